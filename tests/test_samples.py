"""Answers at each evaluation, and early stopping by the held-out loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Crash, crash_at
from sentences import Check
from test_page import config

from qlora_native.data.dataset import load_dataset
from qlora_native.errors import UserError
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.evaluate.answers import LONGEST
from qlora_native.tool.train.loop import Trainer
from qlora_native.tool.train.passes import Learner
from qlora_native.tool.train.progress import read_metrics
from qlora_native.tool.train.samples import Samples
from qlora_native.weights.open import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_files(tmp_path_factory.mktemp("samples"))


def answers(out: Path) -> dict[int, list[dict[str, str]]]:
    return {line["step"]: line["samples"] for line in read_metrics(out / "metrics.jsonl") if "samples" in line}


def train(config: TrainConfig, **options: Any) -> Any:
    trainer = Trainer(config, quiet=True, **options)
    trainer.train()
    return trainer.model


def adapter(folder: Path, out: str) -> bytes:
    return (folder / out / "adapter" / "adapter_model.safetensors").read_bytes()


def generated(model: Any, tokenizer: Any, ids: Any) -> str:
    """As transformers' ``generate`` does it."""
    model.eval()
    prompt = torch.tensor(ids)[None]
    ends = [tokenizer.eos_token_id, model.config.eos_token_id]
    options = {"do_sample": False, "max_new_tokens": LONGEST, "eos_token_id": ends}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return str(tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize(
    "asked", [3, pytest.param(["what is red?", "what is gold?"], marks=pytest.mark.long)], ids=["rows", "prompts"]
)
def test_answers_are_greedy_and_train_nothing(files: Path, asked: Any) -> None:
    out = f"asked {type(asked).__name__}"
    model = train(config(files, out, samples=asked, steps=40, eval_every=20))
    train(config(files, f"{out}, not", samples=0, steps=40, eval_every=20))
    assert adapter(files, out) == adapter(files, f"{out}, not")
    found, tokenizer = answers(files / out), load_tokenizer(files / "model")
    assert [*found] == [0, 20, 40]
    rows = load_dataset(files / "train.jsonl", tokenizer).split(4, seed=0)[1]
    for number, sample in enumerate(found[40]):
        if isinstance(asked, int):
            ids, labels = rows[number]["input_ids"].tolist(), rows[number]["labels"].tolist()
            start = next(at for at, label in enumerate(labels) if label >= 0)
            assert sample["expected"] == tokenizer.decode(ids[start:-1])  # without the end
            assert sample["prompt"] == tokenizer.decode(ids[:start], skip_special_tokens=True)
            ids = ids[:start]
        else:
            messages = [{"role": "user", "content": asked[number]}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert sample["answer"] == generated(model, tokenizer, ids)
    assert any(sample["answer"] != sample["before"] for sample in found[40])
    assert [sample["before"] for sample in found[40]] == [sample["answer"] for sample in found[0]]


def test_a_resumed_run_keeps_its_first_answers_and_the_card_has_both(files: Path) -> None:
    train(config(files, "whole"))
    with pytest.raises(Crash):
        train(config(files, "resumed"), on_step=crash_at(7))
    train(config(files, "resumed").model_copy(update={"resume": "auto"}))
    assert answers(files / "resumed") == answers(files / "whole")
    card = (files / "resumed" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert json.loads(card.partition("```json\n")[2].partition("\n```")[0]) == answers(files / "whole")[12]


def test_prompts_need_no_held_out_rows_and_plain_text_no_template(files: Path) -> None:
    (files / "text.jsonl").write_text('{"text": "what is red? apple"}\n' * 8)
    values = config(files, "plain", samples=["what is"], steps=2).model_dump()
    values["data"] |= {"train": str(files / "text.jsonl"), "eval_fraction": 0}
    model = train(TrainConfig.model_validate(values))
    found, tokenizer = answers(files / "plain"), load_tokenizer(files / "model")
    assert [*found] == [0, 2]
    assert found[2][0]["answer"] == generated(model, tokenizer, tokenizer("what is")["input_ids"]) != ""
    # A row that is trained as a whole: the second half is to be continued.
    rows = load_dataset(files / "text.jsonl", tokenizer)
    (_, sample), *_ = Samples(1, model, tokenizer, rows, rows, False)._prompts
    assert sample["prompt"] and (sample["prompt"] + sample["expected"]).replace(" ", "") == "whatisred?apple"


def test_as_many_passes_on_each_process_of_a_sharded_model(files: Path) -> None:
    """Whatever the answers are: the one that ends early is cut, not the passes."""
    model = train(config(files, "sharded", steps=40, samples=0))
    tokenizer = load_tokenizer(files / "model")
    rows = load_dataset(files / "train.jsonl", tokenizer)
    found, passes = list[Any](), list[int]()
    model.register_forward_hook(lambda *_: passes.append(len(found)))
    for is_sharded in (False, True):
        found.append(Samples(["what is red?"], model, tokenizer, rows, None, is_sharded).answers([]))
    assert found[0] == found[1] and passes.count(0) < passes.count(1) == LONGEST


def test_patience(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The lowest is at 4; the run crashes after step 9, resumes at 8, and ends at the third without a lower one."""
    losses = {0: 5.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 3.0, 10: 3.1}
    options: dict[str, Any] = {"patience": 3, "samples": 0}
    step = [0]

    def on_step(record: dict[str, Any]) -> None:
        step[0] = record["step"]
        if step[0] == 9 and not crashed:
            crashed.append(True)
            raise Crash

    crashed: list[bool] = []
    monkeypatch.setattr(Learner, "evaluate", lambda self, rows: losses[step[0]])
    with pytest.raises(Crash):
        Trainer(config(files, "patient", **options), quiet=True, on_step=on_step).train()
    step[0] = 8
    resumed = config(files, "patient", **options).model_copy(update={"resume": "auto"})
    summary = Trainer(resumed, on_step=on_step).train()
    assert (summary.steps, summary.best_step, summary.loss_after) == (10, 4, 3.1)
    assert "stopped after step 10" in capsys.readouterr().out
    facts = json.loads((files / "patient" / "report.json").read_text())
    assert facts["has_ended"] and facts["notes"][-1]["step"] == 10


def test_mistakes(files: Path, sentence: Check, tmp_path: Path) -> None:
    for key in ("samples", "patience"):
        values = config(files, "wrong", **{"samples": 0, key: 2}).model_dump()
        values["data"]["eval_fraction"] = 0
        with pytest.raises(UserError) as refused:
            train(TrainConfig.model_validate(values))
        sentence(refused.value)
    values = config(files, "wrong", samples=0, patience=2).model_dump()
    values["lora"]["ship"] = "nf4"
    with pytest.raises(UserError) as refused:
        TrainConfig.from_values(values)
    sentence(refused.value)
    for words in (["--samples", "-1"], ["--samples", "[1, x"], ["--patience", "0"]):
        with pytest.raises(UserError) as refused:
            TrainConfig.from_values(config(files, "wrong").model_dump(), words)
        sentence(refused.value)
