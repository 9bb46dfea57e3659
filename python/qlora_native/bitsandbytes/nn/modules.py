"""Linear layers over 4-bit weights, and the parameter that is quantized when it is moved to a device."""

from __future__ import annotations

import copy
import logging
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.bitsandbytes import functional
from qlora_native.bitsandbytes.state import QuantState

logger = logging.getLogger(__name__)
_OPTIONS = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
_CASTS = (Tensor.half, Tensor.bfloat16, Tensor.float, Tensor.double)  # of module.half() and its like


def _of_state(path: str) -> property:
    """A read-only attribute of the quant state, for FSDP, which walks the keys of a state_dict by attribute."""
    return property(attrgetter(f"quant_state.{path}"))


class Params4bit(nn.Parameter):
    """A frozen parameter that becomes 4-bit when it is moved to a device, and stays so.

    Args:
        data: the dense tensor, or packed bytes with ``bnb_quantized``.
        requires_grad: False; packed bytes have no gradient.
        quant_state: of bytes that are packed already.
        blocksize, compress_statistics, quant_type, quant_storage: as ``functional.quantize_4bit``; blocksize is 64
            by default.
        module: the layer whose attribute ``quant_state`` follows this one's.
        bnb_quantized: ``data`` is packed.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: nn.Module | None

    absmax = _of_state("absmax")
    code = _of_state("code")
    quant_map = code
    offset = _of_state("offset")
    state2 = _of_state("state2")
    nested_absmax = _of_state("state2.absmax")
    nested_blocksize = _of_state("state2.blocksize")
    nested_quant_map = _of_state("state2.code")
    nested_dtype = _of_state("state2.dtype")
    nested_offset = offset

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        self: Params4bit = torch.Tensor._make_subclass(
            cls, torch.empty(0) if data is None else data, requires_grad
        )
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """The parameter from packed bytes and the other tensors of a state_dict (see docs/format.md)."""
        state = QuantState.from_dict(quantized_stats, device=device)
        options = (state.blocksize, state.nested, state.quant_type or "", data.dtype, module, True)
        self = cls(data.to(device), requires_grad, state, *options)
        self._update_module()
        return self

    def _attributes(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in (*_OPTIONS, "quant_state", "module", "bnb_quantized")
        }

    def _update_module(self) -> None:
        if self.module is not None:
            self.module.quant_state = self.quant_state  # type: ignore[assignment]

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """Quantize on the device, if this is dense still, in place; else move bytes and scales.

        A dtype is not taken by what is packed: bytes are no numbers to cast.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "meta" and not self.bnb_quantized:
            options = {name: getattr(self, name) for name in _OPTIONS}
            self.data, self.quant_state = functional.quantize_4bit(self.data.to(device), **options)
            self.bnb_quantized = True
            self._update_module()
            return self
        if self.quant_state is not None and device is not None:
            self.quant_state.to(device)
        moved = super().to(
            device=device, dtype=None if self.bnb_quantized else dtype, non_blocking=non_blocking
        )
        return type(self)(moved, self.requires_grad, **self._attributes())

    def cpu(self) -> Params4bit:  # type: ignore[override]
        """:meth:`to` the CPU."""
        return self.to(device="cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Params4bit:  # type: ignore[override]
        """:meth:`to` a CUDA device."""
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), (self.data, self.requires_grad), self._attributes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        # The layer's copy, if it is that which is copied.
        module = memo.get(id(self.module), self.module)
        attributes = copy.deepcopy({**self._attributes(), "module": None}, memo)
        return type(self)(
            copy.deepcopy(self.data, memo), self.requires_grad, **{**attributes, "module": module}
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS and isinstance(args[0], cls) and args[0].bnb_quantized:
            return args[0]  # bytes under a float dtype are no numbers to cast
        result = super().__torch_function__(func, types, args, kwargs or {})
        # FSDP2 shards with these, and reads the attributes of the pieces.
        if func in (torch.chunk, torch.split):
            whole = args[0]
            return tuple(cls(piece, whole.requires_grad, **whole._attributes()) for piece in result)
        return result


class Linear4bit(nn.Linear):
    """y = x W^T + bias with W frozen in 4 bits, once the layer has been moved to a device.

    Load dense weights first and move then, ``layer.to(device)``, which quantizes; or load a state_dict that is 4-bit.
    Evaluation and training compute the same; the weight's bytes never change.

    Args:
        input_features, output_features, bias, device: as nn.Linear.
        compute_dtype: x is cast to it, and y back to x's dtype; by default the dtype of the first input.
        compress_statistics, quant_type, quant_storage: as ``functional.quantize_4bit``.
    """

    weight: Params4bit

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        options = (compress_statistics, quant_type, quant_storage)
        self.weight = Params4bit(self.weight.data, False, None, None, *options, module=self)
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage

    def set_compute_type(self, x: Tensor) -> None:
        """Compute in the dtype of the first input; float16 leaves ``compute_dtype`` as it is."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        elif x.dtype == torch.float16 and self.compute_dtype == torch.float32:
            logger.warning(
                "Linear4bit: float16 inputs are computed in float32, as compute_dtype says: slower."
            )

    def _state(self) -> QuantState:
        """The weight's quant state; taken from the layer where a wrapper such as FSDP has made a plain parameter."""
        state: QuantState | None = getattr(self.weight, "quant_state", None)
        if state is None:
            state = self.quant_state
            storage = self.quant_storage
            if state is None:
                raise RuntimeError(
                    f"{type(self).__name__}({self.in_features}, {self.out_features}): the weight is not 4-bit yet: "
                    "move the layer to a device with .to(device) first, which quantizes it."
                )
            self.weight = Params4bit(
                self.weight, False, state, quant_storage=storage, module=self, bnb_quantized=True
            )
        return state

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features] in x's dtype."""
        state = self._state()
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        compute = self.compute_dtype or x.dtype
        if self.bias is not None and self.bias.dtype != compute:
            self.bias.data = self.bias.data.to(compute)
        return functional.matmul_4bit(x.to(compute), self.weight.data, state, bias=self.bias).to(
            x.dtype
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state: QuantState | None = getattr(self.weight, "quant_state", None)
        if state is not None:
            for name, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{name}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        name = f"{prefix}weight"
        parts = {key: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
        ours: set[str] = {name, *parts} if parts else set()
        rest = {key: value for key, value in state_dict.items() if key not in ours}
        super()._load_from_state_dict(rest, prefix, *others)
        if not parts or name not in state_dict:
            return
        _, _, missing_keys, _, error_msgs = others
        missing_keys.remove(name)
        stored = state_dict[name]
        device = stored.device if self.weight.device.type == "meta" else self.weight.device
        try:
            self.weight = Params4bit.from_prequantized(stored, parts, device=device, module=self)
        except ValueError as error:
            error_msgs.append(f"{name}: {error}")


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` of type NF4."""

    __init__ = functional.without(Linear4bit.__init__, "quant_type", "nf4")


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` of type FP4."""

    __init__ = functional.without(Linear4bit.__init__, "quant_type", "fp4")
