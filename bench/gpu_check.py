"""What only a machine with an NVIDIA GPU can show; bench/gpu_check.sh builds the library and runs this.

    python bench/gpu_check.py                     every group without a result, as far as GPU_CHECK_SECONDS (540) allow
    python bench/gpu_check.py basics step_8b      these groups, anew

Groups run in order of worth, each in a process, so that a crash costs that group alone; one that dies goes on in
another behind the row at which it died, as long as it gets further. Its record is a file of JSON lines in
build/gpu_check. $OUT/gpu_check.json has the rows of all records that are there, and is written anew after each group.
The exit status is 1 if a group failed or a row has no match.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import birth
from gpu_timing import AGAIN, Context, card, clocks, on_gpu, read, rows_of, text_of
from pages import ROOT

RESERVE = 10  # seconds before its end in which a group begins no row
GONE_ON = ("ok", "unfinished")  # states of a process that did not fail


class Group(NamedTuple):
    """``run`` is "module function argument"; ``needs`` are packages that are imported before."""

    seconds: int  # at most
    run: str
    needs: str = ""


GROUPS = {
    "basics": Group(90, "gpu_basics run"),
    "capture": Group(40, "gpu_basics run_capture"),
    "paging": Group(40, "gpu_passes run paging"),
    "step_8b": Group(100, "gpu_models run 8B", "transformers"),
    "crossovers": Group(100, "gpu_products run crossovers"),
    "primitives": Group(60, "gpu_basics run_primitives"),
    "tests": Group(180, "gpu_basics run_tests"),
    "passes": Group(60, "gpu_passes run passes"),
    "products_few": Group(180, "gpu_products run few"),
    "products_many": Group(150, "gpu_products run many"),
    "norms": Group(40, "gpu_passes run norms"),
    "loss": Group(40, "gpu_passes run loss"),
    "host": Group(40, "gpu_passes run host"),
    "streamed": Group(100, "gpu_models run_streamed", "transformers"),
    "memcheck": Group(90, "gpu_basics run_sanitizer memcheck"),
    "racecheck": Group(90, "gpu_basics run_sanitizer racecheck"),
    "synccheck": Group(60, "gpu_basics run_sanitizer synccheck"),
    "step_dense": Group(90, "gpu_models run_rival dense", "peft"),
    "step_bitsandbytes": Group(90, "gpu_models run_rival bitsandbytes", "bitsandbytes peft"),
    "step_unsloth": Group(120, "gpu_models run_rival unsloth", "unsloth peft"),
    "step_dense_compiled": Group(150, "gpu_models run_rival dense_compiled", "peft"),
    "step_torchao": Group(90, "gpu_models run_rival torchao", "torchao peft"),
    "step_70b": Group(150, "gpu_models run 70B", "transformers"),
    "products_variants": Group(120, "gpu_products run variants"),
    "products_long": Group(150, "gpu_products run long"),
    "products_70b": Group(240, "gpu_products run 70b"),
}


def child(run: str, needs: str, record: str, seconds: str) -> None:
    """The process of a group, whose record is appended to a file."""
    torch.manual_seed(0)
    context = Context(Path(record), float(seconds))
    context.record(card=card())
    module, function, *arguments = run.split()
    if all(context.importable(name) for name in needs.split()):  # unsloth first: it changes transformers
        getattr(importlib.import_module(module), function)(context, *arguments)


def run_once(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """The state in which a command ends, and its last words; it is killed with all that it started, also when this
    process is ended. It gets no process session of its own, in which it could outlive the command that started it."""
    status: int | None = None
    states: dict[int | None, str] = {0: "ok", AGAIN: "unfinished", None: f"cut off after {seconds:.0f} s"}
    env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=os.setpgrp
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        words = out.read()
    print(words, end="")
    if status is not None and status < 0:
        states[status] = f"ended by {signal.Signals(-status).name}"
    said = ["", *filter(str.strip, words.splitlines())]
    last = next((line for line in said if line.startswith(("Fatal Python error", "Timeout ("))), said[-1])
    return states.get(status, f"ended with status {status}"), last[:300]


def run_group(group: Group, file: Path, seconds: float) -> dict[str, Any]:
    """Runs a group to its end; how it ended, which is also the last line of its record."""
    sensors, began = file.with_name("sensors.csv"), time.monotonic()
    before = len(text_of(sensors))
    ends: list[tuple[str, str]] = []
    goes_on = True
    while goes_on:
        known, left = len(of("row", file)), began + seconds - time.monotonic()
        arguments = [group.run, group.needs, str(file), f"{left - RESERVE:.0f}"]
        ends.append(run_once([sys.executable, __file__, "--child", *arguments], left))
        is_new = len(of("row", file)) > known
        goes_on = ends[-1][0] != "ok" and is_new and time.monotonic() < began + seconds - RESERVE
    state, words = next((each for each in ends if each[0] not in GONE_ON), ends[-1])
    found = {"state": state, "words": "" if state == "ok" else words, "seconds": round(time.monotonic() - began, 1)}
    found["clocks"] = clocks(text_of(sensors)[before:])
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"end": found}) + "\n")
    return found


def of(key: str, file: Path) -> list[Any]:
    """What the lines of a record say under a key."""
    return [record[key] for record in read(file) if key in record]


def has_result(file: Path) -> bool:
    """Whether a group has come to its end; one that ran out of time goes on."""
    return any(end["state"] != "unfinished" for end in of("end", file))


def result(work: Path) -> dict[str, Any]:
    """All records that are there, as one result."""
    found: dict[str, Any] = {"bench": "gpu_check", "birth": birth()}
    found |= {"card": {}, "ceilings": {}, "groups": {}, "rows": []}
    for name in GROUPS:
        file = work / f"{name}.jsonl"
        said = {key: list(dict.fromkeys(of(key, file))) for key in ("left_out", "absent") if of(key, file)}
        for end in of("end", file):
            found["groups"][name] = end | said
        for rates in of("ceilings", file):
            found["ceilings"][name] = rates
        found["card"] = [found["card"], *of("card", file)][-1]
        found["rows"] += [{"group": name, **row} for row in rows_of(read(file)).values()]
    return found


def problems(found: dict[str, Any], names: Sequence[str]) -> list[str]:
    """One sentence for each group that failed, and each of its rows that failed or has no match."""
    groups = [(name, entry) for name, entry in found["groups"].items() if name in names]
    rows = [row for row in found["rows"] if row["group"] in names and not row.get("match")]
    return [
        *(f"{name}: {entry['state']}: {entry['words']}" for name, entry in groups if entry["state"] not in GONE_ON),
        *(f"{row['group']}: {row['row']}: {row.get('error', 'NO MATCH')}" for row in rows),
    ]


def check(work: Path, folder: Path, names: Sequence[str], end: float) -> list[str]:
    """Runs groups until a time, and writes the result to a folder; the problems."""
    out = folder / "gpu_check.json"
    for name in (name for name in GROUPS if name in (names or GROUPS)):
        file = work / f"{name}.jsonl"
        if names:
            file.unlink(missing_ok=True)
        print(f"\n===== {name} =====", flush=True)
        left = min(GROUPS[name].seconds, end - time.monotonic())
        if has_result(file) or left < 2 * RESERVE:
            print("there" if has_result(file) else "left out: no time left, run this again")
        else:
            ended = run_group(GROUPS[name], file, left)
            print(f"----- {name}: {ended['state']} after {ended['seconds']} s", flush=True)
        out.write_text(json.dumps(result(work), indent=1) + "\n", encoding="utf-8")
    said = problems(result(work), names or list(GROUPS))
    print("", *said, f"{len(said)} problems; see {out}", sep="\n")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="what to run anew (default: what has no result)")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    unknown = [name for name in arguments.groups if name not in GROUPS]
    if unknown:
        raise SystemExit(f"gpu_check: no group is named {' '.join(unknown)}: expected one of {', '.join(GROUPS)}")
    if not on_gpu():
        raise SystemExit("gpu_check: there is no NVIDIA GPU here; tests/test_gpu_check.py rehearses it without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    end = time.monotonic() + float(os.environ.get("GPU_CHECK_SECONDS", "540"))
    work = Path(os.environ.get("GPU_CHECK_WORK", ROOT / "build" / "gpu_check"))
    work.mkdir(parents=True, exist_ok=True)
    raise SystemExit(1 if check(work, Path(os.environ.get("OUT", work)), arguments.groups, end) else 0)


if __name__ == "__main__":
    main()
