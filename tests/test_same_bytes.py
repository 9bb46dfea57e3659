"""What has the same bytes on every instruction set: each computes all of it in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import qlora_native as qn

SCRIPT = """
import hashlib, json, torch
import qlora_native as qn
from qlora_native import _C

DTYPES = torch.float32, torch.bfloat16, torch.float16
ops, digests = torch.ops.qlora_native, {}
torch.manual_seed(3)


def add(part, *tensors):
    for t in tensors:
        digests.setdefault(part, hashlib.sha256()).update(
            t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )


for quant_type in ("nf4", "fp4"):
    for dtype in DTYPES:
        for scale in (1.0, 1e-40):
            w = qn.quantize((torch.randn(37, 131) * scale).to(dtype), quant_type=quant_type, block_size=32)
            add("quantize", w.packed, w.absmax, w.nested_absmax, w.nested_offset, *map(w.dequantize, DTYPES))

for number, dtype in enumerate(DTYPES):
    x, g, w = torch.randn(9, 333).to(dtype), torch.randn(9, 333).to(dtype), torch.randn(333).to(dtype)
    x[0] *= 1e-30  # subnormals
    y, rstd = ops.rms_norm(x, w, 1e-5)
    add("activations", y, rstd, ops.rms_norm_backward(g, x, w, rstd, 1e-5))
    gate = torch.linspace(-110, 110, 9 * 333).view(9, 333).to(dtype)
    add("activations", ops.swiglu(gate, g), *ops.swiglu_backward(g, gate, x))
    heads, cos, sin = (torch.randn(2, n, 5, 38).to(dtype) for n in (3, 1, 1))
    add("activations", *(ops.rotary(heads, cos[:, 0], sin[:, 0], inverse) for inverse in (False, True)))
    targets, losses = torch.randint(333, (9,)), torch.empty(9)
    _C.softmax_loss(number, gate.data_ptr(), targets.data_ptr(), 9, 333, True, losses.data_ptr())
    add("activations", gate, losses)

for bits in (32, 8):
    for dtype in DTYPES:
        for optimizer in (qn.optim.AdamW, qn.optim.Adam, qn.optim.Lion):
            params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (5, 4097, 9000, 16384)]
            rule = optimizer(params, lr=1e-2, weight_decay=0.01, bits=bits, max_norm=1.0)
            for step in range(4):
                for p in params:
                    p.grad = (torch.randn(p.shape) * 10.0 ** (3 - 4 * step)).to(dtype)
                rule.step()
                add("optimizers", torch.tensor(rule.grad_norm, dtype=torch.float64))
            add("optimizers", *params, *(t for s in rule.state.values() for t in s.values()))

print(json.dumps({"isa": _C.cpu_isa(), **{part: digest.hexdigest() for part, digest in digests.items()}}))
"""


@pytest.fixture(scope="module")
def digests() -> dict[str, dict[str, str]]:
    found = {}
    for isa in qn.build_info()["isas_built"]:
        environment = {**os.environ, "QLORA_NATIVE_ISA": isa}
        run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        if run.returncode and "this machine and build offer" in run.stderr:
            continue
        assert run.returncode == 0, run.stderr
        found[isa] = json.loads(run.stdout)
        assert found[isa]["isa"] == isa
    return found


@pytest.mark.long  # each golden file is read on each instruction set
@pytest.mark.parametrize("part", ["quantize", "activations", "optimizers"])
def test_the_bytes_are_those_of_every_instruction_set(digests: dict[str, dict[str, str]], part: str) -> None:
    assert "scalar" in digests and len({found[part] for found in digests.values()}) == 1, digests
