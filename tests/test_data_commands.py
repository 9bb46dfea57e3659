"""``qlora data show`` and ``data check``, ``data.columns``, runs over several files: what is printed, found, refused.

Each mistake that the check finds by its name, and no other, is one that people reported of a trainer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import yaml
from helpers import demo_model_or_skip
from runs import metrics
from sentences import Check
from tiny_models import edit_config
from transformers import AutoTokenizer

from qlora_native.data.check import iter_findings
from qlora_native.data.dataset import load_dataset
from qlora_native.errors import UserError
from qlora_native.tool.cli.data import histogram
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer
from qlora_native.tool.train.setup import make_sampler
from qlora_native.weights.open import load_tokenizer

QUESTION = {"role": "user", "content": "\x1b[31mred"}
LONG = {"role": "assistant", "content": "apple " * 40}
COLUMNS = {"instruction": "question", "output": "sql"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows: of train.jsonl one is truncated and two are dropped, without an answer and with a late one;
    of rows.jsonl and rows.csv the keys are not ours, which ours.jsonl has."""
    folder = tmp_path_factory.mktemp("files")
    tiny.write_model(folder / "model", num_hidden_layers=1)
    rows = [json.loads(line) for line in tiny.write_rows(folder / "train.jsonl", 6).read_text().splitlines()]
    rows += [{"messages": chat} for chat in ([QUESTION, LONG], [QUESTION], [{**LONG, "role": "user"}, LONG])]
    tiny.write_jsonl(folder / "train.jsonl", rows)
    config = f"model: {folder / 'model'}\ndata: {{train: {folder / 'train.jsonl'}, max_length: 64}}\n"
    (folder / "config.yaml").write_text(config)
    facts = list(enumerate(tiny.FACTS))
    tiny.write_jsonl(folder / "rows.jsonl", [{"id": n, "question": q, "sql": a, "text": "x"} for n, (q, a) in facts])
    tiny.write_jsonl(folder / "ours.jsonl", [{"instruction": q, "output": a} for _, (q, a) in facts])
    lines = ["id,question,sql", *(f"{number},{q},{a}" for number, (q, a) in facts)]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    lines = ["instruction,output", *(f"say {color},{thing}" for color, thing in tiny.FACTS[:4])]
    (folder / "more.csv").write_text("\n".join(lines) + "\n")
    return folder


def shown(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["data", "show", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_config_by_the_real_command_line(files: Path, sentence: Check) -> None:
    command = [sys.executable, "-m", "qlora_native", "data", "show", str(files / "config.yaml"), "--rows", "1"]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    sentence(done.stdout)
    assert done.stdout.isascii() and "\x1b" not in done.stdout


def test_a_data_file_with_keys_and_one_row(
    files: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, sentence: Check
) -> None:
    words = (files / "train.jsonl", "--model", files / "model", "--max_length", 64, "--packing", "true")
    sentence(shown(capsys, *words, "--row", 8, "--png", tmp_path / "lengths.png"))
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert ":7: 64 tokens, 54 of them trained, 108 more " in shown(capsys, *words, "--row", 7)
    assert ":9: 64 tokens, 0 of them trained," in (out := shown(capsys, *words, "--row", 9))
    assert "dropped: no trained token within max_length=64\n" in out
    out = shown(capsys, *words[:5], "--row", 9)
    assert out == shown(capsys, "--row", 9, *words[:5])
    assert out == shown(capsys, "--model", files / "model", "--train", *words[:1], "--row", 9, *words[3:5])


def test_another_chat_template(files: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = "{{ 'Chat: ' }}" + tiny.CHAT_TEMPLATE
    (tmp_path / "other.jinja").write_text(text)
    words = (files / "train.jsonl", "--model", files / "model", "--rows", 1, "--chat_template")
    assert "\nChat: <|user|>say, " in (out := shown(capsys, *words, text)) and "[[apple<|end|>]]" in out
    assert shown(capsys, *words, tmp_path / "other.jinja") == out
    assert main(["data", "show", *map(str, words), str(tmp_path / "none.jinja")]) == 2
    assert "none.jinja cannot be read" in capsys.readouterr().err


def test_several_files(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (files / "config.yaml", "--rows", 1, "--train", files / "train.jsonl", files / "more.csv", "--packing")
    out = shown(capsys, *words)
    assert f"{files / 'more.csv'}:2: " in out and f"{files / 'train.jsonl'}:1: " in out
    assert [file["rows"] for file in json.loads(shown(capsys, *words, "--json"))["files"]] == [7, 4]
    assert "more.csv" not in shown(capsys, *words, "--row", 9).partition("packed:")[2]


def test_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, files / "config.yaml", "--json", "--rows", "2", "--train_on", "all"))
    (file,) = found["files"]
    assert (file["rows"], file["dropped"], file["truncated"], file["format"]) == (9, 0, 2, "messages")
    assert file["truncated_lines"] == [7, 9]
    assert sum(count for *_, count in file["histogram"]) == 9
    assert [row["line"] for row in found["rows"]] == [1, 2]
    assert "".join(part["text"] for part in found["rows"][0]["parts"]).startswith("<|user|>say, what is red")
    assert found["packing"] is None


def test_on_a_terminal_trained_tokens_are_colored(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = shown(capsys, files / "config.yaml", "--rows", "1")
    assert "<|assistant|>\x1b[1;32mapple<|end|>\x1b[0m" in out and "[[" not in out


MAPPED = "check rows.jsonl --model model --data.columns.instruction=question"


@pytest.mark.parametrize(
    "words",
    [
        "show trian.jsonl --model model",
        "show train.jsonl",
        "show --train train.jsonl",
        "show train.jsonl --train train.jsonl --model model",
        "show --model model",
        "show train.jsonl --model model --row 99",
        "show train.jsonl --model model --max_lenght 9",
        f"{MAPPED} --data.columns.output=sq",
        f"{MAPPED} '--data.columns.output=wholly other'",
        f"{MAPPED} --data.columns.outptu=sql",
        f"{MAPPED} --data.columns.x=sql",
    ],
)
def test_mistakes_are_one_sentence(
    files: Path, words: str, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., str], sentence: Check
) -> None:
    monkeypatch.chdir(files)
    sentence(mistake("data", *shlex.split(words)))


def test_rows_of_one_length_are_one_bar() -> None:
    assert histogram(np.array([5, 5])) == [(5, 5, 2)]


# ---- columns


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_rows_are_those_of_a_file_with_our_names(files: Path, name: str) -> None:
    tokenizer = load_tokenizer(files / "model")
    expected = load_dataset(files / "ours.jsonl", tokenizer)
    found = load_dataset(files / name, tokenizer, columns=COLUMNS)
    assert found.stats.format == "alpaca" and len(found) == len(tiny.FACTS)
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.labels.tolist() == expected.labels.tolist()
    # One of several files may have our names already.
    both = load_dataset([files / name, files / "ours.jsonl"], tokenizer, columns=COLUMNS)
    assert len(both) == 2 * len(tiny.FACTS)


@pytest.mark.parametrize(
    "words",
    [
        "--columns instruction=question output=sql",
        "--data.columns.instruction question --data.columns.output sql",
        "--columns {instruction:\xa0question,output:\xa0sql}",
    ],
)
def test_from_the_command_line(files: Path, words: str) -> None:
    given = [word.replace("\xa0", " ") for word in words.split(" ")]
    values = {"model": str(files / "model"), "data": {"train": str(files / "rows.jsonl")}}
    config = TrainConfig.from_values(values, given)
    assert config.data.columns == COLUMNS
    assert TrainConfig.from_values(yaml.safe_load(config.to_yaml())).data.columns == COLUMNS


def test_every_command_reads_them(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = str(files / "model"), str(files / "rows.jsonl")
    words = ["--columns", "instruction=question", "output=sql"]
    assert main(["data", "show", rows, "--model", model, *words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["files"][0]["format"] == "alpaca" and shown["rows"][0]["parts"][0]["text"].count("red") == 1
    out = ["--output_dir", str(tmp_path / "out"), "--samples", "0"]
    assert main(["train", "--model", model, "--train", rows, *words, "--steps", "1", *out]) == 0
    capsys.readouterr()
    # The adapter's run names the columns, unless they are given.
    evaluated = ["eval", model, "--data", rows, "--json"]
    losses = []
    for more in (["--adapter", str(tmp_path / "out" / "adapter")], words):
        assert main([*evaluated, *more]) == 0
        losses.append(json.loads(capsys.readouterr().out)["sides"][0]["texts"]["rows.jsonl"]["loss"])
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match="output"):
        load_dataset(rows, load_tokenizer(model), columns={"instruction": "question"})


# ---- several files


@pytest.fixture
def settings(files: Path, tmp_path: Path) -> dict[str, Any]:
    data = {"train": [str(files / "ours.jsonl"), str(files / "more.csv")], "weights": [1, 3]}
    return runs.settings(files, tmp_path / "out", data, {"r": 2}, steps=6, batch_size=4, grad_accum=1, save_every=4)


def test_a_run_over_two_files_resumes_with_the_same_bytes(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["data"]["chat_template"] = "{{ 'Chat: ' }}" + tiny.CHAT_TEMPLATE
    trainer = Trainer(TrainConfig.model_validate(settings), quiet=True)
    summary = trainer.train()
    adapter, lines = (summary.adapter_dir / "adapter_model.safetensors").read_bytes(), metrics(tmp_path / "out")
    card = (summary.adapter_dir / "README.md").read_text()
    files = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in settings["data"]["train"]}
    assert len(files) == 2 and all(f"`{path}` | `{digest}`" in card for path, digest in files.items())
    # As the adapter was trained, so its answers are asked for.
    tokenizer = load_tokenizer(settings["model"], summary.adapter_dir)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "Chat: <|user|>a<|end|>"

    assert main(["merge", settings["model"], str(summary.adapter_dir), "--out", str(tmp_path / "merged")]) == 0
    assert load_tokenizer(tmp_path / "merged").chat_template == settings["data"]["chat_template"]

    settings["output_dir"] = str(tmp_path / "again")
    config = TrainConfig.model_validate(settings)
    with pytest.raises(runs.Crash):
        Trainer(config, quiet=True, on_step=runs.crash_at(5)).train()
    changed = config.model_copy(update={"resume": "auto", "data": config.data.model_copy(update={"weights": [1, 2]})})
    with pytest.raises(UserError, match="other weights"):
        Trainer(changed, quiet=True).train()
    summary = Trainer(config.model_copy(update={"resume": "auto"}), quiet=True).train()
    assert (summary.adapter_dir / "adapter_model.safetensors").read_bytes() == adapter
    assert metrics(tmp_path / "again") == lines


def test_a_file_without_a_row_left_is_refused(settings: dict[str, Any]) -> None:
    config = TrainConfig.model_validate(settings)
    rows = load_dataset(config.data.files, load_tokenizer(config.model))
    assert make_sampler(config, rows).mix is not None
    with pytest.raises(UserError, match="more.csv has no row left"):
        make_sampler(config, rows.subset(np.flatnonzero(rows.file == 0)))


# ---- the check

Rows = list[dict[str, Any]]
Prepare = Callable[[Any], None]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


FACTS = [chat(f"what is {color}?", thing) for color, thing in tiny.FACTS]
ASKED = [{"messages": [{"role": "user", "content": f"what is {color}?"}]} for color, _ in tiny.FACTS]
REPEATED = [f"{color} is {thing}, and always was {thing} to me" for color, thing in tiny.FACTS]
COPIED = [chat(f"repeat: {text}", text) for text in REPEATED]
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


@pytest.fixture
def model(files: Path) -> Path:
    return files / "model"


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
        tiny.write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer, max_length=limits.pop("max_length", 256)
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
    copied = tiny.write_jsonl(tmp_path / "copied.jsonl", COPIED)
    facts = tiny.write_jsonl(tmp_path / "facts.jsonl", FACTS)
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
    data = {key: str(tiny.write_jsonl(tmp_path / f"{key}.jsonl", part)) for key, part in parts.items()}
    values = {"model": str(folder), "data": data, "lora": {"trainable_tokens": trained}}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    assert main(["data", "check", str(tmp_path / "run.yaml"), "--json"]) == (2 if expected else 0)
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["findings"]] == expected
