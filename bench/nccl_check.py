"""The NCCL path of several processes, on a machine with two GPUs or more: python bench/nccl_check.py [--ranks N].

Trains a small random llama by ddp and by fsdp on N cards and by one process on one, from one config, and compares the
adapters. Without two GPUs it prints that and exits with 77.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import runs

SKIPPED = 77
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the adapter's largest change; sums come in another order


def main() -> int:
    """Run all and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    ranks = parser.parse_args().ranks
    if torch.cuda.device_count() < 2 or ranks < 2:
        print(f"skipped: torch finds {torch.cuda.device_count()} GPUs, expected 2 or more")
        return SKIPPED
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs.write_files(folder, 48, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
        for dtype, tolerance in TOLERANCE.items():
            one = _train(folder, "none", dtype, 1)
            for mode in ("ddp", "fsdp"):
                many = _train(folder, mode, dtype, ranks)
                distance = max(float((many[key] - one[key]).abs().max()) for key in one)
                scale = max(float(value.abs().max()) for key, value in one.items() if "lora_B" in key)
                bad = not distance <= tolerance * scale
                failed += bad
                print(f"{mode} on {ranks}, {dtype}: {distance / scale:.1e} of the change {'FAILED' if bad else 'ok'}")
    return 1 if failed else 0


def _train(folder: Path, mode: str, dtype: str, ranks: int) -> dict[str, torch.Tensor]:
    out, path = folder / f"{mode}-{dtype}", folder / f"{mode}-{dtype}.yaml"
    options = {"steps": 10, "batch_size": 4, "grad_accum": ranks, "dtype": dtype, "lr": 1e-3}
    config = {**runs.settings(folder, out, {"max_length": 64}, **options), "parallel": mode}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    visible = {} if ranks > 1 else {"CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, *start, "-m", "qlora_native", "train", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **visible})
    return load_file(out / "adapter" / "adapter_model.safetensors")


if __name__ == "__main__":
    sys.exit(main())
