"""Write docs/gpu.md: what gpu_model.py predicted and, once there is a card, what gpu_check.py measured.

python bench/gpu_page.py --add FILE...       merge results into bench/results/CARD.json; later ones win, by group
python bench/gpu_page.py --write             the page
python bench/gpu_page.py --check             exit status 1 if the page differs from the results
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import births
from pages import RESULTS, between, table, write_or_check

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- bench/gpu_page.py begins -->", "<!-- bench/gpu_page.py ends -->"
OFF = 1.3  # measured over predicted, or the other way round, from which on the model was wrong
MODELS = ("8B", "70B")  # a training step's row ends with one

Result = dict[str, Any]
Rows = Mapping[str, Mapping[str, float | None]]


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" as h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?i)nvidia|tesla|geforce", "", name).lower()).strip("-")


def predictions() -> dict[str, dict[str, float | None]]:
    """Of gpu_model.py, in ms by row and card."""
    return dict(json.loads((RESULTS / "model.json").read_text(encoding="utf-8"))["rows"])


def predicted(row: str, card: str, rows: Rows) -> float | None:
    """Milliseconds, None for a card or row that the model lacks."""
    return next((ms for key, ms in rows.get(row, {}).items() if key in card), None)


def merged(results: Iterable[Result]) -> Result:
    """One result; a group that stands in several comes from the last.

    Raises:
        ValueError: they are of different cards, or of a dry run.
    """
    found: Result = {}
    for result in results:
        if result.get("dry_run"):
            raise ValueError("a dry run measures nothing: expected results of a card")
        if found and found["card"]["name"] != result["card"]["name"]:
            raise ValueError(f"results of {found['card']['name']} and of {result['card']['name']}: merge one card's")
        old = [row for row in found.get("rows", []) if row["group"] not in result["groups"]]
        both = {key: {**found.get(key, {}), **result[key]} for key in ("groups", "ceilings")}
        first = min(filter(None, (found.get("birth"), result["birth"])), key=lambda birth: str(birth["date"]))
        found = {**found, **result, **both, "birth": first, "rows": [*old, *result["rows"]]}
    return found


def compared(result: Result, rows: Rows) -> list[tuple[str, float, float]]:
    """Row, measured ms (median), predicted ms; what the model missed by most comes first."""
    found = []
    for row in result["rows"]:
        guess = predicted(row["row"], result["card"].get("name", ""), rows)
        if guess and "ms" in row and "ours" in row["ms"]:
            found.append((row["row"], row["ms"]["ours"][1], guess))
    return sorted(found, key=lambda pair: -max(pair[1] / pair[2], pair[2] / pair[1]))


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _ratio(row: Mapping[str, Any], rival: str) -> str:
    over = row.get("ours_over", {}).get(rival)
    return "" if over is None else f"{1 / over[1]:.2f}"


def card_lines(result: Result, rows: Rows) -> list[str]:
    """The tables of one card."""
    card = result["card"]
    by_group = [entry.get("clocks", {}) for entry in result["groups"].values()]
    hot = max((clocks["celsius"][2] for clocks in by_group if "celsius" in clocks), default=None)
    masks = {clocks["throttle"] for clocks in by_group if "throttle" in clocks}
    rates = [f"{name}: {value:g}" for name, value in next(iter(result["ceilings"].values()), {}).items()]
    rivals = sorted({name for row in result["rows"] for name in row.get("ours_over", {})} - {"ours_warm"})
    body = []
    for row in result["rows"]:
        if "ms" not in row:
            continue
        guess, ours = predicted(row["row"], card["name"], rows), row["ms"]["ours"][1]
        warm = row["ms"].get("ours_warm", [None, None])[1]
        floor = f"{100 * row['of_floor']:.0f} %" if "of_floor" in row else ""
        cells = [row["row"], _ms(ours), _ms(warm), floor, _ms(guess), f"{ours / guess:.2f}" if guess else ""]
        body.append([*cells, *(_ratio(row, name) for name in rivals)])
    off = [row for row, ours, guess in compared(result, rows) if max(ours / guess, guess / ours) > OFF]
    failed = [f"- {name}: {entry['state']}. {entry['words']}" for name, entry in result["groups"].items()]
    return [
        f"## {card['name']}",
        "",
        *births.lines({card["name"]: result}),
        f"torch {card['torch']}, CUDA {card['torch_cuda']}, {card.get('dtype', '')}; {', '.join(rates)}.",
        f"Hottest: {hot} degrees Celsius; reasons for lower clocks, as nvidia-smi's bit masks: {', '.join(masks)}.",
        f"The model is off by more than {OFF} in {len(off)} of {len(compared(result, rows))} rows.",
        "",
        *table(["", "ms", "L2 warm", "of the floor", "predicted", "x predicted", *(f"x {n}" for n in rivals)], body),
        *(line for line in failed if ": ok. " not in line),
        *(f"- {row['row']}: {row['error']}" for row in result["rows"] if "error" in row),
        "",
    ]


def lines(folder: Path = RESULTS) -> list[str]:
    """Between the marks."""
    rows = predictions()
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    measured = [result for result in results if result.get("bench") == "gpu_check"]
    found = [line for result in measured for line in card_lines(result, rows)]
    if not measured:
        found = ["No card has been measured yet: every time on this page is computed, from data sheets.", ""]
    cards = list(dict.fromkeys(name for row in rows.values() for name in row))
    steps = [[row, *(_ms(times[name]) for name in cards)] for row, times in rows.items() if row.endswith(MODELS)]
    found += ["## Predicted steps", "", "In ms; an empty cell is a model that does not fit into the card's memory.", ""]
    return [*found, *table(["", *cards], steps)]


def page(text: str, folder: Path = RESULTS) -> str:
    """The page with its title and its tables rewritten."""
    made = between(text, BEGIN, END, lines(folder))
    measured = "No card has been measured" not in made
    return re.sub(r"\A# .*", f"# {'What a GPU measured' if measured else 'Predicted, not measured'}", made)


def main() -> None:
    """Merge, write or check."""
    if "--add" in sys.argv[1:]:
        result = merged(json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[2:])
        file = RESULTS / f"{slug(result['card']['name'])}.json"
        old = [json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []
        file.write_text(json.dumps(merged([*old, result]), indent=1) + "\n", encoding="utf-8")
        print(file)
        return
    write_or_check(__doc__, PAGE, page, "bench/results")


if __name__ == "__main__":
    main()
