"""``qlora tune``: measures on this machine's GPU which kernels are fastest for the layers of a model."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("model", metavar="MODEL", help="a model folder or a .gguf file; only its shapes are used")
    parser.add_argument(
        "--tokens", nargs="+", type=int, metavar="M", help="token counts of a step (default: 4, 8, 16, ... 8192)"
    )
    parser.add_argument("--block-size", type=int, default=64, metavar="N", help="weights per scale (default: 64)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of x (default: bfloat16)")
    parser.add_argument(
        "--skip-modules",
        nargs="+",
        default=["lm_head"],
        metavar="NAME",
        help="linear layers that are not 4-bit (default: lm_head, the output embedding)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a product")
    parser.epilog = """Once a GPU and model, before training, while nothing else runs there. Training and
inference then follow what was found; docs/tuning.md tells where it is kept and how to forget it.

example:
  qlora tune Llama-3.1-8B-Instruct"""


def layer_shapes(
    model: str, dtype: str = "bfloat16", skip_modules: Sequence[str] = ("lm_head",), block_size: int = 64
) -> list[tuple[int, int]]:
    """[N, K] of each weight that load_model would make 4-bit, from the model's configuration alone."""
    import torch

    from qlora_native._io import as_user_error
    from qlora_native.hf.build import MetaModel, four_bit_weights
    from qlora_native.hf.source import open_source

    of = getattr(torch, dtype)
    with as_user_error():
        tree = MetaModel(open_source(Path(model).expanduser(), of).config, of, torch.device("meta"))
        weights = four_bit_weights(tree.model, skip_modules, block_size, tree.in_fp32)
    shapes = []
    for name, transposed in weights.items():
        *_, rows, columns = tree.shapes[name].shape  # of one expert, where it is a stack of them
        shapes.append((columns, rows) if transposed else (rows, columns))
    return shapes


def run(args: argparse.Namespace) -> int:
    """Measure and print each product as it comes."""
    import torch

    from qlora_native import tuning
    from qlora_native._io import as_user_error

    logging.getLogger("transformers").setLevel(logging.ERROR)
    dtype = getattr(torch, args.dtype)
    shapes = layer_shapes(args.model, args.dtype, args.skip_modules, args.block_size)

    def report(found: tuning.Tuned) -> None:
        sizes = {**found.problem._asdict(), "dtype": args.dtype}
        plans = {"built_in": str(found.built_in), "chosen": str(found.chosen)}
        seconds = {"built_in_seconds": found.built_in_seconds, "chosen_seconds": found.chosen_seconds}
        if args.json:
            print(json.dumps({**sizes, **plans, **seconds, "left_out": found.left_out}), flush=True)
            return
        m, n, k, *_, forward, low_memory = found.problem
        kind = ("forward" if forward else "gradient") + (", low memory" if low_memory else "")
        change = f"{found.built_in} stays" if found.chosen == found.built_in else f"{found.chosen} for {found.built_in}"
        times = f"{1e3 * found.chosen_seconds:.4g} ms for {1e3 * found.built_in_seconds:.4g}"
        print(f"[{n}, {k}], {m} tokens, {kind}: {change}, {times}", flush=True)
        for sentence in found.left_out:
            print(f"  left out: {sentence}", flush=True)

    tokens = args.tokens or tuning.TOKENS
    with as_user_error():
        tuning.tune(shapes, tokens=tokens, dtype=dtype, block_size=args.block_size, report=report)
    return 0
