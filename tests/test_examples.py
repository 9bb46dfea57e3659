"""Every example of every page is checked: a command by its own parser, YAML as a config, JSON line by line. What is
tagged python, py or sh runs too (test_docs.py)."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from laws import ROOT
from safetensors.torch import save_file
from test_docs import NOT_RUN, blocks_of, pages, runs_in_test

from qlora_native.errors import UserError
from qlora_native.tool.cli import main
from qlora_native.tool.config import TrainConfig, keys

Capture = pytest.CaptureFixture[str]
SPAN = re.compile(r"(?<!`)`((?:qlora|python|bash|torchrun|pip) [^`]+)`(?!`)")
MINIMAL = {"model": "base-model", "data": {"train": "rows.jsonl"}}
TEXTS = ("cpp", "text")  # an outline that no kernel has; Ollama's Modelfile, which test_serving.py reads


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> Callable[[list[str]], None]:
    """Fails unless a command of ours takes these words; it does not run. A config reads the adapter that it names."""
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    sides = {f"base_model.model.q_proj.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    save_file(sides, adapter / "adapter_model.safetensors")
    monkeypatch.chdir(tmp_path)

    def check(words: list[str]) -> None:
        assert words and words[0] in main.COMMANDS, words
        taken: list[argparse.Namespace] = []
        monkeypatch.setattr(importlib.import_module(f"qlora_native.tool.cli.{words[0]}"), "run", taken.append)
        assert main.main(words) == 0, capsys.readouterr().err
        TrainConfig.from_values(merged(MINIMAL, {}), getattr(taken[0], "overrides", ()))

    return check


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section."""
    both = {**base, **more}
    return {key: merged(base.get(key, {}), value) if type(value) is dict else value for key, value in both.items()}


def check_commands(line: str, parse: Callable[[list[str]], None]) -> None:
    """Each command of a line: ours parses, a script of ours is there with its options, others are in NOT_RUN."""
    for part in line.split(" && "):
        words = shlex.split(part, comments=True)
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        if words:
            check_command(words, parse)


def check_command(words: list[str], parse: Callable[[list[str]], None]) -> None:
    command, options = " ".join(words), [word for word in words if word.startswith("--")]
    if words[0] == "torchrun" and "qlora_native" in words:
        words = ["qlora", *words[words.index("qlora_native") + 1 :]]
    if words[0] == "qlora":
        parse(words[1:])
    elif words[0] in ("python", "bash", "pytest") and len(words) > 1 and not words[1].startswith("-"):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        if words[0] == "pytest":
            source = (ROOT / "tests/conftest.py").read_text(encoding="utf-8")
        assert all(re.search(rf"{option}\b", source) for option in options), command
    else:
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        assert {extra for word in words for extra in re.findall(r"^\.\[(.+)\]", word)} <= {*extras}, command
        assert command.startswith(tuple(NOT_RUN)), f"{command}: name it in NOT_RUN of test_docs.py"


def check_block(language: str, title: str, text: str, parse: Callable[[list[str]], None]) -> None:
    """One example."""
    if language in ("sh", "console"):
        for command in filter(None, map(str.strip, text.replace("\\\n", " ").splitlines())):
            check_commands(command, parse)
    elif language == "yaml":
        TrainConfig.from_values(merged({} if title else MINIMAL, yaml.safe_load(text)))
    elif language == "json":
        assert all(json.loads(line) for line in text.splitlines())
    elif language in ("python", "py"):
        compile(text, "a block", "exec")
    else:
        assert language in TEXTS, f"no check is known for a block that is tagged {language!r}"


def check_span(span: str) -> None:
    """The options of a command in a sentence, which leaves out what the sentence is not about."""
    name, options = span.split()[1], {*re.findall(r"--[\w.-]+", span)} - {"--help"}
    if name not in main.COMMANDS:
        assert name == "COMMAND", span
        return
    parser = argparse.ArgumentParser()
    importlib.import_module(f"qlora_native.tool.cli.{name}").configure(parser)
    known = {*parser._option_string_actions}
    if main.COMMANDS[name].first:
        known |= {f"--{key}" for key in keys()} | {f"--{key.rpartition('.')[2]}" for key in keys()}
    assert options <= known, span


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_example_of_the_page_is_right(path: Path, parse: Callable[[list[str]], None]) -> None:
    text = path.read_text(encoding="utf-8")
    blocks = blocks_of(path)
    assert 2 * len(blocks) == len(re.findall(r"^ *```", text, re.MULTILINE)), "a fence that no check reads"
    for block in blocks:
        check_block(*block, parse)
    for span in SPAN.findall(text):
        if span.startswith("qlora "):
            check_span(span)
        elif span.startswith(("python bench/", "bash .ci/")):
            check_commands(span, parse)
    assert not re.search(r"^    (?:\$ )?(?:qlora|python|pip|llama-\w+) ", text, re.MULTILINE), "an example has a fence"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("sh", "qlora train config.yaml --lrr 1e-4"),
        ("console", "qlora train config.yaml --lora.rank 8"),
        ("console", "qlora merge base run/adapter --out merged --chek"),
        ("console", "qlora mergee base run/adapter --out merged"),
        ("console", "qlora quantize base --out four-bit --method wsme"),
        ("console", "torchrun --nproc-per-node 2 -m qlora_native train config.yaml --paralel fsdp"),
        ("console", "python bench/bench_residency.py FOLDER --limit 4"),
        ("console", "pip install '.[trian]'"),
        ("console", "make"),
        ("yaml", "lora: {rank: 8}"),
        ("yaml", "train:\n  steps: many"),
        ("json", "{'text': 'Paris'}"),
        ("py", "model = "),
        ("toml", "r = 8"),
    ],
)
def test_a_mistake_is_seen(language: str, text: str, parse: Callable[[list[str]], None]) -> None:
    with pytest.raises((AssertionError, SyntaxError, ValueError, UserError)):
        check_block(language, "", text, parse)


@pytest.mark.parametrize("span", ["qlora merge --chek", "qlora quantise MODEL", "qlora train --steeps 3"])
def test_a_mistake_in_a_sentence_is_seen(span: str) -> None:
    with pytest.raises(AssertionError):
        check_span(span)


def test_what_is_listed_as_not_run_is_on_a_page() -> None:
    lines = re.split(r"\n| && ", "\n".join(text for path in pages() for *_, text in blocks_of(path)))
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []
    assert all(runs_in_test(path) for path in pages() if any(tag == "sh" for tag, *_ in blocks_of(path)))
