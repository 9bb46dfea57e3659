"""What an installed copy must hold, what its metadata promise, and what README and build promise."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from laws import ROOT

import qlora_native as qn
from qlora_native import _C

DISTRIBUTION = "qlora_native"
PACKAGE = Path(qn.__file__).parent
EXTRAS = set(importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or [])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def test_the_package_is_typed_and_its_stub_names_what_the_native_module_has() -> None:
    assert (PACKAGE / "py.typed").is_file()
    stub = (PACKAGE / "_C.pyi").read_text(encoding="utf-8")
    declared = set(re.findall(r"^(?:(?:def|class) )?(\w+)(?=[:(])", stub, re.MULTILINE))
    assert declared == {name for name in vars(_C) if not name.startswith("_")}


def test_one_version_everywhere() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(dev|a|b|rc)\d+)?", qn.__version__)
    assert importlib.metadata.version(DISTRIBUTION) == qn.__version__
    assert qn.build_info()["version"] == qn.__version__, "the native module was built from another version"


def test_the_core_needs_three_packages_and_the_extras_are_there() -> None:
    requires = importlib.metadata.requires(DISTRIBUTION) or []
    core = {re.split(r"[^\w-]", line)[0].lower() for line in requires if "extra ==" not in line}
    assert core == {"torch", "numpy", "safetensors"}
    groups = re.findall(r"pip install '?\.\[([\w, ]+)\]", README)
    named = {extra.strip() for group in groups for extra in group.split(",")}
    assert {"train", "demo", "bench", "test", "dev"} | named <= EXTRAS


def test_the_license_is_named_and_shipped() -> None:
    assert importlib.metadata.metadata(DISTRIBUTION)["License-Expression"] == "Apache-2.0"
    licenses = [path for path in importlib.metadata.files(DISTRIBUTION) or [] if path.name == "LICENSE"]
    assert licenses and "Apache License" in licenses[0].read_text(encoding="utf-8")


def test_build_info_has_the_promised_keys() -> None:
    info = qn.build_info()
    assert set(info) == {"version", "cuda", "cuda_archs", "cuda_lacking", "compiler", "isas_built", "cpu_isa"}
    assert isinstance(info["cuda"], bool) and info["cuda"] == (info["cuda_lacking"] == "")
    assert all(isinstance(arch, int) for arch in info["cuda_archs"])
    assert "scalar" in info["isas_built"]
    assert info["cpu_isa"] in info["isas_built"]


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    done = python("import qlora_native as qn; qn.build_info()", env={**os.environ, "QLORA_NATIVE_ISA": "avx9000"})
    assert done.returncode != 0
    assert "QLORA_NATIVE_ISA is 'avx9000'" in done.stderr and "scalar" in done.stderr


def test_the_readme_example_runs(tmp_path: Path) -> None:
    """The first Python block of the README, as a reader would paste it."""
    code = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0]
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_a_failing_native_build_fails_the_install(tmp_path: Path) -> None:
    """No compiler output, no package: never a wheel without its native module, and the compiler's message is shown."""
    pytest.importorskip("scikit_build_core")
    pytest.importorskip("pybind11")
    compiler = tmp_path / "refusing-compiler"
    # Passes CMake's checks of the compiler, then refuses the first file of ours.
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *cpp/cpu/*) echo "refusing-compiler: error: out of cookies" >&2; exit 1;; esac\n'
        f'exec {os.environ.get("CXX", "c++")} "$@"\n'
    )
    compiler.chmod(0o755)
    wheels = tmp_path / "wheels"
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*wheel, "-w", str(wheels), "-C", f"build-dir={tmp_path / 'build'}", str(ROOT)],
        env={**os.environ, "CXX": str(compiler), "QLORA_NATIVE_CUDA": "OFF"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "out of cookies" in done.stdout + done.stderr
    assert not wheels.exists() or not list(wheels.iterdir())
