"""Passes of a training run in CUDA graphs: over the emulator they are the eager ones, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import emulated_graphs
import emulated_torch
import pytest
import tiny_models
import torch
from emulated import Emulator
from emulated_graphs import Cuda
from helpers import same_bytes
from torch import Tensor

import qlora_native as qn
from qlora_native import lora
from qlora_native.models import fuse
from qlora_native.ops import _library, linear_cross_entropy
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.memory import OOMRetry
from qlora_native.tool.train.passes import Passes, is_random, why_eager


@pytest.fixture
def capturing(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    monkeypatch.setattr(fuse, "is_on_cpu", lambda tensor: False)  # attention is torch's
    monkeypatch.setattr(linear_cross_entropy, "CPU", linear_cross_entropy.ANY)  # and so is a dense head's product
    with emulated_graphs.graphs(emulator=emulator) as cuda:
        yield cuda


@pytest.fixture
def model(tmp_path: Any) -> Callable[[], Any]:
    folder = tiny_models.save(tmp_path / "model", dtype=torch.bfloat16)

    def make() -> Any:
        made = qn.load_model(folder, dtype=torch.bfloat16)
        lora.add_lora(made, lora.LoraConfig(r=4, seed=0))
        made.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        return made.train()

    return make


def batch(rows: int, columns: int, seed: int, padded: int = 0) -> dict[str, Tensor]:
    ids = tiny_models.tokens(rows, columns, seed)
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        mask[-1, -padded:], labels[-1, -padded:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Run:
    """Steps of two micro-batches, all of whose numbers are kept."""

    def __init__(self, model: Any, is_captured: bool) -> None:
        self.notes: list[str] = []
        self.model = model
        self.passes = Passes(model, self.notes.append, is_captured=is_captured)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = qn.optim.AdamW(self.params, lr=1e-2, max_norm=1.0)

    def step(self, number: int, shapes: list[tuple[int, int, int]]) -> list[Tensor]:
        self.passes.run(
            (batch(rows, columns, 10 * number + index, padded), 0.25 + 0.5 * index)
            for index, (rows, columns, padded) in enumerate(shapes)
        )
        grads = [p.grad.clone() for p in self.params if p.grad is not None]
        self.optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [*grads, *(p.detach().clone() for p in self.params), self.passes.loss.clone()]


@pytest.mark.usefixtures("capturing")
def test_replayed_passes_are_the_eager_ones(model: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that come again, with padding behind a row; a learning rate that falls; one shape that comes once."""
    runs = [Run(model(), is_captured) for is_captured in (False, True)]
    replays = emulated_torch.count_replays(monkeypatch)
    for number in range(5):
        shapes = [(2, 8, 0), (2, 16, 5)] if number != 3 else [(2, 8, 0), (1, 24, 0)]
        expected, got = (run.step(number, shapes) for run in runs)
        assert len(got) == len(expected)
        assert all(map(same_bytes, got, expected))
    captured = runs[1].passes
    assert not runs[1].notes and len(captured.graphs) == 2
    assert len(replays) == 3 + 2  # the third pass of a shape is captured, and replayed at once
    assert not torch.equal(expected[0], runs[0].step(9, [(2, 8, 0)])[0])


@pytest.mark.usefixtures("capturing")
def test_packed_rows(model: Callable[[], Any]) -> None:
    """Where rows begin is read off the positions, anew at every replay."""
    runs = [Run(model(), is_captured) for is_captured in (False, True)]
    for number in range(4):
        packed = batch(2, 16, number)
        del packed["attention_mask"]
        begin = 5 + number
        packed["position_ids"] = torch.cat((torch.arange(begin), torch.arange(16 - begin))).expand(2, -1).contiguous()
        packed["labels"][packed["position_ids"] == 0] = -100
        for run in runs:
            run.passes.run([(packed, 1.0)])
        assert all(map(same_bytes, *([p.grad for p in run.params] for run in runs)))
        for run in runs:
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert len(runs[1].passes.graphs) == 1 and not runs[1].notes


def test_what_cannot_be_captured_goes_on_eagerly(capturing: Cuda, model: Callable[[], Any]) -> None:
    """A mask that hides a token in front; then a model that waits for the device in its forward, which the rehearsal
    finds; and one that waits in captures alone."""
    for in_capture in (False, True):
        runs = [Run(model(), is_captured) for is_captured in (False, True)]
        for run in runs:
            in_front = batch(2, 8, 0)
            in_front["attention_mask"][0, :3], in_front["labels"][0, :3] = 0, -100
            for _ in range(4):
                run.passes.run([(in_front, 1.0)])
        assert not runs[1].passes.graphs and not runs[1].notes

        def waits(module: Any, args: Any, in_capture: bool = in_capture) -> None:
            if capturing.is_capturing or not in_capture:
                args[0].sum().item()

        for run in runs:
            run.optimizer.zero_grad()
            run.model.model.layers[0].register_forward_pre_hook(waits)
        captures: list[Any] = []
        for number in range(5):
            expected, got = (run.step(number, [(2, 8, 0)]) for run in runs)
            assert all(map(same_bytes, got, expected))
            captures.append(runs[1].passes.pool)
        assert len(runs[1].notes) == 1 and not runs[1].passes.is_captured
        assert capturing.current is capturing.default and not capturing.underway
        assert captures == [None] * 5
        assert (__file__ in runs[1].notes[0]) is not in_capture


def test_the_memory_of_graphs_is_free_once_they_are_dropped(capturing: Cuda, model: Callable[[], Any]) -> None:
    run, eager = Run(model(), True), Run(model(), False)
    for number in range(4):
        run.step(number, [(2, 8, 0)]), eager.step(number, [(2, 8, 0)])
    assert len(run.passes.graphs) == 1 and sum(capturing.users.values()) == 2
    run.passes.stop_capturing("memory ran out")
    run.passes.stop_capturing("again")
    assert sum(capturing.users.values()) == 0 and len(run.notes) == 1
    assert all(map(same_bytes, run.step(5, [(2, 8, 0)]), eager.step(5, [(2, 8, 0)])))
    assert not run.passes.graphs


def test_a_step_that_runs_out_of_memory_begins_again_without_graphs(capturing: Cuda, model: Callable[[], Any]) -> None:
    """On a card that has no room beside their memory."""
    run, eager = Run(model(), True), Run(model(), False)
    for number in range(3):
        run.step(number, [(2, 8, 0)]), eager.step(number, [(2, 8, 0)])
    assert run.passes.graphs
    retry = OOMRetry(config(), run.optimizer, print, run.passes.stop_capturing, can_retry=True)

    def step() -> list[Tensor]:
        if sum(capturing.users.values()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run.step(3, [(2, 24, 0)])

    assert all(map(same_bytes, retry.run(step, "step 4"), eager.step(3, [(2, 24, 0)])))
    assert retry.retries == 1 and len(run.notes) == 1 and not run.passes.is_captured


def config(**options: Any) -> TrainConfig:
    return TrainConfig(model="m", data={"train": "t"}, train=options)


def test_when_passes_are_captured(model: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "module_for", lambda device: device.type == "cuda" or None)
    made = model()
    on_cuda = SimpleNamespace(device=torch.device("cuda"), config=made.config, modules=made.modules)
    assert why_eager(config(), on_cuda) is None
    assert why_eager(config(), made) == "" == why_eager(config(cuda_graph="off"), on_cuda)
    assert config(cuda_graph=False).train.cuda_graph == "off"  # as YAML reads the word
    assert why_eager(config(), on_cuda, world=2) and why_eager(config(), on_cuda, has_room=False)
    assert not is_random(made)
    next(m for m in made.modules() if isinstance(m, lora.LoRALinear)).dropout = 0.1
    assert is_random(made) and why_eager(config(), on_cuda)
    assert why_eager(config(grad_checkpointing=False), on_cuda) is None
    made = model()
    made.config.attention_dropout = 0.1
    assert is_random(made)
