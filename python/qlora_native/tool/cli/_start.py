"""How a run begins where nothing says otherwise: rows a step, passes and lengths, by its rows and the memory."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

from qlora_native._io import as_user_error, user_path

if TYPE_CHECKING:
    from qlora_native.tool.config import TrainConfig
    from qlora_native.tool.estimate import Estimate, Estimator

MARGIN = 0.9  # of the memory, so that a longer row or another process is no disaster
ENOUGH_ROWS = 4096  # of a file, to choose by
OPTIMIZERS = ("adamw", "adamw8bit")
LENGTHS = (2048, 1024, 512, 256)  # tokens a row
MICRO_BATCHES = (16, 8, 4, 2, 1)  # rows
PASS_TOKENS = {"cpu": 1024, "cuda": 16384}  # from so many on, more in one pass make a step no faster
STEP_ROWS = (16, 8, 4)
# Fewer steps leave an adapter half trained; more passes learn rows by heart.
STEPS, MOST_EPOCHS = (100, 10)
ROWS = 1000  # assumed where no file of rows is named
EVALUATIONS = 5  # of a short run


class Start(NamedTuple):
    """What fits the memory: ``estimate`` is that of micro-batches of the longest row."""

    estimate: Estimate
    fits: bool
    max_length: int
    batch_size: int
    grad_accum: int
    epochs: int
    eval_every: int
    optimizer: str


def schedule(rows: int) -> tuple[int, int]:
    """Rows a step and passes over ``rows`` of them: the widest step, and the fewest passes, that make STEPS steps."""
    wide = next((width for width in STEP_ROWS if rows >= STEPS * width), STEP_ROWS[-1])
    return wide, min(MOST_EPOCHS, math.ceil(STEPS * wide / rows))


def start(estimator: Estimator, limit: int, rows: int = ROWS, longest: int = LENGTHS[0]) -> Start:
    """The longest rows that fit ``limit`` bytes, as many at once as make a step faster, with optimizer states in 8 bits
    only if they must be; if nothing fits, the least. ``longest`` of the ``rows`` is in tokens."""
    wide, epochs = schedule(rows)
    device = estimator.setting.device
    lengths = [length for length in LENGTHS if length <= estimator.positions and length < 2 * longest]
    lengths = lengths or [min(LENGTHS[-1], estimator.positions)]
    for optimizer, max_length, batch_size in itertools.product(OPTIMIZERS, lengths, MICRO_BATCHES):
        length = -(-min(max_length, longest) // 8) * 8  # as collate pads
        if batch_size > wide or (batch_size > 1 and batch_size * length > PASS_TOKENS[device]):
            continue
        grad_accum = wide // batch_size
        estimate = estimator.at(
            optimizer=optimizer,
            length=length,
            micro_batches=grad_accum,
            batch_size=min(batch_size, rows),
        )
        if fits := estimate.fits(int(MARGIN * limit)):
            break
    eval_every = min(100, max(1, epochs * math.ceil(rows / wide) // EVALUATIONS))
    return Start(estimate, fits, max_length, batch_size, grad_accum, epochs, eval_every, optimizer)


def measured_rows(config: TrainConfig, limit: int | None = None) -> tuple[int, int]:
    """How many rows of ``data.train`` are trained, and the tokens of the longest; of the first ``limit`` of a file."""
    from qlora_native.data.dataset import load_split
    from qlora_native.weights.open import load_tokenizer

    tokenizer = config.add_tokens_and_template(load_tokenizer(config.model, config.adapter))
    rows = load_split(tokenizer=tokenizer, limit=limit, **config.row_options)[0]
    return len(rows), config.data.longest(rows.lengths)


def completed(config: TrainConfig, device: str | None = None, limit: int | None = None) -> TrainConfig:
    """The config of a run without a file: for what was not given what suits the rows and the memory, of ``limit`` bytes
    if not of this machine."""
    import torch

    from qlora_native.tool.estimate import Estimator, Setting

    rows, longest = measured_rows(config, ENOUGH_ROWS)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    limit = limit or free_bytes(device)
    with as_user_error():
        estimator = Estimator(user_path(config.model), Setting.from_config(config, device))
    chosen = start(estimator, limit, rows, longest)
    step_rows = chosen.batch_size * chosen.grad_accum
    given = config.train.model_fields_set
    if "batch_size" in given:
        chosen = chosen._replace(grad_accum=max(1, step_rows // config.train.batch_size))
    elif "grad_accum" in given:
        chosen = chosen._replace(batch_size=max(1, step_rows // config.train.grad_accum))
    names = {"optimizer", "eval_every", "epochs", "batch_size", "grad_accum"} - given
    if "steps" in given:
        names.discard("epochs")
    data = {} if "max_length" in config.data.model_fields_set else {"max_length": chosen.max_length}
    train = config.train.model_copy(update={name: getattr(chosen, name) for name in names})
    return config.model_copy(update={"train": train, "data": config.data.model_copy(update=data)})


def free_bytes(device: str) -> int:
    """Of the memory of this machine, or of its card; 8 GiB where that cannot be found out."""
    import torch

    from qlora_native._memory import free_device_memory, free_memory

    is_card = device == "cuda"
    free = (
        free_device_memory(torch.device("cuda", torch.cuda.current_device()))
        if is_card
        else free_memory()
    )
    return free.bytes if free else 8 << 30
