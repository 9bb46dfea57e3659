"""What an adapted layer costs the host, forward and backward, and a token of a generation, with kernels and GEMMs that
cost nothing. On a device that is ahead of the host, such ratios are what counts.

The calls for a layer are those of the GPU check's group ``host`` (gpu_passes.py), over tiny CPU tensors; ours take the
CUDA path over a native module of stubs. A token is one of a tiny Llama with an adapter: by a graph whose replay costs
nothing, and by the loop over a cache that grows, which runs every layer anew and was the only one up to commit de98c3c.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from common import Bar, Bench, interleaved, timings
from gpu_passes import host_calls
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_native as qn
from qlora_native import lora
from qlora_native.models import decode, fuse
from qlora_native.models.generate import Sampling, stream
from qlora_native.ops import _cuda_kernels, _cuda_products, _direct, _library

TOKENS, N, K, RANK = 4, 32, 32, 4
BARS = {"fused": (Bar("torch", 1.2),), "two steps": (Bar("torch", 1.5),)}  # of the host's time of plain torch
DECODE_BARS = (Bar("eager", 0.35),)
LAYERS, ANSWER = 24, 400
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
PLANS = {"fused": (2, 64, 64, 1, 3, 0, 0), "two steps": (_cuda_products.TWO_STEP, 0, 0, 1, 0, 0, 0)}


def pass_for_cuda(plan: tuple[int, ...]) -> None:
    """Products of CPU tensors take the CUDA path to the end, over kernels that do nothing."""
    module: Any = ModuleType("_cuda")
    module.plan_matmul = lambda question: plan
    for name in ("linear_4bit", "dequantize_4bit", "rms_norm", "rotary", "swiglu"):
        setattr(module, name, lambda *arguments: None)
    _cuda_kernels.native = _library.module_for = lambda device: module  # type: ignore[assignment]
    _cuda_kernels.facts = lambda device: _cuda_kernels.Facts(90, 132)  # type: ignore[assignment]
    _cuda_kernels.current_device, _cuda_kernels.raw_stream = lambda: 0, lambda index: 0
    _cuda_kernels.is_capturing = lambda device: False
    # In place of fp32 products of 16-bit operands, which torch has on CUDA alone: of fp32 ones, of the same shapes.
    operands = {m: (torch.zeros(m, TOKENS), torch.zeros(TOKENS, n)) for m, n in ((RANK, K), (N, RANK))}
    _cuda_products.wide_product = lambda left, right: torch.mm(*operands[len(left)])
    _cuda_products.plan_of.cache_clear()
    _direct._DEVICES, _direct._TENSOR_KEYS = dict.fromkeys(_direct._DEVICES, "CUDA"), frozenset()


@contextmanager
def captured() -> Iterator[Any]:
    """A capture into a graph whose replay does nothing."""
    yield SimpleNamespace(replay=lambda: None)


def token_calls() -> dict[str, Callable[[], int]]:
    """The next token of an answer by each loop, of which ours is the one over a static cache."""
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=LAYERS, **SIZES)).save_pretrained(folder)
        models = [qn.load_model(folder, dtype=torch.bfloat16, device="cpu") for _ in range(2)]
    for model in models:
        lora.add_lora(model, lora.LoraConfig(r=RANK))
        model.eval()
    models[1].__class__ = type(models[1]).__bases__[1]  # transformers' own, whose passes nobody looks at
    pass_for_cuda(PLANS["fused"])
    fuse.is_on_cpu = lambda tensor: False
    loop: Any = decode
    loop.rehearsed, loop.Pool = partial(nullcontext, []), lambda: SimpleNamespace(captured=captured)
    cuda: Any = torch.cuda
    cuda.device = lambda device: nullcontext()
    sampling = Sampling(max_tokens=ANSWER)
    answers = [stream(model, [5, 6, 7], sampling, set()) for model in models]
    return {name: partial(next, answer) for name, answer in zip(("ours", "eager"), answers, strict=True)}


def main() -> None:
    bench = Bench("host_cost", __doc__, repeats=2000, threads=1)
    bench.begin()
    torch.set_flush_denormal(True)  # outputs are never written, so that any number may be in them
    w = qn.quantize(torch.randn(N, K))
    for kind, dtype in (("fused", torch.bfloat16), ("two steps", torch.bfloat16), ("two steps", torch.float32)):
        pass_for_cuda(PLANS[kind])
        calls = host_calls(w, torch.randn(N, K, dtype=dtype), TOKENS, RANK)["host lora step"]
        seconds = interleaved(calls, bench.options.repeats, warmup=50)
        row = {"products": kind, "dtype": str(dtype), "match": True, **timings(seconds, BARS[kind])}
        bench.add(row, "products", "dtype")
    seconds = interleaved(token_calls(), ANSWER - 50, warmup=50)
    bench.add({"layers": LAYERS, "match": True, **timings(seconds, DECODE_BARS)}, "layers")
    bench.write()


if __name__ == "__main__":
    main()
