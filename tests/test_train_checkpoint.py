"""Checkpoints: resuming is bit-equal, after a kill at any moment, and a full disk costs nothing that was there."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
import yaml
from runs import Crash, crash_at, metrics, steps_made, wait_until, write_files

from qlora_native import _io as disk
from qlora_native.calibration.data import LEAST_TOKENS
from qlora_native.distributed import OneProcess
from qlora_native.errors import UserError
from qlora_native.optim import AdamW
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train import checkpoint, loop
from qlora_native.tool.train.checkpoint import Interrupted, StoppedBySignal, stop_request
from qlora_native.tool.train.loop import Trainer, describe

STEPS = 7
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
ADAPTER = "adapter_model.safetensors"
TRAINED = f"adapter/{ADAPTER}"

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the subprocesses: their number changes the order of sums


class Run:
    """A run into ``folder/out`` with dropout, odd batch sizes and epochs that end inside the run: all that a resumed
    run could get wrong."""

    def __init__(self, files: Path, folder: Path) -> None:
        self.files, self.folder, self.out = files, folder, folder / "out"

    def settings(self, **train: Any) -> dict[str, Any]:
        options = {"steps": STEPS, "batch_size": 3, "grad_accum": 2, "lr": 5e-3, "save_every": 2, "eval_every": 3}
        data = {"eval_fraction": 0.2, **train.pop("data", {})}
        return runs.settings(self.files, self.out, data, {"r": 4, "alpha": 8, "dropout": 0.3}, **{**options, **train})

    def train(self, resume: str | None = None, on_step: Any = None, **options: Any) -> Any:
        config = TrainConfig.model_validate({**self.settings(**options), "resume": resume})
        return Trainer(config, quiet=True, on_step=on_step).train()

    def crash(self, step: int, **options: Any) -> None:
        with pytest.raises(Crash):
            self.train(on_step=crash_at(step), **options)
        torch.rand(5), random.random(), np.random.rand()  # the new process would begin elsewhere

    def start(self, driver: str, **options: Any) -> subprocess.Popen[str]:
        """In a process of its own, with Python that runs before it."""
        return runs.start(self.settings(**options), self.folder, driver)

    def resume_started(self) -> None:
        assert main(["train", str(self.folder / "config.yaml"), "--resume"]) == 0

    def checkpoints(self) -> list[str]:
        return [path.name for path in checkpoint.checkpoints(self.out)]

    def assert_as(self, other: Path) -> None:
        for name in (TRAINED, f"best/{ADAPTER}"):
            assert (self.out / name).read_bytes() == (other / name).read_bytes(), name
        assert metrics(self.out) == metrics(other)
        assert sorted(path.name for path in self.out.iterdir()) == sorted(path.name for path in other.iterdir())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def undisturbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing happened to."""
    run = Run(files, tmp_path_factory.mktemp("undisturbed"))
    run.train()
    return run.out


@pytest.fixture
def run(files: Path, tmp_path: Path) -> Run:
    return Run(files, tmp_path)


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.long) for step in (1, 2, 5)), 3, 7])
def test_a_run_that_crashed_ends_as_if_it_had_not(run: Run, undisturbed: Path, step: int) -> None:
    """After step 1 there is no checkpoint yet: it starts anew."""
    run.crash(step)
    run.train("auto")
    run.assert_as(undisturbed)


PACKED: dict[str, Any] = {
    "data": {"packing": True, "max_length": 64}, "batch_size": 1, "steps": None, "epochs": 2.5,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "adamw8bit"}, pytest.param({"optimizer": "lion"}, marks=pytest.mark.long), PACKED],
    ids=str,
)
def test_other_runs_resume_too(run: Run, files: Path, options: dict[str, Any]) -> None:
    whole = Run(files, run.folder / "whole")
    whole.train(**options)
    run.crash(5, **options)
    if options is PACKED:  # it stops inside the second epoch
        assert len([record for record in metrics(whole.out) if "lr" in record]) == 8, "3 steps an epoch"
        state = json.loads((run.out / "step-000004" / checkpoint.STATE).read_text())["data"]
        assert (state["epoch"], state["batch"]) == (1, 1)
    run.train("auto", **options)
    run.assert_as(whole.out)
    if options is PACKED:
        with pytest.raises(UserError, match="packing was on .* off"):
            run.train("auto", **{**options, "data": {"max_length": 64}})


def test_a_checkpoint_older_than_the_choice_of_optimizer_is_one_of_adamw(run: Run, undisturbed: Path) -> None:
    run.crash(5)
    for path in run.out.glob(f"step-*/{checkpoint.CONFIG}"):
        path.write_text("".join(line for line in path.open() if "optimizer:" not in line))
    with pytest.raises(UserError, match="train.optimizer adamw -> lion;"):
        run.train("auto", optimizer="lion")
    run.train("auto")
    run.assert_as(undisturbed)


def test_without_the_random_state_the_end_would_differ(run: Run, undisturbed: Path, monkeypatch: Any) -> None:
    """That the comparison above can fail."""
    run.crash(5)
    monkeypatch.setattr(checkpoint, "set_random_state", lambda tensors, plain: None)
    run.train("auto")
    assert (run.out / TRAINED).read_bytes() != (undisturbed / TRAINED).read_bytes()


def test_resume_of_a_finished_run_changes_nothing(run: Run, undisturbed: Path) -> None:
    assert "tokens/s (median)" in describe(run.train())
    summary = run.train("auto")
    assert summary.steps == STEPS and summary.tokens_per_second == 0
    assert "tokens/s" not in describe(summary)
    run.assert_as(undisturbed)


def test_resume_from_a_named_checkpoint(run: Run, undisturbed: Path) -> None:
    run.train(keep=9)
    run.train(str(run.out / "step-000004"), keep=9)
    assert (run.out / TRAINED).read_bytes() == (undisturbed / TRAINED).read_bytes()
    assert metrics(run.out) == metrics(undisturbed)


# Slow enough for a parent to act in the middle; what is computed and written is the same.
SLOW = """
import time
from qlora_native{0} import {1} as module
plain = module.{2}
module.{2} = lambda *args, **options: time.sleep({3}) or plain(*args, **options)
"""
SLOW_STEPS = SLOW.format(".train", "loop", "learning_rate", 0.15)
SLOW_WRITING = SLOW.format("", "_io", "fsync", 0.2)


@pytest.mark.parametrize(
    "writing", [pytest.param(False, marks=pytest.mark.long), True], ids=["between checkpoints", "while one is written"]
)
def test_killed(run: Run, undisturbed: Path, writing: bool, mistake: Any) -> None:
    """Until then no other run may have its folder."""
    process, partial = run.start(SLOW_WRITING if writing else SLOW_STEPS), run.out / ".step-000004.qlora-partial"
    wait_until(partial.exists if writing else lambda: steps_made(run.out) >= 5, process)
    assert f"is writing {run.out}:" in mistake("train", run.folder / "config.yaml", "--resume")
    process.kill()
    process.communicate()
    assert partial.is_dir() is writing
    assert run.checkpoints() == (["step-000002"] if writing else ["step-000002", "step-000004"])
    run.resume_started()
    run.assert_as(undisturbed)


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGTERM, signal.SIGHUP))],
)
def test_ctrl_c_finishes_the_step_and_saves(run: Run, undisturbed: Path, number: signal.Signals) -> None:
    process = run.start(SLOW_STEPS, save_every=0)
    wait_until(lambda: steps_made(run.out) >= 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    (saved,) = run.checkpoints()
    assert f"stopped after step {int(saved[5:])}; {run.out / saved} is saved" in errors
    assert steps_made(run.out) == int(saved[5:]) < STEPS
    run.resume_started()
    assert (run.out / TRAINED).read_bytes() == (undisturbed / TRAINED).read_bytes()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_step_is_the_exit_code(
    run: Run, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plain = run.folder / "config.yaml", loop.learning_rate
    path.write_text(yaml.safe_dump(run.settings(save_every=0)))

    def learning_rate(*args: Any, **options: Any) -> float:
        if steps_made(run.out) == 3:
            os.kill(os.getpid(), number)
        return plain(*args, **options)

    monkeypatch.setattr(loop, "learning_rate", learning_rate)
    before = signal.signal(number, signal.default_int_handler)  # under nohup SIGHUP is ignored
    try:
        assert main(["train", str(path)]) == 128 + number
    finally:
        signal.signal(number, before)
    assert run.checkpoints() == ["step-000004"] and steps_made(run.out) == 4
    assert "stopped after step 4; " in capsys.readouterr().err


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_stops_at_once(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler)  # under nohup SIGHUP is ignored

    def two_signals() -> None:
        with stop_request(OneProcess()) as stop:
            assert signal.getsignal(number) == stop.on_signal
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert stop.requested
            os.kill(os.getpid(), number)
            time.sleep(1)

    with pytest.raises(StoppedBySignal, match="at once") as stopped:
        two_signals()
    assert stopped.value.code == 128 + number and not isinstance(stopped.value, Interrupted)
    assert signal.signal(number, before) is signal.default_int_handler


@pytest.mark.parametrize("which", [ADAPTER, checkpoint.TENSORS, checkpoint.STATE, checkpoint.CONFIG])
def test_a_full_disk_leaves_the_checkpoint_before_it(
    run: Run, undisturbed: Path, which: str, monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    path, plain_fsync = run.folder / "config.yaml", os.fsync
    path.write_text(yaml.safe_dump(run.settings()))

    def full(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if ".step-000004" in name and which in Path(name).name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain_fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        error = mistake("train", path)
    assert re.search(rf"{run.out}/step-000004: No space left .* {run.out}/step-000002 is intact", error), error
    assert [entry.name for entry in run.out.iterdir() if "step" in entry.name] == ["step-000002"]
    run.resume_started()
    run.assert_as(undisturbed)


def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    """No patching: the kernel cuts the file at 4 KiB."""
    write(tmp_path, 1, trained_optimizer(numel=10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match=r"step-000002: File too large.*step-000001 is intact"):
            write(tmp_path, 2, trained_optimizer(numel=5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def trained_optimizer(numel: int, kind: Any = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.zeros(numel))
    optimizer: torch.optim.Optimizer = kind([parameter], **options)
    parameter.grad = torch.randn(numel)
    optimizer.step()
    return optimizer


def write(folder: Path, step: int, optimizer: torch.optim.Optimizer, keep: int = 2) -> Path:
    options: dict[str, Any] = {"state": {"step": step}, "config": "model: m\n", "keep": keep, "ranks": OneProcess()}
    return checkpoint.save_checkpoint(folder, step, save_adapter=lambda partial: None, optimizer=optimizer, **options)


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


@pytest.mark.parametrize(
    ("kind", "options", "count"), [(torch.optim.AdamW, {"fused": True}, 3), (AdamW, {"bits": 8}, 5)]
)
def test_optimizer_and_random_state_come_back(tmp_path: Path, kind: Any, options: dict[str, Any], count: int) -> None:
    optimizer = trained_optimizer(5000, kind, **options)
    folder = write(tmp_path, 3, optimizer)
    drawn = (torch.rand(3), random.random(), np.random.rand())
    other = trained_optimizer(5000, kind, lr=0.5, **options)
    assert checkpoint.load_checkpoint(folder, other, OneProcess()) == {"step": 3}
    again = (torch.rand(3), random.random(), np.random.rand())
    assert torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]
    (expected,), (got,) = optimizer.state.values(), other.state.values()
    assert expected.keys() == got.keys() and len(expected) == count
    assert all(expected[key].dtype == got[key].dtype and torch.equal(expected[key], got[key]) for key in expected)
    assert other.param_groups[0]["lr"] == 0.5  # the config's, not the checkpoint's


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE])
def test_a_damaged_checkpoint_is_reported(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 3, trained_optimizer(7))
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(UserError, match="step-000003.* cannot be read: .*delete"):
        checkpoint.load_checkpoint(folder, trained_optimizer(7), OneProcess())


def test_a_checkpoint_whose_step_is_no_number(run: Run) -> None:
    run.crash(3)
    path = run.out / "step-000002" / checkpoint.STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": -1}))
    with pytest.raises(UserError, match=r"step-000002 cannot be read: .*step"):
        run.train("auto")


def test_what_a_kill_leaves_is_cleaned_up(tmp_path: Path) -> None:
    # Killed while writing, between the two renames, before the old one was deleted; and what is not ours.
    left = [".step-000004.qlora-partial", ".best.qlora-old", ".adapter.qlora-old", "adapter", ".other.partial", "mine"]
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    disk.recover(tmp_path)
    after = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert after == {"best": ".best.qlora-old", **{name: name for name in ("adapter", ".other.partial", "mine")}}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "best"

    def replace(name: str, text: str, error: type[Exception] | None = None) -> None:
        with disk.atomic_folder(final) as partial:
            (partial / name).write_text(text)
            if error is not None:
                raise error

    replace("a", "1")
    with pytest.raises(Crash):
        replace("a", "2", Crash)
    assert (final / "a").read_text() == "1"
    replace("b", "3")
    assert [path.name for path in final.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_folder_and_a_file_have_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, atomic in enumerate((disk.atomic_folder, disk.atomic_file)):
        final = tmp_path / str(number)
        with atomic(final):
            with pytest.raises(UserError, match=rf"is writing {final}:"), atomic(final):
                pass
            assert disk.partial_folder(final).exists()
        assert [path.name for path in tmp_path.iterdir()] == [str(n) for n in range(number + 1)]

    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(disk.fcntl, "flock", no_locks)
    with disk.atomic_folder(tmp_path / "unlocked"), disk.locked(tmp_path):
        pass
    assert (tmp_path / "unlocked").is_dir()


def test_a_clock_that_jumps_changes_nothing(run: Run, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back and forth by years, in the process and in the times of files."""
    plain, chance = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: plain() + chance.uniform(-1e9, 1e9))
    run.crash(5)
    os.utime(run.out / "step-000002", (4e9, 4e9))
    os.utime(run.out / "step-000004", (0, 0))
    run.train("auto")
    run.assert_as(undisturbed)
    timed = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["seconds"] < 1e6 for line in timed if "seconds" in line)


@pytest.mark.parametrize("is_enough", [False, True])
def test_a_method_that_falls_back(
    run: Run, undisturbed: Path, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows are too few to calibrate with, a run is one of rtn, and so is its other half; else it is another."""
    monkeypatch.setitem(LEAST_TOKENS, "wmse", 1 if is_enough else 1 << 30)
    run.crash(5)
    values = {**run.settings(), "quant": {"method": "wmse"}, "resume": "auto"}
    trainer = Trainer(TrainConfig.model_validate(values), quiet=True)
    if is_enough:
        with pytest.raises(UserError, match=r"other settings: quant.method rtn -> wmse;"):
            trainer.train()
    else:
        trainer.train()
        run.assert_as(undisturbed)
        assert TrainConfig.from_file(run.out / "adapter" / checkpoint.CONFIG).quant.method == "rtn"


def test_an_earlier_run_is_not_overwritten_nor_a_folder_resumed(run: Run, undisturbed: Path, sentence: Any) -> None:
    for resume in (None, str(run.folder)):
        with pytest.raises(UserError) as raised:
            Run(run.files, undisturbed.parent).train(resume)
        sentence(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"lora": {"r": 8, "alpha": 8, "dropout": 0.3}},
        {"train": {"seed": 1, "lr": 1e-5}},
        {"quant": {"type": "fp4"}},
        {"model": "elsewhere/other-model"},
        {"data": {"train": "other.jsonl"}},
    ],
    ids=" ".join,
)
def test_other_settings_are_refused(
    files: Path, undisturbed: Path, tmp_path: Path, change: dict[str, Any], sentence: Any
) -> None:
    values: dict[str, Any] = {**Run(files, undisturbed.parent).settings(), "resume": "auto"}
    for key, value in change.items():
        values[key] = {**values[key], **value} if key in ("train", "data") else value
    if "data" in change:
        values["data"]["train"] = str(tiny.write_rows(tmp_path / "other.jsonl", 24))
    with pytest.raises(UserError) as raised:
        Trainer(TrainConfig.model_validate(values), quiet=True).train()
    sentence(raised.value)
