"""Write the tables of docs/memory.md, from results/estimate-*.json and from the estimator.

python bench/memory_page.py --write
python bench/memory_page.py --check      # exit status 1 if docs/memory.md has other figures
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import births
from pages import results_of, rewritten, side_by_side, table, write_or_check

PAGE = Path(__file__).parents[1] / "docs/memory.md"
GIB = 1 << 30
SIZES = {  # hidden, MLP, layers, heads, heads of k and v, vocabulary, tied
    "0.36B, as SmolLM2": (960, 2560, 32, 15, 5, 49152, True),
    "0.5B, as Qwen2.5": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B, as Qwen2.5": (1536, 8960, 28, 12, 2, 151936, True),
    "3B, as Llama 3.2": (3072, 8192, 28, 24, 8, 128256, True),
    "8B, as Llama 3": (4096, 14336, 32, 32, 8, 128256, False),
    "14B, as Qwen2.5": (5120, 13824, 48, 40, 8, 152064, False),
    "32B, as Qwen2.5": (5120, 27648, 64, 40, 8, 152064, False),
    "70B, as Llama 3": (8192, 28672, 80, 64, 8, 128256, False),
}
LENGTHS = (512, 2048)


@cache
def sizes(device: str) -> list[str]:
    """GiB of a step by size of the model: with checkpointing, without, and streamed with it."""
    from transformers import AutoConfig

    from qlora_native.models.device_layers import layer_units
    from qlora_native.models.residency import least_residency
    from qlora_native.tool.estimate import Estimator, Setting

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    body = []
    for name, shape in SIZES.items():
        values = dict(zip((*names, "vocab_size", "tie_word_embeddings"), shape, strict=True))
        config = AutoConfig.for_model("llama", **values)
        estimator = Estimator(config, Setting(device=device, batch_size=1))
        units = layer_units(estimator.modules)
        left_out = sum(unit.num_bytes for unit in units) - least_residency(units).num_bytes
        if device == "cpu" and not config.tie_word_embeddings:  # the rows of a batch are read from the file
            left_out += 2 * config.vocab_size * config.hidden_size
        totals = []
        for length in LENGTHS:
            on, off = (estimator.at(length=length, checkpointing=checkpointing) for checkpointing in (True, False))
            streaming = estimator.at(length=length, cuda_graph=False)
            totals += [on.total + on.reserve, off.total + off.reserve, streaming.total + streaming.reserve - left_out]
        body.append([name, *(f"{total / GIB:.{1 if total < 10 * GIB else 0}f}" for total in totals)])
    head = [f"{length:,} tokens, {how}" for length in LENGTHS for how in ("checkpointing", "without", "streamed")]
    return table(["GiB", *head], body)


def measured() -> list[str]:
    """Predicted against measured, one row a run."""
    results = results_of("estimate")
    bodies = {
        cpu: [
            [
                row["model"],
                f"{row['rows']} x {row['length']}",
                "on" if row["checkpointing"] else "off",
                f"{row['total']['predicted'] / 2**20:.1f}",
                f"{row['total']['measured'] / 2**20:.1f}",
                f"{100 * row['total']['error']:+.1f} %",
            ]
            for row in result["rows"]
        ]
        for cpu, result in results.items()
    }
    head = ["model", "tokens", "checkpointing", "predicted, MiB", "measured, MiB", "error"]
    lines = side_by_side(head, bodies, keys=3)
    for result in results.values():
        names = ("weights", "optimizer", "total")
        weights, states, worst = (max(abs(row[name]["error"]) for row in result["rows"]) for name in names)
        machine = result["machine"]
        about = f"{machine['cpu']}, torch {machine['torch']}, {machine['threads']} thread, {machine['cpu_isa']}"
        lines += [
            f"The largest error is {100 * worst:.1f} % ({about}).",
            f"Of weights and scales it is {100 * weights:.1f} %, of optimizer states {100 * states:.1f} %.",
        ]
    return births.marked("estimate", [*lines, *births.lines(results), births.FOOTNOTE, ""], results)


def saved() -> list[str]:
    """What each idea saves for the sizes of Llama 3 8B."""
    from transformers import AutoConfig

    from qlora_native.tool.estimate import Estimator, Setting
    from qlora_native.tool.estimate.memory import state_bytes

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)
    setting = Setting(device="cuda", batch_size=1, length=2048)
    single = replace(setting, quant={**setting.quant, "double_quant": False})
    nested, plain = (Estimator(config, s) for s in (setting, single))
    peak = nested.at().peak
    linear = 2 * peak.weights
    every = linear + peak.dense // 2
    paged = nested.at(paged=True, page_budget=0).peak.optimizer

    def row(what: str, num_bytes: int, count: int) -> list[str]:
        return [what, f"{num_bytes / count:.4f}".rstrip("0").rstrip("."), f"{num_bytes / GIB:.2f}"]

    trained = sum(nested.trained)
    body = [
        row("16-bit linear weights", 2 * linear, linear),
        row("in 4 bits", peak.weights, linear),
        row("scales in fp32, one for 64", plain.at().peak.scales, linear),
        row("scales double-quantized", peak.scales, linear),
        row("AdamW's states of all weights in fp32, were they trained", state_bytes(every, "adamw"), every),
        row("AdamW's states of the adapters", peak.optimizer, trained),
        row("of them in memory, paged out", paged, trained),
    ]
    return table(["", "bytes a weight or trained weight", "GiB"], body)


def streamed() -> list[str]:
    """Llama 3 70B on 16 GB: which layers stream, and the bytes that are copied."""
    from transformers import AutoConfig

    from qlora_native.tool.estimate import Estimator, Setting
    from qlora_native.tool.estimate.cards import streamed_on

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)
    setting = Setting(device="cuda", batch_size=1, length=1024, optimizer="adamw8bit")
    streaming = streamed_on(Estimator(config, setting), 16 * GIB)
    assert streaming is not None
    plan, needed = streaming.residency, streaming.estimate.total + streaming.estimate.reserve
    return [
        f"Llama 3 70B with 8-bit AdamW, 1 x 1,024 tokens, takes {needed / GIB:.1f} GiB of a card of 16 GB: "
        f"{len(plan.streamed)} of {len(plan.units)} layers stream.",
        f"{plan.streamed_bytes / GIB:.1f} GiB of pinned memory hold them, and {plan.bytes_read() / 2 / GIB:.1f} GiB "
        "are copied in each direction of a micro-batch.",
        "",
    ]


BLOCKS = {
    "cpu": lambda: sizes("cpu"),
    "cuda": lambda: sizes("cuda"),
    "measured": measured,
    "saved": saved,
    "streamed": streamed,
}
page = partial(rewritten, "memory_page.py", BLOCKS)

if __name__ == "__main__":
    write_or_check(__doc__, PAGE, page, "bench/results")
