"""Native kernels in place of what stands between a model's matrix products: norms, gated MLPs, attention.

No class is recognized by its name: a module is computed both ways on numbers that show a difference, and replaced only
where the results agree. transformers' attention modules call a rotation and an attention function by the names of
globals: a copy of the forward is made that finds the native ones there, so other models do not change.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, update_wrapper, wraps
from itertools import pairwise, permutations, product
from types import CellType, FunctionType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import qlora_native as qn
from qlora_native._buffers import gather_pages
from qlora_native.functional import SIXTEEN_BITS, dense_linear
from qlora_native.nn.experts import Substitute, substitute_class
from qlora_native.ops import _library
from qlora_native.ops._direct import call
from qlora_native.ops.causal_attention import is_native
from qlora_native.weights.files import mapped_part

# How far two orders of rounding may lie apart, relative to the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
# Instruction sets with products of bf16. Without them torch's attention multiplies 16-bit numbers one by one.
NATIVE_BF16 = ("avx512_bf16", "amx", "neon_bf16")
PLAIN = (str, int, float, NoneType)  # settings that are compared by their values


def fuse(model: nn.Module) -> dict[str, int]:
    """Give the modules of a model that allow it a forward of native kernels; others are left alone.

    On a CUDA device, attention itself and dense layers stay torch's. A module is left alone on any other device, and on
    one that this build has no kernels for. Outputs agree to rounding and less is kept for backward: a norm keeps its
    input and one number a row, a gated MLP its two branches and their product, a rotation nothing of its own size.
    Calling it twice changes nothing. A deep copy or pickle of the model stays fused.

    Returns:
        How many modules were fused, by kind: ``norm``, ``mlp``, ``attention``, ``linear``.
    """
    counts: Counter[str] = Counter()
    # Of modules alike, the first is tried out: trying reads its weights.
    found: dict[Any, dict[str, Any] | None] = {}
    # The modules are tried out with their linear layers, which come first.
    for kinds in ((Dense,), (Norm, GatedMLP, Attention)):
        for module, kind in product(list(model.modules()), kinds):
            if isinstance(module, Fused):
                continue
            # Each dense weight's pages are gathered.
            key = (kind, module if kind is Dense else _likeness(module))
            if key not in found:
                found[key] = kind.recognize(module)
            settings = found[key]
            if settings is not None:
                vars(module).update(settings)
                module.__class__ = substitute_class(kind, type(module))
                counts[kind.label] += 1
    return dict(counts)


def _likeness(module: nn.Module) -> tuple[Any, ...]:
    """The same of two modules that compute the same function of their weights and inputs."""

    weights = (
        (name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in module.named_parameters()
    )
    settings = (
        (path, type(part), name, value if isinstance(value, PLAIN) else id(value))
        for path, part in module.named_modules()
        for name, value in sorted(vars(part).items())
        if isinstance(value, PLAIN) or not name.startswith("_")
    )
    return *weights, *settings


def unfuse(model: nn.Module) -> None:
    """Give the modules that :func:`fuse` changed their own code back."""
    for module in model.modules():
        if isinstance(module, Fused):
            for setting in ("_fused_eps", "_fused_parts"):
                vars(module).pop(setting, None)
            module.__class__ = type(module).__bases__[1]


class Fused(Substitute):
    """A module with a forward of native kernels: a subclass of the class it replaces, under its name."""

    label: str

    @classmethod
    def recognize(cls, module: nn.Module) -> dict[str, Any] | None:
        """Attributes to set if ``module`` computes what this class would, or None."""
        raise NotImplementedError


class Norm(Fused):
    """weight * x / rms(x)."""

    label = "norm"
    _fused_eps: float
    weight: nn.Parameter

    @classmethod
    def recognize(cls, module: nn.Module) -> dict[str, Any] | None:
        weight: Any = getattr(module, "weight", None)
        parts: list[Any] = [*module.parameters(), *module.buffers(), *module.children()]
        if len(parts) != 1 or parts[0] is not weight or type(module).__module__.startswith("torch."):
            return None
        if weight.dim() != 1 or weight.dtype not in TOLERANCE or not is_ours(weight):
            return None
        for eps in sorted(
            {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2}
        ):
            # Rows about as small as eps show where it is added, and its value.
            probe = _noise(4, weight.shape[0]) * torch.tensor(
                [[1.0], [30.0], [eps**0.5], [eps**0.5 / 8]], device="cpu"
            )
            probe = probe.to(weight)
            if agree(
                _attempt(module, probe),
                torch.ops.qlora_native.rms_norm(probe, weight.detach(), eps)[0],
            ):
                return {"_fused_eps": eps}
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or x.dtype != self.weight.dtype or not is_taken(x):
            return super().forward(x, *args, **kwargs)
        return call("rms_norm", x, self.weight, self._fused_eps)[0]


class GatedMLP(Fused):
    """down(silu(gate(x)) * up(x))."""

    label = "mlp"
    _fused_parts: tuple[str, str, str]  # names of gate, up, down

    @classmethod
    def recognize(cls, module: nn.Module) -> dict[str, Any] | None:
        parts: dict[str, Any] = dict(module.named_children())
        shapes = {
            name: (part.out_features, part.in_features)
            for name, part in parts.items()
            if hasattr(part, "out_features") and hasattr(part, "in_features")
        }
        others = [part for name, part in parts.items() if name not in shapes]
        if (
            len(shapes) != 3
            or len(others) != 1
            or [*others[0].parameters(), *module.parameters(recurse=False)]
        ):
            return None
        # The dtype in which a linear layer, dense, 4-bit or adapted, computes.
        layer = parts[min(shapes)]
        layer = getattr(layer, "base_layer", layer)
        dtype = getattr(getattr(layer, "quantized", getattr(layer, "weight", None)), "dtype", None)
        if dtype not in TOLERANCE or not all(map(is_ours, module.parameters())):
            return None
        device = next(module.parameters()).device
        line = torch.linspace(-12.0, 12.0, 97, device="cpu").to(device, dtype)
        if not agree(_attempt(others[0], line), nn.functional.silu(line)):
            return None
        for gate, up, down in permutations(shapes):
            if not shapes[gate] == shapes[up] == shapes[down][::-1]:
                continue
            # Large numbers would show a clamp.
            probe = (_noise(2, shapes[gate][1]) * torch.tensor([[1.0], [40.0]], device="cpu")).to(
                device, dtype
            )
            with modes_kept(module), torch.no_grad():
                # Thus dropout in the module's own forward shows, and not in its parts.
                for part in module.modules():
                    part.training = part is module
                got = parts[down](torch.ops.qlora_native.swiglu(parts[gate](probe), parts[up](probe)))
                if agree(_attempt(module, probe), got, each_row=True):
                    return {"_fused_parts": (gate, up, down)}
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not is_taken(x):
            return super().forward(x, *args, **kwargs)
        gate, up, down = (getattr(self, name) for name in self._fused_parts)
        return down(call("swiglu", gate(x), up(x)))


class Attention(Fused):
    """An attention whose forward rotates q and k by a function of its module; on the CPU also one that calls
    transformers' sdpa."""

    label = "attention"

    @classmethod
    def recognize(cls, module: nn.Module) -> dict[str, Any] | None:
        forward, parameter = type(module).forward, next(module.parameters(), None)
        if parameter is None or not is_ours(parameter) or not isinstance(forward, FunctionType):
            return None
        return None if _with_native_parts(forward, is_on_cpu(parameter)) is forward else {}

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        return {"forward": _with_native_parts(base.forward)}  # type: ignore[arg-type]


class Dense(Fused):
    """A dense linear layer in 16 bits."""

    label = "linear"
    weight: nn.Parameter
    bias: nn.Parameter | None

    @classmethod
    def recognize(cls, module: nn.Module) -> dict[str, Any] | None:
        if (
            type(module) is not nn.Linear
            or module.weight.dtype not in SIXTEEN_BITS
            or not is_on_cpu(module.weight)
        ):
            return None
        # No cache holds it.
        is_large = module.weight.numel() >= 1 << 22 and module.weight.is_contiguous()
        if is_large and mapped_part(module.weight) is None:
            gather_pages(module.weight)
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return dense_linear(x, self.weight, self.bias)


def is_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def is_ours(tensor: Tensor) -> bool:
    """Whether there are native kernels for the tensor's device."""
    return is_on_cpu(tensor) or _library.module_for(tensor.device) is not None


def is_taken(x: Tensor) -> bool:
    """Whether a fused module gives ``x`` to the ops, which fall back to torch by themselves; cheap, and traceable."""
    return x.device.type in ("cpu", "cuda") and x.dtype in TOLERANCE


def agree(got: Any, expected: Tensor, each_row: bool = False) -> bool:
    """Equal but for rounding, relative to the largest value, of each row or of all."""
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    difference, size = (got.float() - expected.float()).abs(), expected.float().abs()
    difference, size = (
        (difference.amax(-1), size.amax(-1)) if each_row else (difference, size.clamp_min(1e-3))
    )
    return bool((difference <= TOLERANCE[expected.dtype] * size).all() and size.isfinite().all())


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put the random states of the CPU and of the model's CUDA devices, and all training flags, back at the end."""
    before = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def _attempt(module: nn.Module, x: Tensor) -> Any:
    """The module's answer to ``x``, or None if it takes something else."""
    try:
        return module(x)
    except Exception:  # whatever an unknown module raises, it is not what is looked for
        return None


def attends_in_fp32() -> bool:
    """Whether torch's attention is given fp32 in place of 16-bit numbers on this CPU."""
    return qn.build_info()["cpu_isa"] not in NATIVE_BF16


def _with_native_parts(function: FunctionType, attends: bool = True) -> FunctionType:
    """A copy of ``function`` with native kernels in place of the globals that compute the same, and of the function
    that it wraps; the function itself if neither uses one. Unless it ``attends``, rotations alone are replaced."""
    swapped: dict[str, Any] = {}
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        if isinstance(found, FunctionType) and _rotates(found):
            swapped[name] = _native_rotary(found)
        elif attends and found is ALL_ATTENTION_FUNCTIONS:
            swapped[name] = _native_interfaces()
    inner = getattr(function, "__wrapped__", None)
    copied = _with_native_parts(inner, attends) if isinstance(inner, FunctionType) else inner
    if not swapped and copied is inner:
        return function
    cells = function.__closure__ and tuple(
        CellType(copied) if inner is not None and cell.cell_contents is inner else cell
        for cell in function.__closure__
    )
    names = {**function.__globals__, **swapped}
    # By its name torch.compile would look the swapped ones up in the module itself.
    names.pop("__name__", None)
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    update_wrapper(copy, function)
    return copy


@cache
def _rotates(function: FunctionType) -> bool:
    """Whether ``function(q, k, cos, sin)`` is the rotation that the native kernel does."""
    q, k = (_noise(2, heads, 5, 16) for heads in (3, 1))
    cos, sin = _noise(2, 2, 5, 16)
    expected = (torch.ops.qlora_native.rotary(x, cos, sin, False) for x in (q, k))
    try:
        is_named = list(inspect.signature(function).parameters)[:4] == ["q", "k", "cos", "sin"]
        return is_named and all(
            agree(*pair) for pair in zip(function(q, k, cos, sin), expected, strict=True)
        )
    except Exception:  # it takes something else
        return False


def _native_rotary(original: FunctionType) -> Callable[..., Any]:
    @wraps(original)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = (
            not args
            and not kwargs
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and q.dim() == k.dim() == 4
        )
        fits = plain and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] == k.shape[-1] and is_taken(q)
        if not fits or cos.requires_grad or sin.requires_grad:
            return original(q, k, cos, sin, *args, **kwargs)
        return call("rotary", q, cos, sin, False), call("rotary", k, cos, sin, False)

    return apply


def _native_interfaces() -> AttentionInterface:
    """A copy of transformers' table of attention functions, with ours where it names its own sdpa."""
    table, ours = AttentionInterface(), partial(_attention, widen=attends_in_fp32())
    for name, function in ALL_ATTENTION_FUNCTIONS.items():
        table[name] = ours if function is sdpa_attention_forward else function
    return table


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    widen: bool,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa by documents, where a mask separates some, and by the native kernel, where every position sees
    all earlier ones and no other. Torch computes the rest, in fp32 if ``widen``, and all on other devices than the CPU.

    query [B, H, T, D], key and value [B, H / g, T, D]; returns [B, T, H, D].
    """
    if not is_on_cpu(query):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, **options
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    square = query.shape[2] == key.shape[2] > 1 and options.get("position_bias") is None
    alike = (
        query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and query.shape[3] == key.shape[3]
    )
    native = square and alike and not options.get("dropout") and is_native(query)
    widen = widen and query.dtype in TOLERANCE

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool | None) -> Tensor:
        if native and mask is None and causal is True:
            scale = options.get("scaling")
            scale = q.shape[3] ** -0.5 if scale is None else scale
            return call("causal_attention", q, k, v, scale)[0].transpose(1, 2)
        if widen:
            mask = mask.float() if mask is not None and mask.is_floating_point() else mask
            q, k, v = q.float(), k.float(), v.float()
        return sdpa_attention_forward(module, q, k, v, mask, is_causal=causal, **options)[0].to(
            query.dtype
        )

    documents = None
    if attention_mask is not None and square and not torch.compiler.is_compiling():
        documents = documents_of(attention_mask, query.shape[0])
    if documents is None:
        return attend(query, key, value, attention_mask, is_causal), None
    rows = []
    # split, not slices: its derivative is one concatenation.
    for sequence, *operands in zip(documents, *(x.split(1) for x in (query, key, value)), strict=True):
        lengths = [document.length for document in sequence]
        parts = zip(sequence, *(x.split(lengths, 2) for x in operands), strict=True)
        rows.append(
            torch.cat([attend(q, k, v, document.mask, True) for document, q, k, v in parts], 1)
        )
    return torch.cat(rows), None


_FOUND = "_qlora_native_documents"  # kept on the mask, which all layers of a forward pass share


class Document(NamedTuple):
    """One square of a mask, [1, 1, length, length]; ``mask`` is None if it is plainly causal."""

    length: int
    mask: Tensor | None


Documents = tuple[tuple[Document, ...], ...]  # of each sequence of the batch, in order


def documents_of(mask: Tensor, batch: int) -> Documents | None:
    """The documents of a boolean mask [B or 1, 1, T, T]; None for one document, or if anything outside them is seen."""
    is_square = mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == mask.shape[3]
    if mask.dtype != torch.bool or not is_square or mask.shape[0] not in (1, batch):
        return None
    if not hasattr(mask, _FOUND):
        setattr(mask, _FOUND, _find(mask))
    found: Documents | None = getattr(mask, _FOUND)
    return found and found * (batch // len(found))


def _find(mask: Tensor) -> Documents | None:
    sequences = []
    for square in mask[:, 0]:
        # Every position sees itself and, unless it is a document's first, the one before it.
        starts = [0, *((~square.diagonal(-1)).nonzero().flatten() + 1).tolist(), len(square)]
        parts = [square[start:end, start:end] for start, end in pairwise(starts)]
        if not bool(square.diagonal().all()) or sum(int(part.sum()) for part in parts) != int(
            square.sum()
        ):
            return None
        masks = (
            None if torch.equal(part, torch.ones_like(part).tril()) else part[None, None]
            for part in parts
        )
        sequences.append(tuple(map(Document, map(len, parts), masks)))
    return tuple(sequences) if any(len(documents) > 1 for documents in sequences) else None
