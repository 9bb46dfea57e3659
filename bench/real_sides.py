"""The processes of bench_real, and what they start from: one GGUF file, ours on its weights, the peer on them decoded.

`ours` loads the file; where its weights cannot be kept they become NF4, and the peer gets those decoded. `theirs` is
transformers + PEFT on a 16-bit folder. `llama.cpp` is the wheel xllamacpp on the same file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_generate import PROMPT, decode
from children import serve
from common import peer_dtype
from train_sides import ALPHA, RANK, Loss, private_megabytes, serve_training, task_batches

PARTS = {"train": True, "learn": False}  # whether rows are cut to full length, all of it trained
CONTEXT = 1024  # tokens that llama.cpp has room for


def prepare(folder: Path, source: Path, steps: dict[str, int], seed: int) -> dict[str, Any]:
    """Writes the 16-bit folder, the adapter (and for llama.cpp its GGUF form), the batches and the prompt.

    Returns:
        frozen, head, adapters: numbers of weights in the adapted layers, in the output embedding, in the adapters.
        loss: of each part, that of its first batch by transformers' code in fp32 on the decoded weights. kept: whether
        ours has the file's own weights. prompt: token ids.
    """
    import qlora_native as qn
    from qlora_native.data.template import ChatEncoder
    from qlora_native.models.load import load_dense
    from qlora_native.nn import QuantizedLinear
    from qlora_native.tool.cli.main import main
    from qlora_native.weights.open import load_tokenizer

    tokenizer: Any = load_tokenizer(str(source))
    model: Any = qn.load_model(source, fuse=False)
    dense: Any = load_dense(source, fuse=False)
    if not model.load_report.is_kept:
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                dense.get_submodule(name).weight.data.copy_(module.quantized.dequantize(torch.bfloat16))
    dense.save_pretrained(folder / "model")
    qn.add_lora(model, qn.LoraConfig(r=RANK, alpha=ALPHA, seed=seed))
    qn.save_adapter(model, folder / "adapter")
    head = dense.get_output_embeddings().weight
    linear = sum(m.weight.numel() for m in dense.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head)
    prepared: dict[str, Any] = {"kept": model.load_report.is_kept, "frozen": linear, "head": head.numel()}
    prepared["adapters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    prepared["loss"] = {}
    if prepared["kept"]:
        words = ["export", str(folder / "adapter"), "--to", "gguf-adapter", "--out", str(folder / "adapter.gguf")]
        if main(words) != 0:
            raise SystemExit("the adapter has no GGUF form")
    del model
    dense.float()
    for part, full_length in PARTS.items():
        batches = task_batches(folder, tokenizer, steps[part], seed, full_length)
        torch.save(batches, folder / f"{part}.pt")
        with torch.no_grad():
            prepared["loss"][part] = float(dense(**batches["train"][0]).loss)
    prepared["prompt"] = ChatEncoder(tokenizer).prompt_ids([{"role": "user", "content": PROMPT}])
    tokenizer.save_pretrained(folder / "tokenizer")
    return prepared


def our_model(folder: Path, source: Path, checkpointing: bool = False, adapter: bool = True) -> Any:
    """As `qlora train` and `qlora chat` have it."""
    import qlora_native as qn
    from qlora_native._memory import keep_freed_memory
    from qlora_native.models.fuse import fuse

    keep_freed_memory(checkpointing)
    model: Any = qn.load_model(source)
    if adapter:
        qn.load_adapter(model, folder / "adapter")
        fuse(model)
    return model


def their_model(folder: Path, adapter: torch.dtype | None) -> Any:
    """transformers in the best dtype here, with PEFT's adapter in a dtype, if any."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=peer_dtype(), attn_implementation="sdpa")
    if adapter is None:
        return base
    model = PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter)
    return model


def train(side: str, part: str, folder: Path, source: Path, checkpointing: bool, lr: float) -> None:
    """Serves training. Adapters are in fp32, but for the peer's in a timed step: they are in the dtype of its weights.

    After loading, the kernel's record of the peak is reset: "memory" is of the steps.
    """
    from qlora_native.models.loss import causal_lm_loss

    imported = private_megabytes("VmRSS")
    is_ours = side == "ours"
    if is_ours:
        model = our_model(folder, source, checkpointing)
    else:
        model = their_model(folder, peer_dtype() if part == "train" else torch.float32)
        model.config.use_cache = False
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False, "preserve_rng_state": False})
    loss: Loss = (lambda batch: causal_lm_loss(model, batch)) if is_ours else (lambda batch: model(**batch).loss)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    serve_training(model, loss, torch.load(folder / f"{part}.pt"), lr, is_ours, imported)


def generate(side: str, folder: Path, source: Path, prompt: list[int], threads: int) -> None:
    """Serves "decode N", greedy and past an end of text, and "lead N": by how much token N was preferred, in logits."""
    name, _, adapter = side.partition("+")
    if name == "llama.cpp":
        complete = llama_cpp(source, folder / "adapter.gguf" if adapter else None, threads)
        serve(lambda words: complete(prompt, int(words[1])))
        return
    if name == "ours":
        model = our_model(folder, source, adapter=bool(adapter)).eval()
    else:
        model = their_model(folder, peer_dtype() if adapter else None).eval()
    ids, tokens = torch.tensor([prompt]), torch.tensor([], dtype=torch.int64)

    def answer(words: list[str]) -> dict[str, Any]:
        nonlocal tokens
        count = int(words[1])
        if words[0] == "lead":
            with torch.inference_mode():
                best = model(torch.cat([ids[0], tokens[:count]])[None]).logits[0, -1].float().topk(2).values
            return {"lead": float(best[0] - best[1])}
        started = time.perf_counter()
        tokens = decode(model, ids, count)
        return {"seconds": time.perf_counter() - started, "tokens": tokens.tolist()}

    serve(answer)


def llama_cpp(source: Path, adapter: Path | None, threads: int) -> Callable[[list[int], int], dict[str, Any]]:
    """A function that continues token ids greedily in llama.cpp; seconds are of the whole request, as the others'."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(source)
    options.n_ctx, options.n_parallel, options.verbosity = CONTEXT, 1, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        options.lora_adapters = [lora]
    server = xllamacpp.Server(options)

    def complete(prompt: list[int], count: int) -> dict[str, Any]:
        request = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        started = time.perf_counter()
        answer = server.handle_completions(request)
        seconds = time.perf_counter() - started
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if answer["usage"]["completion_tokens"] != count:
            raise RuntimeError(f"llama.cpp made {answer['usage']['completion_tokens']} tokens of {count}")
        about = {"text": answer["choices"][0]["text"], "system": xllamacpp.get_system_info()}
        return {"seconds": seconds, "tokens_per_second": answer["timings"]["predicted_per_second"], **about}

    return complete
