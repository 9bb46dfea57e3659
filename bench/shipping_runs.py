"""The runs of bench_shipping: adapters trained with and without ``lora.ship`` over one 4-bit base, and their merges.

A run is named TEXT-SETTING-SEED; its scores are files in FOLDER/runs, one for what was trained and one for each merge,
and what has one is not made again. The run with ``lora.ship`` continues the one without it from its last step, where it
begins to differ.
"""

from __future__ import annotations

import itertools
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import isa_env  # noqa: F401  (before torch)
from common import kept
from peer_models import tokenizer
from quality_texts import topics

import qlora_native as qn
from qlora_native._memory import keep_freed_memory
from qlora_native.data.template import padding_id
from qlora_native.lora import load_adapter
from qlora_native.models.load import load_dense
from qlora_native.tool.cli.demo import MAX_CHARACTERS, model_file
from qlora_native.tool.cli.main import main as qlora
from qlora_native.tool.cli.standard_library import is_held_out, write_split
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.evaluate.measure import measure
from qlora_native.tool.evaluate.texts import load_text
from qlora_native.tool.rows import load_rows
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
    held_out: Any = load_rows(settings, tokenizer)[1]
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
