"""Code in a model, an adapter, a config or a data file, which would leave a file if it ran: no command runs it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapters import write_model_and_adapter
from runs import settings
from test_damaged import Call
from tiny import write_rows
from tiny_models import edit_config
from transformers import AutoConfig, dynamic_module_utils

from qlora_native.tool.cli.main import main

CODE = """
with open({mark!r}, "a") as file:
    file.write(__name__)
import transformers
class Config(transformers.LlamaConfig): pass
class Model(transformers.LlamaForCausalLM): pass
class Tokenizer(transformers.PreTrainedTokenizerFast): pass
def generate(*args, **options): pass
"""
AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", None],
}
PICKLES = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "model.pt")
TEMPLATES = (
    "{{{{ cycler.__init__.__globals__.os.mkdir({mark!r}) }}}}",
    "{{{{ self.__init__.__globals__.__builtins__.open({mark!r}, 'w') }}}}",
    "{{% for c in ().__class__.__base__.__subclasses__() %}}{{{{ c.__init__.__globals__ }}}}{{% endfor %}}",
)
COMMANDS = (
    "convert {0}/model {0}/out --to 16bit",
    "quantize {0}/model --out {0}/out",
    "merge {0}/model {0}/adapter --out {0}/out",
    "export {0}/model --adapter {0}/adapter --to peft --out {0}/out",
    "export {0}/model --to gguf --out {0}/out.gguf",
    "chat {0}/model --adapter {0}/adapter --prompt hello --max-tokens 1",
    "eval {0}/model --data {0}/train.jsonl",
    "estimate {0}/model --json",
    "data show {0}/train.jsonl --model {0}/model",
    "data check {0}/train.jsonl --model {0}/model",
    "train {0}/run.yaml",
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_and_adapter(tmp_path_factory.mktemp("canary"))
    write_rows(folder / "train.jsonl")
    return folder


@pytest.fixture
def planted(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sound files with code beside them, importable, and named wherever a library looks for such code."""
    folder = shutil.copytree(sound, tmp_path / "files")
    code, mark = CODE.format(mark=str(mark_of(folder))), str(mark_of(folder))
    for place in (folder, folder / "model", folder / "adapter"):
        for name in ("evil", "sitecustomize", "configuration_llama", "modeling_llama", "train"):
            (place / f"{name}.py").write_text(code)
        for name in PICKLES:
            torch.save(Call(os.mkdir, mark), place / name)
    (folder / "model" / "custom_generate").mkdir()
    (folder / "model" / "custom_generate" / "generate.py").write_text(code)
    edit_config(folder / "model", auto_map=AUTO_MAP)
    edit(folder / "model" / "tokenizer_config.json", auto_map=AUTO_MAP)
    library = {"base_model_class": "Model", "parent_library": "evil"}
    edit(folder / "adapter" / "adapter_config.json", auto_mapping=library)
    run = settings(folder, folder / "run", steps=1)
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def mark_of(folder: Path) -> Path:
    """What the code leaves if it runs."""
    return folder.parent / "it ran"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def runs_it(folder: Path, action: Callable[[], object]) -> bool:
    try:
        action()
    finally:
        ran = mark_of(folder).exists()
        shutil.rmtree(mark_of(folder)) if mark_of(folder).is_dir() else mark_of(folder).unlink(missing_ok=True)
    return ran


def test_whoever_trusts_the_folder_runs_its_code(planted: Path) -> None:
    """That the tests below can fail."""
    assert runs_it(planted, lambda: AutoConfig.from_pretrained(planted / "model", trust_remote_code=True))
    for name in PICKLES:
        assert runs_it(planted, partial(torch.load, planted / "model" / name, weights_only=False))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:2]))
def test_no_command_runs_it(planted: Path, command: str) -> None:
    codes: list[int] = []
    assert not runs_it(planted, lambda: codes.append(main(command.format(planted).split())))
    assert codes == [0]


@pytest.mark.parametrize("name", ["model/model.safetensors", "adapter/adapter_model.safetensors"])
def test_pickles_do_not_stand_in_for_safetensors(planted: Path, name: str, mistake: Callable[..., str]) -> None:
    (planted / name).unlink()
    assert not runs_it(planted, lambda: mistake(*COMMANDS[2].format(planted).split()))


def test_a_model_type_that_only_its_code_knows(planted: Path, mistake: Callable[..., str]) -> None:
    edit_config(planted / "model", model_type="evil", architectures=["Model"])
    for command in (COMMANDS[0], COMMANDS[5], COMMANDS[10]):
        assert not runs_it(planted, lambda: mistake(*command.format(planted).split()))  # noqa: B023


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_reaches_no_python(planted: Path, template: str, mistake: Callable[..., str]) -> None:
    (planted / "model" / "chat_template.jinja").write_text(template.format(mark=str(mark_of(planted))))
    for command in ("chat {0}/model --prompt hello --max-tokens 1", "data show {0}/train.jsonl --model {0}/model"):
        assert not runs_it(planted, lambda: mistake(*command.format(planted).split()))  # noqa: B023


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:pathlib.Path", "name:evil.Model", "module:evil"])
def test_a_config_makes_no_objects(planted: Path, tag: str, mistake: Callable[..., str]) -> None:
    with (planted / "run.yaml").open("a") as file:
        file.write(f"seed: !!python/{tag} [{mark_of(planted)}]\n")
    assert not runs_it(planted, lambda: mistake("train", planted / "run.yaml"))


def test_a_script_is_no_data(planted: Path, mistake: Callable[..., str]) -> None:
    assert not runs_it(planted, lambda: mistake("data", "show", planted / "train.py", "--model", planted / "model"))
