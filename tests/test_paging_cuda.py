"""A spike under a hard limit on a GPU: unpaged states make it fail, paged="auto" lets it pass. Needs a GPU; what can be
shown without one is in test_paging_emulated.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

MIB = 1 << 20
STEPS, NUMEL = 4, 16 * MIB  # 64 MiB of parameters and of gradients, 128 MiB of states

CHILD = f"""
import sys, torch, qlora_native as qn
limited, paged = sys.argv[1] == "limited", {{"auto": "auto", "False": False}}[sys.argv[2]]
torch.manual_seed(0)
start = torch.randn({NUMEL})
if limited:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction({300 * MIB} / total)
param = torch.nn.Parameter(start.cuda())
optimizer = qn.optim.AdamW([param], lr=1e-3, paged=paged)
for step in range({STEPS}):
    param.grad = torch.full_like(param, 0.1 * (step + 1))
    optimizer.step()
    if step == 1:
        param.grad = None
        spike = torch.ones({150 * MIB}, dtype=torch.uint8, device="cuda")
        assert int(spike[-1]) == 1
        del spike
torch.save(param.detach().cpu(), sys.argv[3])
print("state bytes", optimizer.paging_statistics()["state_bytes"])
"""


def run(tmp_path: object, limited: str, paged: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, limited, paged, f"{tmp_path}/{limited}-{paged}.pt"]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_a_spike_that_kills_unpaged_training_passes_with_auto(tmp_path: object) -> None:
    free = run(tmp_path, "unlimited", "False")
    assert free.returncode == 0, free.stderr[-2000:]
    dead = run(tmp_path, "limited", "False")
    assert dead.returncode != 0 and "out of memory" in dead.stderr
    paged = run(tmp_path, "limited", "auto")
    assert paged.returncode == 0, paged.stderr[-2000:]
    expected, got = (torch.load(f"{tmp_path}/{name}.pt") for name in ("unlimited-False", "limited-auto"))
    assert torch.equal(expected, got)
