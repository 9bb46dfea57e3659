"""Drop-in layers over a quantized weight: QuantizedLinear, with bitsandbytes' state_dict, and QuantizedEmbedding."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import _native, functional, weight
from qlora_native.ops._direct import unobserved
from qlora_native.ops._operands import Weight, is_sharded
from qlora_native.ops.linear_4bit import Matrix, Prepared, linear_4bit, product
from qlora_native.ops.lora_linear_4bit import adapted_at_once, lora_linear_4bit
from qlora_native.weight import QuantizedWeight, bnb_state_key, from_bnb, pack_json, read_state, to_bnb

_SCALES = weight.TENSOR_FIELDS[1:]


class KeepsBits(nn.Module):
    """A module whose scales, buffers with the names of a weight's tensors, keep their values in a cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = [(name, buffer) for name, buffer in self._buffers.items() if name.endswith(_SCALES)]
        super()._apply(fn, recurse)
        for name, exact in before:
            if exact is not None and (cast := getattr(self, name)).dtype != exact.dtype:
                self._buffers[name] = exact.to(cast.device)
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds a part of a weight (a DTensor, as FSDP2 makes it).

        The state_dict then holds parameters and buffers under their own names, in place of bitsandbytes' keys:
        torch.distributed.checkpoint reads each key as an attribute.
        """
        return any(map(is_sharded, self.parameters(recurse=False)))

    def reset_parameters(self) -> None:
        """Does nothing: frozen weights have no initialization of their own."""


class QuantizedLinear(KeepsBits, nn.Linear):
    """y = x W^T + bias with W frozen in 4 bits.

    ``weight`` is a frozen uint8 parameter [ceil(n/2), 1]; scales are buffers beside it. The state_dict holds the keys
    of bitsandbytes' Linear4bit (see :func:`qlora_native.to_bnb`), or a GGUF format's blocks, unless the weight is
    sharded (:attr:`is_sharded`); loading a float [N, K] weight quantizes it. Casting the module (``.half()``,
    ``.to(dtype)``) changes the bias alone: codes and scales keep their bits.

    Args:
        in_features, out_features, bias: as nn.Linear.
        quant_type, block_size, double_quant: as :func:`qlora_native.quantize`.
        dtype: dtype of the dense weight that this stands for, and of the bias.
        device: where the (uninitialized) tensors are made; "meta" is allowed.

    Attributes:
        compute_dtype: the dtype that x is cast to for the product; None, the default, takes x's own. The output has
            x's dtype either way.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    code: Tensor | None
    nested_code: Tensor | None
    compute_dtype: torch.dtype | None = None
    _prepared: Prepared | None = None
    # Where layers stream: gives the bytes of a tensor that another layer's may stand in the place of.
    at_home: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and fill a dense weight
        self.in_features = in_features
        self.out_features = out_features
        self.quantized = QuantizedWeight.empty(
            (out_features, in_features),
            dtype=dtype,
            quant_type=quant_type,
            block_size=block_size,
            double_quant=double_quant,
            device=device,
        )
        made = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", made)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as a value; its tensors are this module's own."""
        value = self._about.with_arguments(self._weight())
        return value if self.at_home is None else value.map(self.at_home)

    @quantized.setter
    def quantized(self, value: QuantizedWeight) -> None:
        if tuple(value.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"QuantizedLinear({self.in_features}, {self.out_features}): the weight is {list(value.shape)}, "
                f"expected [{self.out_features}, {self.in_features}]."
            )
        if self.is_laid_out:
            raise ValueError(
                "QuantizedLinear: a weight laid out for sharding cannot be exchanged: load it before."
            )
        self.weight = nn.Parameter(value.packed.view(-1, 1), requires_grad=False)
        for name in _SCALES:
            # As persistent ones, though state_dict is written below: transformers makes the others anew after loading.
            self.register_buffer(name, getattr(value, name))
        self._about = value.map(lambda tensor: None)
        self._sizes = tuple(value.shape), value.op_args().quant_type, value.block_size

    @classmethod
    def from_quantized(cls, value: QuantizedWeight, bias: Tensor | None = None) -> QuantizedLinear:
        """A layer over an existing weight [N, K], without copying it."""
        n, k = value.shape
        layer = cls(k, n, bias is not None, dtype=value.dtype, device="meta")
        layer.quantized = value
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> QuantizedLinear:
        """Quantize a dense layer; ``options`` as :func:`qlora_native.quantize`. The bias is shared, not copied."""
        return cls.from_quantized(weight.quantize(linear.weight, **options), linear.bias).train(
            linear.training
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense layer with the decoded weight, by default in the original dtype; the bias is shared."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.quantized.dequantize(dtype), requires_grad=False)
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def lay_out_for_sharding(self) -> None:
        """Make the weight [blocks, block_size / 2] and its scales [blocks, bytes] frozen uint8 parameters, of the same
        bytes; the scales' is called ``absmax_bytes`` and takes the place of ``absmax``.

        Sharding along the first dimension then shards both at the borders of blocks, and no cast to another
        floating-point dtype reaches them. A weight whose last block is not full keeps its shape [ceil(n/2), 1]. The
        state_dict does not change until the weight is sharded; loading one before is refused.
        """
        if not self.is_laid_out:
            numel = self.in_features * self.out_features
            self.weight, self.absmax_bytes = in_rows(
                self._packed, self.absmax, numel, self._about.block_size
            )
            del self.absmax

    @property
    def is_laid_out(self) -> bool:
        """Whether :meth:`lay_out_for_sharding` was called."""
        return "absmax_bytes" in self._parameters

    def _weight(self) -> Weight:
        """The weight as an op takes it."""
        return Weight(*self._fields(self._packed.view(-1)))

    @property
    def _packed(self) -> Any:
        return self._parameters["weight"]

    def _fields(self, packed: Tensor) -> tuple[Any, ...]:
        """Those of a :class:`Weight`. By dictionary, since by attribute takes as long as a small product."""
        buffers = self._buffers
        absmax = buffers.get("absmax")
        nested_absmax = buffers["nested_absmax"]
        if absmax is None:  # laid out for sharding
            absmax = scales_in(self.absmax_bytes, nested_absmax is not None)
        nested = nested_absmax, buffers["nested_offset"]
        tables = buffers["code"], buffers["nested_code"]
        return (packed, absmax, *nested, *tables, *self._sizes)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias: x [..., in_features] to [..., out_features] in x's dtype."""
        if self.compute_dtype is not None and self.compute_dtype != x.dtype:
            return self.forward(x.to(self.compute_dtype)).to(x.dtype)
        bias = self._parameters.get("bias")
        if unobserved(x, bias):  # nothing is recorded: the kernel at once, with the same bits
            y = product(self._matrix(), x, bias)
            if y is not None:
                return y
        return linear_4bit(x, self._weight(), self.bias)

    def with_adapter(
        self, x: Tensor, a: Tensor, b: Tensor, scale: float, x_lora: Tensor | None = None
    ) -> Tensor:
        """y = x W^T + bias + scale * (x_lora A^T) B^T, x_lora being x if it is None: x [..., K], a [r, K], b [N, r].

        :func:`qlora_native.lora_linear` over this layer's weight and bias.
        """
        if x_lora is None:  # a few tokens, of which nothing is recorded: one pass over W
            y = adapted_at_once(self._matrix, x, self.bias, a, b, scale)
            if y is not None:
                return y
        return lora_linear_4bit(x, self._weight(), a, b, scale, self.bias, x_lora)

    def _matrix(self) -> Matrix | None:
        """The native form of the weight, made once; None where it has none."""
        parameters = self._parameters
        # Without them, something else stands in their place.
        if "weight" not in parameters or "bias" not in parameters:
            return None
        if self._prepared is None:
            self._prepared = Prepared()
        packed: Any = parameters["weight"]
        return self._prepared.matrix(self._fields(packed))

    def extra_repr(self) -> str:
        nested = self.nested_absmax is not None
        about = f"{self._about.quant_type}, block_size={self._about.block_size}, double_quant={nested}"
        return f"{super().extra_repr()}, {about}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.is_sharded:
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        if self._packed.is_meta:  # no values to describe yet
            destination[prefix + "weight"] = self._packed
        else:
            destination.update(to_tensors(self.quantized, prefix + "weight"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if self.is_sharded:
            return super()._load_from_state_dict(state_dict, prefix, *others)
        local_metadata, strict, missing_keys, unexpected_keys, error_msgs = others
        name = prefix + "weight"
        try:
            value = None
            if state_key(state_dict, name) is not None:
                value = from_tensors(state_dict, name)
            elif name in state_dict and state_dict[name].is_floating_point():
                options: Any = {
                    "quant_type": self._about.quant_type,
                    "block_size": self._about.block_size,
                }
                double_quant = self.nested_absmax is not None
                value = weight.quantize(state_dict[name], double_quant=double_quant, **options)
            if value is None and name in state_dict:
                raise ValueError(
                    f"it is {state_dict[name].dtype} without a quant state: expected floats, or that too."
                )
            if value is None:
                missing_keys.append(name)
            else:
                there = self._packed.device
                self.quantized = value if there.type == "meta" else value.to(there).map(torch.clone)
        except ValueError as error:
            error_msgs.append(f"'{name}': {error}")
        bias = state_dict.get(prefix + "bias")
        if self.bias is not None:
            if bias is None:
                missing_keys.append(prefix + "bias")
            elif bias.shape != self.bias.shape:
                error_msgs.append(
                    f"'{prefix}bias' is {list(bias.shape)}: expected {list(self.bias.shape)}."
                )
            elif self.bias.device.type == "meta" or local_metadata.get(
                "assign_to_params_buffers", False
            ):
                self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
            else:
                with torch.no_grad():
                    self.bias.copy_(bias)
        if strict:
            ours = (
                key for key in state_dict if key.startswith(prefix) and not key.startswith(name + ".")
            )
            unexpected_keys += [key for key in ours if key not in (name, prefix + "bias")]


class AskedLinear(QuantizedLinear):
    """A layer whose parent's code casts to the dtype of its weight: ``weight`` has the dtype, shape and device of the
    dense one, and no values."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        packed: Any = super().__getattr__("weight")
        dtype = self.compute_dtype or self._about.dtype
        return packed.new_full((), torch.nan, dtype=dtype).expand(self._about.shape)


class QuantizedEmbedding(KeepsBits, nn.Embedding):
    """Rows of a frozen table [V, K] in one of GGUF's formats, whose rows are whole blocks; only those asked for are
    decoded.

    ``weight`` is a frozen uint8 parameter [bytes, 1], which a tied output embedding, a
    :class:`QuantizedLinear`, shares. Casting the module changes nothing: rows come in the dtype that
    the weight stands for.
    """

    absmax: Tensor

    def __init__(self, value: QuantizedWeight) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate and fill a dense table
        self.num_embeddings, self.embedding_dim = value.shape
        self.padding_idx = self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False
        self.weight = nn.Parameter(value.packed.view(-1, 1), requires_grad=False)
        self.register_buffer("absmax", value.absmax, persistent=False)
        self._about = value.map(lambda tensor: None)

    @property
    def quantized(self) -> QuantizedWeight:
        """The table as a value; its tensors are this module's own."""
        arguments = self._about.op_args()._replace(packed=self.weight.view(-1), absmax=self.absmax)
        return self._about.with_arguments(arguments)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] to [..., K]."""
        return functional.dequantize_rows(self.quantized, ids)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._about.quant_type}"


def in_rows(
    packed: Tensor, absmax: Tensor, numel: int, block_size: int
) -> tuple[nn.Parameter, nn.Parameter]:
    """Codes [blocks, block_size / 2], or as they are if the last block is not full, and scales [blocks, bytes]: frozen
    uint8 parameters over the same memory. Raises ValueError for a weight in a GGUF format."""
    if numel and not absmax.numel():
        raise ValueError(
            "a weight in a GGUF format cannot be sharded over processes: quantize it to nf4 for that."
        )
    rows = packed.view(-1, block_size // 2) if numel % block_size == 0 else packed
    scales = absmax.view(-1, 1).view(torch.uint8)
    return nn.Parameter(rows, requires_grad=False), nn.Parameter(scales, requires_grad=False)


def scales_in(stored: Tensor, double_quant: bool) -> Tensor:
    """The scales [blocks] in the second of :func:`in_rows`."""
    return stored.view(-1) if double_quant else stored.view(torch.float32).view(-1)


def state_key(keys: Container[str], prefix: str = "weight") -> str | None:
    """The key of ``prefix`` among ``keys`` that describes a quantized weight (:func:`to_tensors`), or None."""
    ours = (
        f"{prefix}.quant_state.gguf__{_native.QUANT_TYPES[number]}" for number in _native.GGUF_BLOCKS
    )
    return next((key for key in ours if key in keys), bnb_state_key(keys, prefix))


def to_tensors(w: QuantizedWeight, prefix: str = "weight") -> dict[str, Tensor]:
    """The tensors of a state_dict: those of :func:`to_bnb`; of a GGUF format its blocks, uint8 [bytes, 1], under
    ``prefix``, and dtype and shape as UTF-8 JSON under ``prefix.quant_state.gguf__q4_0`` (or another name)."""
    if not w.is_gguf:
        return to_bnb(w, prefix)
    state = {"dtype": str(w.dtype).removeprefix("torch."), "shape": list(w.shape)}
    about = pack_json(state).to(w.device)
    return {prefix: w.packed.view(-1, 1), f"{prefix}.quant_state.gguf__{w.quant_type}": about}


def from_tensors(tensors: Mapping[str, Tensor], prefix: str = "weight") -> QuantizedWeight:
    """A weight from the tensors of :func:`to_tensors`. Raises ValueError, naming the key, if they do not fit."""
    key = state_key(tensors, prefix)
    if key is None or ".gguf__" not in key[len(prefix) :]:
        return from_bnb(tensors, prefix)
    packed = tensors.get(prefix)
    try:
        state = read_state(tensors[key], ("dtype", "shape"))
        if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
            raise ValueError(f"'{prefix}' is missing or holds no bytes")
        about: Any = {"shape": state["shape"], "dtype": getattr(torch, state["dtype"])}
        return QuantizedWeight.of_blocks(
            packed.reshape(-1), quant_type=key.rpartition("__")[2], **about
        )
    except ValueError as error:
        raise ValueError(f"from_tensors: '{key}': {error}") from None
