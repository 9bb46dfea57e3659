"""Memory that runs out inside a step: the step begins again and computes the same, or one sentence says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import metrics, settings, write_files

from qlora_native.errors import UserError
from qlora_native.optim import AdamW
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train import memory, passes, prepare
from qlora_native.tool.train.loop import Trainer

STEPS = 5
TOO_MUCH = 1 << 60  # bytes
Result = tuple[bytes, list[dict[str, Any]]]


pytestmark = pytest.mark.usefixtures("one_thread")  # their number changes the order of sums


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


def train(files: Path, out: Path, **options: Any) -> Any:
    """Dropout makes each micro-batch draw random numbers."""
    options = {"steps": STEPS, "batch_size": 3, "grad_accum": 2, "lr": 5e-3, "eval_every": 3, **options}
    values = settings(files, out, {"eval_fraction": 0.2}, {"r": 4, "alpha": 8, "dropout": 0.3}, **options)
    return Trainer(TrainConfig.model_validate(values)).train()


def result(out: Path) -> Result:
    """The adapter, and the metrics without the times."""
    return (out / "adapter" / "adapter_model.safetensors").read_bytes(), metrics(out)


@pytest.fixture(scope="module")
def undisturbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("undisturbed")
    train(files, out)
    return result(out)


def failing(monkeypatch: pytest.MonkeyPatch, *calls: int, allocate: Callable[[], Any]) -> list[int]:
    """Has the losses of these numbers fail once they are computed; returns the list that counts all."""
    plain, count = passes.causal_lm_loss, [0]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        count[0] += 1
        value = plain(model, batch)
        if count[0] in calls:
            allocate()
        return value

    monkeypatch.setattr(passes, "causal_lm_loss", loss)
    return count


def by_torch() -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def by_numpy() -> None:
    np.empty(TOO_MUCH, dtype=np.uint8)


def by_a_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


# The calls: two micro-batches of held-out rows, two a step, two of held-out rows after step 3.
EVALUATION = 2
SECOND_HALF_OF_STEP_2 = EVALUATION + 4


@pytest.mark.parametrize("allocate", [by_torch, by_numpy, by_a_device])
def test_the_step_begins_again_and_computes_the_same(
    files: Path, undisturbed: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, allocate: Any
) -> None:
    failing(monkeypatch, SECOND_HALF_OF_STEP_2, allocate=allocate)
    summary = train(files, tmp_path)
    assert result(tmp_path) == undisturbed
    assert summary.retried == 1 and summary.paging_seconds > 0
    first, last = [line for line in capsys.readouterr().out.splitlines() if "page" in line or "paging" in line]
    assert first.startswith("step 2: memory is short, so ") and "1 step began again" in last


def test_without_the_random_state_the_end_would_differ(
    files: Path, undisturbed: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the comparison above can fail."""
    failing(monkeypatch, SECOND_HALF_OF_STEP_2, allocate=by_torch)
    monkeypatch.setattr(memory, "set_random_state", lambda *state: None)
    train(files, tmp_path)
    assert result(tmp_path)[0] != undisturbed[0]


def test_an_evaluation_begins_again_too(files: Path, undisturbed: Result, tmp_path: Path, monkeypatch: Any) -> None:
    count = failing(monkeypatch, 1, EVALUATION + 1 + 6 + 1, allocate=by_torch)
    assert train(files, tmp_path).retried == 2
    assert result(tmp_path) == undisturbed
    assert count[0] == 3 * EVALUATION + 2 * STEPS + 2


def test_the_second_failure_is_one_sentence(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = failing(monkeypatch, SECOND_HALF_OF_STEP_2, SECOND_HALF_OF_STEP_2 + 2, allocate=by_torch)
    numbers = r"^step 2 .* 1152921504606846976 bytes; [\d,]+ MiB .*batch_size \(now 3\) .*max_length \(now 1024\)$"
    with pytest.raises(UserError, match=numbers):
        train(files, tmp_path)
    assert count[0] == SECOND_HALF_OF_STEP_2 + 2


def test_without_paging_the_first_failure_is(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = failing(monkeypatch, SECOND_HALF_OF_STEP_2, allocate=by_numpy)
    with pytest.raises(UserError, match=r"^step 2 .* train.grad_checkpointing to true, .* train.paged to auto$"):
        train(files, tmp_path, paged=False, grad_checkpointing=False)
    assert count[0] == SECOND_HALF_OF_STEP_2


def test_an_update_is_never_done_twice(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    plain = AdamW.step

    def step(self: AdamW, closure: Any = None) -> Any:
        steps.append(plain(self, closure))
        by_torch()

    monkeypatch.setattr(AdamW, "step", step)
    with pytest.raises(UserError, match="step 1 needs more memory"):
        train(files, tmp_path)
    assert len(steps) == 1


def test_other_errors_pass(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = failing(monkeypatch, 4, allocate=lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train(files, tmp_path)
    assert count[0] == 4


def test_a_run_asks_whether_its_card_has_room_for_graphs(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And begins a step again without them."""
    asked: list[tuple[bool, str]] = []
    monkeypatch.setattr(prepare, "forecast", lambda *_: memory.Forecast(has_room_for_graphs=False))
    monkeypatch.setattr(prepare, "why_eager", lambda *_, has_room: asked.append((has_room, "")))
    monkeypatch.setattr(passes.Passes, "stop_capturing", lambda _, reason: asked.append((True, reason)))
    failing(monkeypatch, SECOND_HALF_OF_STEP_2, allocate=by_torch)
    monkeypatch.setattr(passes.Passes, "_without_mask", lambda *_: None)
    train(files, tmp_path, steps=2)
    (has_room, _), (_, reason) = asked
    assert not has_room and "step 2" in reason


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: illegal memory access"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_a_shortage(error: Exception, expected: bool) -> None:
    assert memory.is_out_of_memory(error) == expected
