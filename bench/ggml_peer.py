"""Products by ggml with weights in its own formats, out of the libraries that llama-cpp-python brings, by ctypes.

Only for a comparison: it rounds x to 8 bits, takes and gives fp32, and is forward only.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch

F32 = 0  # enum ggml_type
TYPES = {
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
    "iq4_nl": 20,
    "mxfp4": 39,
}
ARENA_BYTES = 1 << 30  # beyond the weights: each call takes a little of it for its rounded x; pages come when touched


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


# Name -> result, arguments.
BASE: dict[str, tuple[Any, ...]] = {
    "ggml_init": (c_void_p, InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_get_data": (c_void_p, c_void_p),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
}
CPU: dict[str, tuple[Any, ...]] = {
    "ggml_cpu_init": (None,),
    "ggml_graph_compute_with_ctx": (c_int, c_void_p, c_void_p, c_int),
}


def library() -> dict[str, Any] | None:
    """ggml's functions by name, or None if they are not there."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    found: dict[str, Any] = {}
    try:
        for file, names in (("libggml-base.so", BASE), ("libggml-cpu.so", CPU)):
            loaded = ctypes.CDLL(str(folder / file), ctypes.RTLD_GLOBAL)
            for name, (result, *arguments) in names.items():
                found[name] = getattr(loaded, name)
                found[name].restype, found[name].argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    found["ggml_cpu_init"]()
    return found


class Weight:
    """A weight [N, K] in blocks of a format, uint8 [bytes]."""

    def __init__(self, ggml: dict[str, Any], quant_type: str, packed: torch.Tensor, shape: Sequence[int]) -> None:
        self.ggml, self.type, self.packed, self.shape = ggml, TYPES[quant_type], packed, shape


def quantize(weight: torch.Tensor, quant_type: str = "iq4_nl") -> Weight | None:
    """The weight as ggml has it, or None where ggml is not there."""
    ggml = library()
    if ggml is None:
        return None
    source = weight.float().contiguous()
    packed = torch.empty(2 * weight.numel(), dtype=torch.uint8)  # ample
    arguments = (TYPES[quant_type], source.data_ptr(), packed.data_ptr(), 0, *weight.shape, None)
    return Weight(ggml, quant_type, packed[: ggml["ggml_quantize_chunk"](*arguments)].clone(), weight.shape)


class Product:
    """x W^T with copies of W [N, K] that take turns."""

    def __init__(self, weight: Weight, x: torch.Tensor, copies: int) -> None:
        (n, k), m, ggml = weight.shape, x.shape[0], weight.ggml
        self.ggml, self.shape, self.turn = ggml, (m, n), 0
        self.context = ggml["ggml_init"](
            InitParams(ARENA_BYTES + copies * (weight.packed.nbytes + 8 * m * (n + k)), None, False)
        )
        activations = x.float().contiguous()
        self.graphs: list[tuple[Any, Any]] = []
        for _ in range(copies):
            w = ggml["ggml_new_tensor_2d"](self.context, weight.type, k, n)
            t = ggml["ggml_new_tensor_2d"](self.context, F32, k, m)
            ctypes.memmove(ggml["ggml_get_data"](w), weight.packed.data_ptr(), weight.packed.nbytes)
            ctypes.memmove(ggml["ggml_get_data"](t), activations.data_ptr(), activations.nbytes)
            y = ggml["ggml_mul_mat"](self.context, w, t)
            graph = ggml["ggml_new_graph_custom"](self.context, 16, False)
            ggml["ggml_build_forward_expand"](graph, y)
            self.graphs.append((graph, y))

    def __call__(self) -> None:
        """One product; its result lies in ggml's memory."""
        self.turn = (self.turn + 1) % len(self.graphs)
        self.ggml["ggml_graph_compute_with_ctx"](self.context, self.graphs[self.turn][0], torch.get_num_threads())

    def result(self) -> torch.Tensor:
        """The last product, fp32 [M, N]."""
        out = torch.empty(self.shape)
        ctypes.memmove(out.data_ptr(), self.ggml["ggml_get_data"](self.graphs[self.turn][1]), out.nbytes)
        return out

    def __del__(self) -> None:
        self.ggml["ggml_free"](self.context)
