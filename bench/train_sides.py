"""The two sides of bench_train, and what both start from: our training step, and transformers + peft's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from children import serve
from common import peer_dtype
from peer_models import decode_into, dense_model, nf4_config, private_megabytes, tokenizer

import qlora_native as qn

ROWS, LENGTH = 4, 256
RANK, ALPHA = 16, 32


class Peer(NamedTuple):
    """How a peer is set up; our side is as `qlora train` has it but for what is named here."""

    base: str  # "dense" or "nf4", both transformers + peft; "ours"
    dtype: torch.dtype | None = None  # of the weights and of what is computed; None: in which it is fastest here
    adapters: torch.dtype = torch.float32
    tuned_malloc: bool = False
    ours: torch.dtype = torch.bfloat16  # what our side computes in
    our_adapters: torch.dtype = torch.float32


PEERS = {
    "plain-tuned": Peer("dense", torch.bfloat16, torch.bfloat16, tuned_malloc=True),
    "fp32-tuned": Peer("dense", torch.float32, tuned_malloc=True),
    "fp32-both": Peer("dense", torch.float32, tuned_malloc=True, ours=torch.float32),
    "bitsandbytes-tuned": Peer("nf4", None, torch.bfloat16, tuned_malloc=True, our_adapters=torch.bfloat16),
    "bitsandbytes": Peer("nf4"),
    "ours-fp32": Peer("ours", torch.float32),
}


def prepare(folder: Path, steps: int, seed: int, full_length: bool) -> dict[str, Any]:
    """Writes the 16-bit model, the common adapter, the batches of every step and the held-out batches.

    Full length: rows of LENGTH tokens, all trained. Otherwise conversations, their answers trained.

    Returns:
        loss: that of the first batch in fp32 with the decoded weights, in transformers' own code; counts.
    """
    dense = dense_model()
    dense.save_pretrained(folder / "model")
    model: Any = qn.load_model(folder / "model")
    decode_into(dense, model)
    counts = write_adapter(folder, model, dense, seed)
    file = folder / "batches.pt"
    return {"loss": write_batches(file, dense.float(), tokenizer(), steps, seed, full_length), **counts}


def write_adapter(folder: Path, model: Any, dense: Any, seed: int) -> dict[str, int]:
    """Gives our model the adapter that both sides begin with.

    Returns:
        frozen, head, adapters: numbers of weights in the adapted layers, in the output embedding, in the adapters.
    """
    qn.add_lora(model, qn.LoraConfig(r=RANK, alpha=ALPHA, seed=seed))
    qn.save_adapter(model, folder / "adapter")
    head = dense.get_output_embeddings().weight
    frozen = sum(m.weight.numel() for m in dense.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"frozen": frozen, "head": head.numel(), "adapters": adapters}


def write_batches(file: Path, dense: Any, tokenizer: Any, steps: int, seed: int, full_length: bool) -> float:
    """Writes the batches of a run; the loss of the first one by a dense model."""
    batches = task_batches(file.parent, tokenizer, steps, seed, full_length)
    torch.save(batches, file)
    with torch.no_grad():
        return float(dense(**batches["train"][0]).loss)


def task_batches(
    folder: Path, tokenizer: Any, steps: int, seed: int, full_length: bool
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """The batches of every step, and the held-out ones, of the demo's task, whose rows go to ``folder``."""
    from qlora_native.data.batching import BatchSampler, collate
    from qlora_native.data.dataset import load_dataset
    from qlora_native.data.template import padding_id
    from qlora_native.tool.cli.demo import HELD_OUT_ROWS, MAX_CHARACTERS
    from qlora_native.tool.cli.standard_library import write_split

    train_file, held_out_file, _, _ = write_split(folder / "data", MAX_CHARACTERS, HELD_OUT_ROWS)
    rows = load_dataset(train_file, tokenizer, max_length=LENGTH, train_on="all" if full_length else "answers")
    held_out = load_dataset(held_out_file, tokenizer, max_length=LENGTH)

    def batch(rows: Any, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        return collate([rows[number] for number in numbers], padding_id(tokenizer))

    if full_length:
        text = torch.cat([torch.tensor(rows[i]["input_ids"].tolist()) for i in range(len(rows))])
        text = text.repeat(-(-steps * ROWS * LENGTH // text.numel()))[: steps * ROWS * LENGTH]
        batches = [
            {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
            for ids in text.view(steps, ROWS, LENGTH)
        ]
    else:
        order = BatchSampler(rows.lengths, ROWS, seed=seed)
        batches = [batch(rows, next(order)) for _ in range(steps)]
    evaluated = range(len(held_out))
    return {"train": batches, "held_out": [batch(held_out, evaluated[at : at + ROWS]) for at in evaluated[::ROWS]]}


def our_model(
    folder: Path,
    source: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    adapted: bool = True,
) -> Any:
    """As `qlora train` has it, and without an adapter as `qlora chat`."""
    from qlora_native._memory import keep_freed_memory
    from qlora_native.models.fuse import fuse

    keep_freed_memory(checkpointing)
    model: Any = qn.load_model(source or folder / "model", dtype=dtype)
    if adapted:
        qn.load_adapter(model, folder / "adapter")
        fuse(model)
    return model


def their_model(folder: Path, dtype: torch.dtype, quantized: bool = False, adapted: bool = True) -> Any:
    """The usual stack: a dense model or a BitsAndBytesConfig, and a PEFT adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "device_map": "cpu", "attn_implementation": "sdpa"}
    if quantized:
        options["quantization_config"] = nf4_config(BitsAndBytesConfig, dtype)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    return PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True) if adapted else base


def cast_adapter(model: Any, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def worker(side: str, peer: str, folder: str, lr: float, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    imported = private_megabytes("VmRSS")
    chosen = PEERS[peer]
    is_ours = side == "ours" or chosen.base == "ours"
    dtype = chosen.ours if side == "ours" else chosen.dtype or peer_dtype()
    if is_ours:
        model = our_model(Path(folder), dtype=dtype)
    else:
        model = their_model(Path(folder), dtype, quantized=chosen.base == "nf4")
    cast_adapter(model, chosen.our_adapters if side == "ours" else chosen.adapters)
    serve_training(model, Path(folder, "batches.pt"), lr, is_ours, imported)


def held_out_loss(loss_of: Callable[[dict[str, torch.Tensor]], Any], batches: list[dict[str, torch.Tensor]]) -> float:
    """The mean over all trained tokens, in nats."""
    total = count = 0.0
    with torch.no_grad():
        for batch in batches:
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total += float(loss_of(batch)) * tokens
            count += tokens
    return total / count


def serve_training(model: Any, file: Path, lr: float, is_ours: bool, imported: float) -> None:
    """Answers "step i", "evaluate", "memory"; ``imported`` is the process's memory before the model was loaded."""
    from qlora_native.models.loss import causal_lm_loss

    batches = torch.load(file)
    model.train()
    if not is_ours:
        model.config.use_cache = False
    parameters = [p for p in model.parameters() if p.requires_grad]
    stack = ExitStack()  # kept until the process ends
    if is_ours:  # as `qlora train` has it: the step clips, and old objects are no garbage
        from qlora_native._memory import without_old_objects
        from qlora_native.optim import AdamW

        stack.enter_context(without_old_objects())
        optimizer: torch.optim.Optimizer = AdamW(parameters, lr, max_norm=1.0)
    else:
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=True)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return causal_lm_loss(model, batch) if is_ours else model(**batch).loss

    def step(index: int) -> dict[str, float]:
        started = time.perf_counter()
        loss = loss_of(batches["train"][index])
        loss.backward()
        if not is_ours:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss), "seconds": time.perf_counter() - started}

    trainable = sum(p.numel() for p in parameters)

    def answer(command: list[str]) -> dict[str, float]:
        if command[0] == "step":
            return step(int(command[1]))
        if command[0] == "evaluate":
            # In training mode, which without dropout computes the same: one forward of bitsandbytes' layers in
            # evaluation mode on a CPU repacks their weights in place, and cuts the gradients of all training after it.
            return {"loss": held_out_loss(loss_of, batches["held_out"])}
        # VmHWM: the peak, of loading and of the training steps
        return {"peak_mib": private_megabytes("VmHWM"), "imported_mib": imported, "trainable": trainable}

    serve(answer)
