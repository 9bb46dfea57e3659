"""What is kept of an adapter by models without one: merged to 16 bits, to 4 bits by each method, at the end of a run.

    python bench/bench_shipping.py --work FOLDER --json
    python bench/shipping_page.py --write      # writes docs/shipping.md's tables
    python bench/plots.py shipping             # draws docs/shipping.png

FOLDER keeps what is done, so a run that was stopped goes on. `--no-runs` takes what is there, and of it the seeds that
have all forms. Some 75 minutes on two cores that do nothing else. A process for each text, with one thread each, is the
fastest. The run with ``lora.ship`` continues the one without it from its last step, where it begins to differ.
Retention is that of evaluate/retention.py, against the adapter of the run without ``lora.ship``; losses of the seeds
are added up row by row, so that its error has rows as the sample. `match`: every form of a run scored the same tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from children import all_calls
from common import Bench, birth_in, kept, rounded, verdict
from peer_models import tokenizer
from quality_texts import topics

import qlora_native as qn
from qlora_native._memory import keep_freed_memory
from qlora_native.data.dataset import load_split
from qlora_native.data.template import padding_id
from qlora_native.lora import load_adapter
from qlora_native.models.load import load_dense
from qlora_native.tool.cli.demo import MAX_CHARACTERS, model_file
from qlora_native.tool.cli.main import main as qlora
from qlora_native.tool.cli.standard_library import is_held_out, write_split
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.evaluate.measure import Scores, measure
from qlora_native.tool.evaluate.retention import retention
from qlora_native.tool.evaluate.texts import load_text
from qlora_native.tool.train.loop import Trainer
from qlora_native.weights.open import load_tokenizer

TEXTS, SEEDS = ("docstrings", "reference"), (0, 1, 2)
SETTINGS = {"usual": 5e-4, "light": 1e-5}  # peak learning rates
STEPS, LENGTH = 100, 256
HELD_OUT_ROWS, CHARACTERS = 48, 450
ORIGINAL, BASE = "original", "base-4bit"
CALIBRATION_ROWS = 120
EVALUATED = {"docstrings": 0.015, "reference": 0.05}  # of the training rows, 46 each: for the loss of a run's report
FROM_BASE, TO_NF4 = ["--base", "dequantized"], ["--to", "nf4", "--method"]
MERGES: dict[str, tuple[str, list[str]]] = {  # the model that the adapter is merged into, and options of `qlora merge`
    "gptq-base": (BASE, [*FROM_BASE, *TO_NF4, "gptq", "--calibration"]),
    "gptq-original": (ORIGINAL, [*TO_NF4, "gptq", "--calibration"]),
    "rtn-original": (ORIGINAL, [*TO_NF4, "rtn"]),
    "rtn-base": (BASE, [*FROM_BASE, *TO_NF4, "rtn"]),
    "bf16-original": (ORIGINAL, []),
    "bf16-base": (BASE, FROM_BASE),
}
TRAINED = ("plain", "shipped")  # the adapter beside its base, and the model that `lora.ship` wrote
BARS = {"gptq-original": (1.0, 0.9), "gptq-base": (0.85, 0.6), "shipped": (0.97, 0.9)}  # usual, light
APART_BAR, RAW_BAR = 1e-4, 0.02  # nats a token


def write_texts(work: Path) -> None:
    """``train.jsonl`` and ``heldout.jsonl`` of each text: the demo's task, and pages of the language reference."""
    write_split(work / "docstrings", MAX_CHARACTERS, HELD_OUT_ROWS)
    (work / "reference").mkdir(exist_ok=True)
    parts: dict[bool, list[str]] = {False: [], True: []}
    for number, page in enumerate(topics()):
        parts[is_held_out(f"topic {number}")] += [page[at : at + CHARACTERS] for at in range(0, len(page), CHARACTERS)]
    rest = parts[True]
    parts[True] = [rest[number * len(rest) // HELD_OUT_ROWS] for number in range(HELD_OUT_ROWS)]
    for name, side in (("train", False), ("heldout", True)):
        lines = [json.dumps({"text": part}) for part in parts[side] if part.strip()]
        (work / "reference" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for text in TEXTS:
        lines = (work / text / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        part = lines[:: len(lines) // CALIBRATION_ROWS][:CALIBRATION_ROWS]
        (work / text / "calibration.jsonl").write_text("".join(part), encoding="utf-8")


def write_bases(work: Path) -> None:
    for name, load in ((ORIGINAL, lambda: load_dense(model_file())), (BASE, lambda: qn.load_model(work / ORIGINAL))):
        if not (work / name).exists():
            model: Any = load()
            unfinished = work / f"{name}.partial"
            model.save_pretrained(unfinished)
            tokenizer().save_pretrained(unfinished)
            unfinished.rename(work / name)


def config(work: Path, text: str, setting: str, seed: int, ships: bool) -> Any:
    """A run of `qlora train`, with the settings of the demo."""
    out = work / "trained" / f"{text}-{setting}-{seed}" / ("ship" if ships else "plain")
    data = {"train": f"{work / text}/train.jsonl", "max_length": LENGTH, "eval_fraction": EVALUATED[text]}
    train = {"steps": STEPS, "lr": SETTINGS[setting], "seed": seed, "batch_size": 4, "grad_accum": 1}
    train |= {"grad_checkpointing": False, "eval_every": 0, "save_every": STEPS, "samples": 0}
    lora = {"r": 16, "alpha": 32} | ({"ship": "nf4"} if ships else {})
    values = {"model": str(work / BASE), "output_dir": str(out), "data": data, "lora": lora, "train": train}
    return TrainConfig.model_validate(values | {"resume": "auto"})


def scores(model: Any, work: Path, text: str, tokenizer: Any) -> dict[str, list[float]]:
    """Sums over the tokens of each held-out row."""
    rows = load_text(work / text / "heldout.jsonl", tokenizer, max_length=LENGTH).rows
    found = measure(model, rows, padding_id(tokenizer))[0]
    return {"tokens": found.tokens.tolist(), "nats": found.nats.tolist()}


def train(work: Path, text: str, setting: str, seed: int, tokenizer: Any, ships: bool) -> tuple[Any, dict[str, Any]]:
    """Train an adapter: the settings, and the adapter's scores with the loss that training reports."""
    settings = config(work, text, setting, seed, ships)
    out = Path(settings.output_dir)
    checkpoint = out / f"step-{STEPS:06}"
    if ships and not checkpoint.exists():
        shutil.copytree(out.with_name("plain") / checkpoint.name, checkpoint)
        (checkpoint / "config.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    loss = Trainer(settings, quiet=True).train().loss_after
    model = load_adapter(qn.load_model(work / BASE), out / "adapter")
    return settings, {"loss_after": loss, **scores(model, work, text, tokenizer)}


def make_plain(work: Path, text: str, setting: str, seed: int, tokenizer: Any) -> dict[str, Any]:
    return train(work, text, setting, seed, tokenizer, ships=False)[1]


def make_shipped(work: Path, text: str, setting: str, seed: int, tokenizer: Any) -> dict[str, Any]:
    """Train to the end with ``lora.ship``: the scores of the adapter, and of the file that ships."""
    settings, trained = train(work, text, setting, seed, tokenizer, ships=True)
    model: Any = qn.load_model(Path(settings.output_dir) / "shipped")
    shipped: dict[str, Any] = scores(model, work, text, tokenizer)
    held_out: Any = load_split(tokenizer=tokenizer, **settings.row_options)[1]
    shipped["loss_after"] = Trainer(settings, model=model, tokenizer=tokenizer, quiet=True).evaluate(held_out)
    return {"ship": trained, "shipped": shipped}


def make_merge(work: Path, name: str, form: str, tokenizer: Any) -> dict[str, list[float]]:
    """Merge the adapter of a run, and score what comes out."""
    text, (into, options) = name.split("-")[0], MERGES[form]
    out = work / "merged" / f"{name}-{form}"
    shutil.rmtree(out, ignore_errors=True)
    words = ["merge", work / into, work / "trained" / name / "plain" / "adapter", "--out", out, *options]
    if options[-1:] == ["--calibration"]:
        words.append(work / text / "calibration.jsonl")
    if qlora(list(map(str, words))):
        raise SystemExit(f"{name}: {form} cannot be merged")
    found = scores((qn.load_model if "nf4" in options else load_dense)(out), work, text, tokenizer)
    shutil.rmtree(out)
    return found


def prepare(work: Path) -> None:
    """Write the texts and the bases, where they are missing."""
    if not (work / "reference/heldout.jsonl").exists():
        write_texts(work)
    write_bases(work)


def make_runs(folder: str, text: str) -> None:
    keep_freed_memory()
    work = Path(folder)
    encode = load_tokenizer(str(work / BASE))
    kept(work / "runs" / f"{text}.json", lambda: scores(qn.load_model(work / BASE), work, text, encode))
    for seed, setting in itertools.product(SEEDS, SETTINGS):
        name, run = f"{text}-{setting}-{seed}", (work, text, setting, seed, encode)
        makers = {"plain": partial(make_plain, *run), "trained": partial(make_shipped, *run)}
        makers |= {form: partial(make_merge, work, name, form, encode) for form in MERGES}
        for form, make in makers.items():
            kept(work / "runs" / f"{name}-{form}.json", make)
            print(name, form, flush=True)


def read_runs(work: Path, text: str, setting: str) -> dict[int, dict[str, Any]]:
    """What each seed's forms scored, of seeds that have all of them."""
    found = {}
    for seed in SEEDS:
        name = f"{text}-{setting}-{seed}"
        files = {form: work / "runs" / f"{name}-{form}.json" for form in ("plain", "trained", *MERGES)}
        if all(file.exists() for file in files.values()):
            forms = {form: json.loads(file.read_text(encoding="utf-8")) for form, file in files.items()}
            found[seed] = forms | forms.pop("trained")
    return found


def rows_of(work: Path) -> list[dict[str, Any]]:
    """A row of the result for each setting and form."""
    rows = []
    for number, setting in enumerate(SETTINGS):
        found = {text: read_runs(work, text, setting) for text in TEXTS}
        for form in (*TRAINED, *MERGES):
            row: dict[str, Any] = {"setting": setting, "form": form, "match": True, "bars": [], "texts": {}}
            for text in (text for text, runs in found.items() if runs):
                base = json.loads((work / "runs" / f"{text}.json").read_text(encoding="utf-8"))
                add_text(row, text, found[text], base, BARS[form][number] if form in BARS else None)
            if row["texts"]:
                rows.append(row)
    return rows


def add_text(
    row: dict[str, Any], text: str, runs: dict[int, dict[str, Any]], base: dict[str, Any], limit: float | None
) -> None:
    """What the row's form keeps on a text."""
    form = row["form"]

    def summed(*found: dict[str, Any]) -> Scores:
        tokens, nats = (torch.tensor([one[key] for one in found]).double().sum(0) for key in ("tokens", "nats"))
        return Scores(tokens, nats)

    def retained(*seeds: int) -> dict[str, Any]:
        sides = ([base] * len(seeds), [runs[s]["plain"] for s in seeds], [runs[s][form] for s in seeds])
        return retention(*(summed(*side) for side in sides))

    whole = retained(*runs)
    row["texts"][text] = {
        "retention": rounded([whole["retention"], whole["retention_error"]]),
        "seeds": {seed: rounded([retained(seed)["retention"]])[0] for seed in runs},
        "losses": [round(whole[f"{side}_loss"], 4) for side in ("base", "adapted", "shipped")],
    }
    row["match"] &= all(run[form]["tokens"] == base["tokens"] for run in runs.values())
    bars = []
    if limit is not None:
        bars.append(verdict("", f"retention on {text}", limit, whole["retention"], at_least=True))
    if form == "shipped":
        apart = max(abs(run["shipped"]["loss_after"] - run["ship"]["loss_after"]) for run in runs.values())
        raw = mean(summed(run["ship"]).excess(summed(run["plain"]))[0] for run in runs.values())
        bars.append(verdict("", f"nats from the last evaluation on {text}", APART_BAR, apart))
        bars.append(verdict("", f"nats of the raw adapter on {text}", RAW_BAR, raw))
    row["bars"] += bars


def main() -> None:
    folder = {"type": Path, "required": True, "metavar": "FOLDER", "help": "what is done is kept here"}
    bench = Bench("shipping", __doc__, work=folder, no_runs=False)
    work: Path = bench.options.work
    born = birth_in(work)
    if not bench.options.no_runs:
        prepare(work)
        all_calls(*((make_runs, work, text) for text in TEXTS))
    files = {text: (work / text / "heldout.jsonl").read_bytes() for text in TEXTS}
    texts = {
        text: {"rows": len(held_out.splitlines()), "sha256": hashlib.sha256(held_out).hexdigest()}
        for text, held_out in files.items()
    }
    training = {"steps": STEPS, "rates": SETTINGS, "length": LENGTH, "calibration_rows": CALIBRATION_ROWS}
    bench.begin(birth=born, texts=texts, training=training)
    for row in rows_of(work):
        bench.add(row, "setting", "form", "texts")
    bench.write()


if __name__ == "__main__":
    main()
