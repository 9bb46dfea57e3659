"""The contenders of bench_linear: one weight in the form of each, and what each does with it.

Every contender multiplies with the same values, those that the 4-bit weight stands for; but torchao's scales differ in
the last bits, what decodes for itself does not round its values to bf16 where it computes in fp32, and ggml quantizes
them to a format of its own and x to 8 bits. Rivals compute in the dtype that they are best in here: fp32 on a CPU
without a dot product for bf16. For few rows of x each rotates
over copies of its own form of the weight, four times the last-level cache in all, so that the products read memory, as
a model's do; all but torchao, which writes and reads far more than that in each call, and takes seconds to copy.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ggml_peer
import torch
import torch.nn.functional as F
from cases import Product
from ceilings import prepacked
from common import Functions, cache_bytes, limit_bitsandbytes, peer_dtype, relative_error

import qlora_native as qn

ROTATE_UP_TO = 16  # rows of x
DTYPE = peer_dtype()
PLAIN = {torch.bfloat16: "bf16", torch.float32: "fp32"}[DTYPE]  # torch's own product


def copies(num_bytes: int, m: int) -> int:
    """How many weights of so many bytes to rotate over."""
    return max(2, -(-4 * cache_bytes() // num_bytes)) if m <= ROTATE_UP_TO else 1


def rotation(make: Callable[[], Any], num_bytes: int, m: int) -> Callable[[], Any]:
    """A function that gives the next of enough copies, round and round, or always the one."""
    values = itertools.cycle([make() for _ in range(copies(num_bytes, m))])
    return lambda: next(values)


def copied(w: qn.QuantizedWeight) -> qn.QuantizedWeight:
    """The same bytes elsewhere. The first product checks them once and moves them into huge pages."""
    fresh = copy.copy(w)
    fresh.packed, fresh.absmax = w.packed.clone(), w.absmax.clone()
    with torch.no_grad():
        qn.linear(torch.zeros(1, w.shape[1], dtype=torch.bfloat16), fresh)
    return fresh


def product_of(w: qn.QuantizedWeight, is_forward: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Our x W^T, or dy W."""
    if is_forward:
        return lambda x: qn.linear(x, w)
    arguments = w.op_args()
    return lambda dy: torch.ops.qlora_native.linear_4bit_grad_input(dy, *arguments)


class Weights:
    """A weight [N, K] in the form of each contender that is there."""

    def __init__(self, n: int, k: int) -> None:
        dense = torch.randn(n, k, dtype=torch.bfloat16) / k**0.5
        self.ours = qn.quantize(dense)
        self.values = self.ours.dequantize()  # bf16: what everyone multiplies with
        self.theirs = self.values.to(DTYPE)
        self.buffer = torch.empty_like(self.theirs)  # warm: that rival at its best, at the price of its memory
        self.bitsandbytes = _bitsandbytes_layer(dense.to(DTYPE))
        self.torchao = torchao_weight(dense.to(DTYPE))
        self.ggml = ggml_peer.quantize(self.values)


def _bitsandbytes_layer(dense: torch.Tensor) -> Any:
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        return None
    limit_bitsandbytes()
    n, k = dense.shape
    layer = Linear4bit(k, n, bias=False, compute_dtype=DTYPE, compress_statistics=True, quant_type="nf4")
    layer.weight = Params4bit(dense.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu")


def torchao_weight(dense: torch.Tensor) -> Any:
    """Their NF4 tensor, or None. It is one of the two modules, by version."""
    for module in ("torchao.quantization", "torchao.dtypes.nf4tensor"):
        try:
            return importlib.import_module(module).to_nf4(dense, 64, 256)
        except (ImportError, AttributeError):
            continue
    return None


def _layer_copy(layer: Any, inference: bool, k: int) -> Any:
    """A layer with tensors of its own. In evaluation mode its first forward repacks them."""
    fresh = copy.deepcopy(layer)
    fresh.weight.quant_state = copy.deepcopy(layer.weight.quant_state)
    fresh.quant_state = fresh.weight.quant_state
    fresh.train(not inference)
    if inference:
        with torch.no_grad():
            fresh(torch.zeros(1, k, dtype=DTYPE))
    return fresh


def products(weights: Weights, case: Product, t: torch.Tensor, is_forward: bool) -> Functions:
    """Name -> x W^T, for x [M, K] in bf16, or dy W, for dy [M, N]; oneDNN's form for that is one of W^T, a second copy.

    bitsandbytes' evaluation mode, torchao and ggml take part in the forward alone.
    """
    m, packed_bytes, dense_bytes = case.m, weights.ours.nbytes, weights.theirs.nbytes
    y = t.to(DTYPE)

    def copy_of_ours() -> tuple[Callable[[torch.Tensor], torch.Tensor], qn.QuantizedWeight]:
        w = copied(weights.ours)
        return product_of(w, is_forward), w

    multiply = F.linear if is_forward else torch.matmul
    laid_out = weights.theirs if is_forward else weights.theirs.t().contiguous()
    ours = rotation(copy_of_ours, packed_bytes, m)
    dense = rotation(weights.theirs.clone, dense_bytes, m)
    onednn = rotation(lambda: prepacked(laid_out, m), dense_bytes, m)
    functions: Functions = {
        "ours": lambda: ours()[0](t),
        PLAIN: lambda: multiply(y, dense()),
        "onednn_prepacked": lambda: onednn()(y),
        "dequantize_into_buffer_linear": lambda: multiply(y, ours()[1].dequantize(out=weights.buffer)),
    }
    if y.dtype != t.dtype:
        functions["ours_fp32"] = lambda: ours()[0](y)
    if weights.bitsandbytes is not None:
        of_mode = _bitsandbytes_forward if is_forward else _bitsandbytes_backward
        functions |= of_mode(weights.bitsandbytes, y, lambda make: rotation(make, packed_bytes, m))
    if weights.torchao is not None and is_forward:
        functions["torchao"] = lambda: F.linear(y, weights.torchao)
    if weights.ggml is not None and is_forward:
        functions["ggml_iq4_nl"] = ggml_peer.Product(weights.ggml, t, copies(packed_bytes, m))
    return functions


def _bitsandbytes_forward(layer: Any, x: torch.Tensor, rotate: Callable[[Any], Any]) -> Functions:
    train = rotate(lambda: _layer_copy(layer, False, x.shape[1]))
    inference = rotate(lambda: _layer_copy(layer, True, x.shape[1]))
    return {"bitsandbytes": lambda: train()(x), "bitsandbytes_inference": lambda: inference()(x)}


def _bitsandbytes_backward(layer: Any, dy: torch.Tensor, rotate: Callable[[Any], Any]) -> Functions:
    def graph() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.zeros(len(dy), layer.in_features, dtype=DTYPE, requires_grad=True)
        with torch.enable_grad():
            return _layer_copy(layer, False, layer.in_features)(x), x

    def backward() -> torch.Tensor:
        y, x = graphs()
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    graphs = rotate(graph)
    return {"bitsandbytes": backward}


class Lora:
    """Forward and backward of a layer with adapters, against the same without them."""

    SCALE = 2.0

    def __init__(self, weights: Weights, case: Product) -> None:
        self.weights = weights
        self.x = torch.randn(case.m, case.k, dtype=torch.bfloat16, requires_grad=True)
        self.a = (torch.randn(case.r, case.k) / case.k**0.5).requires_grad_()
        self.b = (torch.randn(case.n, case.r) / case.r**0.5).requires_grad_()
        self.grad = torch.randn(case.m, case.n, dtype=torch.bfloat16)

    def _both(self, forward: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            y = forward()
            return y, *torch.autograd.grad(y, inputs, self.grad.to(y.dtype))

    def functions(self) -> Functions:
        """Name -> (y, dx) or (y, dx, dA, dB)."""
        x, a, b, w, theirs = self.x, self.a, self.b, self.weights.ours, self.weights.theirs
        z = x.detach().to(DTYPE).requires_grad_()

        def torch_lora() -> torch.Tensor:
            low = F.linear(z, a.to(z.dtype))
            return F.linear(z, theirs) + self.SCALE * F.linear(low, b.to(z.dtype))

        return {
            "ours": lambda: self._both(lambda: qn.lora_linear(x, w, a, b, self.SCALE), (x, a, b)),
            "linear": lambda: self._both(lambda: qn.linear(x, w), (x,)),
            PLAIN: lambda: self._both(lambda: F.linear(z, theirs), (z,)),
            f"{PLAIN}_lora": lambda: self._both(torch_lora, (z, a, b)),
        }

    def error(self, got: tuple[torch.Tensor, ...]) -> float:
        """The largest relative error of y, dx, dA and dB against fp64."""
        x, a, b, grad = (t.detach().double() for t in (self.x, self.a, self.b, self.grad))
        w = self.weights.values.double()
        low, back = x @ a.t(), grad @ b
        truth = (
            x @ w.t() + self.SCALE * (low @ b.t()),
            grad @ w + self.SCALE * (back @ a),
            self.SCALE * (back.t() @ x),
            self.SCALE * (grad.t() @ low),
        )
        return max(relative_error(t, s) for t, s in zip(got, truth, strict=True))
