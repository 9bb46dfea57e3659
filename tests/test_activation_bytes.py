"""The ops between the products give the same bytes on every instruction set: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import qlora_native as qn

DIGEST = """
import hashlib, torch
import qlora_native.ops
from qlora_native import _C

ops, digest = torch.ops.qlora_native, hashlib.sha256()
torch.manual_seed(0)


def add(*tensors):
    for t in tensors:
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
    x, g, w = torch.randn(9, 333).to(dtype), torch.randn(9, 333).to(dtype), torch.randn(333).to(dtype)
    x[0] *= 1e-30  # subnormals
    y, rstd = ops.rms_norm(x, w, 1e-5)
    add(y, rstd, ops.rms_norm_backward(g, x, w, rstd, 1e-5))
    gate = torch.linspace(-110, 110, 9 * 333).view(9, 333).to(dtype)
    add(ops.swiglu(gate, g), *ops.swiglu_backward(g, gate, x))
    heads, cos, sin = (torch.randn(2, n, 5, 38).to(dtype) for n in (3, 1, 1))
    add(*(ops.rotary(heads, cos[:, 0], sin[:, 0], inverse) for inverse in (False, True)))
    targets, losses = torch.randint(333, (9,)), torch.empty(9)
    _C.softmax_loss(number, gate.data_ptr(), targets.data_ptr(), 9, 333, True, losses.data_ptr())
    add(gate, losses)
print(_C.cpu_isa(), digest.hexdigest())
"""


def test_same_bytes_on_every_instruction_set() -> None:
    digests = {}
    for isa in qn.build_info()["isas_built"]:
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], env={**os.environ, "QLORA_NATIVE_ISA": isa}, capture_output=True, text=True
        )
        if run.returncode and "this machine and build offer" in run.stderr:
            continue
        assert run.returncode == 0, run.stderr
        name, digest = run.stdout.split()
        assert name == isa
        digests[isa] = digest
    assert "scalar" in digests
    assert len(set(digests.values())) == 1, digests
