"""docs/bitsandbytes.md: its scripts, its names, and the runner of bitsandbytes' own tests on a folder of ours."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from sentences import Check

import qlora_native.bitsandbytes as bnb

PAGE = (Path(__file__).parents[1] / "docs" / "bitsandbytes.md").read_text(encoding="utf-8")
RUNNER = Path(__file__).parent / "peers" / "run_bitsandbytes_tests.py"
FILES = ("linear4bit", "functional", "ops", "autograd", "modules", "optim")
LINEAR = """
import torch
import bitsandbytes as bnb
from bitsandbytes.cextension import HIP_ENVIRONMENT
from bitsandbytes.nn.modules import Params4bit
from tests.helpers import answer

def test_name():
    assert bnb.__name__ == "qlora_native.bitsandbytes" and answer == 42 and not HIP_ENVIRONMENT
    assert bnb.nn.LinearNF4(64, 64).to("cpu")(torch.ones(1, 64)).shape == (1, 64)
    assert torch.ops.bitsandbytes.quantize_4bit(torch.ones(64), 64, "nf4", torch.uint8)[0].shape == (32, 1)

def test_torch_compile():
    raise AssertionError("left out")
"""
OPTIM = """
import bitsandbytes.optim as optim

LAMB = optim.LAMB

def test_lamb():
    LAMB([])

def test_timing_bench():
    raise AssertionError("left out")
"""
MODULES = """
def test_4bit_linear_warnings():
    raise AssertionError("explained in the docs")
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RUNNER), str(folder), *arguments], capture_output=True, text=True)


def test_what_is_counted(tmp_path: Path, sentence: Check) -> None:
    (tmp_path / "tests").mkdir()
    texts = {"test_linear4bit": LINEAR, "test_optim": OPTIM, "test_modules": MODULES, "helpers": "answer = 42\n"}
    for name in ("__init__", "helpers", *(f"test_{name}" for name in FILES)):
        (tmp_path / "tests" / f"{name}.py").write_text(texts.get(name, ""))
    result = run(tmp_path, "--", "-q")
    assert result.returncode == 0, result.stdout
    summary, *table = result.stdout.splitlines()[-5:]
    assert summary.endswith(": 1 passed, 0 failed, 1 failed as docs/bitsandbytes.md says")
    assert [line.split()[0] for line in table] == ["1"] * 4
    sentence("\n".join(table))

    result = run(tmp_path, "--compile", "--", "-q")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "FAILED  tests/test_linear4bit.py::test_torch_compile"


def test_another_folder_is_an_error(tmp_path: Path, sentence: Check) -> None:
    result = run(tmp_path)
    assert result.returncode == 2
    sentence(result.stdout)


def test_the_page_names_what_is_offered() -> None:
    for name in (*bnb.nn.__all__, *bnb.functional.__all__):
        stem = re.sub(r"_(nf4|fp4)$", "", name)
        assert f"`{name}`" in PAGE or f"`{stem}_4bit`" in PAGE, name
