"""Measure again all that fits this CPU class in one sitting, in order of worth, and rewrite the pages.

    bash bench/measure.sh --minutes 60            stops before the first bench that would take longer
    bash bench/measure.sh --classes               also as a CPU of each smaller class (bench/isa_env.py)
    bash bench/measure.sh --only train linear

A result that is there for the code that is checked out, with the versions that are installed, is not measured again, so
the same line continues a sitting that was stopped. Commit first: what differs from its commit is measured every time.
It says at the end what it left out, and why. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import births
import common
import isa_env
from pages import CLASSES, RESULTS, ROOT

import qlora_native as qn
from qlora_native._memory import free_memory

GIB = 1 << 30
CGROUPS = Path("/sys/fs/cgroup/memory")
LIMITED = ("avx512_bf16", "avx2")  # classes that a larger CPU can stand for


class Job(NamedTuple):
    """A bench: its results' name, its command, about how long it takes, and what it needs."""

    name: str
    command: str  # STATE: a folder that stays
    minutes: int
    packages: tuple[str, ...] = ()
    disk_gib: int = 0
    memory_gib: int = 4
    each_class: bool = True  # whether the figures depend on the instructions
    cgroups: bool = False


PEFT, BNB = ("peft",), ("peft", "bitsandbytes")
JOBS = (
    Job("train", "bench_train.py", 5, BNB),
    Job("real", "bench_real.py", 40, PEFT, 8, 8),
    Job("start", "bench_start.py", 30, (), 6),
    Job("generate", "bench_generate.py", 3, ("bitsandbytes",)),
    Job("linear", "bench_linear.py", 8, ("bitsandbytes",)),
    Job("experts", "bench_experts.py", 2),
    Job("quantize", "bench_quantize.py", 1, ("bitsandbytes",)),
    Job("optim", "bench_optim.py", 3, ("bitsandbytes",)),
    Job("gguf", "bench_gguf.py", 8),
    Job("paged", "bench_paged.py --page-dir STATE", 8, ("bitsandbytes",), 8, 6),
    Job("paged_learn", "bench_paged.py --learn 30 --page-dir STATE", 4, (), 4, each_class=False),
    Job("packing", "bench_packing.py", 4),
    Job("switch", "bench_switch.py", 6, BNB),
    Job("busy", "bench_busy.py", 30, each_class=False),
    Job("preference", "bench_preference.py", 8, ("trl",), each_class=False),
    Job("estimate", "bench_estimate.py", 12, each_class=False),
    Job("residency", "bench_residency.py STATE/8B --limits 4 2.5", 60, (), 14, 10, False, cgroups=True),
    Job("shipping", "bench_shipping.py --work STATE/shipping", 80, (), 6, 4, False),
    Job("quality", "bench_quality.py --work STATE/quality", 100, (), 4, 4, False),
)
PAGES = (
    "readme.py --write",
    *(f"{name}_page.py --write" for name in ("any_file", "memory", "quality", "shipping")),
    "plots.py",
)


def is_done(job: Job, cpu: str) -> bool:
    """Whether a result of this code, with these versions, is there."""
    file = RESULTS / f"{job.name}-{cpu}.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    born = result.get("birth", {})
    if not births.is_born(result) or born.get("backfilled") or born["changed"]:
        return False
    return born["versions"] == common.birth()["versions"] and not births.is_old(job.name, result)


def obstacle(job: Job, state: Path, memory: int) -> str:
    """Why a bench cannot run here; "" if it can."""
    missing = [name for name in job.packages if importlib.util.find_spec(name) is None]
    free = shutil.disk_usage(state).free
    if not (ROOT / "bench" / job.command.split()[0]).exists():
        return f"there is no bench/{job.command.split()[0]}"
    if missing:
        return f"no {', '.join(missing)}: pip install '.[bench]' trl"
    if free < job.disk_gib * GIB:
        return f"{free / GIB:.0f} GiB of disk are free, it takes {job.disk_gib}"
    if memory < job.memory_gib * GIB:
        return f"{memory / GIB:.0f} GiB of memory are free, it takes {job.memory_gib}"
    if job.cgroups and not (CGROUPS.is_dir() and os.access(CGROUPS, os.W_OK)):
        return "it takes memory cgroups of version 1, and root"
    return ""


def run(job: Job, cpu: str, state: Path, seconds: float) -> str:
    """Measures; why nothing came of it, or ""."""
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | isa_env.settings(cpu)
    script, *words = job.command.replace("STATE", str(state)).split()
    commands = [[script, *words, "--json", str(RESULTS / f"{job.name}-{cpu or own_class()}.json")]]
    if job.cgroups and not (state / "8B").exists():
        commands.insert(0, ["four_bit_folder.py", "8B", str(state / "8B")])
    end = time.monotonic() + seconds
    for command in commands:
        line = [sys.executable, str(ROOT / "bench" / command[0]), *command[1:]]
        try:
            status = subprocess.run(line, env=env, cwd=ROOT, timeout=end - time.monotonic(), check=False).returncode
        except subprocess.TimeoutExpired:
            return "cut off at the time limit"
        if status:
            return f"{command[0]} ended with status {status}"
    return ""


def own_class() -> str:
    """Of this CPU, or what QLORA_NATIVE_ISA makes of it."""
    return str(qn.build_info()["cpu_isa"])


def measure(chosen: list[tuple[Job, str]], state: Path, minutes: float) -> list[str]:
    """Runs what is missing, one after the other; a sentence for each that was left out.

    Args:
        chosen: benches, each with the class to stand for, "" for this CPU's own.
    """
    end, left_out = time.monotonic() + 60 * minutes, []
    for job, cpu in chosen:
        name = f"{job.name}-{cpu or own_class()}"
        left = end - time.monotonic()
        if is_done(job, cpu or own_class()):
            print(f"{name}: there for this code", flush=True)
            continue
        free = free_memory()
        reason = obstacle(job, state, free.bytes if free else job.memory_gib * GIB)
        if not reason and left < 60 * job.minutes:
            reason = f"it takes about {job.minutes} minutes, {max(0, left) / 60:.0f} are left"
        if not reason:
            print(f"===== {name} =====", flush=True)
            reason = run(job, cpu, state, left)
        if reason:
            left_out.append(f"{name}: {reason}")
    return left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time limit (default: none)")
    parser.add_argument("--classes", action="store_true", help=f"also limited to each of {', '.join(LIMITED)}")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], metavar="NAME", help="these alone")
    parser.add_argument("--state", type=Path, default=ROOT / "build/measure", help="unfinished work is kept here")
    arguments = parser.parse_args()
    arguments.state.mkdir(parents=True, exist_ok=True)
    own = own_class()
    smaller = [cpu for cpu in LIMITED if own in CLASSES[: CLASSES.index(cpu)]] if arguments.classes else []
    jobs = [job for job in JOBS if job.name in (arguments.only or [job.name])]
    chosen = [(job, cpu) for job in jobs for cpu in ["", *smaller][: None if job.each_class else 1]]
    left_out = measure(chosen, arguments.state, arguments.minutes)
    for page in PAGES:
        script, *words = page.split()
        subprocess.run([sys.executable, ROOT / "bench" / script, *words], cwd=ROOT, check=True)
    stored = {file.stem for job in jobs for cpu in CLASSES for file in RESULTS.glob(f"{job.name}-{cpu}.json")}
    hint = "" if arguments.classes else "; --classes limits it"
    others = sorted(stored - {f"{job.name}-{cpu or own}" for job, cpu in chosen})
    left_out += [f"{name}: not measured on a CPU of class {own}{hint}" for name in others]
    print("", *(f"left out: {reason}" for reason in left_out), f"{len(left_out)} left out", sep="\n")


if __name__ == "__main__":
    main()
