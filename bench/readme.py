"""Write the figures of README.md and docs/performance.md from bench/results/*-CPU_CLASS.json.

python bench/readme.py --write      # after the benches have run
python bench/readme.py --check      # exit status 1 if a page differs from the results, or a result lacks its birth
python bench/readme.py --marks      # which figures are older than their code
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import births
import goals
import real_page
import start_page
from pages import RESIDENCY, RESULTS, ROOT, results_of, side_by_side, table

START = "bench/start_page.py"  # whose markers stand around what the two commands take
NAMES = {
    "bf16": "torch bf16",
    "fp32": "torch fp32",
    "ours_fp32": "our own for fp32 activations",
    "bf16_lora": "torch bf16 with LoRA",
    "onednn_prepacked": "oneDNN prepacked",
    "dequantize_into_buffer_linear": "decode into a buffer, torch",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_inference": "bitsandbytes, inference only",
    "torchao": "torchao",
    "ggml_iq4_nl": "ggml IQ4_NL, x in 8 bits",
    "linear": "our bare `linear`",
    "copy": "`copy_`",
    "fill": "`fill_`",
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

Row = dict[str, Any]
Results = Mapping[str, Row]  # CPU class -> what a bench found there


def number(value: float) -> str:
    """Three significant digits, thousands with a comma."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Median and quartiles."""
    return f"{number(values[1])} ({number(values[0])}-{number(values[2])})"


def bars(row: Row) -> str:
    """The bars of a row: each with its limit, the measured value and whether it was met."""
    words, either = [], row.get("either_bar")
    for bar in row["bars"]:
        rival = NAMES.get(bar["rival"], bar["rival"])
        asked = f"at most {bar['bar']:g} {bar['measure']} of {rival}"
        if bar["measure"] == "times as fast":
            asked = f"at least {bar['bar']:g} x {rival}"
        elif bar["measure"] == "of the floor":
            asked = f"at least {100 * bar['bar']:g} % of {rival}"
        missed = "not reached" if either and any(goals.met_bars(row)) else "missed"
        state = {True: "met", False: missed, None: "not measured"}[bar["met"]]
        words.append(f"{asked}: " + ("" if bar["value"] is None else f"{bar['value']:g}, ") + state)
    return "one of two: " + " or ".join(words) if either and words else "; ".join(words)


def faster(row: Row, rival: str) -> str:
    """How many times as fast as a rival, by the median of the paired ratios."""
    if rival not in row["ours_over"]:
        return ""
    ratio = 1 / row["ours_over"][rival][1]
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"


def machines(*groups: Results) -> str:
    """The machines, each with the CPU classes that were measured on it."""
    classes: dict[str, dict[str, None]] = {}
    for machine in (result["machine"] for results in groups for result in results.values()):
        name = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
        classes.setdefault(name, {})[machine["cpu_isa"]] = None
    return "; ".join(f"{name} ({', '.join(found)})" for name, found in classes.items())


def about(results: Results) -> str:
    """The lines that name the script, the machines, the commits and days."""
    script = next(f"bench/bench_{result['bench']}.py" for result in results.values())
    machine = textwrap.wrap(f"Machine: {machines(results)}.", births.WIDTH, break_on_hyphens=False)
    return "\n".join([f"Script: [{script}](../{script}).", *machine, *births.lines(results)])


def every(results: Results) -> list[Row]:
    """The rows of all classes."""
    return [row for result in results.values() for row in result["rows"]]


def products(results: Results) -> list[str]:
    """The tables of linear-*.json."""
    names = {name for row in every(results) for name in row["ours_over"]}
    rivals = [name for name in NAMES if name in names and name not in ("linear", "bf16_lora", "fp32_lora")]
    lines = [
        "## Products with a 4-bit weight",
        "",
        "A row has the time of one product, the share of its floor, and the speed relative to each peer.",
        "The floor is the longer of reading the bytes once and the operations at oneDNN's best rate in the same run.",
        "Ratios are medians of paired rounds.",
        "For M <= 16 the weights rotate over copies that take four times the cache.",
        about(results),
        "",
        "![Time of the forward product against M](linear.png)",
        "",
    ]
    head = ["", "M", "ms", "of the floor", *(f"x {NAMES[name]}" for name in rivals), "bar"]
    plain: dict[str, list[list[str]]] = {cpu: [] for cpu in results}
    others: dict[str, list[list[str]]] = {cpu: [] for cpu in results}
    for cpu, result in results.items():
        for row in result["rows"]:
            ms, floor = number(row["ms"]["ours"][1]), f"{100 * row['of_floor']:.0f} %"
            if row["direction"] in ("forward", "grad_input"):
                what = {"forward": "forward", "grad_input": "input gradient"}[row["direction"]]
                cells = [f"{what} {row['n']} x {row['k']}", str(row["m"]), ms, floor]
                plain[cpu].append([*cells, *(faster(row, name) for name in rivals), bars(row)])
            else:
                what = f"`lora_linear` r={row['r']}, forward + backward"
                others[cpu].append([f"{what}, {row['n']} x {row['k']}, M={row['m']}", ms, floor, bars(row)])
    return [*lines, *side_by_side(head, plain, keys=2), *side_by_side(["", "ms", "of the floor", "bar"], others)]


def quantizing(results: Results) -> list[str]:
    """The table of quantize-*.json: NF4 with double quantization, bf16."""
    chosen = {
        cpu: [r for r in result["rows"] if r["quant_type"] == "nf4" and r["double_quant"] and r["dtype"] == "bfloat16"]
        for cpu, result in results.items()
    }
    there = {name for rows in chosen.values() for row in rows for name in row["ours_over"]}
    rivals = [name for name in ("copy", "bitsandbytes", "torchao") if name in there]
    bodies = {
        cpu: [
            [
                f"{row['direction']} {row['n']} x {row['k']}",
                number(row["ms"]["ours"][1]),
                f"{100 * row['of_floor']:.0f} %",
                *(faster(row, name) for name in rivals),
                bars(row),
            ]
            for row in rows
        ]
        for cpu, rows in chosen.items()
    }
    lines = [
        "## Quantizing",
        "",
        "bf16 to NF4 with double quantization, and back into an `out` that was written before.",
        "The floor is reading the input and writing the output once.",
        about(results),
        "",
    ]
    head = ["", "ms", "of the floor", *(f"x {NAMES[name]}" for name in rivals), "bar"]
    return lines + side_by_side(head, bodies)


def optimizers(results: Results) -> list[str]:
    """The table of optim-*.json."""
    rivals = list(dict.fromkeys(name for row in every(results) for name in row["ours_over"]))
    bodies = {
        cpu: [
            [
                f"{row['optimizer']}, {row['case']}",
                number(row["ms"]["ours"][1]),
                f"{100 * row['of_floor']:.0f} %",
                *(faster(row, name) for name in rivals),
                bars(row),
            ]
            for row in result["rows"]
        ]
        for cpu, result in results.items()
    }
    sizes = {r["case"]: f"{r['case']}: {r['parameters']:,} in {r['tensors']} tensors" for r in every(results)}
    lines = [
        "## Optimizer steps",
        "",
        f"One step over fp32 parameters: {'; '.join(sizes.values())}.",
        "The floor is the step's bytes at the memory's best rate.",
        about(results),
        "",
    ]
    return lines + side_by_side(["", "ms", "of the floor", *(f"x {name}" for name in rivals), "bar"], bodies)


def training(results: Results) -> list[str]:
    """The table of train-*.json or train_learn-*.json."""
    learned = any("held_out_loss" in row for row in every(results))
    floors = any("products" in row for row in every(results))
    bodies: dict[str, list[list[str]]] = {cpu: [] for cpu in results}
    for cpu, result in results.items():
        for row in result["rows"]:
            speeds, memory = row["tokens_per_second"], row["peak_rss_mib"]
            speed = f"{spread(speeds['ours'])} against {spread(speeds['theirs'])}"
            cells = [PEERS[row["peer"]], speed, faster(row, "theirs")]
            cells += [f"{100 * row['products']['of_floor']:.0f} %" if "products" in row else ""] * floors
            cells.append(f"{memory['ours']:,} against {memory['theirs']:,}")
            if learned:
                sides = (" -> ".join(f"{v:.3f}" for v in row["held_out_loss"][name]) for name in ("ours", "theirs"))
                cells.append(" against ".join(sides))
            bodies[cpu].append([*cells, bars(row)] if not learned else cells)
    what = ["## Training", "", "Training steps of four rows of 256 tokens."]
    if learned:
        steps = every(results)[0]["steps"]
        what = [f"The same over {steps} steps on answers, at most 256 tokens a row, with the held-out loss."]
    lines = [
        *what,
        "SmolLM2-135M, rank 16 on every linear layer, over NF4 with double quantization here.",
        "The peer's weights are those that its row names: dense where it does not say NF4.",
        "Both sides start from the same 16-bit weights and adapter tensors and take turns on the same batches.",
        "Speeds are medians with quartiles.",
        about(results),
        "",
    ]
    head = ["peer", "tokens a second, ours against the peer's", "x", *["of the floor of its products"] * floors]
    head += ["peak memory of the process, MiB", "held-out loss" if learned else "bar"]
    return lines + side_by_side(head, bodies)


def decoding(results: Results) -> list[str]:
    """The table of generate-*.json."""
    bodies = {
        cpu: [[DECODERS[name], spread(values)] for name, values in result["rows"][0]["tokens_per_second"].items()]
        for cpu, result in results.items()
    }
    asked = [["", cpu, bars(result["rows"][0])] for cpu, result in results.items()]
    lines = [
        "## Generation",
        "",
        "Greedy decoding of SmolLM2-135M by transformers' `generate`: medians with quartiles.",
        about(results),
        "",
    ]
    return [*lines, *side_by_side(["", "tokens a second"], bodies), *table(["", "CPU", "bar"], asked)]


def paging(results: Results) -> list[str]:
    """The tables of paged-*.json."""
    shares = {cpu: [r for r in result["rows"] if r["case"] == "shares"] for cpu, result in results.items()}
    first = next(iter(shares.values()))[0]
    rivals = list(dict.fromkeys(name for rows in shares.values() for name in rows[0]["ours_over"]))
    disks = [
        f"{ceilings['disk_read_gb_per_s']:g} GB/s and writes {ceilings['disk_write_gb_per_s']:g} GB/s"
        for ceilings in (result["ceilings"] for result in results.values())
    ]
    notes = dict.fromkeys(
        f"{sentence.rstrip('.')}."
        for result in results.values()
        for note in result["notes"]
        for sentence in note.split(". ")
    )
    lines = [
        "## Paged optimizer states",
        "",
        f"An AdamW step over {first['parameters']:,} parameters with 32-bit states, a share of them in the page file.",
        f"The disk reads {'; '.join(disks)}.",
        "Ratios here do not compare with the table of optimizer steps: between these steps the disk writes.",
        *(["Here all parameters share one gradient, too; there each has its own."] * ("gradients" not in first)),
        about(results),
        *notes,
        "",
        "![Time of a step against the share of states out of memory](paged.png)",
        "",
    ]
    names = {"large": "{parameters:,} parameters, states of {state_bytes:,} bytes under {budget_bytes:,}"}
    bodies: dict[str, list[list[str]]] = {cpu: [] for cpu in results}
    others: dict[str, list[list[str]]] = {cpu: [] for cpu in results}
    for cpu, result in results.items():
        for row in shares[cpu]:
            moved = (row["bytes_in_a_step"] + row["bytes_out_a_step"]) / 1e6
            cells = [f"{100 * row['paged_out']:g} %", spread(row["ms"]["ours"]), number(moved)]
            bodies[cpu].append([*cells, *(faster(row, name) for name in rivals)])
        for row in (r for r in result["rows"] if r["case"] in ("large", "idle")):
            what = names.get(row["case"], "{optimizer}, without pressure, {parameters:,} parameters").format(**row)
            reached = f"{100 * row['of_floor']:.0f} %" if "of_floor" in row else ""
            others[cpu].append([what, spread(row["ms"]["ours"]), reached, bars(row)])
    head = ["out of memory", "ms", "MB moved a step", *(f"x {NAMES.get(n, n)}" for n in rivals)]
    lines += side_by_side(head, bodies)
    return lines + side_by_side(["", "ms", "of the disk's rate, measured at the start", "bar"], others)


def paged_learning(results: Results) -> list[str]:
    """One sentence from each paged_learn-*.json."""
    lines = []
    for cpu, result in results.items():
        plain, coded = result["rows"]
        losses = [" -> ".join(f"{value:.4f}" for value in row["held_out_loss"]) for row in (plain, coded)]
        lines += [
            f"Held-out loss of SmolLM2-135M over {plain['steps']} steps:",
            f"{losses[0]} with 32-bit states in memory, {losses[1]} with 8-bit states in a page file",
            f"({bars(coded)}).",
            about({cpu: result}),
            "",
        ]
    return lines


SECTIONS = (
    ("real", real_page.section),
    ("train", training),
    ("train_learn", training),
    ("generate", decoding),
    ("linear", products),
    ("quantize", quantizing),
    ("optim", optimizers),
    ("paged", paging),
    ("paged_learn", paged_learning),
)


def performance(folder: Path) -> list[str]:
    """The tables of docs/performance.md."""
    lines = [
        "Ratios come from runs in which both sides take turns: they carry over to another machine better than times.",
        "A bar is a goal that this project set itself.",
        births.FOOTNOTE,
    ]
    if not any("amx" in results_of(name, folder) for name, _ in SECTIONS):
        lines.append("The AMX kernels are tested where there is AMX; no speed on this page is from such a processor.")
    lines.append("")
    for name, write in SECTIONS:
        results = results_of(name, folder)
        if results:
            lines += births.marked(name, write(results), results)
    return lines + goals.page(folder)


def little_memory(folder: Path) -> list[str]:
    """Of each shape the run in the least memory."""
    parts = []
    for shape, name in RESIDENCY.items():
        results = results_of(name, folder)
        limited = [(row["limit_gib"], cpu, row) for cpu in results for row in results[cpu]["rows"] if row["limit_gib"]]
        if limited:
            limit, cpu, row = min(limited, key=lambda found: found[:2])
            speed = number(row["tokens_per_second"])
            parts.append(f"{shape} trains under {limit:g} GiB at {speed} tokens a second ({cpu})")
    about = "In little memory, with random weights in the shapes of Llama 3 ([how](docs/any-file.md)):"
    return [about, f"{', '.join(parts)}."] if parts else []


def summary(folder: Path) -> list[str]:
    """README.md's tables of training, of SmolLM2-135M as it was measured last, the runs in little memory, and where all
    figures and missed goals are."""
    real, found = results_of("real", folder), results_of("train", folder)
    newest = max((result["birth"]["date"] for result in found.values() if births.is_born(result)), default="")
    results = {cpu: result for cpu, result in found.items() if not newest or result["birth"]["date"] == newest}
    body = [
        [
            PEERS[row["peer"]],
            cpu,
            f"{faster(row, 'theirs')} x",
            " / ".join(number(row["tokens_per_second"][side][1]) for side in ("ours", "theirs")),
            " / ".join(f"{row['peak_rss_mib'][side]:,}" for side in ("ours", "theirs")),
        ]
        for cpu, result in results.items()
        for row in result["rows"]
        if not row["peer"].startswith("ours")
    ]
    head = ["peer of SmolLM2-135M", "CPU class", "speed", "tokens a second, ours / peer"]
    tables = births.marked("real", real_page.headline(real), real)
    tables += births.marked("train", table([*head, "peak memory, MiB, ours / peer"], body), results)
    commits = [result["birth"] for each in (real, results) for result in each.values() if births.is_born(result)]
    born = dict.fromkeys(f"{birth['commit'][:7]} of {birth['date']}" for birth in commits)
    every_goal = goals.found(folder)
    missed = sum(not goal.met for goal in every_goal)
    return [
        "Training steps of four rows of 256 tokens, rank 16 on all linear layers; speed is the median of paired steps.",
        "",
        *tables,
        f"Commits: {', '.join(born)}.",
        *([births.FOOTNOTE] if any(births.MARK in line for line in tables) else []),
        f"[All figures](docs/performance.md); of {len(every_goal)} goals "
        f"[{missed} are missed](docs/performance.md#missed-goals).",
        *little_memory(folder),
    ]


def replaced(text: str, lines: Sequence[str], script: str = "bench/readme.py") -> str:
    """The page with other lines between the markers of a script.

    Raises:
        ValueError: the markers are not there, once each and in this order.
    """
    begin, end = f"<!-- {script} begins -->", f"<!-- {script} ends -->"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended or begin in rest or end in after:
        raise ValueError(f"The page must hold {begin} and {end} once each, in this order.")
    return before + "\n".join([begin, "", *lines, "", end]).replace("\n\n\n", "\n\n") + after


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="put the figures into the pages")
    action.add_argument("--check", action="store_true", help="exit 1 if a page has other figures")
    action.add_argument("--marks", action="store_true", help="list the results whose code has changed since")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--performance", type=Path, default=ROOT / "docs/performance.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.marks:
        print("\n".join(births.report(arguments.results)))
        return
    unborn = births.unborn(arguments.results)
    if arguments.check and unborn:
        sys.exit(f"no commit, date and versions in {', '.join(unborn)}: measure again with --json")
    for page, make in ((arguments.readme, summary), (arguments.performance, performance)):
        text = page.read_text(encoding="utf-8")
        wanted = replaced(text, make(arguments.results))
        if page == arguments.readme:
            wanted = replaced(wanted, start_page.headline(results_of("start", arguments.results)), START)
            wanted = wanted.replace("begins -->\n\n", "begins -->\n").replace("\n\n<!-- ", "\n<!-- ")  # 130 lines
        if arguments.write:
            page.write_text(wanted, encoding="utf-8")
        elif births.without_marks(text) != births.without_marks(wanted):
            sys.exit(f"{page} differs from {arguments.results}: run python bench/readme.py --write")


if __name__ == "__main__":
    main()
