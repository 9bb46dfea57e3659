"""bitsandbytes' own tests, run on the CPU against ``qlora_native.bitsandbytes`` under the name ``bitsandbytes``.

    python tests/peers/run_bitsandbytes_tests.py FOLDER [--compile] [-- pytest arguments]

FOLDER is a checkout of bitsandbytes 0.50, which holds ``tests/test_linear4bit.py``; none of its files is copied here.
The tests need pytest, numpy, scipy and lion-pytorch. Prints what passed, failed and was left out, with the reasons, and
exits with 1 if a test failed for which docs/bitsandbytes.md gives no reason.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FILES = [f"test_{name}.py" for name in ("linear4bit", "functional", "ops", "autograd", "modules", "optim")]
COMPILED = ("torch_compile", "minutes of compiling: --compile runs it")

# What is left out: a pattern of node ids, and why.
LEFT_OUT = [
    (r"LLMInt8|test_matmullt|linear8bitlt|-Int8Lt|\[Int8Lt|Linear8bit|MLP8bit", "the half for 8-bit inference"),
    (r"mbedding", "embeddings"),
    (r"ademamix|AdEMAMix|lamb|lars|adagrad|rmsprop|momentum", "an optimizer that is not AdamW, Adam or Lion"),
    (r"few_bit_quant|fp8_quant|global_config", "makers of 8-bit maps, or the manager of single parameters' states"),
    (r"bench", "a timing without an assertion"),
]
# What fails for a reason that docs/bitsandbytes.md gives: a pattern, and the reason in short.
EXPECTED = [
    (
        r"test_gemv_4bit\[dim=1024-fp32-fc2-",
        "torch's own fp32 product, which they compare with, is further from the truth than their bound",
    ),
    ("test_4bit_linear_warnings", "no warning of float32 products where there are none"),
]


class Absent:
    """In the place of a class that their files name while they are imported, and that is not offered here."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        raise AssertionError("a test of what is not offered was not left out")


def dynamic_map(signed: bool = True) -> torch.Tensor:
    """The 8-bit map that their tests of blockwise quantization give: each power of ten has twice as many levels as the
    one below it, fp32 [256], sorted."""
    levels = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1)
        decade = 10 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        levels += [decade, -decade] if signed else [decade]
    return torch.cat(levels).sort().values


def install() -> None:
    """Make ``import bitsandbytes`` give our module, with stand-ins for the names that their files only mention."""
    import qlora_native.bitsandbytes as ours
    from qlora_native.bitsandbytes import functional, nn, ops, optim

    ops.register_ops()
    modules: dict[str, Any] = {
        "": ours, "functional": functional, "nn": nn, "nn.modules": nn.modules, "optim": optim,
    }  # fmt: skip
    stand_ins = {"cextension": {"HIP_ENVIRONMENT": False}, "utils": {"sync_gpu": lambda tensor: None}}
    for name, values in stand_ins.items():
        modules[name] = ModuleType(f"bitsandbytes.{name}")
        modules[name].__dict__.update(values)
    for name, module in modules.items():
        sys.modules[f"bitsandbytes.{name}".rstrip(".")] = module
    functional.create_dynamic_map = dynamic_map
    functional.has_avx512bf16 = lambda: False  # there is no second layout for such CPUs
    embeddings = [f"Embedding{kind}" for kind in ("", "4bit", "8bit", "FP4", "NF4")]
    for name in ("Linear8bitLt", "StableEmbedding", *embeddings):
        setattr(nn, name, Absent)
    for family in ["AdEMAMix", "SGD", "LARS", "LAMB", "RMSprop", "Adagrad"]:
        for name in (family, f"{family}8bit", f"{family}32bit", f"Paged{family}", f"Paged{family}8bit"):
            setattr(optim, name, Absent)
    optim.PytorchLARS = Absent
    optim.ademamix = ModuleType("ademamix")
    optim.ademamix._ReferenceAdEMAMix = Absent
    ours.matmul = Absent


def reason_of(node: str, table: list[tuple[str, str]]) -> str:
    return next((reason for pattern, reason in table if re.search(pattern, node)), "")


class Selection:
    """A pytest plugin that leaves tests out and counts the outcomes."""

    def __init__(self, left_out: list[tuple[str, str]]) -> None:
        self.left_out = left_out
        self.passed = 0
        self.others: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        reasons = {item: reason_of(item.nodeid, self.left_out) for item in items}
        self.others.update(f"left out: {reason}" for reason in reasons.values() if reason)
        config.hook.pytest_deselected(items=[item for item in items if reasons[item]])
        items[:] = [item for item in items if not reasons[item]]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            reason = reason_of(report.nodeid, EXPECTED)
            if reason:
                self.others[f"failed: {reason}"] += 1
            else:
                self.failed.append(report.nodeid)
        elif report.skipped:
            self.others["xfailed" if hasattr(report, "wasxfail") else "skipped by themselves"] += 1
        elif report.when == "call":
            self.passed += 1


def main() -> int:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a checkout of bitsandbytes 0.50")
    parser.add_argument("--compile", action="store_true", help="run the tests of torch.compile as well")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args, rest = parser.parse_args(words[:end]), words[end + 1 :]
    folder = args.folder.resolve()
    absent = [name for name in FILES if not (folder / "tests" / name).is_file()]
    if absent:
        print(f"{folder} is no checkout of bitsandbytes: tests/{absent[0]} is missing.")
        return 2
    import pytest

    os.environ["BNB_TEST_DEVICE"] = "cpu"
    os.environ.pop("PYTEST_ADDOPTS", None)  # options of our own suite
    os.chdir(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent)]
    install()
    selection = Selection(LEFT_OUT if args.compile else [*LEFT_OUT, COMPILED])
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning", *rest]
    status = pytest.main([*options, *(f"tests/{name}" for name in FILES)], plugins=[selection])
    expected = sum(count for name, count in selection.others.items() if name.startswith("failed: "))
    print(f"\nbitsandbytes' tests against qlora_native.bitsandbytes: {selection.passed} passed, ", end="")
    print(f"{len(selection.failed)} failed, {expected} failed as docs/bitsandbytes.md says")
    for name, count in sorted(selection.others.items()):
        print(f"{count:6d}  {name}")
    for name in selection.failed:
        print(f"FAILED  {name}")
    broken = status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    return 1 if selection.failed or broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
