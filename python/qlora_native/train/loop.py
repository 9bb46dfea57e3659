"""The whole training run, in plain torch, from top to bottom in ``Trainer._train``.

A step learns from ``batch_size * grad_accum`` rows of about equal length, or packed sequences. They pass through the
model in micro-batches, each weighted by its share of the step's trained tokens, so that the gradient is that of one
big batch however the rows are divided. On one process ``ranks`` does nothing.

A step whose loss or gradient is not finite changes nothing and is counted; after ``MAX_SKIPPED`` of them in a row the
run stops. A step that runs out of memory is repeated, once, with the optimizer's states paged out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import TypeAdapter

from qlora_native._io import as_write_error, atomic_folder, locked, reading, recover, user_path
from qlora_native._memory import keep_freed_memory, peak_rss_bytes, without_old_objects
from qlora_native.config import NonNegative, TrainConfig
from qlora_native.data.batching import evaluation_order
from qlora_native.data.dataset import TokenizedDataset
from qlora_native.data.template import TEMPLATE, check_vocabulary, padding_id
from qlora_native.distributed import Items, OneProcess, joined, restarts
from qlora_native.errors import UserError
from qlora_native.hf.loss import causal_lm_loss, settle, trained_tokens
from qlora_native.hf.source import load_tokenizer, open_source
from qlora_native.lora import load_adapter, save_adapter
from qlora_native.train.batches import Batch, check_packing, describe_rows, load_rows, make_sampler, micro_batches
from qlora_native.train.checkpoint import (
    BEFORE,
    CONFIG,
    Interrupted,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    stop_request,
)
from qlora_native.train.graphs import LARGEST_SCALE, LossScale, Passes, why_eager
from qlora_native.train.memory import MappedWeights, MemoryReport, OOMRetry
from qlora_native.train.progress import Metrics, Progress, RunPage, make_loggers, plot_losses
from qlora_native.train.setup import (
    check_data,
    learning_rate,
    make_optimizer,
    parameter_groups,
    prepare_model,
    resolve,
    seed_all,
    what_is_trained,
)

MAX_SKIPPED = 5

Record = dict[str, Any]  # one line of metrics.jsonl


@dataclass
class TrainState:
    """The loop's own part of a checkpoint; losses are held-out ones in nats per token, None without held-out rows."""

    step: NonNegative = 0
    tokens: NonNegative = 0
    skipped: NonNegative = 0
    skipped_in_a_row: NonNegative = 0
    loss_before: float | None = None
    loss_after: float | None = None
    best_loss: float | None = None
    best_step: NonNegative | None = None
    since_best: NonNegative = 0  # evaluations
    samples: list[dict[str, str]] = field(default_factory=list)  # the last answers, beside the first
    scale: LossScale = field(default_factory=LossScale)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSummary:
    steps: int
    skipped_steps: int
    tokens: int  # that passed through the model, padding not counted
    loss_before: float | None  # held-out loss in nats per token of the quantized model; None without held-out rows
    loss_after: float | None
    best_loss: float | None
    best_step: int | None
    tokens_per_second: float  # median over the steps of this process; 0 if it took none
    seconds: float  # of this process, from the first step to the last
    paged_bytes: int  # of optimizer states that this process moved, both ways together
    paging_seconds: float  # waiting for them, and in first attempts that failed
    retried: int  # steps and evaluations that ran out of memory and were repeated
    peak_rss_bytes: int
    adapter_dir: Path  # the adapter after the last step
    best_dir: Path | None  # the adapter with the lowest held-out loss
    weight_bytes_read: int = 0  # of frozen weights that did not fit, by this process
    weight_stall_seconds: float = 0.0  # waiting for them
    shipped_dir: Path | None = None  # the 4-bit model that the last evaluation was of
    retention: dict[str, Any] | None = None  # how much of what the adapter learned that model keeps


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
        self.resolved = config
        self.on_step, self.quiet = on_step, quiet
        self.ranks = OneProcess()
        self.output_dir = user_path(config.output_dir)

    def train(self) -> TrainSummary:
        """Train, evaluate, save.

        Raises:
            UserError: whatever the user can fix.
            Interrupted: a KeyboardInterrupt, once all is saved after Ctrl-C, SIGTERM or SIGHUP.
            RankLost: another one of several processes ended or hangs.
        """
        with joined(self.config.parallel, self.config.rank_timeout) as self.ranks, self._only_run():
            return self._train()

    @contextmanager
    def _only_run(self) -> Iterator[None]:
        """Hold the output folder, cleaned up after a killed run; UserError if another run holds it."""
        with ExitStack() as stack:
            with self.ranks.together():
                if self.ranks.is_first:
                    with as_write_error(self.output_dir):
                        self.output_dir.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(self.output_dir))
                    recover(self.output_dir)
            yield

    def _train(self) -> TrainSummary:
        from qlora_native.hf.trained import check_base, record_of, stored_base

        config, options, ranks = self.config, self.config.train, self.ranks
        keep_freed_memory(options.grad_checkpointing)

        # Checkpoint, tokenizer and data come first: a broken line is found in seconds, a model takes longer.
        with ranks.together():
            resume = config.resume or ("auto" if restarts() else None)
            checkpoint = find_checkpoint(config, self.output_dir, resume)
            names = config.logging if ranks.is_first else []
            loggers = make_loggers(names, self.output_dir, config.model_dump(mode="json"))
            source = open_source(user_path(config.model)) if self.model is None else None
            self.tokenizer = config.prepared(self.tokenizer or load_tokenizer(source or config.model, config.adapter))
            rows, held_out = load_rows(config, self.tokenizer)
            findings = check_data(source, self.tokenizer, rows, held_out)
            stored = stored_base(checkpoint.folder if checkpoint else config.adapter, source)
            config, fell_back = resolve(config, checkpoint, rows, stored or source, self.model)
            self.resolved = config
            self.hashes = {**rows.stats.files, **({} if held_out is None else held_out.stats.files)}

        # Model and optimizer.
        memory = None
        if source is not None and not ranks.is_sharded:
            memory = MemoryReport(config, stored or source, config.data.longest(rows), len(rows))
        budget = memory.layers_budget if memory is not None and ranks.world == 1 else None
        options_of_it: dict[str, Any] = {"source": source, "stored": stored, "layers_budget": budget}
        options_of_it |= {"tokenizer": self.tokenizer, "adapter": None if checkpoint else config.adapter}
        self.model = model = prepare_model(config, self.model, rows, ranks, quiet=self.quiet, **options_of_it)
        self.base = record_of(model, source, stored, self.output_dir)
        check_base(config.adapter, self.base, config.model)
        optimizer = make_optimizer(options, parameter_groups(model, config.lora.lora_plus_ratio), self.output_dir)
        highest = [int(data.input_ids.max()) for data in (rows, held_out) if data is not None]
        check_vocabulary(max(*highest, padding_id(self.tokenizer)), self.tokenizer, model, rows.stats.path)
        if ranks.is_sharded:
            settle(model)
        if config.data.packing:
            check_packing(model)
        sampler = make_sampler(config, rows)
        total = options.steps or sampler.steps(options.epochs or 1)

        # Where to start: at 0 from the seed, or where the checkpoint stopped, random state included.
        state = TrainState(scale=LossScale(LARGEST_SCALE if options.dtype == "float16" else 1.0))
        seed_all(options.seed + ranks.rank)  # dropout differs from rank to rank
        if checkpoint is not None:
            load_adapter(model, checkpoint.folder)
            with reading(checkpoint.folder, BEFORE):
                state = TypeAdapter(TrainState).validate_python(load_checkpoint(checkpoint.folder, optimizer, ranks))
                sampler.load_state_dict(state.data)

        metrics = Metrics(self.output_dir / "metrics.jsonl" if ranks.is_first else None, state.step, loggers)
        quiet = self.quiet or not ranks.is_first
        progress = Progress(total, state.step, options.log_every, options.eval_every, quiet=quiet)
        is_converted = source is not None and not source.is_four_bit
        progress.note(what_is_trained(config, model, is_converted, total))
        for line in describe_rows(rows, held_out):
            progress.note(line)
        facts: dict[str, Any] = {"config": config.to_yaml(), "model": config.model, "steps": total}
        facts["rows"] = [data.stats.as_dict() for data in (rows, held_out) if data is not None]
        page = RunPage(self.output_dir if ranks.is_first else None, facts, progress, lambda: state.step, memory)
        for line in [*findings, *([fell_back] if fell_back is not None else [])]:
            page.note(line)
        if checkpoint is not None:
            page.note(f"continuing from {checkpoint.folder} after step {state.step}")
        if getattr(model, "streamed_layers", None) is not None:
            page.note(f"the model is larger than the device: {model.streamed_layers}")
        if reason := why_eager(config, model, ranks.world):
            page.note(f"CUDA graphs are off: {reason}")
        self.passes = Passes(model, lambda batch: causal_lm_loss(model, batch), page.note, is_captured=reason is None)
        samples = None
        if options.samples:
            from qlora_native.train.samples import Samples

            samples = Samples(options.samples, model, self.tokenizer, rows, held_out, ranks.is_sharded)
        self.shipping = shipping = None
        if config.lora.ship is not None:
            from qlora_native.evaluate.retention import describe as in_words
            from qlora_native.train.shipping import Shipping

            self.shipping = shipping = Shipping(config, model)
        weights = MappedWeights(config, model, memory, page.note, ranks.world)
        oom_retry = OOMRetry(config, optimizer, page.note, can_retry=ranks.world == 1)
        speeds: list[float] = []
        began = time.monotonic()

        with closing(metrics), closing(progress), closing(page), without_old_objects(), stop_request(ranks) as stop:
            while True:
                if shipping is not None and state.step >= total:
                    oom_retry.run(partial(shipping.recode, rows, config.data.max_length), "calibrating what ships")
                    page.note(f"after step {state.step} the weights are those that ship, {config.lora.ship}")
                if is_due(state.step, options.eval_every, total):
                    started, what = time.monotonic(), f"evaluation after step {state.step}"
                    if not state.step and (held_out or samples):
                        progress.note("evaluating before the first step")
                    if samples is not None:
                        state.samples = oom_retry.run(partial(samples.answers, state.samples), what)
                    if held_out:
                        loss = oom_retry.run(partial(self.evaluate, held_out), what)
                        weights.check(loss)
                        progress.evaluation(state.step, loss, time.monotonic() - started)
                        self._record_evaluation(state, loss, metrics)
                    elif samples is not None:
                        metrics.write({"step": state.step, "samples": state.samples})
                    page.write()
                if options.patience is not None and state.since_best >= options.patience:
                    page.note(f"stopped after step {state.step}: {state.since_best} evaluations without a lower loss")
                    break
                if state.step >= total:
                    break

                # One optimizer step.
                started = time.monotonic()
                what = f"step {state.step + 1}"
                items = next(sampler.forever())
                loss, tokens, trained = oom_retry.run(partial(self._learn, rows, items, state.scale), what)
                weights.check(loss)
                rate = learning_rate(
                    state.step, total, peak=options.lr, warmup=options.warmup, scheduler=options.scheduler
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_ratio", 1.0)
                norm = math.nan
                if math.isfinite(loss):
                    oom_retry.run_once(optimizer.step, what)  # clips; does nothing if the gradient is not finite
                    norm = optimizer.grad_norm or 0.0
                if not state.scale.is_lowered(loss, norm, page.note):
                    self._count_skipped(state, loss, norm, page)
                optimizer.zero_grad()

                # Report.
                oom_retry.report_paging(what)
                seconds = time.monotonic() - started
                speeds.append(tokens / seconds)
                state.step, state.tokens, state.data = state.step + 1, state.tokens + tokens, sampler.state_dict()
                record: Record = {"step": state.step, "loss": loss, "lr": rate, "grad_norm": norm}
                record |= {"tokens": tokens, "trained_tokens": trained}
                record |= {"seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}
                metrics.write(record)
                progress.step(record)
                if self.on_step is not None:
                    self.on_step(record)

                # Save; after Ctrl-C, save and stop.
                stopping = ranks.any(stop.requested)
                if stopping or (options.save_every and is_due(state.step, options.save_every, total)):
                    saved = save_checkpoint(
                        self.output_dir,
                        state.step,
                        save_adapter=self._write_adapter,
                        optimizer=optimizer,
                        state=asdict(state),
                        config=config.to_yaml(),
                        keep=options.keep,
                        ranks=ranks,
                    )
                    if stopping:
                        raise Interrupted(
                            f"stopped after step {state.step}; {saved} is saved, --resume continues from it",
                            stop.number,
                        )
            memory_line = None if memory is None else memory.line()  # before the plot of the losses takes memory
            retention = None
            if shipping is not None and held_out:
                losses = partial(self._losses, held_out)
                retention = oom_retry.run(partial(shipping.retention, losses, ranks), "evaluation of what ships")
                if retention is not None:
                    page.note(in_words(retention))
            page.close()
            summary = self._finish(state, retention, oom_retry, weights, progress, speeds, time.monotonic() - began)
            if memory_line is not None:
                progress.note(memory_line)
            return summary

    def _learn(self, rows: TokenizedDataset, items: Items, scale: LossScale) -> tuple[float, int, int]:
        """Forward and backward passes of one step: its loss, its tokens, and how many of them are trained."""
        ranks = self.ranks
        batches = list(self._micro_batches(rows, items))
        trained = int(ranks.sum(sum(count for _, count in batches))[0])
        self.passes.begin()
        for batch, count in batches:
            self.passes.run(batch, scale.value * count / trained, ranks.averaged_over)
        self.passes.end()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        ranks.add_gradients(parameters)
        scale.unscale(parameters)
        tokens = int(sum(rows.lengths[item].sum() for item in items))
        return ranks.sum(self.passes.loss.item() / scale.value)[0], tokens, trained

    @torch.no_grad()
    def evaluate(self, rows: TokenizedDataset) -> float:
        """Mean loss in nats over every trained token of ``rows``, with dropout off; draws no random number."""
        parts = self._losses(rows)
        total, trained = self.ranks.sum(sum(nats for nats, _ in parts), sum(count for _, count in parts))
        return total / trained

    @torch.no_grad()
    def _losses(self, rows: TokenizedDataset) -> list[tuple[float, int]]:
        """Nats and trained tokens of each of this rank's micro-batches of ``rows``."""
        data = self.config.data
        items: Items = evaluation_order(rows.lengths, data.max_length if data.packing else None)
        self.model.eval()
        try:
            return [
                (causal_lm_loss(self.model, batch).item() * count, count)
                for batch, count in self._micro_batches(rows, items)
            ]
        finally:
            self.model.train()

    def _micro_batches(self, rows: TokenizedDataset, items: Items) -> Iterator[tuple[Batch, int]]:
        """This rank's micro-batches, each with its number of trained tokens: 0 for a filler."""
        size, pad_id = self.config.train.batch_size, padding_id(self.tokenizer)
        for batch in micro_batches(rows, self.ranks.mine(items), size, pad_id, self.model.device):
            yield batch, trained_tokens(batch)
        for filler in self.ranks.filler(items, size):
            for batch in micro_batches(rows, filler, size, pad_id, self.model.device):
                yield batch, 0

    def _record_evaluation(self, state: TrainState, loss: float, metrics: Metrics) -> None:
        """Record a held-out loss, and save the adapter to ``best/`` if no earlier one was as good."""
        record: Record = {"step": state.step, "eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        metrics.write({**record, "samples": state.samples} if state.samples else record)
        state.loss_after, state.since_best = loss, state.since_best + 1 if state.step else 0
        if state.step == 0:
            state.loss_before = state.best_loss = loss
        elif state.best_loss is None or loss < state.best_loss:
            self._save_adapter(self.output_dir / "best", state)
            state.best_loss, state.best_step, state.since_best = loss, state.step, 0

    def _count_skipped(self, state: TrainState, loss: float, norm: float, page: RunPage) -> None:
        """Count a step that was skipped because its loss or gradient norm is not finite; UserError after many."""
        if math.isfinite(loss) and math.isfinite(norm):
            state.skipped_in_a_row = 0
            return
        state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
        what = f"step {state.step + 1}: loss {loss}, gradient norm {norm}"
        if state.skipped_in_a_row >= MAX_SKIPPED:
            options = self.config.train
            advice = f"lower train.lr (now {options.lr:g}) or train.clip (now {options.clip:g})"
            if options.dtype != "float32":
                advice += ", or set train.dtype to float32"
            advice += "; if no value helps, look at the rows with `qlora data check`"
            raise UserError(f"{what}: not finite {MAX_SKIPPED} times in a row, so training stopped; {advice}")
        page.note(f"{what}: not finite, step skipped")

    def _write_adapter(self, folder: Path) -> None:
        save_adapter(self.model, folder, write=self.ranks.is_first)  # every rank takes part in gathering it
        if self.ranks.is_first and self.base:
            from qlora_native.hf.trained import write_record

            write_record(folder, self.base)

    def _save_adapter(self, folder: Path, state: TrainState, retention: dict[str, Any] | None = None) -> Path:
        with self.ranks.together():
            if not self.ranks.is_first:
                self._write_adapter(folder)
            else:
                from qlora_native.train.card import write_card

                with as_write_error(folder), atomic_folder(folder) as partial:
                    self._write_adapter(partial)
                    (partial / CONFIG).write_text(self.resolved.to_yaml(), encoding="utf-8")
                    if self.resolved.lora.trainable_tokens:
                        self.tokenizer.save_pretrained(partial)
                    if self.resolved.data.chat_template is not None:  # where transformers looks for it
                        (partial / TEMPLATE).write_text(self.tokenizer.chat_template, encoding="utf-8")
                    write_card(partial, self.resolved, {**asdict(state), "retention": retention}, self.hashes)
        return folder

    def _finish(
        self,
        state: TrainState,
        retention: dict[str, Any] | None,
        oom_retry: OOMRetry,
        weights: MappedWeights,
        progress: Progress,
        speeds: list[float],
        seconds: float,
    ) -> TrainSummary:
        progress.close()  # the summary is printed below the bar
        paging = oom_retry.optimizer.paging_statistics()
        adapter_dir = self._save_adapter(self.output_dir / "adapter", state, retention)
        shipped_dir = None
        if self.shipping is not None:
            shipped_dir = self.output_dir / self.shipping.name
            with self.ranks.together():
                if self.ranks.is_first:
                    self.shipping.write(shipped_dir, self.tokenizer)
        if self.ranks.is_first:
            plot_losses(self.output_dir)
        alike = ("tokens", "loss_before", "loss_after", "best_loss", "best_step")
        summary = TrainSummary(
            steps=state.step,
            skipped_steps=state.skipped,
            tokens_per_second=median(speeds) if speeds else 0.0,
            seconds=seconds,
            paged_bytes=paging["bytes_in"] + paging["bytes_out"],
            paging_seconds=paging["stall_seconds"] + oom_retry.lost_seconds,
            retried=oom_retry.retries,
            peak_rss_bytes=peak_rss_bytes(),
            adapter_dir=adapter_dir,
            best_dir=self.output_dir / "best" if state.best_step and state.best_loss is not None else None,
            weight_bytes_read=0 if weights.stream is None else weights.stream.bytes_read,
            weight_stall_seconds=0.0 if weights.stream is None else weights.stream.stall_seconds,
            shipped_dir=shipped_dir,
            retention=retention,
            **{name: getattr(state, name) for name in alike},
        )
        progress.note(describe(summary))
        return summary


def describe(summary: TrainSummary) -> str:
    speed = f"{summary.tokens_per_second:,.0f} tokens/s (median), " if summary.tokens_per_second else ""
    lines = [
        f"{summary.steps} steps, {summary.tokens:,} tokens, {speed}"
        f"peak memory {summary.peak_rss_bytes / 2**20:,.0f} MiB"
    ]
    if summary.loss_before is not None and summary.loss_after is not None:
        lines.append(f"held-out loss {summary.loss_before:.4f} -> {summary.loss_after:.4f}")
    if summary.paged_bytes or summary.retried:
        lines.append(
            f"paging moved {summary.paged_bytes / 2**20:,.0f} MiB of optimizer states; "
            f"{summary.retried} {'step' if summary.retried == 1 else 'steps'} began again; "
            f"it cost {summary.paging_seconds:.1f} s"
        )
    if summary.weight_bytes_read:
        lines.append(
            f"read {summary.weight_bytes_read / 2**20:,.0f} MiB of frozen weights that did not fit in memory, and "
            f"waited {summary.weight_stall_seconds:.1f} s for them"
        )
    if summary.skipped_steps:
        lines.append(f"{summary.skipped_steps} steps were skipped: their loss or gradient was not finite")
    lines.append(f"adapter: {summary.adapter_dir}")
    if summary.shipped_dir is not None:
        lines.append(f"the 4-bit model of this loss: {summary.shipped_dir}")
    if summary.best_dir is not None and summary.best_step != summary.steps:
        lines.append(f"lowest held-out loss {summary.best_loss:.4f} at step {summary.best_step}: {summary.best_dir}")
    return "\n".join(lines)


def is_due(step: int, every: int, total: int) -> bool:
    """Whether ``step`` is the start, the end, or a multiple of ``every`` (0: never in between)."""
    return step == 0 or step >= total or (every > 0 and step % every == 0)
