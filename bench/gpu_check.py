"""What only a machine with an NVIDIA GPU can show; bench/gpu_check.sh builds the library and runs this.

    python bench/gpu_check.py                     every part, in order of importance, within GPU_CHECK_SECONDS
    python bench/gpu_check.py part 2              one part: at most 9 minutes, the build of part 1 included
    python bench/gpu_check.py basics step_8b      these groups
    python bench/gpu_check.py --dry-run [...]     tiny shapes on the CPU; with --emulated FOLDER by the emulated kernels

A group is a process, so that a crash costs that group alone. Its record is a file of JSON lines in build/gpu_check; a
group that dies before its time is started again behind the row at which it died, at most twice. $OUT/gpu_check.json has
the rows of all records that are there, and is written anew after each group. The exit status is 1 if a group failed or
a row has no match.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise
from operator import or_
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WORK = Path(os.environ.get("GPU_CHECK_WORK", ROOT / "build" / "gpu_check"))
PART_SECONDS = 540
RESTARTS = 2
LEFT_OUT, REFUSED = 77, 75  # exit statuses: cannot run here and has said why; is to go on in a new process


class Group(NamedTuple):
    """``run`` is "module function argument" for Python, or a line of bash."""

    name: str
    part: int
    seconds: int  # at most
    run: str
    is_bash: bool = False


TESTS = """tests/test_ops.py tests/test_*4bit.py tests/test_*_step.py tests/test_gradient_norm.py \
tests/test_linear_cross_entropy.py tests/test_rms_norm.py tests/test_rotary.py tests/test_swiglu.py \
tests/test_causal_attention.py tests/test_cuda_build.py tests/test_paging_cuda.py"""
PRIMITIVES = """command -v nvcc >/dev/null || { echo 'there is no nvcc here'; exit 77; }
nvcc -std=c++20 -arch="sm_$ARCH" --fmad=false --expt-relaxed-constexpr -Icpp -I. -Itests -o "$WORK/primitives" \
tests/conformance/main.cu && "$WORK/primitives" >"$WORK/primitives.txt" &&
"$PYTHON" bench/gpu_primitives.py tests/golden/cuda_primitives.txt "$WORK/primitives.txt" """
# Of our kernels alone, where the tool can choose. torch's cache of memory would hide small overruns.
SANITIZER = """sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) ||
{ echo 'there is no compute-sanitizer here'; exit 77; }
ours=(); "$sanitizer" --help | grep -q -- --kernel-regex && ours=(--kernel-regex kns=qlora_native)
rm -f "$WORK/sanitized.jsonl"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 GPU_CHECK_GROUP=sanitized
"$sanitizer" --tool %s --error-exitcode 3 "${ours[@]}" "$PYTHON" bench/gpu_check.py --child basics --seconds 600"""

GROUPS = (
    Group("basics", 1, 90, "gpu_basics run"),
    Group("primitives", 1, 60, PRIMITIVES, is_bash=True),
    Group("products_many", 1, 150, "gpu_products run many"),
    Group("step_8b", 1, 100, "gpu_models run 8B"),
    Group("passes", 1, 60, "gpu_passes run_passes"),
    Group("products_few", 2, 180, "gpu_products run few"),
    Group("norms", 2, 40, "gpu_passes run_norms"),
    Group("loss", 2, 40, "gpu_passes run_loss"),
    Group("host", 2, 40, "gpu_passes run_host"),
    Group("paging", 2, 40, "gpu_paging run"),
    Group("tests", 2, 180, f'"$PYTHON" -c "import pytest" || exit 77; "$PYTHON" -m pytest {TESTS} '
          '-k "cuda or on_device or the_device" --continue-on-collection-errors -q', is_bash=True),
    Group("step_dense", 3, 90, "gpu_models run_rival dense"),
    Group("step_bitsandbytes", 3, 90, "gpu_models run_rival bitsandbytes"),
    Group("step_unsloth", 3, 120, "gpu_models run_rival unsloth"),
    Group("step_dense_compiled", 3, 150, "gpu_models run_rival dense_compiled"),
    Group("step_torchao", 3, 90, "gpu_models run_rival torchao"),
    Group("step_70b", 4, 150, "gpu_models run 70B"),
    Group("streamed", 4, 100, "gpu_streamed run"),
    Group("memcheck", 4, 90, SANITIZER % "memcheck", is_bash=True),
    Group("racecheck", 4, 90, SANITIZER % "racecheck", is_bash=True),
    Group("synccheck", 4, 60, SANITIZER % "synccheck", is_bash=True),
    Group("products_variants", 5, 120, "gpu_products run variants"),
    Group("products_long", 5, 150, "gpu_products run long"),
    Group("products_70b", 5, 240, "gpu_products run 70b"),
)  # fmt: skip
BY_NAME = {group.name: group for group in GROUPS}


# ---------------------------------------------------------------------------------------------------------------------
# The process of a group


@contextlib.contextmanager
def emulated_kernels(folder: str | None) -> Iterator[None]:
    """The ops' CUDA branch on CPU tensors (tests/emulated.py), if a folder with that module is named."""
    if folder is None:
        yield
        return
    sys.path.insert(0, str(ROOT / "tests"))
    import emulated
    import pytest

    module = emulated.load(folder)
    if module is None:
        raise SystemExit(f"gpu_check: {folder} holds no _cuda_emulated module")
    with pytest.MonkeyPatch.context() as patch, emulated.kernels(module, patch):
        yield


def run_python(group: Group, context: Any) -> None:
    """Runs a Python group in this process."""
    module, function, *arguments = group.run.split()
    getattr(importlib.import_module(module), function)(context, *(a.replace("_", " ") for a in arguments))


def child(name: str, seconds: float, dry: bool, emulated_in: str | None) -> None:
    """Runs a Python group, with its record appended to its file."""
    os.environ.setdefault("GPU_CHECK_GROUP", name)
    import torch
    from gpu_timing import Context, Restart, card

    torch.manual_seed(0)
    own = os.environ["GPU_CHECK_GROUP"]  # under a sanitizer not the group's
    context = Context(WORK / f"{own}.jsonl", seconds, dry)
    context.note("card", card())
    with emulated_kernels(emulated_in):
        try:
            run_python(BY_NAME[name], context)
        except Restart:
            raise SystemExit(REFUSED) from None


# ---------------------------------------------------------------------------------------------------------------------
# The process that starts the groups; it loads neither torch nor the library


SENSORS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
    "throttle": "clocks_throttle_reasons.active",
}


class Sampler:
    """nvidia-smi's readings, twice a second, into a file; it changes nothing."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.process: subprocess.Popen[bytes] | None = None
        if shutil.which("nvidia-smi"):
            query = ",".join(["timestamp", *SENSORS.values()])
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-lms", "500", "-i", "0"]
            with file.open("wb") as out:
                self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)

    def stop(self) -> list[tuple[float, dict[str, str]]]:
        """Ends it; what was read, by time."""
        if self.process is None:
            return []
        self.process.terminate()
        self.process.wait()
        return readings(self.file.read_text(encoding="utf-8"))


def readings(text: str) -> list[tuple[float, dict[str, str]]]:
    """Lines of nvidia-smi: time in seconds since 1970, and each sensor's text."""
    found = []
    for cells in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(cells) == 1 + len(SENSORS):  # the last line may be cut off
            moment, _, fraction = cells[0].partition(".")
            seconds = time.mktime(time.strptime(moment, "%Y/%m/%d %H:%M:%S")) + float(f"0.{fraction or 0}")
            found.append((seconds, dict(zip(SENSORS, cells[1:], strict=True))))
    return found


def summary(samples: Sequence[tuple[float, dict[str, str]]], start: float, end: float) -> dict[str, Any]:
    """Median, least and largest of each sensor between two times, and all reasons for lower clocks, as a bit mask."""
    inside = [values for moment, values in samples if start - 0.5 <= moment <= end + 0.5]
    found: dict[str, Any] = {}
    for name in SENSORS:
        texts = [values[name] for values in inside]
        if name == "throttle":
            masks = [int(text, 16) for text in texts if text.startswith("0x")]
            found |= {name: hex(reduce(or_, masks))} if masks else {}
            continue
        numbers = [float(text) for text in texts if text.replace(".", "", 1).isdigit()]
        found |= {name: [median(numbers), min(numbers), max(numbers)]} if numbers else {}
    return found


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a record; a line that a crash cut off is left out."""
    found = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def run_once(command: Sequence[str], seconds: float, env: dict[str, str], log: Path) -> tuple[str, str]:
    """The state in which a command ends, and its last words; it is killed with all that it started, also when this
    process is ended. It gets no process session of its own, in which it could outlive the command that started it."""
    with log.open("ab+") as out:
        start = out.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=os.setpgrp
        )
        state = ""
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status, state = 0, f"cut off after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(start)
        words = out.read().decode("utf-8", "replace")
    sys.stdout.write(words)
    said = [line for line in words.splitlines() if line.strip()]
    last = next((line for line in said if "Fatal Python error" in line), said[-1] if said else "")[:300]
    if status < 0:
        state = f"ended by {signal.Signals(-status).name}"
    elif status in (LEFT_OUT, REFUSED):
        state = "left out" if status == LEFT_OUT else "refused"
    elif status:
        state = f"ended with status {status}"
    return state or "ok", last


def run_group(group: Group, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a group to its end, with restarts; its entry in the result, which is also the last line of its record."""
    file = WORK / f"{group.name}.jsonl"
    file.unlink(missing_ok=True)
    env = os.environ | {"GPU_CHECK_GROUP": group.name, "GPU_CHECK_WORK": str(WORK), "WORK": str(WORK)}
    env |= {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    env |= {"ARCH": arguments.arch, "CUDA_MODULE_LOADING": "LAZY"}
    if arguments.dry_run:  # beside other programs
        env |= {"OMP_NUM_THREADS": "1"}
    sampler = Sampler(WORK / "sensors.csv")
    began, end = time.time(), time.monotonic() + seconds
    died: list[tuple[str, str]] = []
    while True:
        left = end - time.monotonic()
        command = ["bash", "-c", group.run]
        if not group.is_bash:
            command = [sys.executable, __file__, "--child", group.name, "--seconds", f"{max(0.0, left - 10):.0f}"]
            command += ["--dry-run"] * arguments.dry_run
            command += ["--emulated", arguments.emulated] if arguments.emulated else []
        before = len(read(file))
        state, words = run_once(command, left, env, WORK / f"{group.name}.log")
        new = read(file)[before:]
        if state not in ("ok", "left out", "refused"):
            died.append((state, words))
        gone_on = any("begun" in record for record in new)
        if state in ("ok", "left out") or state.startswith("cut off") or not gone_on or len(died) > RESTARTS:
            break
        print(f"{group.name}: {state}; it goes on in a new process", flush=True)
    if died:
        state, words = died[0][0] + (f" ({len(died)} times)" if len(died) > 1 else ""), died[0][1]
    found: dict[str, Any] = {"group": group.name, "state": state, "words": words if state != "ok" else ""}
    samples = sampler.stop()
    found |= {"seconds": round(time.time() - began, 1), "clocks": summary(samples, began, time.time())}
    made = read(file)
    for record in made:
        if "at" in record:
            record["clocks"] = summary(samples, *record["at"])
    file.write_text("".join(json.dumps(record) + "\n" for record in [*made, found]), encoding="utf-8")
    return found


def result() -> dict[str, Any]:
    """All records that are there, as one result."""
    from common import birth  # brings torch, which groups load in processes of their own

    found: dict[str, Any] = {
        "bench": "gpu_check",
        "birth": birth(),
        "card": {},
        "ceilings": {},
        "groups": {},
        "rows": [],
    }
    for group in GROUPS:
        records = read(WORK / f"{group.name}.jsonl")
        entry = next((record for record in reversed(records) if "group" in record), None)
        if entry is None:
            continue
        notes = [record for record in records if "note" in record]
        for key in ("left_out", "absent"):
            values = list(dict.fromkeys(note["value"] for note in notes if note["note"] == key))
            entry |= {key: values} if values else {}
        begun = [record["begun"] for record in records if "begun" in record]
        rows = [record for record in records if "row" in record]
        ended = {row["row"] for row in rows}
        rows += [{"row": name, "error": "the process ended in this row"} for name in begun if name not in ended]
        found["rows"] += [{"group": group.name, **row} for row in {row["row"]: row for row in rows}.values()]
        found["groups"][group.name] = {key: value for key, value in entry.items() if key != "group"}
        found["card"] = next((note["value"] for note in notes if note["note"] == "card"), found["card"])
        rates = [note["value"] for note in notes if note["note"] == "ceilings"]
        found["ceilings"] |= {group.name: rates[-1]} if rates else {}
    return found


def problems(found: dict[str, Any], names: Sequence[str]) -> list[str]:
    """One sentence for each group that failed, and each of its rows that failed or has no match."""
    said = [
        f"{name}: {entry['state']}: {entry['words']}"
        for name, entry in found["groups"].items()
        if name in names and entry["state"] not in ("ok", "left out")
    ]
    for row in found["rows"]:
        if row["group"] in names and ("error" in row or not row["match"]):
            said.append(f"{row['group']}: {row['row']}: {row.get('error', 'NO MATCH')}")
    return said


def show_predictions() -> None:
    """Measured against predicted (bench/gpu_model.py), for a card that the model has; the worst come first."""
    from gpu_page import compared, predictions

    for row, measured, guess in compared(result(), predictions()):
        print(f"{measured / guess:6.2f} x predicted: {measured:.4g} ms, not {guess:.4g}: {row}")


def chosen(words: Sequence[str], dry: bool) -> list[Group]:
    """The groups that the command line names; a dry run has no bash groups."""
    parts = [int(b) for a, b in pairwise(words) if a == "part"]
    names = [word for word in words if word != "part" and not word.isdigit()]
    unknown = [name for name in names if name not in BY_NAME]
    if unknown or any(part not in {group.part for group in GROUPS} for part in parts):
        wrong = " ".join(unknown or map(str, parts))
        raise SystemExit(f"gpu_check: no group or part is named {wrong}: expected one of {', '.join(BY_NAME)}")
    groups = [group for group in GROUPS if not words or group.part in parts or group.name in names]
    return [group for group in groups if not (dry and group.is_bash)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "words", nargs="*", metavar="part N | GROUP", help="what to run, everything if nothing is named"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--emulated", metavar="FOLDER", help="of a dry run: of the module over the emulated device")
    parser.add_argument("--limit", metavar="GROUP=SECONDS,...", default="", help="in place of the groups' own limits")
    parser.add_argument("--arch", default="", help="compute capability without the dot")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1e9, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        child(arguments.child, arguments.seconds, arguments.dry_run, arguments.emulated)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    groups = chosen(arguments.words, arguments.dry_run)
    end = time.monotonic() + float(os.environ.get("GPU_CHECK_SECONDS", PART_SECONDS))
    file = Path(os.environ.get("OUT", WORK)) / "gpu_check.json"
    limits = dict(pair.split("=") for pair in arguments.limit.split(",") if pair)
    for group in groups:
        own = group.seconds * (10 if arguments.dry_run else 1)
        left = min(float(limits.get(group.name, own)), end - time.monotonic())
        print(f"\n===== {group.name} =====", flush=True)
        if left < 5:
            print("left out: no time left")
            continue
        entry = run_group(group, left, arguments)
        print(f"----- {group.name}: {entry['state']} after {entry['seconds']} s", flush=True)
        file.write_text(json.dumps(result() | {"dry_run": arguments.dry_run}, indent=1) + "\n", encoding="utf-8")
    show_predictions()
    said = problems(result(), [group.name for group in groups])
    print("", *said, f"{len(groups)} groups, {len(said)} problems; see {file}", sep="\n")
    raise SystemExit(1 if said else 0)


if __name__ == "__main__":
    main()
