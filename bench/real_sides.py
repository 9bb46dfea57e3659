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
from bench_generate import PROMPT, decode, lead
from children import serve
from common import peer_dtype
from peer_models import decode_into, private_megabytes, reset_peak
from train_sides import cast_adapter, our_model, serve_training, their_model, write_adapter, write_batches

import qlora_native as qn

PARTS = {"train": True, "learn": False}  # whether rows are cut to full length, all of it trained
CONTEXT = 1024  # tokens that llama.cpp has room for


def prepare(folder: Path, source: Path, steps: dict[str, int], seed: int) -> dict[str, Any]:
    """Writes the 16-bit folder, the adapter (and for llama.cpp its GGUF form), the batches and the prompt.

    Returns:
        frozen, head, adapters: numbers of weights in the adapted layers, in the output embedding, in the adapters.
        loss: of each part, that of its first batch by transformers' code in fp32 on the decoded weights. kept: whether
        ours has the file's own weights. prompt: token ids.
    """
    from qlora_native.data.template import ChatEncoder
    from qlora_native.models.load import load_dense
    from qlora_native.tool.cli.main import main
    from qlora_native.weights.open import load_tokenizer

    tokenizer: Any = load_tokenizer(str(source))
    model: Any = qn.load_model(source, fuse=False)
    dense: Any = load_dense(source, fuse=False)
    is_kept = model.load_report.is_kept
    if not is_kept:
        decode_into(dense, model)
    dense.save_pretrained(folder / "model")
    counts = write_adapter(folder, model, dense, seed)
    del model
    if is_kept:
        words = ["export", str(folder / "adapter"), "--to", "gguf-adapter", "--out", str(folder / "adapter.gguf")]
        if main(words) != 0:
            raise SystemExit("the adapter has no GGUF form")
    dense.float()
    losses = {
        part: write_batches(folder / f"{part}.pt", dense, tokenizer, steps[part], seed, full_length)
        for part, full_length in PARTS.items()
    }
    prompt = ChatEncoder(tokenizer).prompt_ids([{"role": "user", "content": PROMPT}])
    tokenizer.save_pretrained(folder / "tokenizer")
    return {"kept": is_kept, **counts, "loss": losses, "prompt": prompt}


def train(side: str, part: str, folder: str, source: str, checkpointing: bool, lr: float, threads: int) -> None:
    """Serves training. Adapters are in fp32, but for the peer's in a timed step: they are in the dtype of its weights.

    After loading, the kernel's record of the peak is reset: "memory" is of the steps.
    """
    torch.set_num_threads(threads)
    imported = private_megabytes("VmRSS")
    is_ours = side == "ours"
    if is_ours:
        model = our_model(Path(folder), Path(source), checkpointing=checkpointing)
    else:
        model = their_model(Path(folder), peer_dtype())
        cast_adapter(model, peer_dtype() if part == "train" else torch.float32)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False, "preserve_rng_state": False})
    reset_peak()
    serve_training(model, Path(folder, f"{part}.pt"), lr, is_ours, imported)


def generate(side: str, folder: str, source: str, prompt: list[int], threads: int) -> None:
    """Serves "decode N", greedy and past an end of text, and "lead N": by how much token N was preferred, in logits."""
    torch.set_num_threads(threads)
    name, _, adapter = side.partition("+")
    if name == "llama.cpp":
        complete = llama_cpp(Path(source), Path(folder, "adapter.gguf") if adapter else None, threads)
        serve(lambda words: complete(prompt, int(words[1])))
        return
    if name == "ours":
        model = our_model(Path(folder), Path(source), adapted=bool(adapter))
    else:
        model = their_model(Path(folder), peer_dtype(), adapted=bool(adapter))
        cast_adapter(model, peer_dtype())
    model.eval()
    ids, tokens = torch.tensor([prompt]), torch.tensor([], dtype=torch.int64)

    def answer(words: list[str]) -> dict[str, Any]:
        nonlocal tokens
        count = int(words[1])
        if words[0] == "lead":
            return {"lead": lead(model, ids, tokens[:count])}
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
