"""A training run in three phases: ``prepare`` opens and checks everything, ``loop`` takes the steps, ``finish`` saves
the adapter and sums up.

A step learns from ``batch_size * grad_accum`` rows of about equal length, or packed sequences. They pass through the
model in micro-batches, each weighted by its share of the step's trained tokens, so that the gradient is that of one
big batch however the rows are divided.

A step whose loss or gradient is not finite changes nothing and is counted; after ``MAX_SKIPPED`` of them in a row the
run stops. A step that runs out of memory is repeated, once, with the optimizer's states paged out.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import TypeAdapter

from qlora_native._io import as_write_error, atomic_folder, locked, reading, recover, user_path
from qlora_native._memory import keep_freed_memory, peak_rss_bytes, without_old_objects
from qlora_native.data.batching import Sampler
from qlora_native.data.dataset import TokenizedDataset
from qlora_native.data.template import TEMPLATE, check_vocabulary, padding_id
from qlora_native.distributed import OneProcess, joined, restarts
from qlora_native.errors import UserError
from qlora_native.lora import load_adapter, save_adapter
from qlora_native.models.loss import check_loss
from qlora_native.optim import AdamW, Lion
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.rows import load_rows, longest
from qlora_native.tool.train.batches import check_packing, make_sampler
from qlora_native.tool.train.checkpoint import (
    BEFORE,
    CONFIG,
    LARGEST_SCALE,
    Interrupted,
    LossScale,
    StopRequest,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    stop_request,
)
from qlora_native.tool.train.memory import MappedWeights, MemoryReport, OOMRetry, forecast
from qlora_native.tool.train.passes import Learner, why_eager
from qlora_native.tool.train.progress import (
    Metrics,
    Observer,
    OnStep,
    Progress,
    Record,
    RunPage,
    TrainSummary,
    describe,
    make_loggers,
    plot_losses,
)
from qlora_native.tool.train.setup import (
    check_data,
    learning_rate,
    make_optimizer,
    parameter_groups,
    prepare_model,
    resolve,
    what_is_trained,
)
from qlora_native.weights.open import load_tokenizer, open_source

if TYPE_CHECKING:
    from qlora_native.tool.train.shipping import Shipping

MAX_SKIPPED = 5


class Trainer:
    """Runs one config.

    Args:
        model, tokenizer: used instead of loading ``config.model``; adapters are added unless the model has some.
        on_step: called after each optimizer step with its line of ``metrics.jsonl``.
        quiet: print nothing.

    After ``train()``, ``model`` is the trained model; with ``lora.ship``, its layers compute as what they ship as.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: Any = None,
        tokenizer: Any = None,
        on_step: Callable[[Record], None] | None = None,
        quiet: bool = False,
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.on_step, self.quiet = on_step, quiet
        self.ranks = OneProcess()

    def train(self) -> TrainSummary:
        """Train, evaluate, save.

        Raises:
            UserError: whatever the user can fix.
            Interrupted: a KeyboardInterrupt, once all is saved after Ctrl-C, SIGTERM or SIGHUP.
            RankLost: another one of several processes ended or hangs.
        """
        with joined(self.config.parallel, self.config.rank_timeout) as self.ranks, self._only_run():
            run = prepare(self.config, self.ranks, self.model, self.tokenizer, self.on_step, quiet=self.quiet)
            self.model, self.tokenizer = run.model, run.tokenizer
            with run.observed(), without_old_objects(), stop_request(self.ranks) as stop:
                loop(run, stop)
                return finish(run)

    def evaluate(self, rows: TokenizedDataset) -> float:
        """Mean loss of ``model`` in nats over every trained token of ``rows``."""
        return Learner(self.config, self.model, self.tokenizer, self.ranks).evaluate(rows)

    @contextmanager
    def _only_run(self) -> Iterator[None]:
        """Hold the output folder, cleaned up after a killed run; UserError if another run holds it."""
        output_dir = user_path(self.config.output_dir)
        with ExitStack() as stack:
            with self.ranks.together():
                if self.ranks.is_first:
                    with as_write_error(output_dir):
                        output_dir.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(output_dir))
                    recover(output_dir)
            yield


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
    page: RunPage
    memory: MemoryReport | None
    weights: MappedWeights
    shipping: Shipping | None
    observers: list[Observer]
    began: float = field(default_factory=time.monotonic)

    @property
    def output_dir(self) -> Path:
        return user_path(self.config.output_dir)

    def note(self, text: str) -> None:
        """Print a line, and list it among the events of the run's page."""
        self.page.note(text)

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
                write_card(partial, self.config, {**asdict(self.state), "retention": retention}, hashes)
        return folder

    def _write_adapter(self, folder: Path) -> None:
        save_adapter(self.model, folder, write=self.ranks.is_first)  # every rank takes part in gathering it
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
        names = config.logging if ranks.is_first else []  # before what takes long: one may not be installed
        loggers = make_loggers(names, output_dir, config.model_dump(mode="json"))
        source = open_source(user_path(config.model)) if model is None else None
        tokenizer = config.prepared(tokenizer or load_tokenizer(source or config.model, config.adapter))
        rows, held_out = load_rows(config, tokenizer)
        notes = check_data(source, tokenizer, rows, held_out)
        stored = stored_base(checkpoint.folder if checkpoint else config.adapter, source)
        config, changes = resolve(config, checkpoint, rows, stored or source, model)

    # The model, which may be larger than the device.
    memory, layers_budget = None, None
    if source is not None and not ranks.is_sharded:
        expected = forecast(config, stored or source, longest(config.data, rows), len(rows))
        memory = MemoryReport(expected)
        layers_budget = expected.layers_budget if ranks.world == 1 else None
    model = prepare_model(
        config,
        model,
        rows,
        ranks,
        source=source,
        stored=stored,
        tokenizer=tokenizer,
        layers_budget=layers_budget,
        adapter=None if checkpoint else config.adapter,
        quiet=quiet,
    )
    base = record_of(model, source, stored, output_dir)
    check_base(config.adapter, base, config.model)
    optimizer = make_optimizer(options, parameter_groups(model, config.lora.lora_plus_ratio), output_dir)
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
    is_converted = source is not None and not source.is_four_bit
    progress.note(what_is_trained(config, model, is_converted, total))
    progress.note(rows.stats.describe())
    if held_out is not None:
        is_part = held_out.stats.path == rows.stats.path
        progress.note(f"held out: {len(held_out):,} of its rows" if is_part else held_out.stats.describe())
    facts = {"config": config.to_yaml(), "model": config.model, "steps": total}
    facts["rows"] = [data.stats.as_dict() for data in data_sets]
    page = RunPage(output_dir, facts, progress, state, memory)
    reason = why_eager(config, model, ranks.world)
    streamed = getattr(model, "streamed_layers", None)
    notes += changes
    if checkpoint is not None:
        notes.append(f"continuing from {checkpoint.folder} after step {state.step}")
    if streamed is not None:
        notes.append(f"the model is larger than the device: {streamed}")
    if reason:
        notes.append(f"CUDA graphs are off: {reason}")
    for line in notes:
        page.note(line)
    observers: list[Observer] = []  # in the order in which they are called
    shipping = None
    if config.lora.ship is not None:
        from qlora_native.tool.train.shipping import Shipping

        shipping = Shipping(config, model, rows, total, page.note)
        observers.append(shipping)  # first: the last samples are answered with the weights that ship
    weights = MappedWeights(config, model, memory, page.note, ranks.world)
    retry = OOMRetry(config, optimizer, page.note, can_retry=ranks.world == 1)
    observers += [weights, retry, progress]
    if options.samples:
        from qlora_native.tool.train.samples import Samples

        observers.append(Samples(options.samples, model, tokenizer, rows, held_out, ranks.is_sharded))
    observers += [*metrics, *loggers]
    if on_step is not None:
        observers.append(OnStep(on_step))
    if ranks.is_first:
        observers.append(page)  # last: it is made of what the others write
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
        learner=Learner(config, model, tokenizer, ranks, page.note, is_captured=reason is None),
        retry=retry,
        progress=progress,
        page=page,
        memory=memory,
        weights=weights,
        shipping=shipping,
        observers=observers,
    )


def loop(run: Run, stop: StopRequest) -> None:
    """Steps, evaluations and checkpoints until the last step, or as long as evaluations find lower losses.

    Interrupted after a signal, when a checkpoint is saved.
    """
    options, state = run.config.train, run.state
    while True:
        if is_due(state.step, options.eval_every, run.total):
            evaluate(run)
        if options.patience is not None and state.since_best >= options.patience:
            run.note(f"stopped after step {state.step}: {state.since_best} evaluations without a lower loss")
            return
        if state.step >= run.total:
            return
        record = take_step(run)
        for observer in run.observers:
            observer.stepped(record)
        state.step = record["step"]
        state.tokens += record["tokens"]
        state.data = run.sampler.state_dict()
        is_last = run.ranks.any(stop.requested)  # a signal may reach one process alone; all stop after the same step
        if is_last or (options.save_every and is_due(state.step, options.save_every, run.total)):
            folder = run.save()
            if is_last:
                message = f"stopped after step {state.step}; {folder} is saved, --resume continues from it"
                raise Interrupted(message, stop.number)


def evaluate(run: Run) -> None:
    """The held-out loss, if rows are held out; the adapter goes to ``best/`` if no earlier one was as good."""
    state, is_best = run.state, False
    record: Record = {"step": state.step}
    for observer in run.observers:
        run.retry.run(partial(observer.evaluating, state), observer.work.format(state.step))
    if run.held_out:
        loss = run.retry.run(partial(run.learner.evaluate, run.held_out), Observer.work.format(state.step))
        for observer in run.observers:
            observer.computed(loss)
        record |= {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        is_best = state.count_evaluation(loss)
    for observer in run.observers:
        observer.evaluated(record)
    if is_best:
        run.save_adapter("best")


def take_step(run: Run) -> Record:
    """One optimizer step, after which no gradient is left; returns its line of the metrics."""
    options, state, optimizer = run.config.train, run.state, run.optimizer
    began, step = time.monotonic(), state.step + 1
    what = f"step {step}"
    items = next(run.sampler.forever())
    loss, tokens, trained = run.retry.run(partial(run.learner.learn, run.rows, items, state.scale), what)
    for observer in run.observers:
        observer.computed(loss)
    rate = learning_rate(state.step, run.total, peak=options.lr, warmup=options.warmup, scheduler=options.scheduler)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
    norm = math.nan
    if math.isfinite(loss):  # else the gradient is not, and the step would find that out at the cost of reading it
        run.retry.run_once(optimizer.step, what)  # clips; does nothing if the gradient is not finite
        norm = optimizer.grad_norm or 0.0
    count_skipped(run, loss, norm)
    optimizer.zero_grad()  # now: an evaluation may need their memory
    seconds = time.monotonic() - began
    record = {"step": step, "loss": loss, "lr": rate, "grad_norm": norm, "tokens": tokens, "trained_tokens": trained}
    return record | {"seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}


def count_skipped(run: Run, loss: float, norm: float) -> None:
    """Note a step that changed nothing since its loss or its gradient's norm is not finite; UserError after many."""
    state, options = run.state, run.config.train
    if state.scale.update(loss, norm):
        scale = f"{state.scale.value:g}"
        run.note(f"the gradient overflows in float16, step skipped; from here on the loss is scaled by {scale}")
        return
    if math.isfinite(loss) and math.isfinite(norm):
        state.skipped_in_a_row = 0
        return
    state.skipped += 1
    state.skipped_in_a_row += 1
    what = f"step {state.step + 1}: loss {loss}, gradient norm {norm}"
    if state.skipped_in_a_row >= MAX_SKIPPED:
        advice = f"lower train.lr (now {options.lr:g}) or train.clip (now {options.clip:g})"
        if options.dtype != "float32":
            advice += ", or set train.dtype to float32"
        advice += "; if no value helps, look at the rows with `qlora data check`"
        raise UserError(f"{what}: not finite {MAX_SKIPPED} times in a row, so training stopped; {advice}")
    run.note(f"{what}: not finite, step skipped")


def is_due(step: int, every: int, total: int) -> bool:
    """Whether ``step`` is the start, the end, or a multiple of ``every`` (0: never in between)."""
    return step == 0 or step >= total or (every > 0 and step % every == 0)


def finish(run: Run) -> TrainSummary:
    """Save the adapter as it is, and print the summary below what the steps printed."""
    state, output_dir, shipping, retention = run.state, run.output_dir, run.shipping, None
    memory_line = None if run.memory is None else run.memory.line()  # before the plot of the losses takes memory
    if shipping is not None and run.held_out:
        measure = partial(shipping.retention, partial(run.learner.losses, run.held_out), run.ranks)
        retention = run.retry.run(measure, "evaluation of what ships")
        if retention is not None:
            from qlora_native.tool.evaluate import retention as shipped

            run.note(shipped.describe(retention))
    if run.ranks.is_first:
        run.page.close()
    run.progress.close()  # the summary is printed below the bar
    seconds = time.monotonic() - run.began
    adapter_dir, shipped_dir = run.save_adapter("adapter", retention), None
    if shipping is not None:
        shipped_dir = output_dir / shipping.name
        with run.ranks.together():
            if run.ranks.is_first:
                shipping.write(shipped_dir, run.tokenizer)
    if run.ranks.is_first:
        plot_losses(output_dir)
    paging, speeds = run.optimizer.paging_statistics(), run.progress.speeds
    summary = TrainSummary(
        steps=state.step,
        skipped_steps=state.skipped,
        **{name: getattr(state, name) for name in ("tokens", "loss_before", "loss_after", "best_loss", "best_step")},
        tokens_per_second=median(speeds) if speeds else 0.0,
        seconds=seconds,
        paged_bytes=paging["bytes_in"] + paging["bytes_out"],
        paging_seconds=paging["stall_seconds"] + run.retry.lost_seconds,
        retried=run.retry.retries,
        peak_rss_bytes=peak_rss_bytes(),
        adapter_dir=adapter_dir,
        best_dir=output_dir / "best" if state.best_step and state.best_loss is not None else None,
        weight_bytes_read=getattr(run.weights.stream, "bytes_read", 0),
        weight_stall_seconds=getattr(run.weights.stream, "stall_seconds", 0.0),
        shipped_dir=shipped_dir,
        retention=retention,
    )
    run.progress.note(describe(summary))
    if memory_line is not None:
        run.progress.note(memory_line)
    return summary
