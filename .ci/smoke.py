"""Run by .ci/full where only the core install is: does the package do its job there? `--ops`: its ops alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

import torch

import qlora_native as qn


def check(what: str, holds: bool) -> None:
    print(f"{'ok' if holds else 'FAILED'}: {what}")
    if not holds:
        raise SystemExit(1)


def main() -> None:
    print(qn.build_info())
    for extra in ("transformers", "pydantic", "peft"):
        check(f"{extra} is absent", importlib.util.find_spec(extra) is None)

    torch.manual_seed(0)
    dense = torch.randn(96, 200)
    for quant_type, bound in (("nf4", 0.15), ("fp4", 0.25)):
        w = qn.quantize(dense, quant_type=quant_type)
        error = (w.dequantize() - dense).norm() / dense.norm()
        check(f"{quant_type}: relative error {error:.3f} below {bound}", 0.01 < error < bound)
        x = torch.randn(7, 200, requires_grad=True)
        y = qn.linear(x, w)
        check(f"{quant_type}: linear is the product", torch.allclose(y, x @ w.dequantize().T, atol=1e-3))
        y.sum().backward()
        grad = x.grad
        check(f"{quant_type}: linear has a gradient", grad is not None and bool(grad.abs().sum() > 0))

    if "--ops" in sys.argv:
        return
    command = shutil.which("qlora", path=os.path.dirname(sys.executable))
    check("the qlora command is installed", command is not None)
    shown = subprocess.run([str(command), "--help"], capture_output=True, text=True)
    check("qlora --help exits with 0", shown.returncode == 0 and "train" in shown.stdout)
    refused = subprocess.run([str(command), "demo"], capture_output=True, text=True)
    print(refused.stderr.strip())
    check(
        "qlora demo exits with 2 and names the packages",
        refused.returncode == 2 and "pip install transformers pyyaml" in refused.stderr,
    )
    check("without a stack trace", "Traceback" not in refused.stderr)


if __name__ == "__main__":
    main()
