"""A layer of 4-bit experts on bf16 tokens, interleaved with its products alone and with a loop over the experts.

    python bench/bench_experts.py --json

Rows: forward, and forward and backward, without adapters and with one of rank 16 on both stacks. Contenders:

    ours      the layer, QuantizedExperts.forward; of "product", the op on its second stack
    products  the products of each expert's rows, which lie side by side, and their gradients, one after another
    loop      the layer an expert after another: their tokens are searched, gathered and added to the result

`match`: ours against the loop; the op against the products, to the bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from common import Bar, Bench, interleaved, relative_error, timings
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import qlora_native as qn
from qlora_native.nn.experts import by_expert, put_stack
from qlora_native.ops.experts_4bit import experts_4bit

EXPERTS, CHOSEN, HIDDEN, INNER, RANK = 64, 8, 2048, 768, 16
SHAPES = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
BARS = (Bar("products", 1.5),)


def stack(n: int, k: int) -> qn.QuantizedWeight:
    return qn.quantize(torch.randn(EXPERTS, n, k, dtype=torch.bfloat16) / k**0.5)


class Layer:
    """The module, and for each stack its experts alone."""

    def __init__(self, rows: int) -> None:
        config = Qwen3MoeConfig(
            hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=CHOSEN
        )
        with torch.device("meta"):
            self.module: Any = Qwen3MoeExperts(config)
        self.stacks = {name: stack(*shape) for name, shape in SHAPES.items()}
        for name, weight in self.stacks.items():
            put_stack(self.module, name, weight)
        self.slices = {name: [weight[e] for e in range(EXPERTS)] for name, weight in self.stacks.items()}
        self.factors = {
            name: (torch.randn(EXPERTS, RANK, k).requires_grad_(), torch.randn(EXPERTS, n, RANK).requires_grad_(), 0.1)
            for name, (n, k) in SHAPES.items()
        }
        tokens = EXPERTS * rows // CHOSEN
        self.x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        # Each expert has as many tokens, and each token as many experts.
        each = torch.arange(tokens * CHOSEN).view(tokens, CHOSEN) % EXPERTS
        self.routing = each[torch.randperm(tokens)], torch.rand(tokens, CHOSEN, dtype=torch.bfloat16)
        self.parts = {name: torch.randn(EXPERTS, rows, k, dtype=torch.bfloat16) for name, (_, k) in SHAPES.items()}

    def run(self, is_adapted: bool, is_backward: bool, forward: Callable[[], list[Tensor]]) -> list[Tensor]:
        self.module.adapters = {name: [factors] for name, factors in self.factors.items()} if is_adapted else {}
        with torch.set_grad_enabled(is_backward):
            ys = forward()
            if is_backward:
                torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        return ys

    def ours(self) -> list[Tensor]:
        return [self.module(self.x, *self.routing)]

    def loop(self) -> list[Tensor]:
        return [by_expert(self.module, self.x, *self.routing, product=self.module._product)]

    def op(self) -> list[Tensor]:
        rows = self.parts["down_proj"]
        offsets = torch.arange(EXPERTS + 1) * rows.shape[1]
        factors = self.module.adapters.get("down_proj", [()])[0]
        x = rows.view(-1, INNER).detach().requires_grad_()
        return [experts_4bit(x, None, offsets, self.stacks["down_proj"].op_args(), *factors)]

    def products(self, *names: str) -> list[Tensor]:
        ys = []
        for name, expert in itertools.product(names, range(EXPERTS)):
            x = self.parts[name][expert].detach().requires_grad_()
            weight = self.slices[name][expert]
            if name in self.module.adapters:
                a, b, scale = self.module.adapters[name][0]
                ys.append(qn.lora_linear(x, weight, a[expert], b[expert], scale))
            else:
                ys.append(qn.linear(x, weight))
        return ys


def row(layer: Layer, part: str, is_adapted: bool, is_backward: bool, repeats: int) -> dict[str, Any]:
    names = SHAPES if part == "layer" else ("down_proj",)
    sides: dict[str, Callable[[], list[Tensor]]] = {
        "ours": layer.ours if part == "layer" else layer.op,
        "products": lambda: layer.products(*names),
    }
    if part == "layer":
        sides["loop"] = layer.loop

    def runner(forward: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        return lambda: layer.run(is_adapted, is_backward, forward)

    functions = {name: runner(forward) for name, forward in sides.items()}
    ours = functions["ours"]()[0].detach()
    truth = (functions["loop"]()[0] if part == "layer" else torch.cat(functions["products"]())).detach()
    match = relative_error(ours, truth) < 1e-2 if part == "layer" else torch.equal(ours, truth)
    return {"match": match} | timings(interleaved(functions, repeats), BARS)


def main() -> None:
    bench = Bench("experts", __doc__, repeats=11, rows=(8,), parts=("product", "layer"))
    bench.begin(experts=EXPERTS, chosen=CHOSEN, hidden=HIDDEN, inner=INNER, rank=RANK)
    for rows in bench.options.rows:
        layer = Layer(rows)
        for part, is_adapted, is_backward in itertools.product(bench.options.parts, (False, True), (False, True)):
            head = {"part": part, "rows": rows, "adapter": is_adapted, "backward": is_backward, "dtype": "bfloat16"}
            found = row(layer, part, is_adapted, is_backward, bench.options.repeats)
            bench.add(head | found, "part", "rows", "adapter", "backward")
    bench.write()


if __name__ == "__main__":
    main()
