"""Passes of an 8B model of which half of the layers stream to the card, against the same model all there."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch
from common import timings
from gpu_models import LLAMA, RANK, build, made_up
from gpu_timing import Case, Context, device, interleaved_calls, on_gpu

import qlora_native as qn
from qlora_native.models.device_layers import layer_units, stream_layers
from qlora_native.models.loss import causal_lm_loss, check_loss

TOKENS = (256, 1024, 4096)


class AtOnce:
    """In the place of torch.cuda's streams, and of what makes one the current one, in a dry run."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def record_event(self) -> None: ...

    def wait_event(self, event: None) -> None: ...

    wait_stream = wait_event


def cases(dry: bool) -> list[Case]:
    """m is the tokens of a pass, k the model's width."""
    sizes = (16,) if dry else TOKENS
    return [Case("streamed_passes", m, k=LLAMA[name(dry)]["hidden_size"], r=RANK, form="8B") for m in sizes]


def name(dry: bool) -> str:
    """Of the shape."""
    return "tiny" if dry else "8B"


def model_of(dry: bool) -> Any:
    """With adapters that are not zero; the same every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        with mock.patch.dict(LLAMA["tiny"], num_hidden_layers=6):
            model = build(name(dry), made_up)
        qn.add_lora(model, qn.LoraConfig(r=RANK, seed=0))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    check_loss(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def run(context: Context) -> None:
    """A row for each number of tokens."""
    with ExitStack() as stack:
        if not on_gpu():
            for attribute in ("Stream", "current_stream", "stream"):
                stack.enter_context(mock.patch.object(torch.cuda, attribute, AtOnce))
        resident, streamed = model_of(context.dry), model_of(context.dry)
        units = layer_units(streamed.model.layers)
        stream_layers(streamed, device(), math.ceil(sum(unit.num_bytes for unit in units) / 2))
        for case in cases(context.dry):
            context.row(case, partial(passes_row, case.m, resident, streamed, context.rounds))


def passes_row(tokens: int, resident: Any, streamed: Any, rounds: int) -> dict[str, Any]:
    """Forward and backward passes in turns: the same gradients; bytes a pass, the bus's rate, how much of it hid."""
    ids = torch.randint(0, 300, (max(1, tokens // 1024), min(tokens, 1024)), device=device())

    def passes(model: Any) -> list[torch.Tensor]:
        model.zero_grad()
        causal_lm_loss(model, {"input_ids": ids, "labels": ids}).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    match = all(map(torch.equal, passes(resident), passes(streamed)))
    layers = streamed.streamed_layers
    before = layers.bytes_copied
    passes(streamed)
    copied = layers.bytes_copied - before
    calls = {"ours": lambda: passes(streamed), "resident": lambda: passes(resident), "copies": lambda: copy_all(layers)}
    seconds = interleaved_calls(calls, rounds)
    times = {key: median(values) for key, values in seconds.items()}
    bus_s = times["copies"] * copied / layers.residency.streamed_bytes
    return {
        "match": match and copied == layers.residency.bytes_read(),
        "streamed_layers": len(layers.residency.streamed),
        "copied_mib": copied >> 20,
        "bus_gb_per_s": round(copied / bus_s / 1e9, 2),
        "hidden_share": round(1 - max(0.0, times["ours"] - times["resident"]) / bus_s, 3),
    } | timings(seconds)


def copy_all(layers: Any) -> None:
    """Every streamed layer's bytes once, with nothing beside it."""
    for unit in layers.residency.streamed:
        slot = layers._slot_of(unit)
        slot.memory[: layers._host[unit].numel()].copy_(layers._host[unit], non_blocking=True)
        slot.unit = None
