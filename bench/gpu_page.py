"""Write docs/gpu.md: what gpu_model.py predicted and, once there is a card, what gpu_check.py measured.

python bench/gpu_page.py --add FILE...       merge results into bench/results/CARD.json; later ones win, by group
python bench/gpu_page.py --write             the page
python bench/gpu_page.py --check             exit status 1 if the page differs from the results
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import births
from pages import RESULTS, ROOT, Page, command
from table_writer import Columns, Result, Row, markdown, number, table

OFF = 1.3  # measured over predicted, or the other way round, from which on the model was wrong
MODELS = ("8B", "70B")  # a training step's row ends with one
NOT_MEASURED = "No card has been measured yet: every time on this page is computed, from data sheets."

Rows = Mapping[str, Mapping[str, float | None]]  # milliseconds by row and card


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" as h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?i)nvidia|tesla|geforce", "", name).lower()).strip("-")


def model(key: str) -> dict[str, dict[str, Any]]:
    """What gpu_model.py made, by row and card."""
    return dict(json.loads((RESULTS / "model.json").read_text(encoding="utf-8"))[key])


def predictions() -> dict[str, dict[str, float | None]]:
    """Of gpu_model.py, in ms by row and card."""
    return model("rows")


def merged(results: Iterable[Result]) -> Result:
    """One result; a group that stands in several comes from the last.

    Raises:
        ValueError: they are of different cards.
    """
    found: Result = {}
    for result in results:
        if found and found["card"]["name"] != result["card"]["name"]:
            raise ValueError(f"results of {found['card']['name']} and of {result['card']['name']}: merge one card's")
        old = [row for row in found.get("rows", []) if row["group"] not in result["groups"]]
        both = {key: {**found.get(key, {}), **result[key]} for key in ("groups", "ceilings")}
        first = min(filter(None, (found.get("birth"), result["birth"])), key=lambda birth: str(birth["date"]))
        found = {**found, **result, **both, "birth": first, "rows": [*old, *result["rows"]]}
    return found


def timed(result: Result, rows: Rows) -> Iterator[Row]:
    """The rows that have our time, with the predicted ms, if the model has the row and the card."""
    for row in result["rows"]:
        if "ms" in row and "ours" in row["ms"]:
            card = result["card"].get("name", "")
            guess = next((ms for key, ms in rows.get(row["row"], {}).items() if key in card), None)
            ours = row["ms"]["ours"][1]
            yield {**row, **({"guess": guess, "over": ours / guess} if guess else {})}


def compared(result: Result, rows: Rows) -> list[tuple[str, float, float]]:
    """Row, measured ms (median), predicted ms; what the model missed by most comes first."""
    found = [row for row in timed(result, rows) if "guess" in row]
    found.sort(key=lambda row: -max(row["over"], 1 / row["over"]))
    return [(row["row"], row["ms"]["ours"][1], row["guess"]) for row in found]


def card_text(result: Result, rows: Rows) -> str:
    """What one card measured."""
    card, groups = result["card"], result["groups"]
    clocks = [group.get("clocks", {}) for group in groups.values()]
    hot = max((clock["celsius"][2] for clock in clocks if "celsius" in clock), default=None)
    masks = {clock["throttle"] for clock in clocks if "throttle" in clock}
    rates = [f"{name}: {value:g}" for name, value in next(iter(result["ceilings"].values()), {}).items()]
    rivals = sorted({name for row in result["rows"] for name in row.get("ours_over", {})} - {"ours_warm"})
    columns: Columns = {
        "": "{row}",
        "ms": "{ms[ours][1]:number}",
        "L2 warm": "{ms[ours_warm][1]:number}",
        "of the floor": "{of_floor:percent}",
        "predicted": "{guess:number}",
        "x predicted": "{over:.2f}",
        **{f"x {name}": f"{{ours_over[{name}]:times}}" for name in rivals},
    }
    guesses = compared(result, rows)
    off = sum(max(ours / guess, guess / ours) > OFF for _, ours, guess in guesses)
    failed = [
        f"- {name}: {group['state']}. {group['words']}" for name, group in groups.items() if group["state"] != "ok"
    ]
    failed += [f"- {row['row']}: {row['error']}" for row in result["rows"] if "error" in row]
    return f"""
## {card["name"]}

{births.text_of({card["name"]: result})}
torch {card["torch"]}, CUDA {card["torch_cuda"]}, {card.get("dtype", "")}; {", ".join(rates)}.
Hottest: {hot} degrees Celsius; reasons for lower clocks, as nvidia-smi's bit masks: {", ".join(masks)}.
The model is off by more than {OFF} in {off} of {len(guesses)} rows.

{table(columns, timed(result, rows))}

{chr(10).join(failed)}
"""


def lines(folder: Path) -> str:
    """Between the marks."""
    rows = predictions()
    results = [result for result in births.stored(folder).values() if result.get("bench") == "gpu_check"]
    cards = list(dict.fromkeys(name for times in rows.values() for name in times))
    steps = {row: [times[card] for card in cards] for row, times in rows.items() if row.endswith(MODELS)}
    body = ([row, *(number(ms) if ms else "" for ms in times)] for row, times in steps.items())
    products = model("products")
    of_blocks = ([row, *(" / ".join(map(number, each)) for each in times.values())] for row, times in products.items())
    return f"""
{chr(10).join(card_text(result, rows) for result in results) or NOT_MEASURED}

## Predicted steps

In ms; an empty cell is a model that does not fit into the card's memory.

{markdown(["", *cards], body)}

## Predicted products with blocks of GGUF

In microseconds: in two steps / by passes of 16 tokens / by the one pass that is planned.

{markdown(["", *next(iter(products.values()))], of_blocks)}
"""


def titled(page: str) -> str:
    """The page with its title."""
    title = "Predicted, not measured" if NOT_MEASURED in page else "What a GPU measured"
    return re.sub(r"\A# .*", f"# {title}", page)


PAGE = Page(ROOT / "docs/gpu.md", {"gpu_page.py": lines}, titled)


def main() -> None:
    """Merge, write or check."""
    if "--add" not in sys.argv[1:]:
        command(__doc__, PAGE)
        return
    result = merged(json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[2:])
    file = RESULTS / f"{slug(result['card']['name'])}.json"
    old = [json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []
    file.write_text(json.dumps(merged([*old, result]), indent=1) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
