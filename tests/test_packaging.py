"""What an installed copy must hold, what its metadata promise, and what README and build promise."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from laws import ROOT

import qlora_native as qn

DISTRIBUTION = "qlora_native"
PACKAGE = Path(qn.__file__).parent


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()


def test_the_stub_names_what_the_native_module_has() -> None:
    from qlora_native import _C

    stub = (PACKAGE / "_C.pyi").read_text(encoding="utf-8")
    declared = set(re.findall(r"^(?:def|class) (\w+)", stub, re.MULTILINE))
    declared |= set(re.findall(r"^(\w+):", stub, re.MULTILINE))
    assert declared == {name for name in vars(_C) if not name.startswith("_")}


def test_one_version_everywhere() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(dev|a|b|rc)\d+)?", qn.__version__)
    assert importlib.metadata.version(DISTRIBUTION) == qn.__version__
    assert qn.build_info()["version"] == qn.__version__, "the native module was built from another version"


def test_the_core_needs_three_packages() -> None:
    requires = importlib.metadata.requires(DISTRIBUTION) or []
    core = {re.split(r"[^\w-]", line)[0].lower() for line in requires if "extra ==" not in line}
    assert core == {"torch", "numpy", "safetensors"}


def test_the_extras_are_there() -> None:
    extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    assert {"train", "demo", "bench", "test", "dev"} <= set(extras)


def test_the_license_is_named_and_shipped() -> None:
    assert importlib.metadata.metadata(DISTRIBUTION)["License-Expression"] == "Apache-2.0"
    files = importlib.metadata.files(DISTRIBUTION) or []
    licenses = [path for path in files if path.name == "LICENSE"]
    assert licenses and "Apache License" in licenses[0].read_text(encoding="utf-8")


def test_build_info_has_the_promised_keys() -> None:
    info = qn.build_info()
    assert set(info) == {"version", "cuda", "cuda_archs", "compiler", "isas_built", "cpu_isa"}
    assert isinstance(info["cuda"], bool)
    assert all(isinstance(arch, int) for arch in info["cuda_archs"])
    assert "scalar" in info["isas_built"]
    assert info["cpu_isa"] in info["isas_built"]


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import qlora_native as qn; qn.build_info()"],
        env={**os.environ, "QLORA_NATIVE_ISA": "avx9000"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "QLORA_NATIVE_ISA is 'avx9000'" in done.stderr
    assert "scalar" in done.stderr


def test_the_readme_example_runs(tmp_path: Path) -> None:
    """The first Python block of the README, as a reader would paste it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    if block is None:
        pytest.skip("README.md has no Python block")
    done = subprocess.run([sys.executable, "-c", block[1]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, f"{block[1]}\n{done.stderr}"


def test_the_readme_commands_name_extras_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    groups = re.findall(r"pip install '?\.\[([\w, ]+)\]", readme)
    named = {extra.strip() for group in groups for extra in group.split(",")}
    assert named <= set(importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or [])


def test_a_failing_native_build_fails_the_install(tmp_path: Path) -> None:
    """No compiler output, no package: never a wheel without its native module, and the compiler's message is shown."""
    for module in ("scikit_build_core", "pybind11"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -r .ci/requirements.txt")
    real = os.environ.get("CXX", "c++")
    compiler = tmp_path / "refusing-compiler"
    # Passes CMake's checks of the compiler, then refuses the first file of ours.
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *cpp/cpu/*) echo "refusing-compiler: error: out of cookies" >&2; exit 1;; esac\n'
        f'exec {real} "$@"\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
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
