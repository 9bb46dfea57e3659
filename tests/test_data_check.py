"""`qlora data check`: each seeded mistake is found by its name and no other, and correct sets have none.

Each mistake is one that people reported of a trainer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from helpers import demo_model_or_skip
from tiny import write_jsonl
from tiny_models import edit_config
from transformers import AutoTokenizer

from qlora_native.data.check import iter_findings
from qlora_native.data.dataset import load_dataset
from qlora_native.tool.cli.main import main

Rows = list[dict[str, Any]]
Prepare = Callable[[Any], None]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


FACTS = [chat(f"what is {color}?", thing) for color, thing in tiny.FACTS]
ASKED = [{"messages": [{"role": "user", "content": f"what is {color}?"}]} for color, _ in tiny.FACTS]
LONG = [f"{color} is {thing}, and always was {thing} to me" for color, thing in tiny.FACTS]
COPIED = [chat(f"repeat: {text}", text) for text in LONG]
TEXTS = [{"text": f"what is {color}? {thing}"} for color, thing in tiny.FACTS]


def template(text: str) -> Prepare:
    def prepare(tokenizer: Any) -> None:
        tokenizer.chat_template = text

    return prepare


def without_end(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("<|end|>", "")


def begins_twice(tokenizer: Any) -> None:
    tokenizer.bos_token = "<|system|>"
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tiny.CHAT_TEMPLATE


NO_TURN = tiny.CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0]
PAIRS = [{"prompt": f"what is {color}? ", "completion": thing} for color, thing in tiny.FACTS]
NO_MISTAKE = "none"
# The name, where people reported it, rows, changes to the tokenizer, limits.
CASES: list[tuple[str, str, Rows, Prepare | None, dict[str, Any]]] = [
    ("no-end-token", "huggingface/trl#1623", FACTS, without_end, {}),
    ("masked-labels", "unslothai/unsloth#2900", [*FACTS, *ASKED], None, {}),
    ("truncated-answers", "huggingface/trl#6025", FACTS, None, {"max_length": 12}),
    ("doubled-bos", "OpenRLHF/OpenRLHF#393", FACTS, begins_twice, {}),
    ("answer-in-prompt", "unslothai/unsloth#823", COPIED, None, {}),
    ("no-assistant-turn", "unslothai/unsloth#2035", FACTS, template(NO_TURN), {}),
    ("beyond-positions", "huggingface/transformers#14384", FACTS, None, {"positions": 15}),
    ("beyond-embedding", "huggingface/transformers#11102", FACTS, None, {"embeddings": 200}),
    ("trained-held-out", "OpenRLHF/OpenRLHF#1089", [*FACTS, *FACTS], None, {}),
    (NO_MISTAKE, "chat", FACTS, None, {}),
    (NO_MISTAKE, "texts", TEXTS, None, {}),
    (NO_MISTAKE, "prompt-completion", PAIRS, None, {}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("check") / "model")


@pytest.mark.parametrize(("name", "report", "rows", "prepare", "limits"), CASES, ids=[case[1] for case in CASES])
def test_a_mistake_is_found_by_its_name_and_no_other(
    name: str, report: str, rows: Rows, prepare: Prepare | None, limits: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """Of rows of which the last quarter is held out."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    if prepare is not None:
        prepare(tokenizer)
    limits = {"positions": 256, "embeddings": 300, **limits}
    loaded = load_dataset(
        write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer, max_length=limits.pop("max_length", 256)
    )
    train, held_out = loaded.split(round(0.25 * len(loaded)))
    found = [finding.name for finding in iter_findings(train, held_out, tokenizer, **limits)]
    assert found == ([] if name == NO_MISTAKE else [name]), report


def test_the_set_of_the_demo_has_none(tmp_path: Path) -> None:
    from qlora_native.tool.cli.demo import HELD_OUT_ROWS, MAX_CHARACTERS, MAX_LENGTH
    from qlora_native.tool.cli.standard_library import write_split
    from qlora_native.weights.open import load_tokenizer

    write_split(tmp_path, MAX_CHARACTERS, HELD_OUT_ROWS)
    tokenizer = load_tokenizer(str(demo_model_or_skip()))
    files = [
        load_dataset(tmp_path / f"{name}.jsonl", tokenizer, max_length=MAX_LENGTH) for name in ("train", "heldout")
    ]
    assert list(iter_findings(files[0], files[1], tokenizer, 8192, 49152)) == []


def test_the_command_and_the_run_name_them(
    model: Path, tmp_path: Path, mistake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    copied, facts = (write_jsonl(tmp_path / "copied.jsonl", COPIED), write_jsonl(tmp_path / "facts.jsonl", FACTS))
    assert "copied.jsonl: answer-in-prompt: " in mistake("data", "check", copied, "--model", model)
    assert "name its folder with --model DIR" in mistake("data", "check", facts)
    assert main(["data", "check", str(copied), "--model", str(model), "--json"]) == 2
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["findings"]] == ["answer-in-prompt"]
    assert main(["data", "check", str(facts), "--model", str(model)]) == 0
    assert "nothing found" in capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(f"model: {model}\ndata: {{train: {copied}}}\noutput_dir: {tmp_path / 'run'}\n")
    assert main(["train", str(tmp_path / "run.yaml"), "--steps", "1"]) == 0
    assert "data check: answer-in-prompt: " in capsys.readouterr().out
    short = Path(shutil.copytree(model, tmp_path / "short"))
    edit_config(short, max_position_embeddings=16)
    words = ["--model", short, "--output_dir", tmp_path / "short-run", "--steps", "1"]
    assert "set data.max_length to 16" in mistake("train", tmp_path / "run.yaml", *words)


NEW = [chat(f"what <|new|> {color}?", thing) for color, thing in tiny.FACTS]
TOKENS: dict[str, tuple[list[Any], Rows, Rows, list[str]]] = {  # trainable_tokens, rows, held-out rows, findings
    "trained": (["<|new|>"], NEW[:8], NEW[8:], []),
    "lacking": ([], NEW[:8], FACTS[8:], ["beyond-embedding"]),
    "lacking-held-out": ([], FACTS[:8], NEW[8:], ["beyond-embedding"]),
    "others-trained": (["<|user|>", 4], NEW[:8], FACTS[8:], ["beyond-embedding"]),
}


@pytest.mark.parametrize("case", TOKENS)
def test_the_command_looks_for_tokens_beyond_the_embedding(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a tokenizer with a token more than the model of 300, unless it is the run that adds it."""
    trained, rows, held_out, expected = TOKENS[case]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    if expected:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens(["<|new|>"], special_tokens=True)
        tokenizer.save_pretrained(folder)
    parts = {"train": rows, "eval": held_out}
    data = {key: str(write_jsonl(tmp_path / f"{key}.jsonl", part)) for key, part in parts.items()}
    values = {"model": str(folder), "data": data, "lora": {"trainable_tokens": trained}}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    assert main(["data", "check", str(tmp_path / "run.yaml"), "--json"]) == (2 if expected else 0)
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["findings"]] == expected
