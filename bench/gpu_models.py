"""Training steps of whole models on a GPU: Llama as transformers builds it from a config, with weights made up.

Our step is `qlora train`'s own (tool.train.loop.Trainer) over random codes of 4 bits. The rivals' are PEFT's
over the same architecture: 16-bit weights, eager and compiled, bitsandbytes NF4, torchao NF4, and unsloth's own. All
have adapters of rank 16 on every linear layer, gradient checkpointing, and the same number of tokens. Their times
depend on shapes alone. Each row is a group of its own: none shares a process, or memory, with another.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import quartiles, rounded
from gpu_timing import Case, Context, device, half, importable, on_gpu, wait
from torch import nn

import qlora_native as qn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

GIB = 1 << 30
USABLE = {"8B": 22.5, "70B": 44.5}  # GiB that a card of 24 or 48 GB gives to a program
RANK, STEPS = 16, 6
LLAMA: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
VOCABULARY = 128256
BATCHES = {"8B": (4, 1024), "70B": (1, 1024), "tiny": (2, 16)}
RIVALS = ("dense", "dense compiled", "bitsandbytes", "torchao", "unsloth")


def cases(model: str, dry: bool) -> list[Case]:
    """The one row of a model; k is its width, m the tokens of a step."""
    name = "tiny" if dry else model
    batch, length = BATCHES[name]
    return [Case("qlora_step", batch * length, k=LLAMA[name]["hidden_size"], r=RANK, form=model)]


def linears(name: str) -> list[tuple[int, int]]:
    """The weights [n, k] of a layer: q, o, gate, up, down, k, v; 8 heads of keys."""
    shape = LLAMA[name]
    width, hidden = shape["hidden_size"], shape["intermediate_size"]
    keys = 8 * width // shape["num_attention_heads"]
    return [(width, width)] * 2 + [(hidden, width)] * 2 + [(width, hidden)] + [(keys, width)] * 2


def llama_config(name: str) -> Any:
    """Llama 3's config of that size."""
    from transformers import LlamaConfig

    words = {"vocab_size": 320, "num_key_value_heads": 2} if name == "tiny" else {"vocab_size": VOCABULARY}
    sizes = {"num_key_value_heads": 8, "max_position_embeddings": 8192, **LLAMA[name], **words}
    return LlamaConfig(**sizes, rms_norm_eps=1e-5, tie_word_embeddings=False)


def made_up(n: int, k: int) -> qn.QuantizedWeight:
    """A weight [n, k] of random codes, with scales of the size that trained weights have."""
    blocks = n * k // 64
    place: dict[str, Any] = {"device": device()}
    return qn.QuantizedWeight(
        torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, **place),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, **place),
        shape=(n, k),
        dtype=half(),
        nested_absmax=torch.full((-(-blocks // 256),), 0.2 / k**0.5, **place),
        nested_offset=torch.full((), 1.0 / k**0.5, **place),
    )


def made_up_blocks(quant_type: str, n: int, k: int) -> qn.QuantizedWeight:
    """A weight [n, k] of random bytes in blocks of a GGUF format; so small ones that no scale is infinite."""
    w = qn.QuantizedWeight.empty((n, k), dtype=half(), quant_type=quant_type, device=device())
    w.packed.random_(0, 0x3C)
    return w


def build(name: str, four_bit: Callable[[int, int], Any]) -> Any:
    """The model on the device, with ``four_bit(n, k)`` in place of the weights that become 4-bit: a QuantizedWeight, or
    a dense tensor. Norms are ones, embeddings normal."""
    from qlora_native.models.build import MetaModel

    meta = MetaModel(llama_config(name), half(), device())
    linears = meta.four_bit_weights(["lm_head"], 64)
    for key, tensor in list(meta.shapes.items()):
        if key in linears:
            meta.store(key, four_bit(*tensor.shape), "made up")
        elif tensor.dim() == 1:
            meta.store(key, torch.ones(tensor.shape, device=device(), dtype=half()), "made up")
        else:
            meta.store(key, torch.randn(tensor.shape, device=device(), dtype=half()) * 0.02, "made up")
    return meta.finish()


def dense(n: int, k: int) -> torch.Tensor:
    """A 16-bit weight."""
    return (torch.randn(n, k, device=device()) / k**0.5).to(half())


@contextmanager
def memory_limit(gib: float) -> Iterator[dict[str, Any]]:
    """No more than so much device memory through torch; what was taken at most stands in the dict afterwards."""
    found: dict[str, Any] = {"limit_gib": gib}
    if not on_gpu():
        yield found
        return
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    found["limit_gib"] = min(gib, total)
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total))
    torch.cuda.reset_peak_memory_stats()
    try:
        yield found
    finally:
        found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB


def run(context: Context, model: str) -> None:
    """Our step of a model, under the memory of a card of its class."""
    for case in cases(model, context.dry):
        total = torch.cuda.get_device_properties(0).total_memory / GIB if on_gpu() else USABLE[model]
        if total < 0.95 * USABLE[model]:
            context.note("left_out", f"{case.name}: it needs {USABLE[model]} GiB, this card has {total:.1f}")
            continue
        context.row(case, lambda: train_row(model, context.dry))


def run_rival(context: Context, rival: str) -> None:
    """The step of one rival on the 8B shapes, with all the memory that the card has."""
    needed = {"dense": "peft", "dense compiled": "peft"}.get(rival, rival)
    if importable(needed, context) is None or importable("peft", context) is None:
        return
    for case in cases("8B", context.dry):
        case = case._replace(op=f"{rival} step")
        context.row(case, lambda: rival_row(rival, context.dry))


def _row(seconds: list[float], losses: list[float], tokens: int, found: dict[str, Any]) -> dict[str, Any]:
    counted = seconds[1:] or seconds  # the first makes tables, workspaces, compiled code
    return {
        "match": bool(torch.tensor(losses).isfinite().all()) and losses[-1] < losses[0],
        "ms": {"ours": rounded(quartiles(counted), 1e3)},
        "first_step_ms": rounded(seconds[:1], 1e3)[0],
        "tokens_per_second": rounded(quartiles([tokens / value for value in counted])),
        "median_step_s": round(median(counted), 4),
        "losses": rounded(losses),
        "bars": [],
        **found,
    }


def train_row(model: str, dry: bool) -> dict[str, Any]:
    """Steps of `qlora train` on one row of text, repeated, with 8-bit AdamW and clipping."""
    from tiny import write_tokenizer
    from transformers import PreTrainedTokenizerFast

    from qlora_native.tool.config import TrainConfig
    from qlora_native.tool.train.loop import Trainer

    name = "tiny" if dry else model
    batch, length = BATCHES[name]
    with tempfile.TemporaryDirectory() as folder, memory_limit(USABLE[model]) as found:
        write_tokenizer(Path(folder))
        rows = Path(folder, "rows.jsonl")
        rows.write_text((f'{{"text": "{"what is green? pear " * length}"}}\n') * batch, encoding="utf-8")
        config = TrainConfig.from_values(
            {
                "model": folder,
                "output_dir": str(Path(folder, "out")),
                "data": {"train": str(rows), "eval_fraction": 0, "max_length": length, "train_on": "all"},
                "lora": {"r": RANK},
                "train": {"steps": STEPS, "batch_size": batch, "grad_accum": 1, "optimizer": "adamw8bit", "lr": 1e-3}
                | {"save_every": 0, "warmup": 0, "scheduler": "constant"},
            }
        )
        records: list[dict[str, Any]] = []
        with torch.no_grad():
            made = build(name, made_up)
        weights = torch.cuda.memory_allocated() / GIB if on_gpu() else None
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        trainer = Trainer(config, model=made, tokenizer=tokenizer, on_step=records.append, quiet=True)
        trainer.train()
    found |= {"weights_gib": weights, "tokens": batch * length}
    return _row([r["seconds"] for r in records], [r["loss"] for r in records], batch * length, found)


def rival_row(rival: str, dry: bool) -> dict[str, Any]:
    """Steps of a plain loop: forward with labels, backward, clipping, torch's fused AdamW."""
    name = "tiny" if dry else "8B"
    batch, length = BATCHES[name]
    with memory_limit(1e9) as found:
        model = _unsloth(name, length) if rival == "unsloth" else _peft(name, rival)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=on_gpu())
        tokens = torch.randint(0, 300, (1, length), device=device()).repeat(batch, 1)
        forward = torch.compile(model, backend="eager" if dry else "inductor") if rival == "dense compiled" else model
        seconds, losses = [], []
        for _ in range(STEPS):
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
    return _row(seconds, losses, tokens.numel(), found | {"tokens": tokens.numel()})


def _peft(name: str, rival: str) -> Any:
    """The model with its linear layers as the rival has them, under PEFT."""
    from peft import LoraConfig, get_peft_model

    with torch.no_grad():
        model = build(name, dense)
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and not path.endswith("lm_head"):
                if rival == "bitsandbytes":
                    model.set_submodule(path, _bitsandbytes(module))
                elif rival == "torchao":  # its tensor runs F.linear by decoding
                    quantized = import_module("torchao.dtypes.nf4tensor").to_nf4(module.weight)
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
    """unsloth loads folders alone: ours in bitsandbytes' format is written for it."""
    from tiny import write_tokenizer

    model_of: Any = import_module("unsloth").FastLanguageModel
    with tempfile.TemporaryDirectory() as folder:
        from qlora_native.weights.config import bitsandbytes_config

        model = build(name, made_up)
        options = {"quant_type": "nf4", "block_size": 64, "double_quant": True}
        model.config.quantization_config = bitsandbytes_config(half(), options, ["lm_head"])
        model.save_pretrained(folder)
        write_tokenizer(Path(folder))
        del model
        model, _ = model_of.from_pretrained(folder, max_seq_length=length, load_in_4bit=True, dtype=half())
    return model_of.get_peft_model(model, r=RANK, lora_alpha=2 * RANK, use_gradient_checkpointing="unsloth")
