"""The loop: it learns, rows may be divided into micro-batches at will, it evaluates, reports and refuses what is not
finite."""

from __future__ import annotations

import inspect
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import ANY, patch

import pytest
import tiny
import tokens
import torch
from helpers import relative_error
from runs import events, settings
from safetensors.torch import load_file

from qlora_native.data.dataset import load_dataset
from qlora_native.errors import UserError
from qlora_native.lora import LoraConfig, add_lora
from qlora_native.models.fuse import fuse
from qlora_native.models.load import load_model
from qlora_native.optim import AdamW, Lion
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.sections import LoopSection
from qlora_native.tool.train import loop, passes, prepare, setup
from qlora_native.tool.train.checkpoint import LARGEST_SCALE, LossScale
from qlora_native.tool.train.loop import Trainer, TrainSummary
from qlora_native.tool.train.passes import Learner
from qlora_native.tool.train.progress import Observer, Recorder
from qlora_native.tool.train.samples import Samples
from qlora_native.tool.train.setup import learning_rate, make_optimizer
from qlora_native.tool.train.shipping import Shipping
from qlora_native.weights.open import SafetensorsSource, load_tokenizer

Record = dict[str, Any]
Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("files") / "model")


pytestmark = pytest.mark.usefixtures("one_thread")  # a second one costs more than it brings on matrices this small


@pytest.fixture
def make(model_folder: Path, tmp_path: Path) -> Make:
    def config(name: str = "run", *, rows: int = 24, eval_fraction: float = 0.0, **options: Any) -> TrainConfig:
        """With as many rows, all of which are held out too where ``eval_fraction`` is 1."""
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        train = str(tiny.write_rows(folder / "train.jsonl", rows))
        data = {"train": train, **({"eval": train} if eval_fraction == 1 else {"eval_fraction": eval_fraction})}
        lora = {"r": 8, "alpha": 16, "dropout": options.pop("dropout", 0.0), "init": options.pop("init", "zero")}
        options = {"steps": 4, "batch_size": 4, "grad_accum": 2, "lr": 5e-3, **options}
        return TrainConfig.model_validate(settings(model_folder.parent, folder / "out", data, lora, **options))

    return config


def run(config: TrainConfig, **options: Any) -> tuple[TrainSummary, list[Record], dict[str, torch.Tensor]]:
    records: list[Record] = []
    summary = Trainer(config, quiet=True, on_step=records.append, **options).train()
    return summary, records, load_file(summary.adapter_dir / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def read_lines(config: TrainConfig) -> list[Record]:
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def test_the_time_left_counts_steps_and_evaluations_each_by_its_own(make: Make, monkeypatch: Any, capsys: Any) -> None:
    clock = [0.0]

    def takes(seconds: float, result: Any) -> Any:
        clock[0] += seconds
        return result

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Learner, "evaluate", lambda learner, rows: takes(300, 1.0))
    monkeypatch.setattr(Learner, "learn", lambda learner, rows, items, scale: takes(2, (1.0, 64, 64)))
    for every, left in ((0, ["5:06", "5:04", "5:02", "5:00"]), (3, ["10:06", "10:04", "10:02", "5:00"])):
        config = make(eval_fraction=0.25, eval_every=every, log_every=1)
        Trainer(config).train()
        printed = capsys.readouterr().out
        assert re.findall(r"([\d:]+) left(?:, for the last evaluation)?$", printed, re.MULTILINE) == left
        assert re.findall(r"([\d:]+) left,", printed) == ["5:00"]


def test_learns_a_small_set_by_heart(make: Make) -> None:
    config = make(rows=12, eval_fraction=1, steps=60, batch_size=12, grad_accum=1, lr=1e-2)
    summary, records, _ = run(config)
    assert summary.loss_before is not None and summary.loss_after is not None
    assert summary.loss_before > 3.0 and summary.loss_after < 0.2
    # Before the first update, on the same rows.
    assert records[0]["loss"] == pytest.approx(summary.loss_before, rel=1e-3)
    assert summary.steps == 60 and len(records) == 60
    assert summary.tokens_per_second > 0 and summary.peak_rss_bytes > 2**27


@pytest.mark.parametrize(("batch_size", "grad_accum"), [(1, 8), (2, 4), (3, 3)])
def test_accumulation_equals_one_big_batch(make: Make, batch_size: int, grad_accum: int) -> None:
    """Rows differ in their number of trained tokens, so equal weights for the micro-batches would show."""
    rows = batch_size * grad_accum
    options: dict[str, Any] = {"rows": 3 * rows, "steps": 3, "dtype": "float32"}
    (_, big, adapter_big), (_, small, adapter_small) = (
        run(make(str(size), batch_size=size, grad_accum=accum, **options))
        for size, accum in ((rows, 1), (batch_size, grad_accum))
    )
    for one, other in zip(big, small, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert (other["tokens"], other["trained_tokens"]) == (one["tokens"], one["trained_tokens"])
    for key, tensor in adapter_big.items():
        assert relative_error(adapter_small[key], tensor) < 1e-3, key


def test_checkpointing_changes_memory_only(make: Make) -> None:
    losses = []
    for on in (False, True):
        config = make(str(on), grad_checkpointing=on, dropout=0.2)
        trainer = Trainer(config, quiet=True)
        trainer.train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()) is on
        losses.append([line["loss"] for line in read_lines(config)])
    assert losses[0] == losses[1]


def test_what_a_run_leaves_behind(make: Make) -> None:
    config = make(eval_fraction=0.25, steps=6, eval_every=2, save_every=3, keep=1)
    before = config.model_copy(deep=True)
    summary, records, _ = run(config)
    assert config == before, "a run changes no key of its config"
    out = Path(config.output_dir)
    lines = read_lines(config)
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(evaluations) == [0, 2, 4, 6]
    assert [line for line in lines if "loss" in line] == records
    assert [line["step"] for line in records] == [1, 2, 3, 4, 5, 6]
    assert (summary.loss_before, summary.loss_after) == (evaluations[0], evaluations[6])
    assert summary.best_loss == min(evaluations.values())
    assert summary.best_dir == out / "best" and (out / "best" / "adapter_model.safetensors").is_file()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.iterdir() if path.name.startswith("step-")] == ["step-000006"]
    assert config.quant.type == "auto"
    resolved = config.model_copy(update={"quant": config.quant.model_copy(update={"type": "nf4"})})
    assert TrainConfig.from_file(out / "adapter" / "config.yaml") == resolved


def test_best_is_the_adapter_of_the_lowest_held_out_loss(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([5.0, 3.0, 2.0, 4.0])
    monkeypatch.setattr(Learner, "evaluate", lambda self, rows: next(losses))
    config = make(eval_fraction=0.25, steps=6, eval_every=2, save_every=2, keep=9)
    summary, _, last = run(config)
    assert (summary.best_loss, summary.best_step) == (2.0, 4)
    assert summary.best_dir is not None
    best = load_file(summary.best_dir / "adapter_model.safetensors")
    at_four = load_file(Path(config.output_dir) / "step-000004" / "adapter_model.safetensors")
    assert same(best, at_four) and not same(best, last)


def test_evaluation_weights_every_token_alike(make: Make) -> None:
    """Against the mean over single rows, weighted by hand."""
    config = make(batch_size=5)
    trainer = Trainer(config, quiet=True)
    trainer.train()
    rows = load_dataset(config.data.train, load_tokenizer(config.model))
    total, count = 0.0, 0
    trainer.model.eval()
    for row in rows:
        ids, labels = (torch.from_numpy(row[key].astype("int64"))[None] for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = trainer.model(input_ids=ids).logits[0, :-1].float()
        picked = labels[0, 1:] != -100
        losses = torch.nn.functional.cross_entropy(logits[picked], labels[0, 1:][picked], reduction="sum")
        total, count = total + losses.item(), count + int(picked.sum())
    assert trainer.evaluate(rows) == pytest.approx(total / count, rel=5e-3)  # bf16 activations
    assert trainer.model.training


def test_epochs_become_steps(make: Make) -> None:
    config = make(rows=20, steps=None, epochs=1.5)
    summary, records, _ = run(config)
    assert summary.steps == math.ceil(1.5 * math.ceil(20 / 8)) == 5
    rows = load_dataset(config.data.train, load_tokenizer(config.model))
    assert sum(record["tokens"] for record in records[:3]) == sum(len(row["input_ids"]) for row in rows)


def test_a_step_that_is_not_finite_is_skipped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned = {3}  # calls of the loss, from 1; with two micro-batches a step this is the first of step 2
    plain, calls = passes.causal_lm_loss, [0]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        calls[0] += 1
        return plain(model, batch) * (float("nan") if calls[0] in poisoned else 1.0)

    monkeypatch.setattr(passes, "causal_lm_loss", loss)
    config = make(steps=3, save_every=1, keep=9)
    summary, records, _ = run(config)
    assert summary.skipped_steps == 1
    assert math.isnan(records[1]["loss"]) and math.isfinite(records[2]["loss"])
    folders = (Path(config.output_dir) / f"step-00000{n}" for n in (1, 2, 3))
    one, two, three = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert same(one, two) and not same(two, three)
    assert read_lines(config)[1]["loss"] is None  # JSON has no NaN
    (event,) = [event for event in events(Path(config.output_dir)) if "skipped" in event[1]]
    assert event[0] == 1 and event[1].startswith("step 2: loss nan, ")


def test_many_steps_that_are_not_finite_stop_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = passes.causal_lm_loss
    monkeypatch.setattr(passes, "causal_lm_loss", lambda model, batch: plain(model, batch) * float("inf"))
    with pytest.raises(UserError, match=r"not finite 5 times .*lower train.lr \(now 0.005\).*data check"):
        run(make(steps=20))


def test_float16_learns_as_float32_does_with_a_scaled_loss(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are those of fp32; a scale under which gradients overflow is halved until they do not."""
    losses: dict[str, list[float]] = {}
    for dtype in ("float32", "float16"):
        records: list[Record] = []
        Trainer(make(dtype, steps=6, dtype=dtype), on_step=records.append, quiet=True).train()
        losses[dtype] = [record["loss"] for record in records]
        assert all(math.isfinite(record["grad_norm"]) for record in records)
    got = losses["float16"]
    assert got == pytest.approx(losses["float32"], rel=2e-2) and got[-1] < got[0]

    monkeypatch.setattr(prepare, "LARGEST_SCALE", 2.0**24)
    config = make("large", steps=16, dtype="float16", save_every=16)
    assert Trainer(config, quiet=True).train().skipped_steps == 0
    state = json.loads(Path(config.output_dir, "step-000016", "trainer.json").read_text())
    lowered = [text for _, text in events(Path(config.output_dir)) if "overflows in float16" in text]
    assert lowered and state["scale"]["value"] == 2.0 ** (24 - len(lowered))


def test_without_the_scale_gradients_are_lost_in_float16() -> None:
    for scale, expected in ((1.0, 0.0), (LARGEST_SCALE, 1e-9)):
        parameter = torch.nn.Parameter(torch.ones(1))
        (parameter.half() * (1e-9 * scale)).float().sum().backward()
        LossScale(scale).unscale([parameter])
        assert parameter.grad is not None and float(parameter.grad) == pytest.approx(expected, rel=2e-2)


def test_clip_bounds_the_update(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    plain = AdamW._step_natively

    def step(self: Any, rows: Any, grad_factor: float) -> None:
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for g in self.param_groups for p in g["params"]))
        seen.append(norm * grad_factor)
        plain(self, rows, grad_factor)

    monkeypatch.setattr(AdamW, "_step_natively", step)
    for name, clip in (("clipped", 0.01), ("free", 0.0)):
        _, records, _ = run(make(name, steps=2, clip=clip))
        norms = [record["grad_norm"] for record in records]
        assert min(norms) > 0.02
        assert seen == pytest.approx([0.01, 0.01] if clip else norms, rel=1e-3)
        seen.clear()


def test_the_rate_reaches_the_optimizer(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    plain = AdamW.step

    def step(self: Any, closure: Any = None) -> Any:
        rates.extend(group["lr"] for group in self.param_groups)
        return plain(self, closure)

    monkeypatch.setattr(AdamW, "step", step)
    run(make(steps=4, lr=1e-3, warmup=2, scheduler="linear"))
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


@pytest.mark.parametrize(
    ("name", "kind", "state_dtype"),
    [("adamw", AdamW, torch.float32), ("adamw8bit", AdamW, torch.int8), ("lion", Lion, torch.float32)],
)
def test_the_optimizer_is_the_one_named(name: Any, kind: type, state_dtype: torch.dtype, tmp_path: Path) -> None:
    options = LoopSection(optimizer=name, clip=0.0, lr=0.5, betas=(0.1, 0.2), weight_decay=0.3)
    parameter = torch.nn.Parameter(torch.zeros(4096))
    parameter.grad = torch.ones(4096)
    optimizer = make_optimizer(options, [parameter], tmp_path)
    optimizer.step()
    assert type(optimizer) is kind and optimizer.max_norm == math.inf
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.1, 0.2), 0.3)
    assert optimizer.state[parameter]["exp_avg"].dtype == state_dtype


def test_schedules() -> None:
    def curve(scheduler: Any, warmup: float) -> list[float]:
        return [learning_rate(step, 10, peak=1.0, warmup=warmup, scheduler=scheduler) for step in range(11)]

    assert curve("constant", 0.4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1])
    assert curve("linear", 0) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0])
    cosine = curve("cosine", 2)
    assert cosine[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert cosine[6] == pytest.approx(0.5) and cosine[10] == pytest.approx(0.0)
    assert cosine[2:] == sorted(cosine[2:], reverse=True)


def test_a_model_given_is_used_as_it_is(make: Make) -> None:
    """With its adapters: that is how two trainers start from the same tensors."""
    config = make(steps=1)
    model = add_lora(load_model(config.model), LoraConfig(r=2, alpha=2, target_modules=["q_proj"], seed=7))
    _, _, adapter = run(config, model=model)
    assert {key.rsplit(".", 3)[1] for key in adapter} == {"q_proj"}
    assert all(2 in tensor.shape for tensor in adapter.values())


def test_two_runs_with_one_seed_are_equal_and_with_two_are_not(make: Make) -> None:
    runs = {"a": 3, "b": 3, "c": 4}
    first, second, third = (run(make(name, steps=2, seed=seed, dropout=0.3))[2] for name, seed in runs.items())
    assert same(first, second)
    assert not any(torch.equal(first[key], third[key]) for key in first)


def test_a_run_opens_the_model_once(make: Make) -> None:
    trainer = Trainer(make(steps=1, rows=200), quiet=True)
    with patch.object(SafetensorsSource, "__init__", autospec=True, side_effect=SafetensorsSource.__init__) as opened:
        trainer.train()
    opened.assert_called_once_with(ANY, Path(trainer.config.model))
    assert fuse(trainer.model) == {}  # once was enough


def test_one_process_imports_little() -> None:
    """A reader of the training loop has at most 110,500 tokens to read, and of no needless room."""
    code = "import sys, qlora_native.tool.train.loop\n"
    code += (
        "print(*(f'{name}={module.__file__}' for name, module in sys.modules.items() if hasattr(module, '__file__')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = (word.split("=", 1) for word in done.stdout.split() if word.startswith("qlora_native"))
    ours = {name: Path(file) for name, file in found if file.endswith(".py")}
    units = {name.removeprefix("qlora_native.").removeprefix("tool.").split(".")[0] for name in ours}
    assert not units & {"calibration", "cli", "estimate", "export"}
    assert {name for name in ours if ".evaluate." in name} == {"qlora_native.tool.evaluate.page"}
    assert "qlora_native.distributed.ranks" not in ours
    assert sum(tokens.size(file.read_text())[0] for file in ours.values()) <= 110_500


def test_the_loop_is_short_and_knows_no_observer_by_name() -> None:
    source = "".join(inspect.getsource(function) for function in (loop.loop, loop.evaluate, loop.take_step))
    assert len([line for line in source.splitlines() if line.strip()]) <= 80
    kinds: list[type] = [*Observer.__subclasses__(), *Recorder.__subclasses__(), Samples, Shipping]
    assert not {kind.__name__ for kind in kinds} & {*re.findall(r"\w+", source)}
    assert not {"page", "progress", "shipping", "weights", "memory"} & {*re.findall(r"run\.(\w+)", source)}


def test_one_row_cannot_be_split(make: Make) -> None:
    with pytest.raises(UserError, match=r"train.jsonl has 1 usable row.*data.eval_fraction"):
        run(make(rows=1, eval_fraction=0.5))


def test_what_takes_long_is_said(make: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    begun: list[str] = []
    monkeypatch.setattr(setup, "announced", lambda text: begun.append(text) or nullcontext())  # type: ignore[func-returns-value]
    config = make(steps=1)
    run(config)
    assert begun == []  # quiet
    Trainer(config).train()
    assert begun == [f"loading {config.model}"] and "before the first step" not in capsys.readouterr().out


def test_plain_lines_where_there_is_no_terminal(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(eval_fraction=0.25, steps=5, log_every=2)
    Trainer(config).train()
    printed = capsys.readouterr().out
    assert re.findall(r"^step (\S+) .*tokens/s", printed, re.MULTILINE) == ["1/5", "2/5", "4/5", "5/5"]
    assert printed.count("held-out loss") == 3  # before, after, summary
    assert printed.index("before the first step") < printed.index("held-out loss")
    assert "\x1b" not in printed
