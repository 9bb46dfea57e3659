"""Training steps of whole models on a GPU: Llama as transformers builds it from a config, with weights made up.

Our step is `qlora train`'s own (tool.train.loop.Trainer) over random codes of 4 bits. The rivals' are PEFT's
over the same architecture: 16-bit weights, eager and compiled, bitsandbytes NF4, torchao NF4, and unsloth's own. All
have adapters of rank 16 on every linear layer, gradient checkpointing, and the same number of tokens. Their times
depend on shapes alone. Each row is a group of its own: none shares a process, or memory, with another. Last come passes
of an 8B model of which half of the layers stream to the card.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import quartiles, rounded, timings
from four_bit_folder import llama_config, write_folder
from gpu_timing import LLAMA, Case, Context, Row, device, half, made_up, on_gpu, wait
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import qlora_native as qn
from qlora_native.models.build import MetaModel
from qlora_native.models.device_layers import layer_units, stream_layers
from qlora_native.models.loss import causal_lm_loss, check_loss
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import runs
import tiny

GIB = 1 << 30
USABLE = {"8B": 22.5, "70B": 44.5}  # GiB that a card of 24 or 48 GB gives to a program
RANK, NUM_STEPS = 16, 6
BATCHES = {"8B": (4, 1024), "70B": (1, 1024), "tiny": (2, 16)}
# k is the model's width, m the tokens of a step.
STEPS = {
    name: Case("qlora_step", math.prod(BATCHES[name]), k=LLAMA[name]["hidden_size"], r=RANK, form=name)
    for name in ("8B", "70B")
}
STREAMED = tuple(STEPS["8B"]._replace(op="streamed_passes", m=m) for m in (256, 1024, 4096))
RIVALS = ("dense", "dense_compiled", "bitsandbytes", "torchao", "unsloth")


@torch.no_grad()
def build(name: str, four_bit: Callable[[int, int], Any]) -> Any:
    """The model on the device, with ``four_bit(n, k)`` in place of the weights that become 4-bit: a QuantizedWeight, or
    a dense tensor. Norms are ones, embeddings normal."""
    meta = MetaModel(llama_config(name), half(), device())
    linears = meta.four_bit_weights(["lm_head"], 64)
    for key, tensor in list(meta.shapes.items()):
        if key in linears:
            made = four_bit(*tensor.shape)
        elif tensor.dim() == 1:
            made = torch.ones(tensor.shape, device=device(), dtype=half())
        else:
            made = torch.randn(tensor.shape, device=device(), dtype=half()) * 0.02
        meta.store(key, made, "made up")
    return meta.finish()


def dense(n: int, k: int) -> Tensor:
    """A 16-bit weight."""
    return (torch.randn(n, k, device=device()) / k**0.5).to(half())


def total_gib() -> float:
    """Of the card's memory."""
    return torch.cuda.get_device_properties(0).total_memory / GIB if on_gpu() else math.inf


def run(context: Context, model: str) -> None:
    """Our step of a model, under the memory of a card of its class."""
    if total_gib() < 0.95 * USABLE[model]:
        context.record(left_out=f"{model}: it needs {USABLE[model]} GiB, this card has {total_gib():.1f}")
    else:
        context.rows([STEPS[model]], lambda case: train_row(model))


def run_rival(context: Context, rival: str) -> None:
    """The step of one rival on the 8B shapes, with all the memory that the card has."""
    context.rows([STEPS["8B"]._replace(op=f"{rival} step")], lambda case: rival_row(rival))


def _row(seconds: list[float], losses: list[float], tokens: int, **found: Any) -> Row:
    counted = seconds[1:]  # the first makes tables, workspaces, compiled code
    return {
        "match": bool(torch.tensor(losses).isfinite().all()) and losses[-1] < losses[0],
        "first_step_ms": rounded(seconds[:1], 1e3)[0],
        "tokens": tokens,
        "tokens_per_second": rounded(quartiles([tokens / value for value in counted])),
        "losses": rounded(losses),
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        **found,
    } | timings({"ours": counted})


def train_row(model: str) -> Row:
    """Steps of `qlora train` on one row of text, repeated, with 8-bit AdamW and clipping."""
    name = model if on_gpu() else "tiny"
    batch, length = BATCHES[name]
    limit = min(USABLE[model], total_gib())
    if on_gpu():
        torch.cuda.set_per_process_memory_fraction(limit / total_gib())
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made_in:
        folder = Path(made_in)
        tiny.write_tokenizer(folder / "model")
        row = json.dumps({"text": "what is green? pear " * length}) + "\n"
        (folder / "train.jsonl").write_text(row * batch, encoding="utf-8")
        data, lora = {"max_length": length, "train_on": "all"}, {"r": RANK}
        options = {"batch_size": batch, "grad_accum": 1, "optimizer": "adamw8bit", "warmup": 0, "scheduler": "constant"}
        settings = runs.settings(folder, folder / "out", data, lora, steps=NUM_STEPS, lr=1e-3, **options)
        sides = {"model": build(name, made_up), "tokenizer": PreTrainedTokenizerFast.from_pretrained(folder / "model")}
        weights = torch.cuda.memory_allocated() / GIB
        Trainer(TrainConfig.from_values(settings), **sides, on_step=records.append, quiet=True).train()
    seconds, losses = ([record[key] for record in records] for key in ("seconds", "loss"))
    return _row(seconds, losses, batch * length, limit_gib=limit, weights_gib=weights)


def rival_row(rival: str) -> Row:
    """Steps of a plain loop: forward with labels, backward, clipping, torch's fused AdamW."""
    name = "8B" if on_gpu() else "tiny"
    batch, length = BATCHES[name]
    seconds, losses = [], []
    model = _unsloth(name, length) if rival == "unsloth" else _peft(name, rival)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=on_gpu())
    tokens = torch.randint(0, 300, (1, length), device=device()).repeat(batch, 1)
    forward = torch.compile(model) if rival == "dense_compiled" else model
    for _ in range(NUM_STEPS):
        wait()
        started = time.perf_counter()
        loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.detach()))
    return _row(seconds, losses, tokens.numel())


def _peft(name: str, rival: str) -> Any:
    """The model with its linear layers as the rival has them, under PEFT."""
    from peft import LoraConfig, get_peft_model

    model = build(name, dense)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not path.endswith("lm_head"):
            if rival == "bitsandbytes":
                model.set_submodule(path, _bitsandbytes(module))
            elif rival == "torchao":  # its tensor runs F.linear by decoding
                quantized = import_module("torchao.dtypes.nf4tensor").to_nf4(module.weight.detach())
                module.weight = nn.Parameter(quantized, requires_grad=False)
    model.is_loaded_in_4bit = rival == "bitsandbytes"
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def _bitsandbytes(module: nn.Linear) -> Any:
    layers: Any = import_module("bitsandbytes.nn")
    made = layers.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=half(), quant_type="nf4", device="meta"
    )
    made.weight = layers.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to(device())
    return made


def _unsloth(name: str, length: int) -> Any:
    """unsloth loads folders alone."""
    language_model: Any = import_module("unsloth").FastLanguageModel
    with tempfile.TemporaryDirectory() as made_in:
        folder = str(write_folder(name, Path(made_in, name)))
        model, _ = language_model.from_pretrained(folder, max_seq_length=length, load_in_4bit=True, dtype=half())
    return language_model.get_peft_model(model, r=RANK, lora_alpha=2 * RANK, use_gradient_checkpointing="unsloth")


def _adapted() -> Any:
    """A model of the shape 8B with adapters that are not zero; the same every time."""
    torch.manual_seed(0)
    model = build("8B" if on_gpu() else "tiny", made_up)
    qn.add_lora(model, qn.LoraConfig(r=RANK, seed=0))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01)
    check_loss(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def run_streamed(context: Context) -> None:
    """Passes against those of the same model all there, a row for each number of tokens."""
    resident, streamed = _adapted(), _adapted()
    units = layer_units(streamed.model.layers)
    stream_layers(streamed, device(), math.ceil(sum(unit.num_bytes for unit in units) / 2))
    context.rows(STREAMED, partial(streamed_row, context, resident, streamed))


def streamed_row(context: Context, resident: Any, streamed: Any, case: Case) -> Row:
    """Forward and backward passes in turns: the same gradients; bytes a pass, the bus's rate, how much of it hid."""
    ids = torch.randint(0, 300, (max(1, case.m // 1024), min(case.m, 1024)), device=device())

    def passes(model: Any) -> list[Tensor]:
        model.zero_grad()
        causal_lm_loss(model, {"input_ids": ids, "labels": ids}).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    match = all(map(torch.equal, passes(resident), passes(streamed)))
    layers = streamed.streamed_layers
    before = layers.bytes_copied
    passes(streamed)
    copied = layers.bytes_copied - before
    calls = {"ours": partial(passes, streamed), "resident": partial(passes, resident)}
    seconds = context.calls({**calls, "copies": partial(copy_all, layers)})
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
