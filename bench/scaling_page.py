"""Write the table of docs/scaling.md: `qlora estimate --gpus` for models that were not run on such cards.

python bench/scaling_page.py --write
python bench/scaling_page.py --check      # exit status 1 if docs/scaling.md differs from the estimator
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pages import between, table, write_or_check

PAGE = Path(__file__).parents[1] / "docs/scaling.md"
BEGIN, END = "<!-- bench/scaling_page.py begins -->", "<!-- bench/scaling_page.py ends -->"
SIZES: dict[str, dict[str, int]] = {  # of Llama 3
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
GROUPS, WORDS = 8, 128256
GIB = 1 << 30


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


def rank_of(case: Case) -> tuple[Any, int]:
    """A rank under fsdp, and the bytes of the whole model's frozen weights."""
    from transformers import AutoConfig

    from qlora_native.tool.cli.estimate import each_rank
    from qlora_native.tool.config import TrainConfig
    from qlora_native.tool.estimate import Estimator, Setting

    sizes = {**SIZES[case.model], "num_key_value_heads": GROUPS, "vocab_size": WORDS, "tie_word_embeddings": False}
    options = {"batch_size": 1, "grad_accum": case.gpus, "optimizer": case.optimizer}
    values = {"model": case.model, "data": {"train": "rows.jsonl", "max_length": case.length}, "train": options}
    config = TrainConfig.model_validate(values)
    setting = replace(Setting.from_config(config, "cuda"), skip_modules=case.skip_modules)
    estimator = Estimator(AutoConfig.for_model("llama", **sizes), setting)
    ranks = {rank.mode: rank for rank in each_rank(estimator, config, case.gpus)}
    return ranks["fsdp"], ranks["ddp"].memory.frozen


def column(case: Case) -> list[str]:
    """The cells of one case, from top to bottom."""
    rank, whole = rank_of(case)
    memory, card = rank.memory, case.card * GIB
    moment = max(rank.moments, key=rank.moments.__getitem__)
    fits = "yes" if rank.total <= card else f"no, by {(rank.total - card) / GIB:.1f} GiB"
    return [
        f"1 x {case.length}, {'8-bit' if case.optimizer == 'adamw8bit' else '32-bit'}",
        "16 bits" if case.skip_modules else "4 bits",
        f"{whole / 1e9:.1f} GB",
        f"{memory.frozen / 1e9:.1f} GB",
        f"{memory.gathered_blocks / 1e9:.1f} GB",
        f"{max(memory.gathered_input, memory.gathered_output) / 1e9:.1f} GB",
        f"{memory.received / 1e9:.1f} GB",
        moment,
        f"{rank.total / GIB:.1f} GiB",
        fits,
    ]


ROWS = (
    "rows, tokens, optimizer",
    "output embedding",
    "frozen weights, whole",
    "held by a rank",
    "gathered while layers run",
    "gathered for an embedding",
    "received a micro-batch",
    "the fullest moment",
    "peak of a card, CUDA included",
    "fits",
)


def page(text: str) -> str:
    """The page with its table rewritten."""
    columns = [column(case) for case in CASES]
    head = ["", *(f"{case.model} on {case.gpus} x {case.card} GB" for case in CASES)]
    body = [[name, *(cells[number] for cells in columns)] for number, name in enumerate(ROWS)]
    return between(text, BEGIN, END, table(head, body))


def main() -> None:
    """Write or check."""
    write_or_check(__doc__, PAGE, page, "qlora estimate --gpus")


if __name__ == "__main__":
    main()
