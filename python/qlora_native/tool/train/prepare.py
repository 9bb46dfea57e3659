"""The first phase of a run: everything that it needs, made from its config, at its start or where it stopped."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import TypeAdapter

from qlora_native._io import as_write_error, atomic_folder, reading, user_path
from qlora_native._memory import keep_freed_memory
from qlora_native.data.batching import Sampler
from qlora_native.data.dataset import TokenizedDataset, load_split
from qlora_native.data.template import TEMPLATE, check_vocabulary, padding_id
from qlora_native.distributed import OneProcess, restarts
from qlora_native.lora import load_adapter, save_adapter
from qlora_native.models.loss import check_loss
from qlora_native.optim import AdamW, Lion
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.checkpoint import (
    BEFORE,
    CONFIG,
    LARGEST_SCALE,
    LossScale,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from qlora_native.tool.train.memory import Forecast, MappedWeights, MemoryReport, OOMRetry, forecast
from qlora_native.tool.train.passes import Learner, why_eager
from qlora_native.tool.train.progress import (
    Metrics,
    Observer,
    OnStep,
    Progress,
    Record,
    RunReport,
    make_loggers,
)
from qlora_native.tool.train.setup import (
    check_data,
    check_held_out,
    check_packing,
    make_optimizer,
    make_sampler,
    parameter_groups,
    prepare_model,
    resolve,
    what_is_trained,
)
from qlora_native.weights.open import load_tokenizer, open_source

if TYPE_CHECKING:
    from qlora_native.tool.train.shipping import Shipping


@dataclass
class Run:
    """Made by :func:`prepare`. ``observers`` has the others of its observers, too."""

    config: TrainConfig  # in which nothing is left open
    ranks: OneProcess
    model: Any
    tokenizer: Any
    rows: TokenizedDataset
    held_out: TokenizedDataset | None
    base: dict[str, str]  # what is recorded of the frozen weights beside an adapter
    optimizer: AdamW | Lion
    sampler: Sampler
    total: int  # steps
    state: TrainState
    learner: Learner
    retry: OOMRetry
    progress: Progress
    report: RunReport
    memory: MemoryReport | None
    weights: MappedWeights
    shipping: Shipping | None
    observers: list[Observer]
    began: float = field(default_factory=time.monotonic)

    @property
    def output_dir(self) -> Path:
        return user_path(self.config.output_dir)

    def note(self, text: str) -> None:
        """Print a line, and list it among the events of the run's report."""
        self.report.note(text)

    @contextmanager
    def observed(self) -> Iterator[None]:
        """A block after which the observers are closed, the last one first."""
        with ExitStack() as stack:
            for observer in self.observers:
                stack.callback(observer.close)
            yield

    def save(self) -> Path:
        """Write a checkpoint; returns its folder."""
        return save_checkpoint(
            self.output_dir,
            self.state.step,
            save_adapter=self._write_adapter,
            optimizer=self.optimizer,
            state=asdict(self.state),
            config=self.config.to_yaml(),
            keep=self.config.train.keep,
            ranks=self.ranks,
        )

    def save_adapter(self, name: str, retention: dict[str, Any] | None = None) -> Path:
        """Write the adapter as it is, with its card, to a folder of this name; returns it."""
        folder = self.output_dir / name
        with self.ranks.together():
            if not self.ranks.is_first:
                self._write_adapter(folder)
                return folder
            from qlora_native.tool.train.card import write_card

            hashes = self.rows.stats.files | (self.held_out.stats.files if self.held_out else {})
            with as_write_error(folder), atomic_folder(folder) as partial:
                self._write_adapter(partial)
                (partial / CONFIG).write_text(self.config.to_yaml(), encoding="utf-8")
                if self.config.lora.trainable_tokens:
                    self.tokenizer.save_pretrained(partial)
                if self.config.data.chat_template is not None:  # where transformers looks for it
                    (partial / TEMPLATE).write_text(self.tokenizer.chat_template, encoding="utf-8")
                write_card(
                    partial, self.config, {**asdict(self.state), "retention": retention}, hashes
                )
        return folder

    def _write_adapter(self, folder: Path) -> None:
        # Every rank takes part in gathering it.
        save_adapter(self.model, folder, write=self.ranks.is_first)
        if self.ranks.is_first and self.base:
            from qlora_native.models.trained import write_record

            write_record(folder, self.base)


def prepare(
    config: TrainConfig,
    ranks: OneProcess,
    model: Any = None,
    tokenizer: Any = None,
    on_step: Callable[[Record], object] | None = None,
    *,
    quiet: bool = False,
) -> Run:
    """The run that ``config`` asks for, at its start or where a checkpoint stopped; arguments as of
    :class:`qlora_native.Trainer`. UserError for whatever the user can fix."""
    from qlora_native.models.trained import check_base, record_of, stored_base

    options, output_dir = config.train, user_path(config.output_dir)
    quiet = quiet or not ranks.is_first
    keep_freed_memory(options.grad_checkpointing)

    # Checkpoint, tokenizer and data come first: a broken line is found in seconds, a model takes longer.
    with ranks.together():
        resume = config.resume or ("auto" if restarts() else None)
        checkpoint = find_checkpoint(config, output_dir, resume)
        # Before what takes long: one may not be installed.
        names = config.logging if ranks.is_first else []
        loggers = make_loggers(names, output_dir, config.model_dump(mode="json"))
        source = open_source(user_path(config.model)) if model is None else None
        tokenizer = config.add_tokens_and_template(
            tokenizer or load_tokenizer(source or config.model, config.adapter)
        )
        check_held_out(config)
        rows, held_out = load_split(tokenizer=tokenizer, folder=output_dir, **config.row_options)
        notes = check_data(source, tokenizer, rows, held_out)
        stored = stored_base(checkpoint.folder if checkpoint else config.adapter, source)
        config, changes = resolve(config, checkpoint, rows, stored or source, model)

    # The model, which may be larger than the device.
    memory, expected = None, Forecast()
    if source is not None and not ranks.is_sharded:
        expected = forecast(config, stored or source, config.data.longest(rows.lengths), len(rows))
        memory = MemoryReport(expected)
    model = prepare_model(
        config,
        model,
        rows,
        ranks,
        source=source,
        stored=stored,
        tokenizer=tokenizer,
        layers_budget=expected.layers_budget if ranks.world == 1 else None,
        adapter=None if checkpoint else config.adapter,
        quiet=quiet,
    )
    base = record_of(model, source, stored, output_dir)
    check_base(config.adapter, base, config.model)
    optimizer = make_optimizer(
        options, parameter_groups(model, config.lora.lora_plus_ratio), output_dir
    )
    data_sets = [rows] if held_out is None else [rows, held_out]
    highest = max(padding_id(tokenizer), *(int(data.input_ids.max()) for data in data_sets))
    check_vocabulary(highest, tokenizer, model, rows.stats.path)
    if ranks.is_sharded:
        check_loss(model)  # forward passes, in which all processes take part
    if config.data.packing:
        check_packing(model)

    # Where to start: at 0 from the seed, or where the checkpoint stopped, random state included.
    sampler = make_sampler(config, rows)
    total = options.steps or sampler.steps(options.epochs or 1)
    state = TrainState(scale=LossScale(LARGEST_SCALE if options.dtype == "float16" else 1.0))
    seed = options.seed + ranks.rank  # dropout differs from rank to rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if checkpoint is not None:
        load_adapter(model, checkpoint.folder)
        with reading(checkpoint.folder, BEFORE):
            stopped_at = load_checkpoint(checkpoint.folder, optimizer, ranks)
            state = TypeAdapter(TrainState).validate_python(stopped_at)
            sampler.load_state_dict(state.data)

    # What watches the steps. Only the first process writes and prints.
    metrics = [Metrics(output_dir / "metrics.jsonl", state.step)] if ranks.is_first else []
    progress = Progress(total, state.step, options.log_every, options.eval_every, quiet=quiet)
    is_converted = source is not None and not source.has_four_bit_weights
    progress.note(what_is_trained(config, model, is_converted, total))
    progress.note(rows.stats.describe())
    if held_out is not None:
        is_part = held_out.stats.path == rows.stats.path
        progress.note(
            f"held out: {len(held_out):,} of its rows" if is_part else held_out.stats.describe()
        )
    facts = {"config": config.to_yaml(), "model": config.model, "steps": total}
    facts["rows"] = [data.stats.as_dict() for data in data_sets]
    report = RunReport(output_dir, facts, progress, state, memory)
    reason = why_eager(config, model, ranks.world, has_room=expected.has_room_for_graphs)
    streamed = getattr(model, "streamed_layers", None)
    notes += changes
    if checkpoint is not None:
        notes.append(f"continuing from {checkpoint.folder} after step {state.step}")
    if streamed is not None:
        notes.append(f"the model is larger than the device: {streamed}")
    if reason:
        notes.append(f"CUDA graphs are off: {reason}")
    for line in notes:
        report.note(line)
    observers: list[Observer] = []  # in the order in which they are called
    shipping = None
    if config.lora.ship is not None:
        from qlora_native.tool.train.shipping import Shipping

        shipping = Shipping(config, model, rows, total, report.note)
        observers.append(shipping)  # first: the last samples are answered with the weights that ship
    weights = MappedWeights(config, model, memory, report.note, ranks.world)
    learner = Learner(config, model, tokenizer, ranks, report.note, is_captured=reason is None)
    can_retry = ranks.world == 1
    retry = OOMRetry(config, optimizer, report.note, learner.stop_capturing, can_retry=can_retry)
    observers += [weights, retry, progress]
    if options.samples:
        from qlora_native.tool.train.samples import Samples

        observers.append(Samples(options.samples, model, tokenizer, rows, held_out, ranks.is_sharded))
    observers += [*metrics, *loggers]
    if on_step is not None:
        observers.append(OnStep(on_step))
    if ranks.is_first:
        observers.append(report)  # last: it is made of what the others write
    if not state.step and (held_out or options.samples):
        progress.note("evaluating before the first step")
    return Run(
        config=config,
        ranks=ranks,
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        held_out=held_out,
        base=base,
        optimizer=optimizer,
        sampler=sampler,
        total=total,
        state=state,
        learner=learner,
        retry=retry,
        progress=progress,
        report=report,
        memory=memory,
        weights=weights,
        shipping=shipping,
        observers=observers,
    )
