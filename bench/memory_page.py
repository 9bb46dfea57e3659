"""Write the tables of docs/memory.md from results/estimate-*.json and the estimator (command line: pages.py)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import births
from pages import ROOT, Page, command, of
from table_writer import Block, Columns, Results, by_class, fill, markdown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from qlora_native.tool.estimate import Estimator

GIB = 1 << 30
SIZES = {
    "0.36B, as SmolLM2": (960, 2560, 32, 15, 5, 49152, True),
    "0.5B, as Qwen2.5": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B, as Qwen2.5": (1536, 8960, 28, 12, 2, 151936, True),
    "3B, as Llama 3.2": (3072, 8192, 28, 24, 8, 128256, True),
    "8B, as Llama 3": (4096, 14336, 32, 32, 8, 128256, False),
    "14B, as Qwen2.5": (5120, 13824, 48, 40, 8, 152064, False),
    "32B, as Qwen2.5": (5120, 27648, 64, 40, 8, 152064, False),
    "70B, as Llama 3": (8192, 28672, 80, 64, 8, 128256, False),
}
LAYER_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZE_KEYS = (*LAYER_KEYS, "vocab_size", "tie_word_embeddings")
LENGTHS = (512, 2048)
WAYS = {"checkpointing": {}, "without": {"checkpointing": False}, "streamed": {"cuda_graph": False}}  # with the first
MEASURED: Columns = {
    "model": "{model}",
    "tokens": "{rows} x {length}",
    "checkpointing": lambda row: "on" if row["checkpointing"] else "off",
    "CPU": "{cpu}",
    "predicted, MiB": "{total[predicted]:MiB}",
    "measured, MiB": "{total[measured]:MiB}",
    "error": "{total[error]:error}",
}
LARGEST = """\
The largest error is {total:.1f} % ({cpu}, torch {torch}, {threads} thread, {cpu_isa}).
Of weights and scales it is {weights:.1f} %, of optimizer states {optimizer:.1f} %."""


def config_of(shape: Sequence[int]) -> PreTrainedConfig:
    """A model of that shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model("llama", **dict(zip(SIZE_KEYS, shape, strict=True)))


def estimator(shape: Sequence[int], device: str, **setting: Any) -> Estimator:
    """Of such a model, one row at a time; without the scratch of a CPU's kernels, which depends on its class."""
    from qlora_native.tool.estimate import Estimator, Setting

    class OnAnyCpu(Estimator):
        def _scratch(self, setting: Setting) -> int:
            return 0 if setting.device == "cpu" else super()._scratch(setting)

    return OnAnyCpu(config_of(shape), Setting(device=device, batch_size=1, **setting))


@cache
def sizes(device: str) -> str:
    """GiB of a step by size of the model: with checkpointing, without, and streamed with it."""
    from qlora_native.models.device_layers import layer_units
    from qlora_native.models.residency import least_residency

    body = []
    for name, shape in SIZES.items():
        model = estimator(shape, device)
        units = layer_units(model.modules)
        left_out = sum(unit.num_bytes for unit in units) - least_residency(units).num_bytes
        if device == "cpu" and not model.config.tie_word_embeddings:  # the rows of a batch are read from the file
            left_out += 2 * model.config.vocab_size * model.config.hidden_size
        totals = []
        for length in LENGTHS:
            estimates = [model.at(length=length, **changes) for changes in WAYS.values()]
            totals += [estimate.total + estimate.reserve for estimate in estimates]
            totals[-1] -= left_out
        body.append([name, *(f"{total / GIB:.{1 if total < 10 * GIB else 0}f}" for total in totals)])
    head = [f"{length:,} tokens, {how}" for length in LENGTHS for how in WAYS]
    return markdown(["GiB", *head], body)


def measured(results: Results) -> str:
    """Predicted against measured, one row a run."""
    lines = [by_class(MEASURED)(results), ""]
    for result in results.values():
        terms = ("weights", "optimizer", "total")
        errors = {term: 100 * max(abs(row[term]["error"]) for row in result["rows"]) for term in terms}
        lines.append(fill(LARGEST, {**result["machine"], **errors}))
    return "\n".join([*lines, births.text_of(results), births.FOOTNOTE])


def saved() -> str:
    """What each idea saves for the sizes of Llama 3 8B."""
    from qlora_native.tool.estimate.memory import state_bytes

    nested = estimator(SIZES["8B, as Llama 3"], "cuda", length=2048)
    quant = {**nested.setting.quant, "double_quant": False}
    single = estimator(SIZES["8B, as Llama 3"], "cuda", length=2048, quant=quant)
    peak = nested.at().peak
    linear = 2 * peak.weights
    every = linear + peak.dense // 2
    trained = sum(nested.trained)
    rows = {
        "16-bit linear weights": (2 * linear, linear),
        "in 4 bits": (peak.weights, linear),
        "scales in fp32, one for 64": (single.at().peak.scales, linear),
        "scales double-quantized": (peak.scales, linear),
        "AdamW's states of all weights in fp32, were they trained": (state_bytes(every, "adamw"), every),
        "AdamW's states of the adapters": (peak.optimizer, trained),
        "of them in memory, paged out": (nested.at(paged=True, page_budget=0).peak.optimizer, trained),
    }
    body = (
        [name, f"{num_bytes / count:.4f}".rstrip("0").rstrip("."), f"{num_bytes / GIB:.2f}"]
        for name, (num_bytes, count) in rows.items()
    )
    return markdown(["", "bytes a weight or trained weight", "GiB"], body)


def streamed() -> str:
    """Llama 3 70B on 16 GB: which layers stream, and the bytes that are copied."""
    from qlora_native.tool.estimate.cards import streamed_on

    model = estimator(SIZES["70B, as Llama 3"], "cuda", length=1024, optimizer="adamw8bit")
    streaming = streamed_on(model, 16 * GIB)
    assert streaming is not None
    plan, needed = streaming.residency, streaming.estimate.total + streaming.estimate.reserve
    return f"""
Llama 3 70B with 8-bit AdamW, 1 x 1,024 tokens, takes {needed / GIB:.1f} GiB of a card of 16 GB: \
{len(plan.streamed)} of {len(plan.units)} layers stream.
{plan.streamed_bytes / GIB:.1f} GiB of pinned memory hold them, and {plan.bytes_read() / 2 / GIB:.1f} GiB \
are copied in each direction of a micro-batch.
"""


BLOCKS: dict[str, Block] = {
    "memory_page.py cpu": lambda _: sizes("cpu"),
    "memory_page.py cuda": lambda _: sizes("cuda"),
    "memory_page.py measured": of("estimate", measured),
    "memory_page.py saved": lambda _: saved(),
    "memory_page.py streamed": lambda _: streamed(),
}
PAGE = Page(ROOT / "docs/memory.md", BLOCKS)

if __name__ == "__main__":
    command(__doc__, PAGE)
