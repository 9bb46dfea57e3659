"""Write the table of docs/scaling.md from `qlora estimate --gpus`, which nobody measured (command line: pages.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from memory_page import GIB, SIZES, config_of
from pages import ROOT, Page, command
from table_writer import Columns, Row, cell_of, markdown

SHAPES = {"70B": SIZES["70B, as Llama 3"], "405B": (16384, 53248, 126, 128, 8, 128256, False)}

BITS = {"adamw": "32-bit", "adamw8bit": "8-bit"}  # of the states


class Case(NamedTuple):
    """One column: a model over ``gpus`` cards of ``card`` GiB, a micro-batch of one row each."""

    model: str
    gpus: int
    card: int
    length: int
    optimizer: str
    skip_modules: tuple[str, ...] = ("lm_head",)  # what stays in 16 bits


CASES = (
    Case("70B", 2, 24, 512, "adamw8bit"),
    Case("70B", 2, 24, 512, "adamw8bit", ()),
    Case("70B", 4, 24, 1024, "adamw"),
    Case("405B", 8, 80, 1024, "adamw"),
)


def fits(row: Row) -> str:
    """Whether a rank fits a card, else by how much it does not."""
    over = row["rank"].total - row["case"].card * GIB
    return "yes" if over <= 0 else f"no, by {over / GIB:.1f} GiB"


ROWS: Columns = {
    "rows, tokens, optimizer": lambda row: f"1 x {row['case'].length}, {BITS[row['case'].optimizer]}",
    "output embedding": lambda row: "16 bits" if row["case"].skip_modules else "4 bits",
    "frozen weights, whole": "{whole:GB}",
    "held by a rank": "{rank.memory.frozen:GB}",
    "gathered while layers run": "{rank.memory.gathered_blocks:GB}",
    "gathered for an embedding": "{embedding:GB}",
    "received a micro-batch": "{rank.memory.received:GB}",
    "the fullest moment": lambda row: max(row["rank"].moments, key=row["rank"].moments.__getitem__),
    "peak of a card, CUDA included": "{rank.total:GiB}",
    "fits": fits,
}


def measures(case: Case) -> Row:
    """A rank under fsdp, and the bytes of the whole model's frozen weights and of the larger gathered embedding."""
    from qlora_native.tool.cli.estimate import each_rank
    from qlora_native.tool.config import TrainConfig
    from qlora_native.tool.estimate import Estimator, Setting

    options = {"batch_size": 1, "grad_accum": case.gpus, "optimizer": case.optimizer}
    values = {"model": case.model, "data": {"train": "rows.jsonl", "max_length": case.length}, "train": options}
    config = TrainConfig.model_validate(values)
    setting = replace(Setting.from_config(config, "cuda"), skip_modules=case.skip_modules)
    ranks = each_rank(Estimator(config_of(SHAPES[case.model]), setting), config, case.gpus)
    whole, rank = ranks
    embedding = max(rank.memory.gathered_input, rank.memory.gathered_output)
    return {"case": case, "rank": rank, "whole": whole.memory.frozen, "embedding": embedding}


def columns() -> str:
    """The table, a column for each case."""
    head = ["", *(f"{case.model} on {case.gpus} x {case.card} GB" for case in CASES)]
    found = [measures(case) for case in CASES]
    return markdown(head, [[name, *(str(cell_of(cell, row)) for row in found)] for name, cell in ROWS.items()])


PAGE = Page(ROOT / "docs/scaling.md", {"scaling_page.py": lambda _: columns()})

if __name__ == "__main__":
    command(__doc__, PAGE)
