"""What bench/gpu_check.sh measures once the library is built: ceilings, products, passes over memory, whole models.

    python bench/gpu_check.py --json FILE [--seconds 300]    on a machine with a GPU
    python bench/gpu_check.py --json FILE --dry-run          tiny shapes on the CPU: shows that this script works
    python bench/gpu_check.py --once                         each op once on tiny shapes, for compute-sanitizer

The file is written anew after every row, so that a run that is cut off leaves what it had. Sections that time does not
allow, and kernels that this build lacks, are named in ``left_out``.
"""

from __future__ import annotations

import argparse
import itertools
import time
import traceback
from collections.abc import Callable
from typing import Any, Literal

import gpu_models
import gpu_paging
import gpu_passes
import gpu_products
import torch
from common import line, write_json
from gpu_timing import Ceilings, card, ceilings, device, on_gpu

import qlora_native as qn
from qlora_native.ops import _library

OPS = ("dequantize_4bit", "quantize_4bit", "linear_4bit", "lora_linear_4bit", "adamw_step", "gradient_norm")


class Run:
    """The result so far, and the time that is left."""

    def __init__(self, path: str | None, seconds: float, dry: bool) -> None:
        self.path, self.dry = path, dry
        self.deadline = time.monotonic() + seconds
        self.found: dict[str, Any] = {
            "bench": "gpu_check",
            "dry_run": dry,
            "card": card(),
            "build": {key: value for key, value in qn.build_info().items() if key in ("version", "cuda_archs")},
            "left_out": [],
            "failed": [],
            "rows": [],
        }

    def write(self) -> None:
        """Now."""
        write_json(self.path, self.found)

    def leave_out(self, sentence: str) -> None:
        """Print what is missing."""
        print(f"left out: {sentence}", flush=True)
        self.found["left_out"].append(sentence)

    def row(self, head: dict[str, Any], measure: Callable[[], dict[str, Any]], keep_s: float = 0.0) -> None:
        """Measures one row, unless fewer than ``keep_s`` seconds are left; a failure is printed and the run goes on."""
        name = " ".join(str(value) for value in head.values())
        if time.monotonic() > self.deadline - keep_s:
            self.leave_out(f"{name}: no time left")
            return
        try:
            made = head | measure()
        except Exception as error:
            traceback.print_exc()
            self.found["failed"].append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        else:
            self.found["rows"].append(made)
            print(line(made, *head) if "ms" in made else made, flush=True)
        self.write()


def name_missing_kernels(run: Run) -> None:
    """Ops that this build runs on a GPU without a kernel of its own."""
    for op in OPS:
        if (op, "CUDA") not in _library.IMPLEMENTATIONS:
            run.leave_out(f"{op} has no CUDA kernel in this build: torch's own operations are timed in its place")


def measure_passes(run: Run, measured: Ceilings, rounds: int) -> None:
    """Dequantize, quantize, AdamW, AdamW with paged states."""
    shapes = gpu_passes.TINY_SHAPES if run.dry else gpu_passes.DEQUANTIZE_SHAPES
    for (n, k), dtype in itertools.product(shapes, (torch.bfloat16, torch.float32)):
        head = {"op": "dequantize_4bit", "dtype": str(dtype).removeprefix("torch."), "n": n, "k": k}
        run.row(head, lambda n=n, k=k, d=dtype: gpu_passes.dequantize_row(n, k, d, measured, rounds))  # type: ignore[misc]
    for n, k in shapes:
        head = {"op": "quantize_4bit", "dtype": "bfloat16", "n": n, "k": k}
        run.row(head, lambda n=n, k=k: gpu_passes.quantize_row(n, k, measured, rounds))  # type: ignore[misc]
    widths: tuple[Literal[8, 32], ...] = (32, 8)
    for bits in widths:
        head = {"op": "adamw_step", "bits": bits}
        run.row(head, lambda bits=bits: gpu_passes.adamw_row(bits, run.dry, measured, rounds))  # type: ignore[misc]
    run.row({"op": "paged_adamw_step", "bits": 32}, lambda: gpu_paging.paging_row(run.dry, rounds))


def measure_products(run: Run, measured: Ceilings, rounds: int, keep_s: float) -> None:
    """Every layer shape, direction and number of tokens."""
    for (n, k), cases in itertools.groupby(gpu_products.cases(run.dry), key=lambda case: case[1:]):
        if time.monotonic() > run.deadline - keep_s:
            run.leave_out(f"products of [{n}, {k}]: no time left")
            continue
        weights = gpu_products.Weights(n, k)
        for case, direction in itertools.product(cases, gpu_products.DIRECTIONS):
            head = {"op": direction, "n": n, "k": k, "m": case.m}
            measure = lambda w=weights, c=case, d=direction: gpu_products.row(w, c, d, measured, rounds)  # noqa: E731
            run.row(head, measure, keep_s)
        del weights
        if on_gpu():
            torch.cuda.empty_cache()


def measure_models(run: Run) -> None:
    """The step under 24 GB, the load under 48 GB."""
    gib = gpu_models.GIB
    small, large = (gpu_models.TINY,) * 2 if run.dry else (gpu_models.LLAMA_8B, gpu_models.LLAMA_70B)
    step = {"op": "qlora_step", "model": "tiny" if run.dry else "8B-shaped"}
    run.row(step, lambda: gpu_models.train_steps(small, 24 * gib, 2 if run.dry else 5), keep_s=10)
    load = {"op": "load", "model": "tiny" if run.dry else "70B-shaped"}
    if on_gpu() and torch.cuda.get_device_properties(0).total_memory < 44 * gib:
        run.leave_out("the 70B-shaped load: this card has less than 44 GiB")
    else:
        run.row(load, lambda: gpu_models.load(large, 48 * gib), keep_s=10)


def once() -> None:
    """Each op on tiny shapes, forward and backward, without timing."""
    for case in gpu_products.TINY:
        w = qn.quantize(torch.randn(case.n, case.k, device=device()))
        for rows in (case.m, 0):
            x = torch.randn(rows, case.k, device=device(), dtype=torch.bfloat16, requires_grad=True)
            a = torch.randn(8, case.k, device=device(), requires_grad=True)
            b = torch.randn(case.n, 8, device=device(), requires_grad=True)
            (qn.linear(x, w).sum() + qn.lora_linear(x, w, a, b, 2.0).sum()).backward()
    widths: tuple[Literal[8, 32], ...] = (32, 8)
    for bits in widths:
        for rule in (qn.optim.AdamW, qn.optim.Lion):
            parameters = [torch.nn.Parameter(torch.randn(5000, device=device())) for _ in "ab"]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            rule(parameters, lr=1e-3, bits=bits, max_norm=1.0).step()
    if on_gpu():
        torch.cuda.synchronize()
    print("each op ran once")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", help="file for the result")
    parser.add_argument("--seconds", type=float, default=300, help="no new row begins after so many")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--once", action="store_true", help="each op once, without timing")
    arguments = parser.parse_args()
    if arguments.dry_run == on_gpu() and not arguments.once:
        raise SystemExit(
            "gpu_check: there is a GPU here, leave --dry-run out (or hide it with CUDA_VISIBLE_DEVICES=)."
            if on_gpu()
            else "gpu_check: torch finds no GPU; --dry-run tries the script out on the CPU."
        )
    torch.manual_seed(0)
    if arguments.once:
        once()
        return
    run = Run(arguments.json, arguments.seconds, arguments.dry_run)
    name_missing_kernels(run)
    with torch.no_grad():
        rounds = 3 if run.dry else 9
        run.found["ceilings"] = measured = ceilings(rounds)
        print(run.found["card"], measured, sep="\n", flush=True)
        run.write()
        measure_passes(run, measured, rounds)
        later_s = 0 if run.dry else 90  # for the models
        measure_products(run, measured, rounds, keep_s=later_s)
    measure_models(run)
    run.write()
    missed = [row for row in run.found["rows"] if not row["match"]]
    print(f"{len(run.found['rows'])} rows, {len(missed)} without a match, {len(run.found['failed'])} failed")
    raise SystemExit(1 if missed or run.found["failed"] else 0)


if __name__ == "__main__":
    main()
