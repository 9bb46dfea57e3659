"""Models larger than a card: decoder layers whose 4-bit weights lie in pinned host memory and visit the device in turn.

The tensors of a streamed layer are views of one of a few slots of device memory, always the same one, so that whatever
holds their addresses (views that autograd saved, tables, caches) stays right. The layer's bytes are there only while it
has its turn, which a hook begins: before its forward pass, before a checkpoint's recomputation, before its backward
pass. A slot is filled by one copy on a stream of its own, ahead of the turn, in the order of a
:class:`qlora_native.models.residency.Residency`. The host waits for nothing: the copy waits for the kernels that were
queued to read the slot's bytes of before, the kernels of a turn for their copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qlora_native._memory import free_device_memory
from qlora_native.calibration.layers import decoder_layers
from qlora_native.errors import UserError
from qlora_native.models.load import load_model
from qlora_native.models.residency import Residency, Unit, plan_residency
from qlora_native.nn.experts import QuantizedExperts
from qlora_native.nn.linear import QuantizedLinear
from qlora_native.ops import _cuda_kernels
from qlora_native.ops._library import module_for
from qlora_native.weight import quantize
from qlora_native.weights.open import open_source
from qlora_native.weights.shapes import OUTPUT_EMBEDDING, ModelShapes
from qlora_native.weights.stream import AUTO

ALIGNMENT = 256  # bytes, of each tensor in a slot; torch's allocator begins its blocks so
FOR_WEIGHTS = 0.75  # of the device's free bytes; the rest is for what passes need


def frozen_parts(layer: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, name, tensor) of the 4-bit weights in a layer: codes and scales."""
    for module in layer.modules():
        if isinstance(module, (QuantizedLinear, QuantizedExperts)):
            for name, tensor in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                if name != "bias" and not tensor.requires_grad:
                    yield module, name, tensor


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def layer_units(layers: Sequence[nn.Module]) -> list[Unit]:
    """The layers as units of a plan, by the bytes that each takes of a slot; the meta device is enough."""
    return [
        Unit(str(number), sum(_padded(tensor.nbytes) for _, _, tensor in frozen_parts(layer)))
        for number, layer in enumerate(layers)
    ]


@dataclass(eq=False)
class _Slot:
    memory: Tensor  # uint8 on the device
    unit: int | None = None  # whose bytes it holds, or will when `copied` has come
    copied: Any = None  # event
    readers: set[Any] = field(default_factory=set)  # streams on which kernels may read these bytes


class StreamedLayers:
    """The layers of a model on a device; those that ``residency`` names stream.

    One pass at a time: two threads that run the model at once would take the slots from each other.

    Attributes:
        residency: the plan; its units are the decoder layers.
        bytes_copied: to the device so far.
    """

    def __init__(
        self, layers: Sequence[nn.Module], residency: Residency, device: torch.device
    ) -> None:
        self.residency, self.device = residency, device
        self.layers = list(layers)
        self.bytes_copied = 0
        self._wanted = {training: residency.wanted(training) for training in (False, True)}
        self._copies = torch.cuda.Stream(device)
        # Thus the memory is not reused before this stream's copies.
        with torch.cuda.stream(self._copies):
            new = partial(torch.empty, residency.slot_bytes, dtype=torch.uint8, device=device)
            self._slots = [_Slot(new()) for _ in range(residency.slots)]
        self._host = {unit: self._move_to_host(unit) for unit in residency.streamed}
        for unit, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(self.visit, unit))
            layer.register_forward_hook(partial(self._watch, unit))

    def _slot_of(self, unit: int) -> _Slot:
        return self._slots[self.residency.streamed.index(unit) % len(self._slots)]

    def _move_to_host(self, unit: int) -> Tensor:
        """Moves a layer's weights into pinned memory, which is returned, and makes its tensors views of its slot."""
        layer, memory, size = (
            self.layers[unit],
            self._slot_of(unit).memory,
            self.residency.units[unit].num_bytes,
        )
        home = partial(self.home, unit)
        host, at = _pinned(size, self.device), 0
        for module, name, tensor in list(frozen_parts(layer)):
            place = slice(at, at + tensor.nbytes)
            host[place].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            view = memory[place].view(tensor.dtype).view(tensor.shape)
            if name in module._parameters:
                tensor.data = view
            else:
                module._buffers[name] = view
            module.at_home = home  # type: ignore[assignment]
            at += _padded(tensor.nbytes)
        layer._apply = partial(self._apply, layer)  # type: ignore[method-assign]
        return host

    def home(self, unit: int, tensor: Tensor) -> Tensor:
        """The bytes in host memory of a tensor in a layer's slot, at any time; any other tensor as it is."""
        if tensor.numel() == 0:  # it has no address
            return torch.empty_like(tensor, device="cpu")
        at = tensor.data_ptr() - self._slot_of(unit).memory.data_ptr()
        if not 0 <= at < self.residency.slot_bytes:
            return tensor
        return self._host[unit][at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _apply(
        self, layer: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> nn.Module:
        """What moves or casts a module must leave the slots where they are."""
        memory = self._slots[0].memory[:1]
        if fn(memory).data_ptr() != memory.data_ptr():
            raise RuntimeError(
                f"a model whose layers stream to {self.device} cannot be moved: load it again."
            )
        return type(layer)._apply(layer, fn, recurse)

    def _watch(self, unit: int, _module: nn.Module, _args: Any, output: Any) -> None:
        """Without checkpointing, the backward pass comes to a layer by the gradient of its output."""
        for tensor in tree_leaves(output) if torch.is_grad_enabled() else ():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self.visit, unit))

    def visit(self, unit: int, *_: Any) -> None:
        """Begin a layer's turn: what the current stream is given from now on may read its weights.

        RuntimeError while a CUDA graph is captured.
        """
        if _cuda_kernels.is_capturing(self.device):
            raise RuntimeError(
                f"layers stream to {self.device}, which a CUDA graph cannot hold: run without graphs."
            )
        is_backward = torch._C._current_graph_task_id() != -1
        schedule = self._wanted[is_backward or self.layers[unit].training]
        stream = torch.cuda.current_stream(self.device)
        taken: set[_Slot] = set()  # by what is used sooner
        for wanted in schedule[-1 - unit if is_backward else unit]:
            slot = self._slot_of(wanted)
            if slot in taken:
                break
            taken.add(slot)
            self._fetch(wanted, slot)
        if unit in self._host:
            slot = self._slot_of(unit)
            stream.wait_event(slot.copied)
            slot.readers.add(stream)

    def _fetch(self, unit: int, slot: _Slot) -> None:
        if slot.unit == unit:
            return
        for stream in slot.readers:
            self._copies.wait_stream(stream)
        host = self._host[unit]
        with torch.cuda.stream(self._copies):
            # By `data`, which has a version of its own: what autograd saved of another layer is not spoiled by it.
            slot.memory.data[: host.numel()].copy_(host, non_blocking=True)
            slot.copied = self._copies.record_event()
        slot.unit, slot.readers = unit, set()
        self.bytes_copied += host.numel()

    def __str__(self) -> str:
        plan = self.residency
        return (
            f"{len(plan.streamed)} of {len(self.layers)} layers stream through {plan.slots} slots on {self.device}: "
            f"{plan.num_bytes / 2**20:,.0f} MiB of 4-bit weights there, {plan.streamed_bytes / 2**20:,.0f} MiB in "
            f"pinned memory, {plan.bytes_read() / 2**20:,.0f} MiB copied a training pass"
        )


def _pinned(num_bytes: int, device: torch.device) -> Tensor:
    """Page-locked memory, uint8. Torch's own rounds sizes up to powers of two, up to twice as much."""
    module = module_for(device)
    if module is None:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    form = -(-num_bytes // 4), 1, False  # of states in fp32
    try:
        store = module.PinnedStore([form], module.pinned_page_bytes, num_bytes)
    except RuntimeError as error:
        raise UserError(
            f"streamed layers: {error} Give the model a larger budget of the device, or free memory of the host: "
            "what is pinned cannot be swapped out."
        ) from None
    return torch.frombuffer(store, dtype=torch.uint8, count=num_bytes)


def stream_layers(
    model: Any, device: torch.device | str = "cuda", budget: int | None = None
) -> StreamedLayers | None:
    """Put a model in host memory on a device that is too small for it; None if it fits.

    As many decoder layers as ``budget`` allows stay on the device; the 4-bit weights of the others lie in pinned host
    memory and are copied for their turn, forward and backward, in training as in generation. Results are those of a
    model that is all there, bit for bit. Everything else of the model goes to the device. CUDA graphs are refused;
    ``state_dict`` reads the host's copies.

    Args:
        model: from :func:`qlora_native.load_model` with ``device="cpu"``, before or after adapters are added; changed
            in place, and kept as ``model.streamed_layers``.
        device: a CUDA device.
        budget: bytes of the device for the 4-bit weights of all layers; by default what is free, less all else of the
            model and a quarter of the rest for what passes need.

    Raises:
        ValueError: two slots do not fit the budget.
        UserError: the model has no list of decoder layers.
    """
    where = _with_number(device)
    layers = list(dict.fromkeys(decoder_layers(model)[1]))
    units = layer_units(layers)
    if budget is None:
        inside = sum(unit.num_bytes for unit in units)
        rest = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - inside
        budget = int(FOR_WEIGHTS * (free_device_memory(where).bytes - rest))
    residency = plan_residency(units, budget)
    streamed = StreamedLayers(layers, residency, where) if residency.streamed else None
    model.to(where)
    model.streamed_layers = streamed
    report = getattr(model, "load_report", None)
    if report is not None:
        model.load_report = replace(report, bytes_mapped=0)  # files may change from now on
    return streamed


def load_to_device(
    path: Any,
    *,
    device: torch.device | str | None = None,
    note: Callable[[str], object] = lambda line: None,
    **options: Any,
) -> Any:
    """:func:`qlora_native.load_model` for inference on a CUDA device; where the weights have no room, layers stream.

    Whether they have is predicted. ``note`` gets one line about streaming. Without a device it is load_model alone.
    """
    if device is None:
        return load_model(path, **options)
    where, source = _with_number(device), open_source(path)
    is_kept = options.get("method") is None and source.keeps(options.get("quant_type", AUTO))
    if source.has_four_bit_weights or is_kept:
        num_bytes = sum(file.stat().st_size for file in source.files)
    else:
        num_bytes = _rounded_bytes(source, options)
    if num_bytes <= FOR_WEIGHTS * free_device_memory(where).bytes:
        return load_model(source, device=where, **options)
    model = load_model(source, device="cpu", **options)
    streamed = stream_layers(model, where)
    if streamed is not None:
        note(f"the model is larger than the device: {streamed}")
    return model


def _rounded_bytes(source: Any, options: dict[str, Any]) -> int:
    """Of a 16-bit model whose linear layers are rounded to 4 bits on loading."""
    form = {"block_size": 64} | {
        name: options[name] for name in ("block_size", "double_quant") if name in options
    }
    skip = options.get("skip_modules")
    meta = ModelShapes(source.config, options.get("dtype", torch.bfloat16))
    chosen = meta.four_bit_weights((OUTPUT_EMBEDDING,) if skip is None else skip, form["block_size"])
    return sum(
        quantize(tensor, **form).nbytes if name in chosen else tensor.nbytes
        for name, tensor in meta.shapes.items()
    )


def _with_number(device: torch.device | str) -> torch.device:
    """A CUDA device without one is the current one."""
    return torch.empty(0, device=device).device
