"""What 4 bits cost SmolLM2-135M in nats, by each method of quantizing, before and after LoRA.

    python bench/bench_quality.py --work FOLDER --json
    python bench/quality_page.py --write      # writes docs/quality.md's tables
    python bench/plots.py quality             # draws docs/quality.png

FOLDER keeps what is done, so a run that was stopped goes on: the bases, what they score on the held-out texts
(quality_texts.py names them), and the fine-tuning runs (quality_runs.py). In all about an hour and a half on two cores
that do nothing else. The 16-bit model is the reference, in bf16; the gap is what plain rounding with double
quantization (`rtn`) loses against it, paired row by row. `wmse` is calibrated on the first 16 windows of 512 tokens,
`gptq` on all 128; no text that is measured on is calibrated on. `match`: the 4-bit model's loss on the first
rows is that of transformers' own code in fp32 with the decoded weights, to 0.5 %; for fine-tuning, that the runs of a
seed began with the same loss at both rates and scored the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from common import add_json, birth_in, machine, rounded, write_json
from quality_runs import ALPHA, EVALUATED, EVALUATED_ROWS, LENGTH, RANK, RATES, ROWS, SEEDS, STEPS, as_rows, load
from quality_texts import CALIBRATION_ROWS, Windows, calibration, held_out

REFERENCE, BASELINE = "bf16", "rtn"
METHODS = {"rtn": 0, "wmse": 16, "gptq": CALIBRATION_ROWS}  # and rows of calibration text
LEARNING = ("bf16", "rtn", "wmse", "gptq")
CLOSED_BARS = {"wmse": {"A": 0.50, "B": 0.45}, "gptq": {"A": 0.75, "B": 0.65}}
LEARNED_BAR = 0.5  # of plain rounding's end gap, averaged over seeds and rates
CHECKED_ROWS, TOLERANCE = 2, 5e-3


def make_base(folder: Path, ids: torch.Tensor) -> None:
    """Write one base."""
    import qlora_native as qn
    from qlora_native.models.load import load_dense
    from qlora_native.tool.cli.demo import model_file

    if folder.name == REFERENCE:
        model = load_dense(model_file())
    else:
        rows = METHODS[folder.name]
        model = qn.load_model(model_file(), method=folder.name, calibration=ids[:rows] if rows else None)
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    partial.rename(folder)


def matches(model: Any, base: Path, ids: torch.Tensor) -> bool:
    """Whether transformers' own code with the same weights, decoded and in fp32, has the same loss."""
    from transformers import AutoModelForCausalLM

    from qlora_native import reference
    from qlora_native.nn import QuantizedLinear
    from qlora_native.tool.evaluate.measure import measure

    twin: Any = AutoModelForCausalLM.from_pretrained(base.with_name(REFERENCE), dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                decoded = reference.dequantize(torch.bfloat16, *module.quantized.op_args())
                twin.get_submodule(name).weight.data.copy_(decoded)
        expected = float(twin(input_ids=ids, labels=ids).loss)
    found = measure(model, as_rows(ids), 0)[0].loss[0]
    return abs(found - expected) <= TOLERANCE * expected


def score(work: Path, names: list[str], texts: dict[str, Windows]) -> dict[str, dict[str, Any]]:
    """What each base makes of each text, from FOLDER/scores or measured now; row by row."""
    from tempfile import TemporaryDirectory

    from qlora_native.tool.evaluate.measure import Reference, measure

    folder = work / "scores"
    folder.mkdir(exist_ok=True)
    missing = [name for name in names if not (folder / f"{name}.json").exists()]
    if missing:
        kept: dict[str, Reference] = {}
        with TemporaryDirectory() as scratch:
            for name in dict.fromkeys([REFERENCE, *missing]):
                model: Any = load(work / name)
                result: dict[str, Any] = {"match": True}
                for text, windows in texts.items():
                    keep_in = Path(scratch) if name == REFERENCE else None
                    scores, reference = measure(model, as_rows(windows.ids), 0, against=kept.get(text), keep_in=keep_in)
                    if reference is not None:
                        kept[text] = reference
                    found = {"nats": scores.nats, "tokens": scores.tokens, "kl": scores.kl, "agreed": scores.agreed}
                    result[text] = {key: value.tolist() for key, value in found.items() if value is not None}
                    print(name, text, f"{scores.loss[0]:.4f}", flush=True)
                if name != REFERENCE:
                    result["match"] = matches(model, work / name, texts["A"].ids[:CHECKED_ROWS])
                (folder / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def method_rows(scored: dict[str, dict[str, Any]], texts: dict[str, Windows]) -> list[dict[str, Any]]:
    """A row of the result for each base: figures with standard errors, and the bars on the share of the gap closed."""
    from qlora_native.tool.evaluate.measure import Scores

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
                row["bars"].append(
                    _bar(f"of the gap closed on {text}", CLOSED_BARS[name][text], figures["closed"][0], True)
                )
        rows.append(row)
    return rows


def learning_rows(work: Path) -> list[dict[str, Any]]:
    """A row for each base that learned: end losses and gaps to the 16-bit base's run of the same seed and rate."""
    from qlora_native.tool.evaluate.measure import Scores

    found: dict[tuple[str, float, int], dict[str, Any]] = {}
    for path in sorted((work / "runs").glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        found[run["base"], run["lr"], run["seed"]] = run
    pairs = [key for key in itertools.product(RATES, SEEDS) if all((base, *key) in found for base in LEARNING)]

    def scores(base: str, key: tuple[float, int], text: str) -> Scores:
        run = found[base, key[0], key[1]][text]
        return Scores(torch.tensor(run["tokens"]).double(), torch.tensor(run["nats"]).double())

    def gap(base: str, text: str) -> float:
        return mean(scores(base, key, text).excess(scores(REFERENCE, key, text))[0] for key in pairs)

    rows: list[dict[str, Any]] = []
    for base in LEARNING if pairs else ():
        row: dict[str, Any] = {"kind": "lora", "base": base, "bars": [], "texts": {}, "runs": len(pairs)}
        starts: dict[int, set[float]] = {}
        for rate, seed in pairs:
            starts.setdefault(seed, set()).add(found[base, rate, seed]["train_loss"][0])
        row["match"] = all(len(losses) == 1 for losses in starts.values()) and all(
            found[base, rate, seed][text]["tokens"] == found[REFERENCE, rate, seed][text]["tokens"]
            for rate, seed in pairs
            for text in EVALUATED
        )
        for text in EVALUATED:
            figures: dict[str, Any] = {"loss": rounded([mean(scores(base, key, text).loss[0] for key in pairs)])[0]}
            if base != REFERENCE:
                gaps: dict[float, list[float]] = {rate: [] for rate in RATES}
                for rate, seed in pairs:
                    one = (rate, seed)
                    gaps[rate].append(scores(base, one, text).excess(scores(REFERENCE, one, text))[0])
                figures["gap"] = rounded([gap(base, text)])[0]
                figures["gaps"] = {f"{rate:g}": rounded(values) for rate, values in gaps.items()}
            row["texts"][text] = figures
            if base not in (REFERENCE, BASELINE):
                share = gap(base, text) / gap(BASELINE, text)
                row["bars"].append(_bar(f"of plain rounding's end gap on {text}", LEARNED_BAR, share, False))
        rows.append(row)
    return rows


def _bar(measure: str, limit: float, value: float, at_least: bool) -> dict[str, Any]:
    met = value >= limit if at_least else value <= limit
    return {
        "rival": BASELINE,
        "measure": measure,
        "bar": limit,
        "at_least": at_least,
        "value": rounded([value])[0],
        "met": met,
    }


def main() -> None:
    """Make what is missing, then put it together."""
    from qlora_native.tool.cli.demo import model_file
    from qlora_native.weights.open import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="what is done is kept here")
    parser.add_argument("--no-learn", action="store_true", help="make no fine-tuning run; take those that are there")
    add_json(parser)
    arguments = parser.parse_args()
    work: Path = arguments.work
    born = birth_in(work)
    tokenizer = load_tokenizer(str(model_file()))
    texts, learned = held_out(tokenizer), calibration(tokenizer)
    names = [REFERENCE, *METHODS]
    for name in names:
        if not (work / name).exists():
            print(f"making {name}", flush=True)
            make_base(work / name, learned.ids)
    scored = score(work, names, texts)
    if not arguments.no_learn:
        command = [sys.executable, str(Path(__file__).with_name("quality_runs.py")), "--work", str(work), *LEARNING]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        workers = [subprocess.Popen(command, env=one_thread) for _ in range(os.cpu_count() or 1)]
        if any(worker.wait() for worker in workers):
            raise SystemExit("a fine-tuning run failed; what is done is kept")
    result: dict[str, Any] = {"bench": "quality", "birth": born, "machine": machine()}
    named = {**texts, "calibration": learned}
    result["texts"] = {
        name: {"about": text.about, "rows": len(text.ids), "length": text.ids.shape[1], "sha256": text.sha256}
        for name, text in named.items()
    }
    result["lora"] = {"steps": STEPS, "rows": ROWS, "length": LENGTH, "r": RANK, "alpha": ALPHA}
    result["lora"] |= {"rates": RATES, "seeds": SEEDS, "evaluated_rows": EVALUATED_ROWS}
    result["rows"] = method_rows(scored, texts) + learning_rows(work)
    for row in result["rows"]:
        for bar in row["bars"]:
            print(row["kind"], row["base"], bar["measure"], bar["value"], "met" if bar["met"] else "MISSED")
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
