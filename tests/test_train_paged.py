"""Training with paged states: it computes the same, and where there can be no page file it reports so."""

from __future__ import annotations

import resource
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml
from helpers import needs_page_files
from runs import events, metrics, steps_made, write_files

from qlora_native._memory import Free
from qlora_native.errors import UserError
from qlora_native.optim import paging, pressure
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer, TrainSummary

# One thread as in the subprocesses: their number changes the order of sums.
pytestmark = [needs_page_files, pytest.mark.usefixtures("one_thread")]

STEPS = 12
MIB = 1 << 20
ADAPTER = Path("adapter", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"), hidden_size=128, intermediate_size=256)


def settings(files: Path, folder: Path, **train: Any) -> dict[str, Any]:
    """Rank 256: 9 MiB of states, through a budget of one MiB."""
    options: dict[str, Any] = {"steps": STEPS, "batch_size": 2, "grad_accum": 1, "lr": 5e-4, "save_every": 1}
    options |= {"paged": True, "page_dir": str(folder / "pages"), "page_budget": MIB, **train}
    return runs.settings(files, folder / "out", lora={"r": 256, "alpha": 256, "dropout": 0.1}, **options)


@pytest.fixture(scope="module")
def unpaged(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with its states in memory that nothing happens to."""
    folder = tmp_path_factory.mktemp("unpaged")
    train(files, folder, paged=False, page_budget=None)
    return folder / "out"


def train(files: Path, folder: Path, **options: Any) -> TrainSummary:
    return Trainer(TrainConfig.model_validate(settings(files, folder, **options))).train()


def assert_same(out: Path, unpaged: Path) -> None:
    assert metrics(out) == metrics(unpaged)
    assert (out / ADAPTER).read_bytes() == (unpaged / ADAPTER).read_bytes()


def test_paged_training_computes_the_same(files: Path, unpaged: Path, tmp_path: Path) -> None:
    summary = train(files, tmp_path)
    assert_same(tmp_path / "out", unpaged)
    assert summary.paged_bytes > STEPS * 8 * MIB and summary.retried == 0
    assert list((tmp_path / "pages").iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses files above 6 MiB: the states are 9, an adapter 4.5."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * MIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_no_room_for_the_page_file_is_reported_before_the_first_step(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(files, tmp_path)))
    assert main(["train", str(path)]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qlora")]
    assert str(tmp_path / "pages") in error and "File too large" in error
    assert steps_made(tmp_path / "out") == 0


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first check on, the watcher finds less than the margin."""
    monkeypatch.setattr(paging, "free_memory", lambda: Free(10 * MIB, 1024 * MIB, "a test"))
    monkeypatch.setattr(pressure, "INTERVAL", 0.001)


@pytest.mark.usefixtures("small_files", "short_of_memory")
def test_auto_without_room_for_the_page_file_stays_in_memory_and_warns(
    files: Path, unpaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = train(files, tmp_path, paged="auto", save_every=0)
    (warning,) = [str(warning.message) for warning in caught if "page" in str(warning.message)]
    assert "the states stay in memory" in warning
    assert_same(tmp_path / "out", unpaged)
    assert summary.paged_bytes == 0
    assert "paged out" not in capsys.readouterr().out


@pytest.mark.usefixtures("short_of_memory")
def test_auto_pages_out_under_pressure_and_says_so_once(
    files: Path, unpaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(files, tmp_path, paged="auto")
    assert_same(tmp_path / "out", unpaged)
    assert summary.paged_bytes > 8 * MIB
    printed = capsys.readouterr().out
    assert printed.count("memory is short, so ") == 1 and printed.count("paging moved ") == 1
    assert sum("states are paged out" in text for _, text in events(tmp_path / "out")) == 1
    assert list((tmp_path / "pages").iterdir()) == []


def test_a_budget_below_the_least_is_one_sentence(files: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"page_budget is 5: expected at least \d+ bytes"):
        train(files, tmp_path, page_budget=5)
