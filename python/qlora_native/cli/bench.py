"""``qlora bench``: this library's ops against torch's own, on this machine and on the shapes of a model of yours."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qlora_native import build_info
from qlora_native._io import as_user_error, user_path
from qlora_native.cli._run import require
from qlora_native.errors import UserError

TOKENS = (1, 16, 256)
OPS = ("linear_4bit", "lora_linear_4bit", "quantize_4bit", "dequantize_4bit", "linear_cross_entropy", "adamw_step")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", metavar="OP", nargs="?", choices=OPS, help=f"one of {', '.join(OPS)} (default: all)")
    parser.add_argument("--model", metavar="MODEL", help="take the shapes of its linear layers; no weight is read")
    parser.add_argument("--shape", nargs=3, type=int, metavar=("M", "N", "K"), help="M tokens, N outputs, K inputs")
    parser.add_argument(
        "--tokens", nargs="+", type=int, metavar="M", help="token counts, without --shape (default: 1 16 256)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of x")
    parser.add_argument("--rounds", type=int, default=11, metavar="R", help="calls of each, in turn (default: 11)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    parser.epilog = """Both are called in turns, so that background load affects both equally; the ratio is
the median over the rounds, above 1 where this library is faster. Without --model and --shape: a weight [4096, 4096].
Close other programs.

examples:
  qlora bench
  qlora bench linear_4bit --shape 16 4096 14336
  qlora bench --model Llama-3.1-8B-Instruct --tokens 1 512"""


def run(args: argparse.Namespace) -> int:
    """Measure and print each row as it comes."""
    from qlora_native.cli.contests import CONTESTS, WITHOUT_TOKENS, Shape, cpu_name

    shapes = _shapes(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_properties(device).name if device.type == "cuda" else cpu_name()
    if not args.json:
        isa = "" if device.type == "cuda" else f", {build_info()['cpu_isa']}, {torch.get_num_threads()} threads"
        print(f"{name}{isa}, torch {torch.__version__}, {args.dtype}")
    torch.manual_seed(0)
    for op in [args.op] if args.op else OPS:
        first = True
        for m, n, k in dict.fromkeys((0 if op in WITHOUT_TOKENS else m, n, k) for m, n, k in shapes):
            contest = CONTESTS[op](Shape(m, n, k), getattr(torch, args.dtype), device)
            if first and not args.json:
                print(f"\n{op}, against {contest.rival}")
                print(f"{'M':>7}  {'[N, K]':<18}{'ours, ms':>10}{'torch, ms':>10}  times as fast (quartiles)")
            first = False
            _print({"op": op, "m": m or None, "n": n, "k": k}, contest, args, name, device)
    return 0


def _shapes(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    if args.model and args.shape:
        raise UserError("qlora bench: --model and --shape were given: expected one of them")
    if args.shape and args.tokens:
        raise UserError("qlora bench: --tokens does not go with --shape, whose first number it is; leave one out")
    for name, values in (("--shape", args.shape), ("--tokens", args.tokens), ("--rounds", [args.rounds])):
        if any(value < 1 for value in values or ()):
            raise UserError(f"qlora bench: {name} is {' '.join(map(str, values))}: expected numbers of 1 and more")
    if args.shape:
        return [tuple(args.shape)]
    weights = [(4096, 4096)]
    if args.model:
        require("qlora bench --model", "transformers", "yaml")
        weights = sorted(set(layer_shapes(args.model, args.dtype)))
    return [(m, n, k) for n, k in weights for m in args.tokens or TOKENS]


def layer_shapes(model: str, dtype: str = "bfloat16") -> list[tuple[int, int]]:
    """[N, K] of each weight that load_model would make 4-bit, from the model's configuration alone."""
    from qlora_native.models.build import MetaModel
    from qlora_native.weights.open import open_source

    with as_user_error():
        config = open_source(user_path(model)).config
        meta = MetaModel(config, getattr(torch, dtype), torch.device("meta"))
        weights = meta.four_bit_weights(("lm_head",), 64)
    # The last two axes: of one expert, where a weight is a stack of them.
    shapes = ((meta.shapes[name].shape[-2:], transposed) for name, transposed in weights.items())
    return [(columns, rows) if transposed else (rows, columns) for (rows, columns), transposed in shapes]


def _print(about: dict[str, Any], contest: Any, args: argparse.Namespace, name: str, device: Any) -> None:
    from qlora_native.cli.contests import interleaved, quartiles, ratios, rounded

    def call_and_wait(function: Callable[[], Any]) -> None:
        function()
        torch.cuda.synchronize(device)

    functions = contest.functions
    if device.type == "cuda":
        functions = {name: partial(call_and_wait, function) for name, function in functions.items()}
    began = time.monotonic()
    seconds = interleaved(functions, args.rounds)
    low, middle, high = rounded(ratios(seconds["torch"], seconds["ours"]))
    row = {
        **about,
        "dtype": args.dtype,
        "device": name,
        "ours_ms": rounded(quartiles(seconds["ours"]), 1e3)[1],
        "torch_ms": rounded(quartiles(seconds["torch"]), 1e3)[1],
        "torch_is": contest.rival,
        "times_as_fast": middle,
        "quartiles": [low, high],
        "match": contest.error < contest.tolerance,
        "relative_error": float(f"{contest.error:.2g}"),
        "seconds": round(time.monotonic() - began, 2),
    }
    if args.json:
        print(json.dumps(row), flush=True)
        return
    match = "" if row["match"] else f"  NO MATCH: relative error {row['relative_error']:g}"
    sizes = f"{about['m'] or '':>7}  [{about['n']}, {about['k']}]"
    print(
        f"{sizes:<27}{row['ours_ms']:>10g}{row['torch_ms']:>10g}{middle:>8g} ({low:g} to {high:g}){match}", flush=True
    )
