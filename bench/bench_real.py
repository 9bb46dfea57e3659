"""Real models from their GGUF files, Gemma 3 270M and Qwen2.5-Coder 0.5B and 1.5B, against PEFT and llama.cpp.

    python bench/bench_real.py --json
    python bench/bench_real.py --models 0.5b --parts train --steps 4

The models are those of `qlora demo --model`, downloaded once. Ours trains on the file's own weights, or on NF4 where
they cannot be kept; the peer is transformers + PEFT on the same weights decoded to bf16 (fp32 on a CPU without a dot
product for bf16), with sdpa and a malloc that keeps its memory. Both start from the same adapter of rank 16 on every
linear layer and see the same batches. Each side is a process; the parent lets them take turns, one step each.

`train`: steps of 4 x 256 tokens, all trained, with and without checkpointing, the peer's adapters in the dtype of its
weights. Peak memory is a process's, from the end of its loading on, file pages in memory included; `match`: whether our
first loss is that of transformers' code in fp32 on the decoded weights, to 0.5 %.
`learn`: 100 steps of the demo's task, adapters in fp32 on both sides, and the held-out loss before and after, once for
each of `--seeds` (of the adapter and of the order of rows; the other parts have the first of them): the bar is on the
means. `match`: whether ours before the first step was that of transformers' code in fp32, to 0.5 %.
`generate`: greedy tokens after a prompt, end of text not heeded, with and without the adapter, and llama.cpp on the
same file; seconds include the prompt. `match`: whether our tokens are the peer's, or part from them first where the
peer itself nearly wavers.

A run of some rows leaves the others of its class in the stored result. With `--work` a row that was measured with this
code (`births.PATHS`) and these settings is taken from there, so that a run that was killed goes on.

Takes about 140 minutes on two cores with AMX: 75 for 1.5b, 33 for 0.5b, 32 for gemma-270m.
Needs 8 GB of disk and, without checkpointing for 1.5b, 12 GB of memory; needs the extra `bench`, and xllamacpp for its
rows.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import births
import isa_env  # noqa: F401  (before torch)
import torch
from bench_generate import NEAR_TIE, PROMPT, decode, first_difference, lead
from bench_train import LOSS_TOLERANCE, TUNED_MALLOC, WARM_UP, products, take_steps
from ceilings import Ceilings, ceilings, floor
from children import Child, calling, in_turns, serve
from common import Bar, Bench, birth, kept, machine, peer_dtype, quartiles, rounded, timings, tokens_a_second, verdict
from peer_models import decode_into, private_megabytes, reset_peak
from train_sides import (
    cast_adapter,
    held_out_loss,
    our_model,
    serve_training,
    their_model,
    write_adapter,
    write_batches,
)

import qlora_native as qn
from qlora_native.tool.cli.demo_model import model_file

MODELS = ("gemma-270m", "0.5b", "1.5b")
PARTS = {"train": True, "learn": False}  # whether rows are cut to full length, all of it trained
CONTEXT = 1024  # tokens that llama.cpp has room for
BARS = {"amx": (2.4, 0.45), "avx512_bf16": (1.5, 0.5), "avx2": (1.35, 0.5)}  # of 1.5b with checkpointing
NATS = 0.02  # of the held-out losses
PEER_DTYPE = str(peer_dtype()).removeprefix("torch.")
MINUTES = {  # about, on two cores with AMX
    "gemma-270m": {"train": 5, "learn": 24, "generate": 3},
    "0.5b": {"train": 5, "learn": 25, "generate": 3},
    "1.5b": {"train": 10, "learn": 60, "generate": 5},
}


def prepare(folder: Path, source: Path, steps: dict[str, int], seed: int) -> dict[str, Any]:
    """Writes the 16-bit folder, the adapter (and for llama.cpp its GGUF form), the batches and the prompt.

    Returns:
        frozen, head, adapters: numbers of weights in the adapted layers, in the output embedding, in the adapters.
        loss: by transformers' code in fp32 on the decoded weights, of each part's first batch and of the held-out rows.
        kept: whether ours has the file's own weights. prompt: token ids.
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
    held_out = torch.load(folder / "learn.pt")["held_out"]
    losses["held_out"] = held_out_loss(lambda batch: dense(**batch).loss, held_out)
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


def child(name: str, function: Callable[..., None], *arguments: Any) -> Child:
    """The process of one side; the peer's malloc keeps its memory."""
    return Child(name, calling(function, name, *arguments), TUNED_MALLOC if name.startswith("theirs") else None)


def trained(
    part: str, checkpointing: bool, task: argparse.Namespace, prepared: dict[str, Any], measured: Ceilings
) -> dict[str, Any]:
    """Both sides, step by step in turn; a row."""
    batches = torch.load(task.folder / f"{part}.pt")["train"]
    call = part, task.folder, task.source, checkpointing, task.lr, task.threads
    sides = {name: child(name, train, *call) for name in ("ours", "theirs")}
    operations = products(batches[min(WARM_UP, len(batches) - 1) :], prepared, checkpointing)
    least = floor(measured, 0, flops=1e9 * sum(operations.values()))
    has_bars = part == "train" and task.model == "1.5b" and checkpointing
    speed, share = BARS.get(task.isa, (0, 0)) if has_bars else (0, 0)
    bars = [Bar("theirs", speed, faster=True)] if speed else []
    row: dict[str, Any] = {"checkpointing": checkpointing, "peer_dtype": PEER_DTYPE, "kept": prepared["kept"]}
    row |= take_steps(sides, batches, prepared["loss"][part], part == "learn", bars, least)
    if share:
        row["bars"].append(verdict("theirs", "of the peak memory", share, row["peak_rss_ratio"]))
    if part == "learn":
        before, after = ({name: losses[at] for name, losses in row["held_out_loss"].items()} for at in (0, -1))
        # The first batch trains some 40 tokens alone: rounding to bf16 may move its mean by as much.
        row["held_out_reference"] = truth = prepared["loss"]["held_out"]
        row["match"] = abs(before["ours"] - truth) <= LOSS_TOLERANCE * truth
        row["bars"].append(nats_apart(after))
    return row


def nats_apart(losses: dict[str, float]) -> dict[str, Any]:
    return verdict("theirs", "nats from the held-out loss", NATS, abs(losses["ours"] - losses["theirs"]))


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the first seed with the means of the held-out losses; those of each seed stand beside them."""
    by_seed = {name: [row["held_out_loss"][name] for row in rows] for name in rows[0]["held_out_loss"]}
    means = {name: [fmean(at) for at in zip(*losses, strict=True)] for name, losses in by_seed.items()}
    match = all(row["match"] for row in rows)
    bars = [nats_apart({name: losses[-1] for name, losses in means.items()})]
    return rows[0] | {"match": match, "bars": bars, "held_out_loss": means, "held_out_loss_by_seed": by_seed}


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def generated(task: argparse.Namespace, prepared: dict[str, Any]) -> dict[str, Any]:
    """All sides in turn; a row."""
    count, prompt = task.new_tokens, prepared["prompt"]
    answers: dict[str, list[dict[str, Any]]] = {}
    agree = {}
    for suffix in ("", "+adapter"):  # one after the other: the peer's weights are in memory once
        names = [name + suffix for name in ("ours", "theirs")]
        if has_llama_cpp() and (not suffix or prepared["kept"]):
            names.append("llama.cpp" + suffix)
        sides = {name: child(name, generate, task.folder, task.source, prompt, task.threads) for name in names}
        found = in_turns(sides, [f"decode {count}"] * (task.repeats + 1))
        ours, theirs = (torch.tensor(found[name][-1]["tokens"]) for name in names[:2])
        at = first_difference(ours, theirs)
        leads = None if at is None else sides["theirs" + suffix].ask(f"lead {at}")["lead"]
        agree["with adapter" if suffix else "base"] = {"first_difference": at, "lead_of_the_peer_there": leads}
        answers |= found
        for side in sides.values():
            side.end()
    seconds = {name: [answer["seconds"] for answer in found[1:]] for name, found in answers.items()}
    row: dict[str, Any] = {"kept": prepared["kept"], "prompt_tokens": len(prompt), "new_tokens": count}
    row["match"] = all((found["lead_of_the_peer_there"] or 0) <= NEAR_TIE for found in agree.values())
    row |= {"tokens": agree, "peer_dtype": PEER_DTYPE, **timings(seconds)}
    row["tokens_per_second"] = tokens_a_second(seconds, count)
    if "llama.cpp" in answers:
        last = answers["llama.cpp"][-1]
        own = [answer["tokens_per_second"] for answer in answers["llama.cpp"][1:]]
        row["llama_cpp"] = {"without_prompt": rounded(quartiles(own)), "text": last["text"], "system": last["system"]}
    return row


def cached(work: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returned for the same key before, or returns now."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return dict(kept(work / "rows" / f"{digest}.json", make))


def measure(bench: Bench, model: str, work: Path) -> None:
    options, isa, born = bench.options, machine()["cpu_isa"], birth()
    source = model_file(model)
    steps = {"train": options.steps, "learn": options.learn_steps}
    code = births.last_change("real") or born["commit"]
    code += f", changed, {time.time()}" * bool(born["changed"])  # which no other run has
    given = {name: getattr(options, name) for name in ("lr", "threads", "new_tokens", "repeats")}

    def fresh(folder: Path, seed: int) -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return prepare(folder, source, steps, seed)

    def row_of(part: str, checkpointing: bool, seed: int) -> dict[str, Any]:
        key = {"model": model, "steps": steps, "seed": seed, "code": code, "isa": isa}

        def make() -> dict[str, Any]:
            folder = work / f"{model}-{seed}"
            prepared = cached(work, key, partial(fresh, folder, seed))
            task = argparse.Namespace(folder=folder, source=source, model=model, isa=isa, **given)
            if part == "generate":
                return generated(task, prepared)
            return trained(part, checkpointing, task, prepared, bench.result["ceilings"])

        return cached(work, {**key, **given, "part": part, "checkpointing": checkpointing}, make)

    for part in options.parts:
        for checkpointing in options.checkpointing if part == "train" else (False,):
            seeds = options.seeds if part == "learn" else options.seeds[:1]
            rows = [row_of(part, checkpointing, seed) for seed in seeds]
            row = {"model": model, "part": part, "seeds": list(seeds)}
            row |= over_seeds(rows) if part == "learn" else rows[0]
            bench.add(row, "model", "part", "checkpointing", "tokens_per_second", "peak_rss_mib", "held_out_loss")


def main() -> None:
    parts = (*PARTS, "generate")
    checkpointing = {"nargs": "+", "type": json.loads, "metavar": "true|false", "default": [True, False]}
    folder = {"type": Path, "help": "folder for the 16-bit models and finished rows (default: temporary)"}
    counts = {"steps": 9, "learn_steps": 100, "new_tokens": 64, "repeats": 5, "lr": 5e-4, "seeds": (0, 1, 2)}
    bench = Bench("real", __doc__, models=MODELS, parts=parts, checkpointing=checkpointing, work=folder, **counts)
    options = bench.options
    minutes = sum(MINUTES[name][part] for name in options.models for part in options.parts)
    print(f"about {minutes} minutes on two cores with AMX, with the steps that are the default", flush=True)
    bench.begin(ceilings=ceilings(), setting={"lr": options.lr})
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            measure(bench, model, options.work or Path(scratch))
    bench.write(key=("model", "part", "checkpointing"))


if __name__ == "__main__":
    main()
