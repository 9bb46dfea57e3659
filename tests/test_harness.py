"""lm-eval: its arguments, recorded by a stub; its own figures against ours, where it is installed."""

from __future__ import annotations

import json
import sys
import types
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_native.errors import UserError
from qlora_native.tool.cli import main
from qlora_native.tool.evaluate.harness import run_tasks

ROWS = (("what is red?", 0), ("what is blue?", 1), ("what is green?", 2), ("say, what is red and good?", 0))
CHOICES = ("blood", "sky", "grass")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each call of the stub."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(model: Any, tasks: Any = None, limit: Any = None, task_manager: Any = None) -> dict[str, Any]:
        calls.append({"model": model, "tasks": tasks, "limit": limit, "manager": task_manager})
        return {"results": {task: {"alias": task, "acc,none": 0.25, "acc_stderr,none": "N/A"} for task in tasks}}

    class HFLM:
        def __init__(self, pretrained: Any, backend: str = "default", tokenizer: Any = None, batch_size: int = 1):
            self.pretrained, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    class TaskManager:
        def match_tasks(self, tasks: list[str]) -> list[str]:
            return [task for task in tasks if task == "colors"]

    # lm-eval's names, as far as they are used, with its signatures
    for name, attribute in (
        ("lm_eval", simple_evaluate),
        ("lm_eval.models", None),
        ("lm_eval.models.huggingface", HFLM),
        ("lm_eval.tasks", TaskManager),
    ):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        if attribute is not None:
            setattr(module, attribute.__name__, attribute)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("harness") / "model", num_hidden_layers=1)


def test_each_variant_is_wrapped_in_lm_evals_own_class(
    calls: list[dict[str, Any]], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("task: mine\n")
    words = ["eval", str(model), "--lm-eval", "colors", str(task), "--rows", "7", "--report", str(tmp_path / "r")]
    assert main.main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [side["name"] for side in printed["sides"]] == ["16-bit", "rtn"]
    assert all(side["tasks"]["colors"] == {"acc,none": 0.25} for side in printed["sides"])  # only numbers are kept
    assert "colors" in (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    for call, kind in zip(calls, ("Linear", "QuantizedLinear"), strict=True):
        assert (call["tasks"], call["limit"]) == (["colors", str(task)], 7) and call["manager"] is not None
        wrapped = call["model"]
        assert type(wrapped.pretrained.model.layers[0].mlp.up_proj).__name__ == kind and wrapped.batch_size == 1
        assert not wrapped.pretrained.training and wrapped.tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("task", "match"), [("colorz", "colorz is not there"), ("gone.yaml", "gone.yaml is not there")]
)
def test_an_unknown_task(
    calls: list[dict[str, Any]], model: Path, task: str, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["eval", str(model), "--lm-eval", task]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qlora")]
    assert len(lines) == 1 and match in lines[0] and not calls


def test_lm_eval_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        run_tasks(None, None, ["arc_easy"])


@torch.no_grad()
def test_lm_eval_itself_counts_as_we_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task of local rows: its accuracy is that of log-likelihoods taken here."""
    pytest.importorskip("lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    rows = [{"question": question, "choices": CHOICES, "answer": answer} for question, answer in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "colors.yaml").write_text(
        f"""task: colors_of_ours
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path}/rows.jsonl}}, cache_dir: {tmp_path}/cache}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
        encoding="utf-8",
    )
    assert main.main(["eval", str(model), "--lm-eval", str(tmp_path / "colors.yaml"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = printed["sides"][0]["tasks"]["colors_of_ours"]["acc,none"]

    tokenizer, dense = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)

    def likelihood(question: str, choice: str) -> float:
        ids, before = (
            torch.tensor(tokenizer(f"{question} {choice}")["input_ids"]),
            len(tokenizer(question)["input_ids"]),
        )
        logs = dense(ids[None]).logits[0].float().log_softmax(-1)
        return float(logs[before - 1 : -1].gather(1, ids[before:, None]).sum())

    best = [max(CHOICES, key=partial(likelihood, question)) for question, _ in ROWS]
    assert found == sum(CHOICES.index(one) == answer for one, (_, answer) in zip(best, ROWS, strict=True)) / len(ROWS)
