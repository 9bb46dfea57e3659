"""Real models from their GGUF files, Gemma 3 270M and Qwen2.5-Coder 0.5B and 1.5B, against PEFT and llama.cpp.

    python bench/bench_real.py --json
    python bench/bench_real.py --models 0.5b --parts train --steps 4

The models are those of `qlora demo --model`, downloaded once. Ours trains on the file's own weights, or on NF4 where
they cannot be kept; the peer is transformers + PEFT on the same weights decoded to bf16 (fp32 on a CPU without a dot
product for bf16), with sdpa and a malloc that keeps its memory. Both start from the same adapter of rank 16 on every
linear layer and see the same batches. Each side is a process; the parent lets them take turns, one step each.

`train`: steps of 4 x 256 tokens, all trained, with and without checkpointing, the peer's adapters in the dtype of its
weights. Peak memory is a process's, from the end of its loading on, file pages in memory included; `match`: whether our
first loss is that of transformers' code in fp32 on the decoded weights, to 0.5 %.
`learn`: 100 steps of the demo's task, adapters in fp32 on both sides, and the held-out loss before and after; `match`:
whether it was that of the peer before the first step, to 0.5 %.
`generate`: greedy tokens after a prompt, end of text not heeded, with and without the adapter, and llama.cpp on the
same file; seconds include the prompt. `match`: whether our tokens are the peer's, or part from them first where the
peer itself nearly wavers.

A run of some rows leaves the others of its class in the stored result. With `--work` a row that was measured with this
code (`births.PATHS`) and these settings is taken from there, so that a run that was killed goes on.

Takes about 80 minutes on two cores with AMX: 45 for 1.5b, 18 for 0.5b, 17 for gemma-270m.
Needs 5 GB of disk and, without checkpointing for 1.5b, 12 GB of memory; needs the extra `bench`, and xllamacpp for its
rows.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import births
import isa_env  # noqa: F401  (before torch)
import torch
from bench_generate import NEAR_TIE, first_difference
from bench_train import LOSS_TOLERANCE, TUNED_MALLOC, WARM_UP
from ceilings import Ceilings, ceilings, floor
from children import Child
from common import (
    Bar,
    add_json,
    birth,
    keep_other_rows,
    line,
    machine,
    peer_dtype,
    quartiles,
    rounded,
    timings,
    write_json,
)
from real_sides import PARTS, generate, prepare, train
from train_sides import LENGTH, RANK, ROWS

from qlora_native.tool.cli.demo_model import model_file

MODELS = ("gemma-270m", "0.5b", "1.5b")
BARS = {"amx": (2.4, 0.45), "avx512_bf16": (1.5, 0.5), "avx2": (1.35, 0.5)}  # of 1.5b with checkpointing
NATS = 0.02  # of the held-out losses
MINUTES = {  # about, on two cores with AMX
    "gemma-270m": {"train": 5, "learn": 9, "generate": 3},
    "0.5b": {"train": 5, "learn": 10, "generate": 3},
    "1.5b": {"train": 10, "learn": 30, "generate": 5},
}


def child(name: str, task: dict[str, Any]) -> Child:
    """The process of one side; the peer's malloc keeps its memory."""
    command = [os.path.abspath(__file__), "--worker", json.dumps({"side": name, **task})]
    return Child(name, command, TUNED_MALLOC if name.startswith("theirs") else None)


def operations(batches: list[dict[str, torch.Tensor]], prepared: dict[str, Any], checkpointing: bool) -> float:
    """Of a step's products but attention's: as bench_train counts them, and the layers' forward once more."""
    tokens = median(int(batch["attention_mask"].sum()) for batch in batches)
    trained = median(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    again = 2 * checkpointing
    of_layers = (4 + again) * prepared["frozen"] + (6 + again) * prepared["adapters"]
    return float(tokens * of_layers + 4 * trained * prepared["head"])


def trained(
    part: str, checkpointing: bool, task: dict[str, Any], prepared: dict[str, Any], measured: Ceilings, bars: bool
) -> dict[str, Any]:
    """Both sides, step by step in turn; a row."""
    batches = torch.load(Path(task["folder"], f"{part}.pt"))["train"]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    sides = {name: child(name, {**task, "part": part, "checkpointing": checkpointing}) for name in ("ours", "theirs")}
    held_out: dict[str, list[float]] = {name: [] for name in sides}

    def evaluate() -> None:
        for name in sides if part == "learn" else ():
            held_out[name].append(sides[name].ask("evaluate")["loss"])

    evaluate()
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for index in range(len(tokens)):
        for name in sorted(sides, reverse=bool(index % 2)):
            steps[name].append(sides[name].ask(f"step {index}"))
    memory = {name: side.ask("memory")["peak_mib"] for name, side in sides.items()}
    evaluate()
    for side in sides.values():
        side.end()

    warm = slice(min(WARM_UP, len(tokens) - 1), None)
    seconds = {name: [step["seconds"] for step in found[warm]] for name, found in steps.items()}
    first, reference = {name: found[0]["loss"] for name, found in steps.items()}, prepared["loss"][part]
    row: dict[str, Any] = {"checkpointing": checkpointing, "steps": len(tokens), "rows": ROWS, "max_length": LENGTH}
    row |= {"rank": RANK, "peer_dtype": str(peer_dtype()).removeprefix("torch."), "kept": prepared["kept"]}
    row["tokens_a_step"] = sum(tokens) / len(tokens)
    row["match"] = abs(first["ours"] - reference) <= LOSS_TOLERANCE * reference
    row["first_loss"] = {"reference": reference, **first}
    speed, share = BARS.get(task["isa"], (0, 0)) if bars else (0, 0)
    row |= timings(seconds, [Bar("theirs", speed, faster=True)] if speed else [])
    least = floor(measured, 0, flops=operations(batches[warm], prepared, checkpointing))
    row |= {"floor_ms": rounded([least], 1e3)[0], "of_floor": rounded([least / median(seconds["ours"])])[0]}
    row["tokens_per_second"] = {
        name: rounded(quartiles([t / s for t, s in zip(tokens[warm], values, strict=True)]))
        for name, values in seconds.items()
    }
    row["peak_rss_mib"] = {name: round(peak) for name, peak in memory.items()}
    row["peak_rss_ratio"] = round(memory["ours"] / memory["theirs"], 3)
    if share:
        verdict = {"rival": "theirs", "measure": "of the peak memory", "bar": share}
        row["bars"].append(verdict | {"value": row["peak_rss_ratio"], "met": row["peak_rss_ratio"] <= share})
    if part == "learn":
        row["held_out_loss"] = held_out
        before = {name: losses[0] for name, losses in held_out.items()}  # the first batch trains some 40 tokens alone
        row["match"] = abs(before["ours"] - before["theirs"]) <= LOSS_TOLERANCE * before["theirs"]
        apart = round(abs(held_out["ours"][-1] - held_out["theirs"][-1]), 4)
        verdict = {"rival": "theirs", "measure": "nats from the held-out loss", "bar": NATS}
        row["bars"].append(verdict | {"value": apart, "met": apart <= NATS})
    return row


def has_llama_cpp() -> bool:
    """Whether its wheel is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


def generated(task: dict[str, Any], prepared: dict[str, Any], count: int, repeats: int) -> dict[str, Any]:
    """All sides in turn; a row."""
    task = {**task, "part": "generate", "prompt": prepared["prompt"]}
    answers: dict[str, list[dict[str, Any]]] = {}
    agree = {}
    for suffix in ("", "+adapter"):  # one after the other: the peer's weights are in memory once
        names = [name + suffix for name in ("ours", "theirs")]
        if has_llama_cpp() and (not suffix or prepared["kept"]):
            names.append("llama.cpp" + suffix)
        sides = {name: child(name, task) for name in names}
        answers |= {name: [] for name in names}
        for turn in range(repeats + 1):
            for name in names[:: -1 if turn % 2 else 1]:
                answers[name].append(sides[name].ask(f"decode {count}"))
        ours, theirs = (torch.tensor(answers[name][-1]["tokens"]) for name in names[:2])
        at = first_difference(ours, theirs)
        lead = None if at is None else sides["theirs" + suffix].ask(f"lead {at}")["lead"]
        agree["with adapter" if suffix else "base"] = {"first_difference": at, "lead_of_the_peer_there": lead}
        for side in sides.values():
            side.end()
    seconds = {name: [answer["seconds"] for answer in found[1:]] for name, found in answers.items()}
    row: dict[str, Any] = {"kept": prepared["kept"], "prompt_tokens": len(prepared["prompt"]), "new_tokens": count}
    row["match"] = all((found["lead_of_the_peer_there"] or 0) <= NEAR_TIE for found in agree.values())
    row |= {"tokens": agree, "peer_dtype": str(peer_dtype()).removeprefix("torch."), **timings(seconds)}
    row["tokens_per_second"] = {name: rounded(quartiles([count / s for s in v])) for name, v in seconds.items()}
    if "llama.cpp" in answers:
        last = answers["llama.cpp"][-1]
        own = [answer["tokens_per_second"] for answer in answers["llama.cpp"][1:]]
        row["llama_cpp"] = {"without_prompt": rounded(quartiles(own)), "text": last["text"], "system": last["system"]}
    return row


def cached(work: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returned for the same key before, or returns now."""
    file = work / "rows" / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if not file.exists():
        found = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"key": key, **found}), encoding="utf-8")
        partial.replace(file)
    return {name: value for name, value in json.loads(file.read_text(encoding="utf-8")).items() if name != "key"}


def measure(name: str, arguments: argparse.Namespace, work: Path, measured: Ceilings) -> list[dict[str, Any]]:
    """The rows of one model."""
    source, folder, here, born = model_file(name), work / name, machine(), birth()
    steps = {"train": arguments.steps, "learn": arguments.learn_steps}
    code = births.last_change("real") or born["commit"]
    code += f", changed, {time.time()}" * bool(born["changed"])  # which no other run has
    key = {"model": name, "steps": steps, "seed": arguments.seed, "code": code, "isa": here["cpu_isa"]}

    def fresh() -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return prepare(folder, source, steps, arguments.seed)

    prepared = cached(work, key, fresh)
    options = {"lr": arguments.lr, "threads": arguments.threads, "isa": here["cpu_isa"]}
    task = {"folder": str(folder), "source": str(source), **options}
    rows = []
    for part in arguments.parts:
        for checkpointing in arguments.checkpointing if part == "train" else (False,):
            counts = {"new_tokens": arguments.new_tokens, "repeats": arguments.repeats}
            about = {**key, **options, "part": part, "checkpointing": checkpointing, **counts}

            def make(part: str = part, checkpointing: bool = checkpointing) -> dict[str, Any]:
                if part == "generate":
                    return generated(task, prepared, arguments.new_tokens, arguments.repeats)
                bars = part == "train" and name == "1.5b" and checkpointing
                return trained(part, checkpointing, task, prepared, measured, bars)

            rows.append({"model": name, "part": part, **cached(work, about, make)})
            print(line(rows[-1], "model", "part", "checkpointing"), rows[-1]["tokens_per_second"], flush=True)
            print(
                "   ", *(f"{n} {rows[-1][n]}" for n in ("peak_rss_mib", "held_out_loss") if n in rows[-1]), flush=True
            )
    return rows


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "generate"), default=(*PARTS, "generate"))
    parser.add_argument(
        "--checkpointing", nargs="+", type=json.loads, metavar="true|false", default=[True, False], help="of train"
    )
    parser.add_argument("--steps", type=int, default=9, help=f"of train, {WARM_UP} of them to warm up")
    parser.add_argument("--learn-steps", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="of generate")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="folder for the 16-bit models and finished rows (default: temporary)")
    add_json(parser)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads if arguments.worker is None else arguments.worker["threads"])
    torch.manual_seed(0)
    if arguments.worker is not None:
        task = arguments.worker
        folder, source = Path(task["folder"]), Path(task["source"])
        if task["part"] == "generate":
            generate(task["side"], folder, source, task["prompt"], task["threads"])
        else:
            train(task["side"], task["part"], folder, source, task["checkpointing"], task["lr"])
        return
    minutes = sum(MINUTES[name][part] for name in arguments.models for part in arguments.parts)
    print(f"about {minutes} minutes on two cores with AMX, with the steps that are the default", flush=True)
    result: dict[str, Any] = {"bench": "real", "machine": machine(), "ceilings": ceilings(), "rows": []}
    result["setting"] = {"lr": arguments.lr, "seed": arguments.seed}
    print(json.dumps(result["machine"]), json.dumps(result["ceilings"]), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for model in arguments.models:
            result["rows"] += measure(model, arguments, arguments.work or Path(name), result["ceilings"])
    keep_other_rows(arguments.json, result, ("model", "part", "checkpointing"))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
