"""cmake/build_backend.py: when pip is asked for an nvcc, and that CMake is given it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from laws import ROOT
from test_build_options import write_program

pytest.importorskip("scikit_build_core")


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hooks on a machine without a toolkit and without a card."""
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "cmake" / "build_backend.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "QLORA_NATIVE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(module, "TOOLKITS", tmp_path)
    return module


CARD = "/bin/echo 580.65.06"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("hook", ["wheel", "editable"])
@pytest.mark.parametrize(
    ("mode", "nvidia_smi", "nvcc", "is_asked"),
    [
        (None, None, None, False),
        (None, "exit 9", None, False),  # no driver behind it
        (None, "/bin/echo No devices were found", None, False),
        (None, CARD, None, True),
        (None, "/bin/echo 575.57.08", None, False),  # it would not run what the packages compile
        (None, "printf '550.54\\n580.65\\n'", None, True),
        (None, CARD, "bin", False),
        (None, CARD, "cuda-12.9/bin", False),
        (None, CARD, "bin 11.8", True),  # too old for the kernels
        (None, CARD, "bin 12.0", False),
        ("OFF", CARD, None, False),
        ("ON", None, None, True),  # wheels that others use
        ("ON", None, "bin", False),
    ],
)
def test_an_nvcc_is_asked_for_where_there_is_a_card_and_none(
    backend: Any,
    hook: str,
    mode: str | None,
    nvidia_smi: str | None,
    nvcc: str | None,
    is_asked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if nvidia_smi is not None:
        write_program(tmp_path / "bin" / "nvidia-smi", nvidia_smi)
    if nvcc is not None:
        folder, _, release = nvcc.partition(" ")
        write_program(tmp_path / folder / "nvcc", f"/bin/echo 'Cuda compilation tools, release {release}, V{release}'")
    settings: list[dict[str, str] | None] = [None]
    if mode is not None:  # an option of CMake counts where the environment has none
        monkeypatch.setenv("QLORA_NATIVE_CUDA", mode)
        settings.append({"cmake.define.QLORA_NATIVE_CUDA": mode})
    for given in settings:
        asked = getattr(backend, f"get_requires_for_build_{hook}")(given)
        assert [name for name in asked if name.startswith("nvidia")] == (backend.PACKAGES if is_asked else [])
        monkeypatch.delenv("QLORA_NATIVE_CUDA", raising=False)


@pytest.mark.parametrize("hook", ["wheel", "editable"])
@pytest.mark.parametrize("others", [False, True])
def test_cmake_gets_the_nvcc_of_the_packages(
    backend: Any, hook: str, others: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless there is another one. nvcc and CMake find the runtime under the names that they look for."""
    toolkit = tmp_path / "site" / "nvidia" / "cu13"
    write_program(toolkit / "bin" / "nvcc", "exit 0")
    (toolkit / "lib").mkdir()
    (toolkit / "lib" / "libcudart.so.13").touch()
    if others:
        write_program(tmp_path / "bin" / "nvcc", "exit 0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    given: list[str | None] = []
    monkeypatch.setattr(backend.build, f"build_{hook}", lambda *_: given.append(os.environ.get("CUDACXX")))
    for _ in range(2):
        monkeypatch.delenv("CUDACXX", raising=False)
        getattr(backend, f"build_{hook}")("dist", None, None)
    assert given == [None if others else str(toolkit / "bin" / "nvcc")] * 2
    assert others or (toolkit / "lib64" / "libcudart.so").exists()


def test_pip_calls_these_hooks() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'build-backend = "build_backend"' in text and 'backend-path = ["cmake"]' in text
