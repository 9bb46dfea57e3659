"""The lines that readme.py puts into README.md and docs/performance.md from bench/results/real-*.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pages import side_by_side, table

from qlora_native.tool.cli.demo_models import MODELS

Results = Mapping[str, dict[str, Any]]  # CPU class -> what bench_real found there


def rows_of(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The rows of one part, those with checkpointing first."""
    return [row for row in result["rows"] if row["part"] == part]


def section(results: Results) -> list[str]:
    """The tables of docs/performance.md."""
    from readme import about, bars, faster, number, spread  # which imports this module

    training: dict[str, list[list[str]]] = {cpu: [] for cpu in results}
    learning: dict[str, list[list[str]]] = {cpu: [] for cpu in results}
    decoding: dict[str, list[list[str]]] = {cpu: [] for cpu in results}
    for cpu, result in results.items():
        for row in rows_of(result, "train"):
            speeds, memory = row["tokens_per_second"], row["peak_rss_mib"]
            cells = [title(row), "with" if row["checkpointing"] else "without"]
            cells += [f"{spread(speeds['ours'])} against {spread(speeds['theirs'])}", faster(row, "theirs")]
            cells += [f"{100 * row['of_floor']:.0f} %", f"{memory['ours']:,} against {memory['theirs']:,}"]
            training[cpu].append([*cells, row["peer_dtype"], bars(row)])
        for row in rows_of(result, "learn"):
            sides = (" -> ".join(f"{v:.3f}" for v in row["held_out_loss"][name]) for name in ("ours", "theirs"))
            learning[cpu].append([title(row), str(row["steps"]), " against ".join(sides), bars(row)])
        for row in rows_of(result, "generate"):
            for suffix, what in (("", "without"), ("+adapter", "with")):
                speeds = {name: row["tokens_per_second"].get(name + suffix) for name in ("ours", "theirs", "llama.cpp")}
                cells = [number(speed[1]) if speed else "" for speed in speeds.values()]
                decoding[cpu].append([title(row), what, *cells])
    head = ["model", "checkpointing", "tokens a second, ours against PEFT's", "x", "of the floor of its products"]
    lines = [
        "## Real models",
        "",
        "The files are those of `qlora demo --model`; ours trains on their own weights, or on NF4 where it says so.",
        "The peer is transformers + PEFT on the same weights, decoded to the dtype in the table.",
        "Its adapters are in that dtype too, its attention is sdpa, and its malloc keeps freed memory.",
        "Steps are of four rows of 256 tokens, with rank 16 on every linear layer; speeds are medians with quartiles.",
        "Peak memory is the process's from the end of its loading on, with the pages of the file that are in memory.",
        about(results),
        "",
        *side_by_side([*head, "peak memory of the process, MiB", "peer", "bar"], training, keys=2),
        "The same on the demo's task, with adapters in fp32 on both sides and equal batches.",
        "",
        *side_by_side(["model", "steps", "held-out loss, ours against PEFT's", "bar"], learning),
        "Greedy decoding, tokens a second: ours, transformers in the peer's dtype, llama.cpp on the same file.",
        "",
        *side_by_side(["model", "adapter", "ours", "transformers", "llama.cpp"], decoding, keys=2),
    ]
    return lines


def title(row: dict[str, Any]) -> str:
    """A model's name, and whether its weights became NF4."""
    return MODELS[row["model"]].title + ("" if row["kept"] else " (NF4)")


def headline(results: Results) -> list[str]:
    """The table of README.md: a row for each model; nothing before it was measured."""
    from readme import faster, number

    body = []
    for cpu, result in results.items():
        for row in (row for row in rows_of(result, "train") if row["checkpointing"]):
            others = [r for part in ("learn", "generate") for r in rows_of(result, part) if r["model"] == row["model"]]
            both: dict[str, Any] = {name: value for other in others for name, value in other.items()}
            losses, speeds = both.get("held_out_loss", {}), both.get("tokens_per_second", {})
            cells = [title(row), cpu, f"{faster(row, 'theirs')} x"]
            cells.append(" / ".join(number(row["tokens_per_second"][side][1]) for side in ("ours", "theirs")))
            cells.append(" / ".join(f"{row['peak_rss_mib'][side]:,}" for side in ("ours", "theirs")))
            cells.append(" / ".join(f"{losses[side][-1]:.3f}" for side in losses))
            decoders = [name for name in ("ours", "theirs", "llama.cpp") if name in speeds and "new_tokens" in both]
            body.append([*cells, " / ".join(number(speeds[name][1]) for name in decoders)])
    if not body:
        return []
    head = ["GGUF file, against PEFT on its 16-bit form", "CPU class", "speed", "tokens a second, ours / PEFT"]
    head += ["peak memory, MiB, ours / PEFT", "held-out loss, ours / PEFT", "decoding, ours / 16 bits / llama.cpp"]
    return table(head, body)
