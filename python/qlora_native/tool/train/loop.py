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
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any

from qlora_native._io import as_write_error, locked, recover, user_path
from qlora_native._memory import peak_rss_bytes, without_old_objects
from qlora_native.data.dataset import TokenizedDataset
from qlora_native.distributed import OneProcess, joined
from qlora_native.errors import UserError
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.checkpoint import Interrupted, StopRequest, stop_request
from qlora_native.tool.train.passes import Learner
from qlora_native.tool.train.prepare import Run, prepare
from qlora_native.tool.train.progress import Observer, Record, TrainSummary, describe, plot_losses
from qlora_native.tool.train.setup import learning_rate

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
            run = prepare(
                self.config, self.ranks, self.model, self.tokenizer, self.on_step, quiet=self.quiet
            )
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


def loop(run: Run, stop: StopRequest) -> None:
    """Steps, evaluations and checkpoints until the last step, or as long as evaluations find lower losses.

    Interrupted after a signal, when a checkpoint is saved.
    """
    options, state = run.config.train, run.state
    while True:
        if is_due(state.step, options.eval_every, run.total):
            evaluate(run)
        if options.patience is not None and state.since_best >= options.patience:
            run.note(
                f"stopped after step {state.step}: {state.since_best} evaluations without a lower loss"
            )
            return
        if state.step >= run.total:
            return
        record = take_step(run)
        for observer in run.observers:
            observer.stepped(record)
        state.step = record["step"]
        state.tokens += record["tokens"]
        state.data = run.sampler.state_dict()
        # A signal may reach one process alone; all stop after the same step.
        is_last = run.ranks.any(stop.requested)
        if is_last or (options.save_every and is_due(state.step, options.save_every, run.total)):
            folder = run.save()
            if is_last:
                message = (
                    f"stopped after step {state.step}; {folder} is saved, --resume continues from it"
                )
                raise Interrupted(message, stop.number)


def evaluate(run: Run) -> None:
    """The held-out loss, if rows are held out; the adapter goes to ``best/`` if no earlier one was as good."""
    state, is_best = run.state, False
    record: Record = {"step": state.step}
    for observer in run.observers:
        run.retry.run(partial(observer.evaluating, state), observer.work.format(state.step))
    if run.held_out:
        measure = partial(run.learner.evaluate, run.held_out)
        loss = run.retry.run(measure, Observer.work.format(state.step))
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
    items = next(run.sampler)  # of this epoch; behind its last batch, the first one of the next
    learn = partial(run.learner.learn, run.rows, items, state.scale)
    loss, tokens, trained = run.retry.run(learn, what)
    for observer in run.observers:
        observer.computed(loss)
    rate = learning_rate(
        state.step, run.total, peak=options.lr, warmup=options.warmup, scheduler=options.scheduler
    )
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
    norm = math.nan
    # Of an infinite loss the gradient is not finite; the step would find that out at the cost of reading it.
    if math.isfinite(loss):
        run.retry.run_once(optimizer.step, what)  # clips; does nothing if the gradient is not finite
        norm = optimizer.grad_norm or 0.0
    count_skipped(run, loss, norm)
    optimizer.zero_grad()  # now: an evaluation may need their memory
    seconds = time.monotonic() - began
    record = {
        "step": step,
        "loss": loss,
        "lr": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "trained_tokens": trained,
    }
    return record | {"seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1)}


def count_skipped(run: Run, loss: float, norm: float) -> None:
    """Note a step that changed nothing since its loss or its gradient's norm is not finite; UserError after many."""
    state, options = run.state, run.config.train
    if state.scale.update(loss, norm):
        scale = f"{state.scale.value:g}"
        run.note(
            f"the gradient overflows in float16, step skipped; from here on the loss is scaled by {scale}"
        )
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
        raise UserError(
            f"{what}: not finite {MAX_SKIPPED} times in a row, so training stopped; {advice}"
        )
    run.note(f"{what}: not finite, step skipped")


def is_due(step: int, every: int, total: int) -> bool:
    """Whether ``step`` is the start, the end, or a multiple of ``every`` (0: never in between)."""
    return step == 0 or step >= total or (every > 0 and step % every == 0)


def finish(run: Run) -> TrainSummary:
    """Save the adapter as it is, and print the summary below what the steps printed."""
    state, output_dir, shipping, retention = run.state, run.output_dir, run.shipping, None
    # This is read before the plot of the losses takes memory.
    memory_line = None if run.memory is None else run.memory.line()
    if shipping is not None and run.held_out:
        measure = partial(shipping.retention, partial(run.learner.losses, run.held_out), run.ranks)
        retention = run.retry.run(measure, "evaluation of what ships")
        if retention is not None:
            from qlora_native.tool.evaluate import retention as shipped

            run.note(shipped.describe(retention))
    if run.ranks.is_first:
        run.report.close()
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
        **{
            name: getattr(state, name)
            for name in ("tokens", "loss_before", "loss_after", "best_loss", "best_step")
        },
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
