"""Measured choices among the plans of the products, kept in one JSON file a card; ``qn.tune`` writes it.

The file of a card is read once a process, when its first plan is asked for, and counts as a whole or not at all: one
that cannot be read, or that another build or card wrote, is ignored, in one sentence.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from qlora_native._cache import cache_folder
from qlora_native._native import DTYPE_NUMBER, build_info
from qlora_native.ops._cuda_kernels import Facts
from qlora_native.ops._library import say_once

FORMAT = 1  # of the file
KINDS = ("gemv", "split_k", "tile", "two_step")  # index = MatmulKind
DTYPES = {number: str(dtype).removeprefix("torch.") for dtype, number in DTYPE_NUMBER.items()}


class Problem(NamedTuple):
    """What a choice is looked up by. ``m`` is a bucket of token counts (tokens_bucket of cuda/matmul_plan.h)."""

    m: int
    n: int
    k: int
    block_size: int
    dtype: int
    forward: bool
    low_memory: bool


class Choice(NamedTuple):
    """MatmulChoice of cuda/matmul_plan.h, field by field."""

    kind: int
    rows: int
    columns: int
    splits: int

    def __str__(self) -> str:
        if self.rows == 0:
            return KINDS[self.kind]
        parts = f" in {self.splits} parts" if self.splits > 1 else ""
        return f"{KINDS[self.kind]} {self.rows}x{self.columns}{parts}"


Choices = dict[Problem, Choice | None]  # None: the built-in plan was not beaten


def folder() -> Path | None:
    """Where the files are: ``QLORA_NATIVE_TUNING``, or the cache folder; None if that variable says ``off``."""
    named = os.environ.get("QLORA_NATIVE_TUNING", "")
    if named == "off":
        return None
    return Path(named) if named else cache_folder()


@cache
def _hash_of(file: str) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:16]


def identity(module: ModuleType, facts: Facts) -> dict[str, Any]:
    """What the measurements depend on: the package, its kernels' binary, torch (for its GEMM), the card."""
    assert module.__file__ is not None
    return {
        "format": FORMAT,
        "version": build_info()["version"],
        "kernels": _hash_of(module.__file__),
        "torch": str(torch.__version__),  # which compares as a version otherwise
        "gpu": facts.name,
        "compute_capability": facts.compute_capability,
        "sm_count": facts.sm_count,
    }


def file_of(where: Path, facts: Facts) -> Path:
    """The file of a card. Cards of one name and size share it."""
    name = re.sub(r"[^a-z0-9]+", "-", facts.name.lower()).strip("-")
    return where / f"plans-{name}-sm{facts.compute_capability}-{facts.sm_count}.json"


def _entry(problem: Problem, choice: Choice | None) -> dict[str, Any]:
    plan = None if choice is None else {**choice._asdict(), "kind": KINDS[choice.kind]}
    return {**problem._asdict(), "dtype": DTYPES[problem.dtype], "plan": plan}


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"{value!r} is no size")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _parsed(entry: Any) -> tuple[Problem, Choice | None]:
    m, n, k, block_size = (_whole(entry[name]) for name in ("m", "n", "k", "block_size"))
    dtype = {name: number for number, name in DTYPES.items()}[entry["dtype"]]
    problem = Problem(m, n, k, block_size, dtype, _flag(entry["forward"]), _flag(entry["low_memory"]))
    plan = entry["plan"]
    if plan is None:
        return problem, None
    return problem, Choice(KINDS.index(plan["kind"]), *(_whole(plan[name]) for name in Choice._fields[1:]))


def read(file: Path, module: ModuleType, facts: Facts) -> Choices:
    """The choices in a file, none if there is none; and none, in one sentence, if it is damaged or not of this card and
    build."""
    ignored, again = f"qlora_native: {file} is ignored and the built-in plans are used", "qn.tune writes a new one."
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text)
        for name, value in identity(module, facts).items():
            if found[name] != value:
                say_once(f"{ignored}: it was measured with {name} {found[name]!r}, here it is {value!r}; {again}")
                return {}
        return dict(map(_parsed, found["entries"]))
    except FileNotFoundError:
        return {}
    except OSError as error:
        say_once(f"{ignored}: it cannot be read ({error.strerror}); {again}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        say_once(f"{ignored}: it is damaged ({type(error).__name__}: {error}); {again}")
    return {}


def write(file: Path, module: ModuleType, facts: Facts, choices: Choices) -> None:
    """All of it at once, or nothing: whoever reads meanwhile finds the old file or the new one, whole."""
    entries = ",\n  ".join(json.dumps(_entry(problem, choices[problem])) for problem in sorted(choices))
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in identity(module, facts).items())
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(f'{{\n{head} "entries": [\n  {entries}\n ]\n}}\n')
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@cache
def choices_of(module: ModuleType, facts: Facts) -> Choices:
    """Those of a card, read at the first call."""
    where = folder()
    return {} if where is None else read(file_of(where, facts), module, facts)


def choice_of(module: ModuleType, problem: Problem, facts: Facts) -> Choice | None:
    """What was measured best for ``m`` tokens, any number of them, None without."""
    choices = choices_of(module, facts)
    return choices.get(problem._replace(m=module.tokens_bucket(problem.m))) if choices else None
