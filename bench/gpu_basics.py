"""Each op once on tiny shapes against the CPU, bytes where the rule is exact: the first thing to run on a card.

Then CUDA graphs, and what other programs find there: the primitives compiled by nvcc, the tests of the ops,
compute-sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from cases import FLOAT_DTYPES, GGUF_TYPES
from common import relative_error
from gpu_timing import AGAIN, Case, Context, device, half, made_up, on_gpu, wait
from pages import ROOT
from replay import Replay
from torch import Tensor

import qlora_native as qn
from qlora_native.ops import _cuda_choice, _cuda_products

TOKENS = (0, 1, 3, 16, 20, 40, 130)  # of every tile: up to 16, 32, 64 and 128 rows
N, K = 192, 256
TOLERANCE = 1e-2
LANES = 32
FP32 = ("arithmetic",)  # primitives whose words are fp32 numbers
GOLDEN = ROOT / "tests" / "golden" / "cuda_primitives.txt"
NVCC = ("-std=c++20", "-arch=native", "--fmad=false", "--expt-relaxed-constexpr", "-Icpp", "-I.", "-Itests")
TESTS = [
    *(
        "ops",
        "*4bit",
        "*_step",
        "gradient_norm",
        "linear_cross_entropy",
        "rms_norm",
        "rotary",
        "swiglu",
        "causal_attention",
    ),
    *("causal_attention", "cuda_build", "paging_cuda"),
]


def run(context: Context) -> None:
    """One row an op and dtype; for products with every number of tokens, with and without an adapter."""
    checks: dict[str, Callable[[], bool]] = {
        "decode": decode,
        "loss": loss,
        "norms": norms,
        "products of blocks": products_of_blocks,
        **{f"{rule} {bits} bits": partial(optimizer, rule, bits) for rule in ("AdamW", "Lion") for bits in (32, 8)},
        **{f"quantize {dtype}": partial(quantize, dtype) for dtype in FLOAT_DTYPES},
        **{f"products {dtype}": partial(products, dtype) for dtype in FLOAT_DTYPES},
    }
    for name, check in checks.items():
        context.row(Case("basics", form=name), lambda check=check: {"match": check()}, True)  # type: ignore[misc]
    wait()


def run_capture(context: Context) -> None:
    """Ops in CUDA graphs, whose replays give the bytes of the calls. A failed capture can leave torch's allocator in
    capture, so it ends the process."""
    w, weight = qn.quantize(torch.randn(N, K, device=device())), torch.randn(K, device=device()).to(half())
    labels = torch.arange(33, device=device())

    def made(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=device()).to(dtype or half()).requires_grad_()

    def gradients(op: Callable[..., Tensor], *operands: Tensor) -> Callable[[], Tensor]:
        grad = torch.ones_like(op(*operands))
        return lambda: torch.cat([g.flatten().float() for g in torch.autograd.grad(op(*operands), operands, grad)])

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return qn.lora_linear(x, w, a, b, 2.0)

    adapter = made(8, K, dtype=torch.float32), made(N, 8, dtype=torch.float32)
    calls: dict[str, Callable[[], Tensor]] = {
        "decode": lambda: w.dequantize(half()),
        **{f"products m={m}": gradients(layer, made(m, K), *adapter) for m in (1, 40, 130, 600)},
        "loss": gradients(lambda h: qn.linear_cross_entropy(h, w, labels), made(33, K)),
        "rms_norm": gradients(lambda x: torch.ops.qlora_native.rms_norm(x, weight, 1e-6)[0], made(33, K)),
        "swiglu": gradients(torch.ops.qlora_native.swiglu, made(33, K), made(33, K)),
    }
    rows: dict[str, Callable[[], dict[str, Any]]] = {name: partial(replayed, call) for name, call in calls.items()}
    for name, row in (rows | {"AdamW": replayed_steps}).items():
        if not context.row(Case("capture", form=name), row, True):
            raise SystemExit(AGAIN)


def replay_of(call: Callable[[], object]) -> Replay:
    """Its graph, behind a warm-up of two calls; RuntimeError if it is refused."""
    replay = Replay([call], device())
    if replay.refused:
        raise RuntimeError(replay.refused)
    return replay


def replayed(call: Callable[[], Tensor]) -> dict[str, Any]:
    """Whether a replay gives the bytes of the call."""
    want = call()
    found = torch.empty_like(want)
    replay = replay_of(lambda: found.copy_(call()))
    found.zero_()
    replay.seconds()
    return {"match": torch.equal(found, want)}


def replayed_steps() -> dict[str, Any]:
    """Whether replayed steps of an optimizer give the bytes of plain ones."""
    found = []
    for is_replayed in (True, False):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(5000, device=device()))
        parameter.grad = torch.randn_like(parameter)
        stepper = qn.optim.AdamW([parameter], lr=1e-3, max_norm=1.0)
        stepper.step()
        if is_replayed:
            replay = replay_of(stepper.step)
            replay.seconds(), replay.seconds()
        else:
            for _ in range(4 if on_gpu() else 2):  # those of the warm-up too
                stepper.step()
        found.append(parameter.detach())
    return {"match": torch.equal(*found)}


def _same(here: Tensor, there: Tensor) -> bool:
    return torch.equal(here.detach().cpu(), there.detach())


def quantize(dtype: torch.dtype) -> bool:
    """Codes and scales, of whole blocks and of a tail, are the CPU's bytes."""
    same = []
    for shape, double in product(((N, K), (5, 127)), (True, False)):
        t = torch.randn(shape, device=device()).to(dtype)
        here, there = (qn.quantize(source, double_quant=double) for source in (t, t.cpu()))
        same += [_same(here.packed, there.packed), _same(here.absmax, there.absmax)]
    return all(same)


def decode() -> bool:
    """Dequantized weights are the CPU's bytes, in each dtype."""
    weights = [qn.quantize(torch.randn(n, k), double_quant=double) for n, k, double in ((N, K, True), (5, 127, False))]
    weights += [made_up(N, K, quant_type).to("cpu") for quant_type in GGUF_TYPES]
    pairs = product(weights, FLOAT_DTYPES)
    return all(_same(w.to(device()).dequantize(dtype), w.dequantize(dtype)) for w, dtype in pairs)


def products(dtype: torch.dtype) -> bool:
    """Forward and all gradients against fp32 products on the CPU, by the fused kernels where there are some."""
    w = qn.quantize(torch.randn(N, K, device=device()) / K**0.5)
    dense = w.to("cpu").dequantize(torch.float32)
    errors = [0.0]
    for m, always_fused in product(TOKENS, (False, True)):
        made = [torch.randn(s) for s in ((m, K), (8, K), (N, 8), (N,), (m, N))]
        x, a, b, bias, grad = (t.to(dtype) if number in (0, 3, 4) else t for number, t in enumerate(made))
        ours = [t.to(device()).requires_grad_() for t in (x, a, b, bias)]
        plan_of = partial(_cuda_products.plan_of, always_fused=always_fused)
        with patch.object(_cuda_products, "plan_of", plan_of), patch.object(_cuda_choice, "card", lambda *_: None):
            y = qn.lora_linear(ours[0], w, ours[1], ours[2], 2.0, bias=ours[3])
            z = qn.linear(ours[0], w)
            grads = torch.autograd.grad(y, ours, grad.to(device()), retain_graph=True)
            plain = torch.autograd.grad(z, ours[0], grad.to(device()))
        exact = [t.detach().float().requires_grad_() for t in (x, a.to(dtype), b.to(dtype), bias)]
        want_z = exact[0] @ dense.t()
        want_y = want_z + 2.0 * (exact[0] @ exact[1].t()) @ exact[2].t() + exact[3]
        want = torch.autograd.grad(want_y, exact, grad.float(), retain_graph=True)
        want_plain = torch.autograd.grad(want_z, exact[0], grad.float())
        pairs = zip((y, z, *grads, *plain), (want_y, want_z, *want, *want_plain), strict=True)
        errors += [relative_error(got.detach().cpu(), there.detach()) for got, there in pairs if m and there.numel()]
    return max(errors) < TOLERANCE


def products_of_blocks() -> bool:
    """Forward by the fused kernels of every GGUF format against fp32 products on the CPU."""
    errors = []
    for quant_type, m, dtype in product(GGUF_TYPES, (1, 9, 16, 24, 64), (half(), torch.float16)):
        w, x = made_up(N, K, quant_type), (torch.randn(m, K) / K).to(dtype)
        want = x.float() @ w.to("cpu").dequantize(torch.float32).t()
        errors.append(relative_error(qn.linear(x.to(device()), w).cpu(), want))
    return max(errors) < TOLERANCE


def loss() -> bool:
    """Loss and gradient for a dense and a 4-bit head, some labels ignored, against torch's on the CPU."""
    head, h = torch.randn(101, 64) / 8, torch.randn(33, 64)
    labels = torch.where(torch.arange(33) % 5 == 0, -100, torch.arange(33))
    errors = []
    for dtype, quantized in product((half(), torch.float16, torch.float32), (False, True)):
        here = h.to(device(), dtype).requires_grad_()
        weight: Any = qn.quantize(head.to(device())) if quantized else head.to(device(), dtype)
        got = qn.linear_cross_entropy(here, weight, labels.to(device()))
        wide = (weight.dequantize(dtype) if quantized else weight).float().cpu()
        there = h.to(dtype).float().requires_grad_()
        want = F.cross_entropy(there @ wide.t(), labels)
        grads = torch.autograd.grad(got, here)[0], torch.autograd.grad(want, there)[0]
        errors += [abs(float(got.detach()) - float(want.detach())), relative_error(grads[0].cpu(), grads[1])]
    return max(errors) < 2 * TOLERANCE


def norms() -> bool:
    """RMSNorm, SwiGLU and rotation, forward and backward, against the CPU's ops."""
    ops = torch.ops.qlora_native
    x, other, grad = (torch.randn(2, 3, 8, 64).to(half()) for _ in range(3))
    weight, angles = torch.randn(64).to(half()), torch.randn(2, 1, 8, 64).to(half())

    def every(place: torch.device) -> list[Tensor]:
        p, q, g = (t.to(place).requires_grad_() for t in (x, other, grad))
        made = [ops.rms_norm(p, weight.to(place), 1e-6)[0], ops.swiglu(p, q), ops.rotary(p, *angles.to(place), False)]
        grads = [torch.autograd.grad(y, p, g)[0] for y in made]
        return [t.detach().cpu() for t in (*made, *grads)]

    return max(map(relative_error, every(device()), every(torch.device("cpu")))) < TOLERANCE


def optimizer(rule: str, bits: int) -> bool:
    """Two clipped steps give the CPU's bytes."""
    start = [torch.randn(5000), torch.randn(40, 33)]
    grads = [torch.randn_like(t) for t in start]
    found = []
    for place in (device(), torch.device("cpu")):
        parameters = [torch.nn.Parameter(t.to(place)) for t in start]
        stepper = getattr(qn.optim, rule)(parameters, lr=1e-3, bits=bits, max_norm=1.0)
        for _ in range(2):
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.to(place)
            stepper.step()
        found.append(parameters)
    return all(map(_same, *found))


def program(name: str, context: Context) -> str | None:
    """Its path; None, and a note, where there is none, or no GPU for it."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/local/cuda/bin") if on_gpu() else None
    if found is None:
        context.record(absent=name)
    return found


def ends_well(*command: Any, **env: str) -> dict[str, Any]:
    """The row of a command, whose exit status is its result."""
    return {"match": subprocess.run(command, cwd=ROOT, env=os.environ | env, check=False).returncode == 0}


def run_tests(context: Context) -> None:
    """The tests of ops that take a card."""
    if program("nvidia-smi", context) is None or context.importable("pytest") is None:
        return
    files = [file for name in TESTS for file in sorted(ROOT.glob(f"tests/test_{name}.py"))]
    options = ("-k", "cuda or on_device or the_device", "--continue-on-collection-errors", "-q")
    context.row(Case("tests"), lambda: ends_well(sys.executable, "-m", "pytest", *files, *options))


def run_sanitizer(context: Context, tool: str) -> None:
    """The basics under a tool that looks at our kernels alone, where it can choose. torch's cache of memory would hide
    small overruns."""
    sanitizer = program("compute-sanitizer", context)
    if sanitizer is None:
        return
    can_choose = "--kernel-regex" in subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    ours = ("--kernel-regex", "kns=qlora_native") if can_choose else ()
    record = context.file.with_name("sanitized.jsonl")
    record.unlink(missing_ok=True)
    check = (sys.executable, ROOT / "bench" / "gpu_check.py", "--child", "gpu_basics run", "", record, "600")
    options = ("--tool", tool, "--error-exitcode", "3", *ours)
    context.row(Case(tool), lambda: ends_well(sanitizer, *options, *check, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def run_primitives(context: Context) -> None:
    """The primitives of the kernels against the emulator's words (tests/conformance/)."""
    nvcc = program("nvcc", context)
    if nvcc is not None:
        context.row(Case("primitives"), lambda: primitives_row(nvcc, str(context.file.with_suffix(""))))


def primitives_row(nvcc: str, made: str) -> dict[str, Any]:
    """Compiles and runs them."""
    subprocess.run([nvcc, *NVCC, "-o", made, "tests/conformance/main.cu"], cwd=ROOT, check=True)
    found = subprocess.run([made], capture_output=True, text=True, check=True).stdout
    said = differences(words_of(GOLDEN.read_text(encoding="ascii")), words_of(found))
    return {"match": not any("DIFFERS" in sentence for sentence in said), "said": said}


def words_of(text: str) -> dict[str, list[str]]:
    """By primitive, of which each has a line: its name and 32-bit words, those of a lane together."""
    return {name: words for name, *words in map(str.split, text.splitlines())}


def same_nan(word: str) -> str:
    """One word for every NaN: which one an operation gives differs between processors (NVIDIA's is 7fffffff)."""
    return "7fffffff" if int(word, 16) & 0x7FFFFFFF > 0x7F800000 else word


def differences(golden: dict[str, list[str]], found: dict[str, list[str]]) -> list[str]:
    """One sentence for each primitive that differs from the emulator."""
    said = []
    for name, words in golden.items():
        if name not in found:
            said.append(f"{name} was not run (bf16 products begin with sm_80)")
            continue
        pairs = zip(*(map(same_nan, row) if name in FP32 else row for row in (words, found[name])), strict=False)
        wrong = [i for i, (want, got) in enumerate(pairs) if want != got]
        if wrong or len(words) != len(found[name]):
            first = wrong[0] if wrong else 0
            lane, word = divmod(first, len(words) // LANES)
            said.append(
                f"{name} DIFFERS in {len(wrong)} of {len(words)} words, first in lane {lane}, word {word}: the GPU has "
                f"{found[name][first]}, the emulator {words[first]}"
            )
    return said
