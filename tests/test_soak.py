"""A long run with paged states: memory, descriptors and threads stay as they are, and pieces add up to the whole."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import runs
from helpers import needs_page_files

from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer

pytestmark = [needs_page_files, pytest.mark.usefixtures("one_thread")]

MIB = 1 << 20


class Sampler:
    """A Trainer's ``on_step`` that counts what the process holds, ``often`` times in a run of ``steps``."""

    def __init__(self, steps: int, often: int = 200) -> None:
        self.every, self.samples = max(1, steps // often), dict[int, tuple[int, int, int]]()

    def __call__(self, record: dict[str, Any]) -> None:
        if record["step"] % self.every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            held = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
            self.samples[record["step"]] = pages * os.sysconf("SC_PAGESIZE"), *held  # type: ignore[assignment]

    def between(self, first: float, last: float) -> tuple[float, int, int]:
        """Median of the resident bytes, most descriptors and most threads in these steps."""
        found = [values for step, values in self.samples.items() if first < step <= last]
        memory, descriptors, threads = zip(*found, strict=True)
        return median(memory), max(descriptors), max(threads)


def test_a_long_paged_run_is_flat_and_its_pieces_add_up(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """``--soak`` steps, in one piece and in three: resident memory of the last tenth is that of the second within 1 %
    (of a short run 5 %), descriptors and threads are as many, and the adapters have the same bytes."""
    steps = pytestconfig.getoption("--soak")
    files = runs.write_files(tmp_path, num_hidden_layers=1)
    options: dict[str, Any] = {"steps": steps, "batch_size": 1, "grad_accum": 1, "lr": 1e-4, "log_every": steps}
    options |= {"save_every": max(1, steps // 40), "paged": True, "page_budget": MIB, "grad_checkpointing": False}

    lora = {"r": 400, "alpha": 400, "dropout": 0.1, "target_modules": ["up_proj", "down_proj"]}  # 1.2 MiB of states

    def train(name: str, on_step: Any, resume: str | None = None) -> Any:
        values = runs.settings(files, tmp_path / name, {}, lora, **options)
        return Trainer(TrainConfig.model_validate({**values, "resume": resume}), on_step=on_step).train()

    sampler = Sampler(steps)
    summary = train("whole", sampler)
    assert summary.paged_bytes > steps * MIB
    early, late = sampler.between(steps / 10, steps / 5), sampler.between(steps * 0.9, steps)
    for name, (memory, descriptors, threads) in (("early", early), ("late", late)):
        print(f"{name}: {memory / MIB:.2f} MiB resident, {descriptors} descriptors, {threads} threads")
    assert abs(late[0] / early[0] - 1) < (0.01 if steps >= 10_000 else 0.05)
    assert late[1:] == early[1:]
    for crash in (steps // 3, steps * 3 // 4):
        with pytest.raises(runs.Crash):
            train("pieces", runs.crash_at(crash), "auto")
    train("pieces", None, "auto")
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "pieces")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert runs.metrics(tmp_path / "whole") == runs.metrics(tmp_path / "pieces")
