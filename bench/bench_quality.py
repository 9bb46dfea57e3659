"""What 4 bits cost SmolLM2-135M in nats, by each method of quantizing, before and after LoRA.

    python bench/bench_quality.py --work FOLDER --json
    python bench/quality_page.py --write      # writes docs/quality.md's tables
    python bench/plots.py quality             # draws docs/quality.png

FOLDER keeps what is done, so a run that was stopped goes on: the bases, what they score on the held-out texts
(quality_texts.py names them), and the fine-tuning runs. In all about an hour and a half on two cores
that do nothing else. The 16-bit model is the reference, in bf16; the gap is what plain rounding with double
quantization (`rtn`) loses against it, paired row by row. `wmse` is calibrated on the first 16 windows of 512 tokens,
`gptq` on all 128; no text that is measured on is calibrated on. `match`: the 4-bit model's loss on the first
rows is that of transformers' own code in fp32 with the decoded weights, to 0.5 %; for fine-tuning, that the runs of a
seed began with the same loss at both rates and scored the same tokens.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import isa_env  # noqa: F401  (before torch)
import numpy as np
import torch
from children import all_calls
from common import Bench, birth_in, kept, rounded, verdict
from peer_models import decode_into, tokenizer
from quality_texts import CALIBRATION_ROWS, Windows, batches, calibration, held_out

import qlora_native as qn
from qlora_native._memory import keep_freed_memory
from qlora_native.models.load import load_dense
from qlora_native.models.loss import causal_lm_loss
from qlora_native.tool.cli.demo import model_file
from qlora_native.tool.evaluate.measure import Reference, Scores, measure
from qlora_native.tool.train.setup import learning_rate

REFERENCE, BASELINE = "bf16", "rtn"
METHODS = {"rtn": 0, "wmse": 16, "gptq": CALIBRATION_ROWS}  # and rows of calibration text
LEARNING = ("bf16", "rtn", "wmse", "gptq")
CLOSED_BARS = {"wmse": {"A": 0.50, "B": 0.45}, "gptq": {"A": 0.75, "B": 0.65}}
LEARNED_BAR = 0.5  # of plain rounding's end gap, averaged over seeds and rates
CHECKED_ROWS, TOLERANCE = 2, 5e-3

# The fine-tuning runs
SEEDS = (0, 1, 2)
RATES = (2e-4, 1e-3)
STEPS, ROWS, LENGTH = 100, 2, 128
RANK, ALPHA = 16, 32
EVALUATED = ("A", "B")
EVALUATED_ROWS = 24


def as_rows(ids: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """Windows [rows, length] as rows in which every token is predicted."""
    return [{"input_ids": row, "labels": row} for row in ids.numpy().astype(np.int32)]


def load(folder: Path) -> Any:
    """A base of the comparison, 16-bit or 4-bit."""
    return load_dense(folder) if folder.name == "bf16" else qn.load_model(folder)


def run(base: Path, rate: float, seed: int, tokenizer: Any) -> dict[str, Any]:
    """One adapter of rank 16 on every linear layer, as `qlora train` makes it: AdamW, clipping, warm-up, cosine."""
    began = time.monotonic()
    model = qn.add_lora(load(base), qn.LoraConfig(r=RANK, alpha=ALPHA, seed=seed)).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = qn.optim.AdamW(parameters, rate, max_norm=1.0)
    losses = []
    for step, ids in enumerate(batches(tokenizer, STEPS, ROWS, LENGTH, seed)):
        loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, peak=rate, warmup=0.05, scheduler="cosine")
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    result: dict[str, Any] = {"base": base.name, "lr": rate, "seed": seed, "train_loss": losses}
    for name, text in held_out(tokenizer).items():
        if name in EVALUATED:
            scores, _ = measure(model, as_rows(text.ids[:EVALUATED_ROWS]), 0)
            result[name] = {"loss": scores.loss[0], "nats": scores.nats.tolist(), "tokens": scores.tokens.tolist()}
    return result | {"seconds": round(time.monotonic() - began, 1)}


def make_part(work: str, bases: list[str], part: int, parts: int) -> None:
    """Makes those of the runs that are missing which fall to one of several processes."""
    keep_freed_memory()
    encode = tokenizer()
    runs = itertools.product(SEEDS, RATES, bases)
    for seed, rate, base in itertools.islice(runs, part, None, parts):
        name = f"{base}-{rate:g}-{seed}"
        found = kept(Path(work, "runs", f"{name}.json"), partial(run, Path(work, base), rate, seed, encode))
        print(name, {text: round(found[text]["loss"], 4) for text in EVALUATED}, found["seconds"], "s", flush=True)


def make_base(folder: Path, ids: torch.Tensor) -> None:
    if folder.name == REFERENCE:
        model = load_dense(model_file())
    else:
        rows = METHODS[folder.name]
        model = qn.load_model(model_file(), method=folder.name, calibration=ids[:rows] if rows else None)
    unfinished = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


def matches(model: Any, base: Path, ids: torch.Tensor) -> bool:
    """Whether transformers' own code with the same weights, decoded and in fp32, has the same loss."""
    from transformers import AutoModelForCausalLM

    twin: Any = AutoModelForCausalLM.from_pretrained(base.with_name(REFERENCE), dtype=torch.float32)
    decode_into(twin, model)
    with torch.no_grad():
        expected = float(twin(input_ids=ids, labels=ids).loss)
    found = measure(model, as_rows(ids), 0)[0].loss[0]
    return abs(found - expected) <= TOLERANCE * expected


def score(work: Path, names: list[str], texts: dict[str, Windows]) -> dict[str, dict[str, Any]]:
    """What each base makes of each text, from FOLDER/scores or measured now; row by row."""
    against: dict[str, Reference] = {}

    def scored(name: str, scratch: Path) -> dict[str, Any]:
        model: Any = load(work / name)
        keep_in = scratch if name == REFERENCE else None
        result: dict[str, Any] = {"match": True}
        for text, windows in texts.items():
            scores, reference = measure(model, as_rows(windows.ids), 0, against=against.get(text), keep_in=keep_in)
            if reference is not None:
                against[text] = reference
            found = {"nats": scores.nats, "tokens": scores.tokens, "kl": scores.kl, "agreed": scores.agreed}
            result[text] = {key: value.tolist() for key, value in found.items() if value is not None}
            print(name, text, f"{scores.loss[0]:.4f}", flush=True)
        if name != REFERENCE:
            result["match"] = matches(model, work / name, texts["A"].ids[:CHECKED_ROWS])
        return result

    files = {name: work / "scores" / f"{name}.json" for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        if not all(file.exists() for file in files.values()):
            files[REFERENCE].unlink(missing_ok=True)  # the others need its logits
        return {name: kept(files[name], partial(scored, name, Path(scratch))) for name in [REFERENCE, *names]}


def method_rows(scored: dict[str, dict[str, Any]], texts: dict[str, Windows]) -> list[dict[str, Any]]:
    """A row of the result for each base: figures with standard errors, and the bars on the share of the gap closed."""

    def scores(name: str, text: str) -> Scores:
        return Scores(**{key: torch.tensor(value, dtype=torch.float64) for key, value in scored[name][text].items()})

    rows = []
    for name, found in scored.items():
        row: dict[str, Any] = {"kind": "method", "base": name, "match": found["match"], "bars": []}
        row["texts"] = {}
        for text in texts:
            mine, best, worst = (scores(which, text) for which in (name, REFERENCE, BASELINE))
            figures: dict[str, Any] = {"loss": rounded(mine.loss), "perplexity": rounded([mine.perplexity])[0]}
            if name != REFERENCE:
                figures["excess"] = rounded(mine.excess(best))
                figures["kl"], figures["same_first"] = rounded(mine.divergence or ()), rounded(mine.agreement or ())
            if name not in (REFERENCE, BASELINE):
                figures["closed"] = rounded(mine.closed(worst, best))
            row["texts"][text] = figures
            if text in CLOSED_BARS.get(name, {}):
                limit, value = CLOSED_BARS[name][text], figures["closed"][0]
                row["bars"].append(verdict(BASELINE, f"of the gap closed on {text}", limit, value, at_least=True))
        rows.append(row)
    return rows


def learning_rows(work: Path) -> list[dict[str, Any]]:
    """A row for each base that learned: end losses and gaps to the 16-bit base's run of the same seed and rate."""
    found: dict[tuple[str, float, int], dict[str, Any]] = {}
    for path in sorted((work / "runs").glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        found[run["base"], run["lr"], run["seed"]] = run
    pairs = [key for key in itertools.product(RATES, SEEDS) if all((base, *key) in found for base in LEARNING)]

    def scores(base: str, text: str) -> list[Scores]:
        runs = (found[base, rate, seed][text] for rate, seed in pairs)
        return [Scores(torch.tensor(run["tokens"]).double(), torch.tensor(run["nats"]).double()) for run in runs]

    def gaps(base: str, text: str) -> list[float]:
        ends = zip(scores(base, text), scores(REFERENCE, text), strict=True)
        return [mine.excess(best)[0] for mine, best in ends]

    rows: list[dict[str, Any]] = []
    for base in LEARNING if pairs else ():
        row: dict[str, Any] = {"kind": "lora", "base": base, "bars": [], "texts": {}, "runs": len(pairs)}
        starts = {(seed, found[base, rate, seed]["train_loss"][0]) for rate, seed in pairs}
        row["match"] = len(starts) == len({seed for _, seed in pairs})
        for text in EVALUATED:
            mine, best = scores(base, text), scores(REFERENCE, text)
            row["match"] &= all(map(torch.equal, *([one.tokens for one in side] for side in (mine, best))))
            figures: dict[str, Any] = {"loss": rounded([mean(one.loss[0] for one in mine)])[0]}
            if base != REFERENCE:
                each = gaps(base, text)
                figures["gap"] = rounded([mean(each)])[0]
                figures["gaps"] = {
                    f"{rate:g}": rounded(gap for gap, pair in zip(each, pairs, strict=True) if pair[0] == rate)
                    for rate in RATES
                }
            row["texts"][text] = figures
            if base not in (REFERENCE, BASELINE):
                share = mean(each) / mean(gaps(BASELINE, text))
                row["bars"].append(verdict(BASELINE, f"of plain rounding's end gap on {text}", LEARNED_BAR, share))
        rows.append(row)
    return rows


def main() -> None:
    folder = {"type": Path, "required": True, "metavar": "FOLDER", "help": "what is done is kept here"}
    bench = Bench("quality", __doc__, work=folder, no_learn=False)  # no fine-tuning run; those that are there count
    work: Path = bench.options.work
    born = birth_in(work)
    texts, learned = held_out(tokenizer()), calibration(tokenizer())
    names = [REFERENCE, *METHODS]
    for name in names:
        if not (work / name).exists():
            print(f"making {name}", flush=True)
            make_base(work / name, learned.ids)
    scored = score(work, names, texts)
    if not bench.options.no_learn:
        processes = os.cpu_count() or 1
        all_calls(*((make_part, work, LEARNING, part, processes) for part in range(processes)))
    described = {
        name: {"about": text.about, "rows": len(text.ids), "length": text.ids.shape[1], "sha256": text.sha256}
        for name, text in {**texts, "calibration": learned}.items()
    }
    setting: dict[str, Any] = {"steps": STEPS, "rows": ROWS, "length": LENGTH, "r": RANK, "alpha": ALPHA}
    setting |= {"rates": RATES, "seeds": SEEDS, "evaluated_rows": EVALUATED_ROWS}
    bench.begin(birth=born, texts=described, lora=setting)
    for row in method_rows(scored, texts) + learning_rows(work):
        bench.add(row, "kind", "base")
    bench.write()


if __name__ == "__main__":
    main()
