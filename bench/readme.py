"""Write the figures of README.md and docs/performance.md from bench/results/*-CPU_CLASS.json.

python bench/readme.py --write      # after the benches have run
python bench/readme.py --check      # exit status 1 if a page differs from the results, or a result lacks its birth
python bench/readme.py --marks      # which figures are older than their code
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import births
import goals
import start_page
from pages import RESIDENCY, ROOT, Page, command, of, results_of, section
from table_writer import Columns, Result, Results, Row, by_class, each, fill, number, only, table

from qlora_native.tool.cli.demo_models import MODELS

NAMES = {  # of rivals
    "bf16": "torch bf16",
    "fp32": "torch fp32",
    "ours_fp32": "our own for fp32 activations",
    "onednn_prepacked": "oneDNN prepacked",
    "dequantize_into_buffer_linear": "decode into a buffer, torch",
    "bitsandbytes_inference": "bitsandbytes, inference only",
    "ggml_iq4_nl": "ggml IQ4_NL, x in 8 bits",
    "linear": "our bare `linear`",
    "copy": "`copy_`",
    "theirs": "the peer",
    "products": "the floor of its products",
    "layers free": "the same with 4-bit layers that return zeros",
    "plain loop": "the plain loop",
    "unpaged": "our step with `paged=False`",
    "budget": "the residency budget",
    "32-bit": "the run with 32-bit states",
}
PEERS = {
    "plain-tuned": "transformers + PEFT, bf16 weights and adapters, tuned malloc",
    "fp32-tuned": "transformers + PEFT, all in fp32, tuned malloc",
    "fp32-both": "transformers + PEFT, all in fp32, tuned malloc; ours in fp32 too",
    "fp32": "transformers + PEFT, all in fp32",
    "ours-fp32": "our own step in fp32",
    "plain": "transformers + PEFT, bf16 weights, fp32 adapters",
    "bitsandbytes-tuned": "transformers + PEFT + bitsandbytes NF4, bf16 adapters on both sides, tuned malloc",
    "bitsandbytes": "transformers + PEFT + bitsandbytes NF4, fp32 adapters",
}
DECODERS = {
    "ours": "`qn.load_model`",
    "unfused": "the same with `fuse=False`: transformers' own code between the products",
    "dequantized": "torch, bf16 weights",
    "bitsandbytes": "bitsandbytes NF4, its inference path",
    "layers free": "`qn.load_model`, 4-bit layers that return zeros",
    "free": "`qn.load_model`, all linear layers return zeros, the output head too",
}
CASES = {
    "forward": "forward {n} x {k}",
    "grad_input": "input gradient {n} x {k}",
    "large": "{parameters:,} parameters, states of {state_bytes:,} bytes under {budget_bytes:,}",
    "idle": "{optimizer}, without pressure, {parameters:,} parameters",
}
ASKED = {"times as fast": "at least {bar:g} x {name}", "of the floor": "at least {bar:percent} of {name}"}


def bars(row: Row) -> str:
    """The bars of a row: each with its limit, the measured value and whether it was met."""
    words, either = [], row.get("either_bar")
    missed = "not reached" if either and any(goals.met_bars(row)) else "missed"
    for bar in row["bars"]:
        asked = ASKED.get(bar["measure"], "at most {bar:g} {measure} of {name}")
        value = "" if bar["value"] is None else f"{bar['value']:g}, "
        state = {True: "met", False: missed, None: "not measured"}[bar["met"]]
        words.append(f"{fill(asked, {**bar, 'name': NAMES.get(bar['rival'], bar['rival'])})}: {value}{state}")
    return "one of two: " + " or ".join(words) if either and words else "; ".join(words)


def rivals(*names: str) -> Columns:
    """A column for each rival: how many times as fast we are."""
    return {f"x {NAMES.get(name, name)}": f"{{ours_over[{name}]:times}}" for name in names}


def title(row: Row) -> str:
    """A model's name, and whether its weights became NF4."""
    return MODELS[row["model"]].title + ("" if row["kept"] else " (NF4)")


# ---------------------------------------------------------------------------------------------------------------------
# docs/performance.md

CPU = {"CPU": "{cpu}"}
TIME = {**CPU, "ms": "{ms[ours]:median}", "of the floor": "{of_floor:percent}"}
SPEEDS = "{tokens_per_second[ours]:spread} against {tokens_per_second[theirs]:spread}"
MEMORY = {"peak memory of the process, MiB": "{peak_rss_mib[ours]:,} against {peak_rss_mib[theirs]:,}"}
LOSSES = "{held_out_loss[ours]:losses} against {held_out_loss[theirs]:losses}"
REAL_STEPS: Columns = {
    "model": title,
    "checkpointing": lambda row: "with" if row["checkpointing"] else "without",
    **CPU,
    "tokens a second, ours against PEFT's": SPEEDS,
    "x": "{ours_over[theirs]:times}",
    "of the floor of its products": "{of_floor:percent}",
    **MEMORY,
    "peer": "{peer_dtype}",
    "bar": bars,
}


def apart_by_seed(row: Row) -> str | None:
    """Our held-out loss less the peer's at the end, of each seed."""
    losses = row.get("held_out_loss_by_seed")
    if losses is None:
        return None
    return " ".join(f"{ours[-1] - theirs[-1]:+.3f}" for ours, theirs in zip(*losses.values(), strict=True))


REAL_LOSSES: Columns = {
    "model": title,
    **CPU,
    "steps": "{steps}",
    "held-out loss, ours against PEFT's, mean of the seeds": LOSSES,
    "ours above PEFT's, seed by seed": apart_by_seed,
    "bar": bars,
}
REAL_DECODING: Columns = {
    "model": title,
    "adapter": "{adapter}",
    **CPU,
    "ours": "{speeds[ours]:median}",
    "transformers": "{speeds[theirs]:median}",
    "llama.cpp": "{speeds[llama.cpp]:median}",
}
STEPS: Columns = {
    "peer": lambda row: PEERS[row["peer"]],
    **CPU,
    "tokens a second, ours against the peer's": SPEEDS,
    "x": "{ours_over[theirs]:times}",
    "of the floor of its products": "{products[of_floor]:percent}",
    **MEMORY,
}
DECODING: Columns = {"": lambda row: DECODERS[row["decoder"]], **CPU, "tokens a second": "{speed:spread}"}
PRODUCTS: Columns = {
    "": lambda row: fill(CASES[row["direction"]], row),
    "M": "{m}",
    **TIME,
    **rivals("bf16", "fp32", "ours_fp32", "onednn_prepacked", "dequantize_into_buffer_linear"),
    **rivals("bitsandbytes", "bitsandbytes_inference", "torchao", "ggml_iq4_nl"),
    "bar": bars,
}
LORA: Columns = {"": "`lora_linear` r={r}, forward + backward, {n} x {k}, M={m}", **TIME, "bar": bars}
QUANTIZING: Columns = {"": "{direction} {n} x {k}", **TIME, **rivals("copy", "bitsandbytes", "torchao"), "bar": bars}
OPTIMIZERS: Columns = {
    "": "{optimizer}, {case}",
    **TIME,
    **rivals("torch fused", "torch fused + clip_grad_norm_"),
    **rivals("bitsandbytes AdamW", "bitsandbytes AdamW8bit", "torchao AdamW8bit"),
    "bar": bars,
}
SHARES: Columns = {
    "out of memory": lambda row: f"{100 * row['paged_out']:g} %",
    **CPU,
    "ms": "{ms[ours]:spread}",
    "MB moved a step": lambda row: number((row["bytes_in_a_step"] + row["bytes_out_a_step"]) / 1e6),
    **rivals("torch fused", "bitsandbytes PagedAdamW", "torchao CPUOffloadOptimizer", "unpaged"),
}
PAGED_STEPS: Columns = {
    "": lambda row: fill(CASES[row["case"]], row),
    **CPU,
    "ms": "{ms[ours]:spread}",
    "of the disk's rate, measured at the start": "{of_floor:percent}",
    "bar": bars,
}


def with_and_without_adapter(result: Result) -> Iterator[Row]:
    """The rows of generating."""
    for row in only(part="generate")(result):
        speeds = row["tokens_per_second"]
        for suffix, adapter in (("", "without"), ("+adapter", "with")):
            there = {name: speeds[name + suffix] for name in speeds if name + suffix in speeds}
            yield {**row, "adapter": adapter, "speeds": there}


def decoders(result: Result) -> list[Row]:
    """A row for each side of a run."""
    return [{"decoder": name, "speed": speed} for name, speed in result["rows"][0]["tokens_per_second"].items()]


def sentences(result: Result) -> list[Row]:
    """What the peers say of themselves."""
    return [{"said": said.rstrip(".")} for note in result["notes"] for said in note.split(". ")]


def pair(result: Result) -> list[Row]:
    """The run with 8-bit states in a page file, and beside it the plain one."""
    plain, coded = result["rows"]
    return [{**coded, "plain": plain, "goals": bars(coded)}]


PAIR = """\
{plain[held_out_loss]:losses4} with 32-bit states in memory, {held_out_loss:losses4} with 8-bit states in a page file
({goals})."""
SHARED = "\nHere all parameters share one gradient, too; there each has its own."
DISK = "{ceilings[disk_read_gb_per_s]:g} GB/s and writes {ceilings[disk_write_gb_per_s]:g} GB/s"
PEER = """
SmolLM2-135M, rank 16 on every linear layer, over NF4 with double quantization here.
The peer's weights are those that its row names: dense where it does not say NF4.
Both sides start from the same 16-bit weights and adapter tensors and take turns on the same batches.
Speeds are medians with quartiles.
{about}"""
SECTIONS = {
    "real": section(
        """
        ## Real models

        The files are those of `qlora demo --model`; ours trains on their own weights, or on NF4 where it says so.
        The peer is transformers + PEFT on the same weights, decoded to the dtype in the table.
        Its adapters are in that dtype too, its attention is sdpa, and its malloc keeps freed memory.
        Steps are of four rows of 256 tokens, with rank 16 on every linear layer; speeds are medians with quartiles.
        Peak memory is the process's from the end of its loading on, with the pages of the file that are in memory.
        {about}
        """,
        by_class(REAL_STEPS, only(part="train")),
        "The same on the demo's task, with adapters in fp32 on both sides and equal batches.",
        by_class(REAL_LOSSES, only(part="learn")),
        "Greedy decoding, tokens a second: ours, transformers in the peer's dtype, llama.cpp on the same file.",
        by_class(REAL_DECODING, with_and_without_adapter),
    ),
    "train": section(
        f"## Training\n\nTraining steps of four rows of 256 tokens.{PEER}", by_class({**STEPS, "bar": bars})
    ),
    "train_learn": section(
        f"The same over {{first[steps]}} steps on answers, at most 256 tokens a row, with the held-out loss.{PEER}",
        by_class({**STEPS, "held-out loss": LOSSES}),
    ),
    "generate": section(
        """
        ## Generation

        Greedy decoding of SmolLM2-135M by transformers' `generate`: medians with quartiles.
        {about}
        """,
        by_class(DECODING, decoders),
        by_class({"": "", **CPU, "bar": bars}),
    ),
    "linear": section(
        """
        ## Products with a 4-bit weight

        A row has the time of one product, the share of its floor, and the speed relative to each peer.
        The floor is the longer of reading the bytes once and the operations at oneDNN's best rate in the same run.
        Ratios are medians of paired rounds.
        For M <= 16 the weights rotate over copies that take four times the cache.
        {about}
        """,
        "![Time of the forward product against M](linear.png)",
        by_class(PRODUCTS, only(direction=("forward", "grad_input"))),
        by_class(LORA, only(direction="lora_forward_backward")),
    ),
    "quantize": section(
        """
        ## Quantizing

        bf16 to NF4 with double quantization, and back into an `out` that was written before.
        The floor is reading the input and writing the output once.
        {about}
        """,
        by_class(QUANTIZING, only(quant_type="nf4", double_quant=True, dtype="bfloat16")),
    ),
    "optim": section(
        """
        ## Optimizer steps

        One step over fp32 parameters: {sizes}.
        The floor is the step's bytes at the memory's best rate.
        {about}
        """,
        by_class(OPTIMIZERS),
        sizes=each("{case}: {parameters:,} in {tensors} tensors"),
    ),
    "paged": section(
        """
        ## Paged optimizer states

        An AdamW step over {first[parameters]:,} parameters with 32-bit states, a share of them in the page file.
        The disk reads {disks}.
        Ratios here do not compare with the table of optimizer steps: between these steps the disk writes.{shared}
        {about}{notes}
        """,
        "![Time of a step against the share of states out of memory](paged.png)",
        by_class(SHARES, only(case="shares")),
        by_class(PAGED_STEPS, only(case=("large", "idle"))),
        disks=each(DISK, lambda result: [result]),
        shared=each(SHARED, only(case="shares", gradients=None)),  # of old results
        notes=each("\n{said}.", sentences, ""),
    ),
    "paged_learn": section(
        """
        Held-out loss of SmolLM2-135M over {first[steps]} steps:
        {runs}
        {about}
        """,
        runs=each(PAIR, pair, "\n"),
    ),
}


def performance(folder: Path) -> str:
    """The text of docs/performance.md."""
    said = f"""\
Ratios come from runs in which both sides take turns: they carry over to another machine better than times.
A bar is a goal that this project set itself.
{births.FOOTNOTE}"""
    if not any("amx" in results_of(name, folder) for name in SECTIONS):
        said += "\nThe AMX kernels are tested where there is AMX; no speed on this page is from such a processor."
    made = (of(name, part)(folder) for name, part in SECTIONS.items())
    return "\n\n".join([said, *filter(None, made), goals.page(folder)])


# ---------------------------------------------------------------------------------------------------------------------
# README.md: training of real models, and of SmolLM2-135M as it was measured last

SPEED: Columns = {"CPU class": "{cpu}", "speed": "{ours_over[theirs]:times} x"}
RATES = "{tokens_per_second[ours]:median} / {tokens_per_second[theirs]:median}"
PEAKS = "{peak_rss_mib[ours]:,} / {peak_rss_mib[theirs]:,}"
OF_MODELS: Columns = {
    "GGUF file, against PEFT on its 16-bit form": title,
    **SPEED,
    "tokens a second, ours / PEFT": RATES,
    "peak memory, MiB, ours / PEFT": PEAKS,
    "held-out loss, ours / PEFT": "{learn[held_out_loss][ours]:end} / {learn[held_out_loss][theirs]:end}",
    "decoding, ours / 16 bits / llama.cpp": lambda row: " / ".join(
        number(row["generate"][name][1]) for name in ("ours", "theirs", "llama.cpp") if name in row["generate"]
    ),
}
OF_PEERS: Columns = {
    "peer of SmolLM2-135M": lambda row: PEERS[row["peer"]],
    **SPEED,
    "tokens a second, ours / peer": RATES,
    "peak memory, MiB, ours / peer": PEAKS,
}


def models(results: Results) -> str:
    """A row for each model that was trained with checkpointing; nothing before one was."""
    rows = []
    for cpu, result in results.items():
        for row in only(part="train", checkpointing=True)(result):
            others = {other["part"]: other for other in result["rows"] if other["model"] == row["model"]}
            speeds = others.get("generate", {}).get("tokens_per_second", {})
            rows.append({**others, **row, "cpu": cpu, "generate": speeds})
    return table(OF_MODELS, rows) if rows else ""


def little_memory(folder: Path) -> str:
    """Of each shape the run in the least memory."""
    parts = []
    for shape, name in RESIDENCY.items():
        results = results_of(name, folder)
        limited = [(row["limit_gib"], cpu, row) for cpu in results for row in results[cpu]["rows"] if row["limit_gib"]]
        if limited:
            limit, cpu, row = min(limited, key=lambda found: found[:2])
            speed = number(row["tokens_per_second"])
            parts.append(f"{shape} trains under {limit:g} GiB at {speed} tokens a second ({cpu})")
    said = "In little memory, with random weights in the shapes of Llama 3 ([how](docs/any-file.md)):"
    return f"{said}\n{', '.join(parts)}." if parts else ""


def summary(folder: Path) -> str:
    """The text of README.md: these tables, the runs in little memory, and where all figures and missed goals are."""
    real, found = results_of("real", folder), results_of("train", folder)
    newest = max((result["birth"]["date"] for result in found.values() if births.is_born(result)), default="")
    last = {cpu: result for cpu, result in found.items() if not newest or result["birth"]["date"] == newest}
    rows = [{**row, "cpu": cpu} for cpu, result in last.items() for row in result["rows"]]
    steps = table(OF_PEERS, (row for row in rows if not row["peer"].startswith("ours")))
    tables = f"{births.marked('real', models(real), real)}\n\n{births.marked('train', steps, last)}"
    footnote = f"\n{births.FOOTNOTE}" if births.MARK in tables else ""
    every_goal = goals.found(folder)
    return f"""
Training steps of four rows of 256 tokens, rank 16 on all linear layers; speed is the median of paired steps.

{tables}

Commits: {births.commits(real, last)}.{footnote}
[All figures](docs/performance.md); of {len(every_goal)} goals \
[{sum(not goal.met for goal in every_goal)} are missed](docs/performance.md#missed-goals).
{little_memory(folder)}
"""


README = Page(ROOT / "README.md", {"start_page.py": start_page.BLOCK, "readme.py": summary})
PERFORMANCE = Page(ROOT / "docs/performance.md", {"readme.py": performance})

if __name__ == "__main__":
    command(__doc__, README, PERFORMANCE)
