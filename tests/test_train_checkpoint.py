"""Checkpoints: resuming is bit-equal, after a kill at any moment, and a full disk costs nothing that was there."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
import yaml
from runs import metrics, start, steps_made, wait_until, write_files

from qlora_native import _io as disk
from qlora_native.cli.main import main
from qlora_native.config import TrainConfig
from qlora_native.distributed import OneProcess
from qlora_native.errors import UserError
from qlora_native.optim import AdamW
from qlora_native.train import checkpoint
from qlora_native.train.checkpoint import Interrupted, stop_request
from qlora_native.train.loop import Trainer

STEPS = 7
ADAPTER = "adapter_model.safetensors"


pytestmark = pytest.mark.usefixtures("one_thread")  # as in the subprocesses: their number changes the order of sums


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


def settings(files: Path, out: Path, **train: Any) -> dict[str, Any]:
    """Dropout, odd batch sizes and epochs that end inside the run: all that a resumed run could get wrong."""
    options = {"steps": STEPS, "batch_size": 3, "grad_accum": 2, "lr": 5e-3, "save_every": 2, "eval_every": 3, **train}
    data = {"eval_fraction": 0.2, **options.pop("data", {})}
    return runs.settings(files, out, data, {"r": 4, "alpha": 8, "dropout": 0.3}, **options)


def train(files: Path, out: Path, resume: str | None = None, **options: Any) -> Any:
    on_step = options.pop("on_step", None)
    config = TrainConfig.model_validate({**settings(files, out, **options), "resume": resume})
    return Trainer(config, quiet=True, on_step=on_step).train()


@pytest.fixture(scope="module")
def undisturbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    train(files, out)
    return out


def assert_as_undisturbed(out: Path, undisturbed: Path) -> None:
    for name in ("adapter", "best"):
        assert (out / name / ADAPTER).read_bytes() == (undisturbed / name / ADAPTER).read_bytes(), name
    assert metrics(out) == metrics(undisturbed)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in undisturbed.iterdir())


class Crash(Exception):
    pass


def crash_at(step: int) -> Callable[[dict[str, Any]], None]:
    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise Crash

    return on_step


@pytest.mark.parametrize("step", [2, 3, 5, 7])
def test_a_run_that_crashed_ends_as_if_it_had_not(files: Path, undisturbed: Path, tmp_path: Path, step: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(Crash):
        train(files, out, on_step=crash_at(step))
    torch.rand(5), random.random(), np.random.rand()  # the new process would begin elsewhere
    train(files, out, resume="auto")
    assert_as_undisturbed(out, undisturbed)


def test_a_packed_run_stopped_inside_its_second_epoch_ends_as_if_it_had_not(files: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "data": {"packing": True, "max_length": 64},
        "batch_size": 1,
        "steps": None,
        "epochs": 2.5,
    }
    train(files, tmp_path / "whole", **options)
    steps = [record for record in metrics(tmp_path / "whole") if "lr" in record]
    assert len(steps) == 8, "3 steps an epoch"
    with pytest.raises(Crash):
        train(files, tmp_path / "out", on_step=crash_at(5), **options)
    state = json.loads((tmp_path / "out" / "step-000004" / checkpoint.STATE).read_text())["data"]
    assert (state["epoch"], state["batch"]) == (1, 1)
    torch.rand(5), random.random(), np.random.rand()
    train(files, tmp_path / "out", resume="auto", **options)
    assert_as_undisturbed(tmp_path / "out", tmp_path / "whole")
    with pytest.raises(UserError, match="packing was on when the checkpoint was made and is off now"):
        train(files, tmp_path / "out", resume="auto", **{**options, "data": {"max_length": 64}})


@pytest.mark.parametrize("optimizer", ["adamw8bit", "lion"])
def test_other_optimizers_resume_too(files: Path, tmp_path: Path, optimizer: str) -> None:
    train(files, tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(Crash):
        train(files, tmp_path / "out", optimizer=optimizer, on_step=crash_at(5))
    train(files, tmp_path / "out", resume="auto", optimizer=optimizer)
    assert_as_undisturbed(tmp_path / "out", tmp_path / "whole")


def test_a_checkpoint_older_than_the_choice_of_optimizer_is_one_of_adamw(
    files: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Crash):
        train(files, out, on_step=crash_at(5))
    for path in out.glob(f"step-*/{checkpoint.CONFIG}"):
        path.write_text("".join(line for line in path.open() if "optimizer:" not in line))
    with pytest.raises(UserError, match=r"train.optimizer adamw -> lion; set them back"):
        train(files, out, resume="auto", optimizer="lion")
    train(files, out, resume="auto")
    assert_as_undisturbed(out, undisturbed)


def test_without_the_random_state_the_end_would_differ(
    files: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the comparison above can fail."""
    out = tmp_path / "out"
    with pytest.raises(Crash):
        train(files, out, on_step=crash_at(5))
    monkeypatch.setattr(checkpoint, "set_random_state", lambda tensors, plain: None)
    train(files, out, resume="auto")
    assert (out / "adapter" / ADAPTER).read_bytes() != (undisturbed / "adapter" / ADAPTER).read_bytes()


def test_resume_before_the_first_checkpoint_starts_anew(files: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Crash):
        train(files, out, on_step=crash_at(1))
    train(files, out, resume="auto")
    assert_as_undisturbed(out, undisturbed)


def test_resume_of_a_finished_run_changes_nothing(files: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(files, out)
    summary = train(files, out, resume="auto")
    assert summary.steps == STEPS and summary.tokens_per_second == 0
    assert_as_undisturbed(out, undisturbed)


def test_resume_from_a_named_checkpoint(files: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(files, out, keep=9)
    train(files, out, resume=str(out / "step-000004"), keep=9)
    assert (out / "adapter" / ADAPTER).read_bytes() == (undisturbed / "adapter" / ADAPTER).read_bytes()
    assert metrics(out) == metrics(undisturbed)


# ---------------------------------------------------------------------------------------------------------------------
# Signals, in processes of their own


# Slow enough for a parent to act in the middle; what is computed and written is the same.
SLOW_STEPS = """
import time
from qlora_native.train import loop
plain = loop.learning_rate
loop.learning_rate = lambda *args, **options: time.sleep(0.15) or plain(*args, **options)
"""
SLOW_WRITING = """
import time
from qlora_native import _io as disk
plain = disk.fsync
disk.fsync = lambda path: time.sleep(0.2) or plain(path)
"""


def test_killed_between_checkpoints(files: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(settings(files, out), tmp_path, SLOW_STEPS)
    wait_until(lambda: steps_made(out) >= 5, process)
    process.kill()
    process.communicate()
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step-000002", "step-000004"]
    assert main(["train", str(tmp_path / "config.yaml"), "--resume"]) == 0
    assert_as_undisturbed(out, undisturbed)


def test_killed_while_a_checkpoint_is_written(files: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(settings(files, out), tmp_path, SLOW_WRITING)
    partial = out / ".step-000004.qlora-partial"
    wait_until(partial.exists, process)
    process.kill()
    process.communicate()
    assert partial.is_dir()  # it was in the middle
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step-000002"]
    assert main(["train", str(tmp_path / "config.yaml"), "--resume"]) == 0
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_saves(
    files: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start(settings(files, out, save_every=0), tmp_path, SLOW_STEPS)
    wait_until(lambda: steps_made(out) >= 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (saved,) = checkpoint.checkpoints(out)
    assert f"stopped after step {int(saved.name[5:])}; {saved} is saved" in errors
    assert steps_made(out) == int(saved.name[5:]) < STEPS
    assert main(["train", str(tmp_path / "config.yaml"), "--resume"]) == 0
    assert (out / "adapter" / ADAPTER).read_bytes() == (undisturbed / "adapter" / ADAPTER).read_bytes()


def test_the_second_signal_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)

    def two_signals() -> None:
        with stop_request(OneProcess()) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert stop.requested
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt, match="at once") as stopped:
        two_signals()
    assert not isinstance(stopped.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------------------------------------------------------------
# Disks


@pytest.mark.parametrize("which", [ADAPTER, checkpoint.TENSORS, checkpoint.STATE, checkpoint.CONFIG])
def test_a_full_disk_leaves_the_checkpoint_before_it(
    files: Path, undisturbed: Path, tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = tmp_path / "out", tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(files, out)))
    plain_fsync = os.fsync

    def full(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if ".step-000004" in name and which in Path(name).name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain_fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(["train", str(path)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert f"could not write {out / 'step-000004'}: No space left on device" in errors[0]
    assert f"{out / 'step-000002'} is intact, and --resume continues from it" in errors[0]
    assert [entry.name for entry in out.iterdir() if "step" in entry.name] == ["step-000002"]
    assert main(["train", str(path), "--resume"]) == 0
    assert_as_undisturbed(out, undisturbed)


def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    """No patching: the kernel cuts the file at 4 KiB."""
    optimizer = trained_optimizer(numel=5000)
    write(tmp_path, 1, trained_optimizer(numel=10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match=r"could not write .*step-000002: File too large.*step-000001 is intact"):
            write(tmp_path, 2, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def trained_optimizer(numel: int) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.zeros(numel))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.randn(numel)
    optimizer.step()
    return optimizer


def write(folder: Path, step: int, optimizer: torch.optim.Optimizer, keep: int = 2) -> Path:
    return checkpoint.save_checkpoint(
        folder,
        step,
        save_adapter=lambda partial: None,
        optimizer=optimizer,
        state={"step": step},
        config="model: m\n",
        keep=keep,
    )


def test_only_the_newest_are_kept_and_the_number_decides(tmp_path: Path) -> None:
    for step in (8, 9, 10, 999_999, 1_000_000):
        write(tmp_path, step, trained_optimizer(3), keep=3)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000010", "step-999999", "step-1000000"]


def test_the_old_one_goes_only_once_the_new_one_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, trained_optimizer(3), keep=1)
    events: list[str] = []
    plain_rename, plain_fsync = os.rename, os.fsync

    def rename(source: Any, target: Any) -> None:
        events.append(f"rename {Path(source).name}")
        plain_rename(source, target)

    def fsync(descriptor: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        plain_fsync(descriptor)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path, 2, trained_optimizer(3), keep=1)
    written = events.index("rename .step-000002.qlora-partial")
    before = set(events[:written])
    assert {f"fsync {name}" for name in (checkpoint.TENSORS, checkpoint.STATE, checkpoint.CONFIG)} <= before
    assert "fsync .step-000002.qlora-partial" in before
    assert events[written + 1 :] == [f"fsync {tmp_path.name}", "rename step-000001"]


def test_optimizer_and_random_state_come_back(tmp_path: Path) -> None:
    optimizer = trained_optimizer(7)
    folder = write(tmp_path, 3, optimizer)
    drawn = (torch.rand(3), random.random(), np.random.rand())
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(7))], lr=0.5, fused=True)
    assert checkpoint.load_checkpoint(folder, other) == {"step": 3}
    again = (torch.rand(3), random.random(), np.random.rand())
    assert torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]
    (expected,), (got,) = optimizer.state.values(), other.state.values()
    assert expected.keys() == got.keys() and len(expected) == 3
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert other.param_groups[0]["lr"] == 0.5  # the config's, not the checkpoint's


def test_coded_states_come_back(tmp_path: Path) -> None:
    def optimizer_of(parameter: torch.nn.Parameter) -> AdamW:
        parameter.grad = torch.randn(5000)
        return AdamW([parameter], bits=8)

    optimizer = optimizer_of(torch.nn.Parameter(torch.zeros(5000)))
    optimizer.step()
    other = optimizer_of(torch.nn.Parameter(torch.zeros(5000)))
    checkpoint.load_checkpoint(write(tmp_path, 3, optimizer), other)
    (expected,), (got,) = optimizer.state.values(), other.state.values()
    assert expected.keys() == got.keys() and len(expected) == 5
    assert all(expected[key].dtype == got[key].dtype and torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE])
def test_a_damaged_checkpoint_is_reported(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 3, trained_optimizer(7))
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(UserError, match=r"step-000003 cannot be read .*delete that folder"):
        checkpoint.load_checkpoint(folder, trained_optimizer(7))


def test_what_a_kill_leaves_is_cleaned_up(tmp_path: Path) -> None:
    def folder(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    folder(".step-000004.qlora-partial")
    folder(".best.qlora-old")  # killed between the two renames
    folder(".adapter.qlora-old")  # killed before the old one was deleted
    folder("adapter")
    folder(".other.partial")
    folder("mine")
    disk.recover(tmp_path)
    left = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert left == {"best": ".best.qlora-old", "adapter": "adapter", ".other.partial": ".other.partial", "mine": "mine"}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "best"
    with disk.atomic_folder(final) as partial:
        (partial / "a").write_text("1")

    def crash_half_way() -> None:
        with disk.atomic_folder(final) as partial:
            (partial / "a").write_text("2")
            raise Crash

    with pytest.raises(Crash):
        crash_half_way()
    assert (final / "a").read_text() == "1"
    with disk.atomic_folder(final) as partial:
        (partial / "b").write_text("3")
    assert [path.name for path in final.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


# ---------------------------------------------------------------------------------------------------------------------
# What may not be resumed


def test_an_earlier_run_is_not_overwritten(files: Path, undisturbed: Path) -> None:
    with pytest.raises(UserError, match=r"holds an earlier run \(step-000007\); continue it with --resume"):
        train(files, undisturbed)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lora": {"r": 8, "alpha": 8, "dropout": 0.3}}, r"lora.r 4 -> 8;"),
        ({"train": {"seed": 1, "lr": 1e-5}}, r"train.seed 0 -> 1;"),
        ({"quant": {"type": "fp4"}}, r"quant.type nf4 -> fp4;"),
        ({"model": "elsewhere/other-model"}, r"model .*model -> elsewhere/other-model;"),
    ],
)
def test_other_settings_are_refused(files: Path, undisturbed: Path, change: dict[str, Any], expected: str) -> None:
    values = settings(files, undisturbed)
    for key, value in change.items():
        values[key] = {**values[key], **value} if key == "train" else value
    config = TrainConfig.model_validate({**values, "resume": "auto"})
    with pytest.raises(UserError, match=rf"step-000007 was made with other settings: {expected} set them back"):
        Trainer(config, quiet=True).train()


def test_other_data_are_refused(files: Path, undisturbed: Path, tmp_path: Path) -> None:
    values = settings(files, undisturbed)
    values["data"]["train"] = str(tiny.write_rows(tmp_path / "other.jsonl", 24))
    with pytest.raises(UserError, match="order of the data cannot be resumed"):
        Trainer(TrainConfig.model_validate({**values, "resume": "auto"}), quiet=True).train()


def test_a_folder_that_is_no_checkpoint(files: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resume is .*, which is no checkpoint .*step-000007 is one"):
        train(files, undisturbed, resume=str(tmp_path))
