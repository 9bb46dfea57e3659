"""Layers that stream to a device, over the emulator: the bits of a resident model, whatever order streams run in.

Every proof is given defects that it must report.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated_torch
import pytest
import runs
import tiny
import tiny_models
import torch
from adapters import make_adapter
from emulated import Emulator
from emulated_torch import Stream
from helpers import gguf_weight, same_bytes
from safetensors.torch import load_file
from sentences import Check
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import qlora_native as qn
from qlora_native.errors import UserError
from qlora_native.models import decode, device_layers, fuse
from qlora_native.models.build import four_bit_parts
from qlora_native.models.device_layers import StreamedLayers, stream_layers
from qlora_native.models.loss import causal_lm_loss, check_loss
from qlora_native.nn.experts import QuantizedExperts, by_expert
from qlora_native.ops import _cuda_kernels, linear_cross_entropy
from qlora_native.tool.cli import main
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.estimate import Estimator, Setting
from qlora_native.tool.estimate.memory import CUDA_CONTEXT
from qlora_native.tool.train import memory, prepare
from qlora_native.tool.train.loop import Trainer
from qlora_native.tool.train.passes import why_eager
from qlora_native.weights.files import mapped_part
from qlora_native.weights.open import open_source

LAYERS, STEPS, PROMPT = 5, 2, 4
GGUF_TYPES = (("q4_k", "q6_k"), ("q4_0", "q5_1"))  # of 256 columns, and of others
IDS = [tiny_models.tokens(1, 8, number) for number in range(STEPS)]  # the host's: a mode would draw them again


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "is_on_cpu", lambda tensor: False)  # attention is torch's
    monkeypatch.setattr(linear_cross_entropy, "CPU", linear_cross_entropy.ANY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_models.save(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, num_hidden_layers=LAYERS)


def make(folder: Any, slots: int, checkpointing: bool = True, training: bool = True) -> Any:
    """The model with adapters that are not zero; with two slots, plain scales and rows of tokens that are trained."""
    model = qn.load_model(folder, dtype=torch.bfloat16, double_quant=slots != 2)
    qn.add_lora(model, qn.LoraConfig(r=4, seed=0, trainable_tokens=[3, 9] if slots == 2 else []))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    check_loss(model)  # which runs it
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model.train(training)


def stream(emulator: Emulator, model: Any, slots: int, resident: int = 0) -> StreamedLayers:
    """Streams it with so many slots, and layers that stay."""
    unit = device_layers.layer_units(model.model.layers)[0].num_bytes
    streamed = stream_layers(model, "cpu", (resident + slots) * unit)
    with _disable_current_modes():
        emulator.module.synchronize(emulator.stream)  # the host's own copies, which are not late
    assert streamed is not None and streamed.residency.slots == slots
    assert len(streamed.residency.streamed) == len(model.model.layers) - resident
    return streamed


def train(model: Any) -> list[Tensor]:
    """Losses and gradients of some passes."""
    found = []
    for ids in IDS:
        loss = causal_lm_loss(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        found.append(loss.detach())
    return [*found, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def generate(model: Any) -> list[Tensor]:
    return [model.generate(IDS[0][:, :PROMPT], max_new_tokens=4, do_sample=False)]


Work = Callable[[Any], list[Tensor]]
WAYS: dict[str, tuple[Work, bool]] = {
    "checkpoints": (train, True),
    "all kept": (train, False),
    "generate": (generate, True),
}


def made_for(way: str, folder: Any, slots: int) -> tuple[Work, Any]:
    work, checkpointing = WAYS[way]
    return work, make(folder, slots, checkpointing, work is train)


@pytest.fixture(scope="module")
def resident(folder: Any) -> Callable[[str, int], list[Tensor]]:
    """What a model does that is all there, once for each way and number of slots."""

    @cache
    def run(way: str, slots: int) -> list[Tensor]:
        work, model = made_for(way, folder, slots)
        return work(model)

    return run


def run_streamed(
    emulator: Emulator, work: Work, model: Any, seed: int = 1, slots: int = 2, stay: int = 0
) -> tuple[list[Tensor], StreamedLayers]:
    with emulated_torch.late(emulator, seed):
        streamed = stream(emulator, model, slots, stay)
        return work(model), streamed


def most_bytes(streamed: StreamedLayers, passes: int) -> int:
    """Copied at most, if each byte moves once a pass, and those at the turns not at all."""
    plan = streamed.residency
    a_pass = plan.bytes_read() if streamed.layers[0].training else plan.streamed_bytes
    return plan.slots * plan.slot_bytes + passes * a_pass


@pytest.mark.parametrize(("slots", "stay"), [(3, 1), (2, 0)])
@pytest.mark.parametrize("way", WAYS)
def test_streamed_layers_give_the_bits_of_resident_ones(
    emulator: Emulator, folder: Any, resident: Callable[..., list[Tensor]], way: str, slots: int, stay: int
) -> None:
    """Forward and backward passes, by the losses and the adapters' gradients, and whole generations."""
    expected = resident(way, slots)
    passes = expected[0].shape[1] - PROMPT if way == "generate" else STEPS
    for seed in (1, 2):
        got, streamed = run_streamed(emulator, *made_for(way, folder, slots), seed, slots, stay)
        assert len(got) == len(expected) > 0 and all(map(same_bytes, got, expected))
        assert streamed.bytes_copied <= most_bytes(streamed, passes)
        plan = streamed.residency
        assert plan.bytes_read() == 2 * (plan.streamed_bytes - slots * plan.slot_bytes) > 0


def _stale(record: Callable[[Stream], int]) -> Callable[[Stream], int]:
    """The event before the one that was recorded."""
    last: dict[Stream, int] = {}

    def before(stream: Stream) -> int:
        event = record(stream)
        found, last[stream] = last.get(stream, event), event
        return found

    return before


def _copy_again(fetch: Callable[..., None]) -> Callable[..., None]:
    def again(streamed: StreamedLayers, unit: int, slot: Any) -> None:
        slot.unit = None
        fetch(streamed, unit, slot)

    return again


DEFECTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "a slot is read before its copy has ended": (Stream, "wait_event", lambda _: lambda *_: None),
    "a slot is overwritten while it is read": (Stream, "wait_stream", lambda _: lambda *_: None),
    "the events of two copies are swapped": (Stream, "record_event", _stale),
    "bytes are copied twice": (StreamedLayers, "_fetch", _copy_again),
    "a backward pass does not say that it comes": (StreamedLayers, "_watch", lambda _: lambda *_: None),
    "all layers take one slot": (StreamedLayers, "_slot_of", lambda _: lambda streamed, unit: streamed._slots[0]),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_reported(
    emulator: Emulator, folder: Any, resident: Callable[..., list[Tensor]], defect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, change = DEFECTS[defect]
    expected = resident("all kept", 2)
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    for seed in range(1, 13):
        got, streamed = run_streamed(emulator, *made_for("all kept", folder, 2), seed)
        if not all(map(same_bytes, got, expected)) or streamed.bytes_copied > most_bytes(streamed, STEPS):
            return
    pytest.fail("nothing was noticed")


@pytest.mark.parametrize("kind", ["experts", "blocks of GGUF"])
def test_other_weights(emulator: Emulator, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts take turns on a GPU, so they do on both sides."""
    monkeypatch.setattr(QuantizedExperts, "forward", lambda self, *x: by_expert(self, *x, product=self._product))
    has_experts = kind == "experts"
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2} if has_experts else {"hidden_size": 256}
    name = "Mixtral" if has_experts else "Llama"
    path = tiny_models.save(tmp_path / "model", name, torch.bfloat16, num_hidden_layers=4, **sizes)

    def made() -> Any:
        model = qn.load_model(path, dtype=torch.bfloat16)
        torch.manual_seed(3)
        for layer in tiny_models.four_bit_layers(model).values() if not has_experts else ():
            kind = GGUF_TYPES[layer.in_features % 256 > 0][layer.out_features > 128]
            layer.quantized = gguf_weight(kind, (layer.out_features, layer.in_features))
        qn.add_lora(model, qn.LoraConfig(r=4, seed=0, target_modules=["q_proj"] if has_experts else "all-linear"))
        check_loss(model)
        return model.train()

    expected = train(made())
    got, _ = run_streamed(emulator, train, made())
    assert len(got) > STEPS + 4 and all(map(same_bytes, got, expected))


def test_a_mapped_file_is_copied_once(emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into pinned memory that nothing wrote before, neither zeros nor a tensor in between."""
    from gguf_files import write_gguf

    model = qn.load_model(write_gguf(tmp_path / "model.gguf", num_hidden_layers=3), quant_type="keep")
    parts = [tensor for layer in model.model.layers for *_, tensor in device_layers.frozen_parts(layer)]
    blocks = [tensor for tensor in parts if tensor.nbytes]
    assert sum(mapped_part(tensor) is not None for tensor in blocks) > len(blocks) / 2  # not q and k: other rows
    expected = sorted(tensor.data_ptr() for tensor in parts)
    sources = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                sources.append(args[1].data_ptr())
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(device_layers, "module_for", lambda device: emulator.module)
    unit = max(unit.num_bytes for unit in device_layers.layer_units(model.model.layers))
    with emulated_torch.late(emulator, 1), Copies():
        assert stream_layers(model, "cpu", 2 * unit) is not None
    assert sorted(sources) == expected
    assert (device_layers._pinned(4096, torch.device("cpu")) == 0xFF).all()  # as the emulator gives it


def test_passes_on_two_streams(emulator: Emulator, folder: Any) -> None:
    """That nothing orders: a copy waits for the readers on both."""
    model = make(folder, 2, training=False)
    with torch.no_grad():
        expected = [model(ids, use_cache=False).logits for ids in IDS]
    for seed in (1, 2, 3):
        model = make(folder, 2, training=False)
        with emulated_torch.late(emulator, seed), torch.no_grad():
            stream(emulator, model, 2)
            got = []
            for ids in IDS:
                with torch.cuda.stream(torch.cuda.Stream("cpu")):
                    got.append(model(ids, use_cache=False).logits)
        assert all(map(same_bytes, got, expected))


def test_a_pass_that_stops_halfway(emulator: Emulator, folder: Any, resident: Callable[..., list[Tensor]]) -> None:
    """As for want of memory, which is followed by another attempt."""
    model = make(folder, 3)
    with emulated_torch.late(emulator, 1):
        stream(emulator, model, 3, 1)
        with model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
            train(model)
        got = train(model)
    assert all(map(same_bytes, got, resident("checkpoints", 3)))


def test_what_looks_at_weights_outside_a_pass(emulator: Emulator, folder: Any) -> None:
    """Their values are the layer's, whoever's bytes lie in its slot; nothing moves or casts them."""
    plain, model = make(folder, 2), make(folder, 2)
    run_streamed(emulator, train, model)
    tiny_models.assert_same(model.state_dict(), plain.state_dict())
    expected = four_bit_parts(plain)
    for name, weight in four_bit_parts(model.half()).items():
        assert same_bytes(weight.dequantize(torch.float32), expected[name].dequantize(torch.float32))
    with pytest.raises(RuntimeError, match="cannot be moved"):
        model.to("meta")


def test_graphs_are_refused(emulator: Emulator, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(folder, 2)
    assert stream_layers(model, "cpu", 1 << 30) is None and model.streamed_layers is None  # it fits
    with emulated_torch.late(emulator, 1):
        stream(emulator, model, 2)
        monkeypatch.setattr(_cuda_kernels, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="CUDA graph cannot hold"):
            model(IDS[0])
    on_cuda = SimpleNamespace(device=torch.device("cuda"), streamed_layers=model.streamed_layers)
    assert why_eager(TrainConfig(model="m", data={"train": "t"}), on_cuda) == "layers stream to the device"
    with pytest.raises(ValueError, match="budget of 0 MiB"):
        stream(emulator, make(folder, 2), 1)


def test_memory_that_cannot_be_pinned_is_one_sentence(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, sentence: Check
) -> None:
    """With advice for layers, not for the states of an optimizer, which lie in the same store."""
    module = emulator.module
    monkeypatch.setattr(device_layers, "module_for", lambda device: module)
    with pytest.raises(UserError) as refused:
        device_layers._pinned(1 << 60, torch.device("cpu"))
    sentence(refused.value)


def test_a_run_that_does_not_fit_streams_by_itself(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same losses and the same adapter, and one line that says so. The card is the estimate less two layers."""
    files = runs.write_files(tmp_path, num_hidden_layers=LAYERS)
    monkeypatch.setattr(device_layers, "stream_layers", lambda model, _, budget: stream_layers(model, "cpu", budget))

    def train_on(fits: bool, out: str) -> list[dict[str, Any]]:
        train = {"steps": 2, "batch_size": 2, "seed": 0, "cuda_graph": "off"}
        config = TrainConfig.from_values(runs.settings(files, tmp_path / out, **train))
        with monkeypatch.context() as patch, emulated_torch.streams(emulator):

            def small(config: TrainConfig, source: Any, *_: int) -> memory.Forecast:
                estimator = Estimator(source, Setting.from_config(config, "cuda", 1 << 20, 8))
                estimate = estimator.at()
                layers = sum(unit.num_bytes for unit in device_layers.layer_units(estimator.modules))
                return memory.fit(estimator, estimate.total + estimate.reserve - (0 if fits else layers // 5))

            patch.setattr(prepare, "forecast", small)
            Trainer(config).train()
        return runs.metrics(tmp_path / out)

    expected, whole = train_on(True, "whole"), capsys.readouterr().out
    got, streamed = train_on(False, "streamed"), capsys.readouterr().out
    assert got == expected
    line = "the model is larger than the device: 4 of 5 layers stream through 3 slots on cpu"
    assert line in streamed and line not in whole
    adapters = [load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("whole", "streamed")]
    tiny_models.assert_same(*adapters)


def test_chat_and_eval_stream_by_themselves(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers and losses are those of a model that fits, one rounded on loading and one that is 4-bit in its files."""
    tiny.write_model(tmp_path / "model", num_hidden_layers=LAYERS)
    make_adapter(tmp_path / "model", tmp_path / "adapter")
    tiny.write_rows(tmp_path / "rows.jsonl", 2)
    model: Any = qn.load_model(tmp_path / "model")
    model.save_pretrained(tmp_path / "four")
    tiny.write_tokenizer(tmp_path / "four")
    units = device_layers.layer_units(model.model.layers)
    rest = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    little = rest - units[0].num_bytes  # of which three quarters are for weights: two layers beside the slots
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(device_layers, "_with_number", lambda device: torch.device("cpu"))
    monkeypatch.setattr(decode, "why_not_captured", lambda model: "")  # a static cache rounds otherwise

    def printed(free: int) -> tuple[Any, Any, str]:
        monkeypatch.setattr(device_layers, "free_device_memory", lambda device: SimpleNamespace(bytes=free))
        with emulated_torch.streams(emulator):
            adapter = ["--adapter", str(tmp_path / "adapter")]
            words = ["chat", str(tmp_path / "model"), *adapter, "--prompt", "what is red?", "--max-tokens", "4"]
            assert main.main([*words, "--json"]) == 0
            chat = capsys.readouterr()
            words = ["eval", str(tmp_path / "four"), *adapter, "--data", str(tmp_path / "rows.jsonl"), "--json"]
            assert main.main(words) == 0
        texts = [answer["text"] for answer in json.loads(chat.out)["answers"]]
        sides = [side["texts"] for side in json.loads(capsys.readouterr().out)["sides"]]
        return texts, sides, chat.err

    streamed: list[StreamedLayers] = []
    init = StreamedLayers.__init__

    def made(layers: StreamedLayers, *args: Any) -> None:
        streamed.append(layers)
        init(layers, *args)

    monkeypatch.setattr(StreamedLayers, "__init__", made)
    *expected, words = printed(1 << 40)
    assert not streamed and "stream through" not in words
    *got, words = printed(little)
    assert got == expected and "layers stream through" in words
    assert len(streamed) == 3 and all(each.bytes_copied for each in streamed)  # chat, the 4-bit form, with an adapter


def test_a_forecast_asks_what_the_card_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number, which torch wants; what is free decides."""
    files = runs.write_files(tmp_path, num_hidden_layers=LAYERS)
    config, free = TrainConfig.from_values(runs.settings(files, tmp_path / "out")), [1 << 40]

    def free_memory(device: torch.device) -> Any:
        assert device == torch.device("cuda", 0)
        return SimpleNamespace(bytes=free[0])

    monkeypatch.setattr(memory, "free_device_memory", free_memory)
    for name, value in {"is_available": True, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    source = open_source(files / "model")
    found = memory.forecast(config, source, 8, 2)  # rows, fewer than batch_size
    assert found.estimate is not None and found.estimate.setting.batch_size == 2
    found = memory.forecast(config, source, 8)
    assert found.layers_budget is None and not found.reason and found.estimate is not None
    free[0] = found.estimate.total + CUDA_CONTEXT - 1000  # without graphs
    found = memory.forecast(config, source, 8)
    assert found.layers_budget is not None and not found.reason
    assert found.estimate is not None and found.estimate.total + CUDA_CONTEXT <= free[0]
