"""The config: every mistake at once, each with what was meant; any key from the command line; the shipped files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError
from sentences import Check

from qlora_native._mistakes import ALIASES
from qlora_native.data.readers import hub_id
from qlora_native.errors import UserError
from qlora_native.lora import LoraConfig
from qlora_native.lora.config import LoraSettings
from qlora_native.tool.cli.config import PRESETS, preset, shipped
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig, keys
from qlora_native.tool.sections import LoraSection

LORA = [key.removeprefix("lora.") for key in keys() if key.startswith("lora.")]
MINIMAL = "model: base\ndata:\n  train: rows.jsonl\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(folder: Path, text: str, *overrides: str) -> list[str]:
    path = write(folder, text)
    with pytest.raises(UserError) as error:
        TrainConfig.from_file(path, overrides)
    return str(error.value).replace(str(path), "run.yaml").splitlines()


def test_defaults(tmp_path: Path) -> None:
    written = yaml.safe_load(TrainConfig.from_file(write(tmp_path, MINIMAL)).to_yaml())
    for key, value in {
        "model": "base", "data.train": "rows.jsonl", "output_dir": "qlora-out", "quant.type": "auto",
        "quant.block_size": 64, "quant.double_quant": True, "lora.r": 16, "lora.alpha": 32,
        "lora.target_modules": "all-linear", "train.lr": 2e-4, "train.betas": [0.9, 0.999], "train.steps": None,
        "train.epochs": None,
    }.items():  # fmt: skip
        section, _, leaf = key.rpartition(".")
        assert (written[section] if section else written)[leaf] == value, key


@pytest.mark.parametrize(("card", "chosen"), [(None, "bfloat16"), (True, "bfloat16"), (False, "float16")])
def test_the_dtype_is_what_the_card_multiplies_in(
    card: bool | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:  # a T4 emulates it
        asked.append(including_emulation)
        return including_emulation or bool(card)

    monkeypatch.setattr("torch.cuda.is_available", lambda: card is not None)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", is_bf16_supported)
    for section in ({}, {"train": {"lr": 1e-4}}, {"train": {"dtype": "auto"}}):
        config = TrainConfig.from_values({**yaml.safe_load(MINIMAL), **section})
        assert config.train.dtype == yaml.safe_load(config.to_yaml())["train"]["dtype"] == chosen
    assert asked == [False] * len(asked) and bool(asked) == (card is not None)
    for given in ("bfloat16", "float32"):
        assert TrainConfig.from_values({**yaml.safe_load(MINIMAL), "train": {"dtype": given}}).train.dtype == given


def test_every_mistake_is_reported_at_once_with_its_line(tmp_path: Path, sentence: Check) -> None:
    text = "modle: base\ndata:\n  train: rows.jsonl\n  max_lenght: 512\nquant:\n  type: nf5\n"
    text += "train:\n  lr: fast\n  steps: 0\n  grad_checkpointing: perhaps\n"
    lines = mistakes(tmp_path, text)
    assert [line.split(":")[1].split()[0] for line in lines] == ["model", "4", "6", "9", "8", "10", "1"]
    sentence("\n".join(lines))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("trian: {}", "did you mean train?"),
        ("lr: 1e-4", "did you mean train.lr?"),
        ("learning_rate: 1e-4", "did you mean train.lr?"),
        ("lora: {rank: 8}", "did you mean lora.r?"),
        ("lora: {lora_alpha: 8}", "did you mean lora.alpha?"),
        ("lora: {drop_out: 0.1}", "did you mean lora.dropout?"),
        ("train: {gradient_accumulation_steps: 4}", "did you mean train.grad_accum?"),
        ("train: {save_evry: 4}", "did you mean train.save_every?"),
        ("quant: {blocksize: 64}", "did you mean quant.block_size?"),
        ("  sequence_len: 3", "did you mean data.max_length?"),
        ("train: {early_stopping_patience: 3}", "did you mean train.patience?"),
        ("report_to: wandb", "did you mean logging?"),
        ("quant: {load_in_4bit: true}", "did you mean quant.type?"),
        ("lora: {zzz: 1}", f"the keys of lora are {', '.join(LORA)}"),
    ],
)
def test_a_key_that_does_not_exist(tmp_path: Path, wrong: str, meant: str) -> None:
    (mistake,) = mistakes(tmp_path, MINIMAL + wrong)
    assert re.fullmatch(rf"run.yaml:4: \S+ is not a key; {re.escape(meant)}", mistake)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "run.yaml: model is not set"),
        ("- a\n- b\n", "run.yaml holds list"),
        ("just words", "run.yaml holds str 'just words'"),
        ("model: base\ndata: rows.jsonl\n", "run.yaml:2: data is 'rows.jsonl': expected a block"),
        ("model: base\n", "run.yaml: data is not set; add"),
        ("model: base\ndata: {eval: x}\n", "run.yaml: data.train is not set; add `train: ...`"),
        ("model: [base\n", "run.yaml:2: not valid YAML"),
        ("model: base\n\tdata: x\n", "run.yaml:2: not valid YAML"),
        ("model: !!python/object:os.system x\n", "run.yaml:1: not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, expected: str) -> None:
    assert mistakes(tmp_path, text)[0].startswith(expected)


@pytest.mark.parametrize(
    "text",
    [
        "train: {steps: 5, epochs: 2}",
        "train: {betas: [0.9]}",
        "train: {betas: [0.9, 1.0]}",
        "train: {betas: [0.1, 0.2, 0.3]}",
        "train: {lr: .nan}",
        "lora: {dropout: 1.0}",
        "lora: {target_modules: {a: 1}}",
        "quant: {block_size: 48}",
        "  format: csv",
        "  weights: [3, 1]",
        "  weights: [0]",
        "model: other",
    ],
)
def test_values_that_are_refused(tmp_path: Path, text: str, sentence: Check) -> None:
    sentence("\n".join(mistakes(tmp_path, MINIMAL + text)))


@pytest.mark.parametrize(
    ("flag", "most"),
    [
        *(("--lr", 1e9), ("--weight_decay", 1e9), ("--lora_plus_ratio", 1e9), ("--epochs", 1e6), ("--alpha", 9e29)),
        *(("--r", 1 << 16), ("--rank_pattern", 1 << 16), ("--alpha_pattern", 9e29), ("--weights", 1e9)),
        *(("--max_length", 1 << 24), ("--batch_size", 1 << 20), ("--grad_accum", 1 << 20), ("--steps", (1 << 31) - 1)),
        *(("--seed", (1 << 62) - 1), ("--page_budget", (1 << 62) - 1), ("--rank_timeout", (1 << 31) - 1)),
    ],
)
def test_numbers_have_limits(tmp_path: Path, flag: str, most: float) -> None:
    path = write(tmp_path, MINIMAL)
    form = "{{a: {}}}" if flag.endswith("_pattern") else "[{}]" if flag == "--weights" else "{}"
    TrainConfig.from_file(path, [flag, form.format(repr(most))])
    for wrong in (repr(2 * most), "1e308", "1e400", str(10**33), "9" * 5000):
        (mistake,) = mistakes(tmp_path, MINIMAL, flag, form.format(wrong))
        assert mistake.startswith(f"{flag} is ")


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.yaml does not exist; .*init --out .*gone.yaml`"):
        TrainConfig.from_file(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(UserError, match=r"binary.yaml cannot be read: not UTF-8 text"):
        TrainConfig.from_file(tmp_path / "binary.yaml")
    with pytest.raises(UserError, match="is a folder, a pipe"):
        TrainConfig.from_file(tmp_path)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--lr", "1e-4"], "train.lr", 1e-4),
        (["--train.lr=1e-4"], "train.lr", 1e-4),
        (["--r", "8"], "lora.r", 8),
        (["--lora.target_modules", "[q_proj, v_proj]"], "lora.target_modules", ["q_proj", "v_proj"]),
        (["--target_modules", "q_proj"], "lora.target_modules", "q_proj"),
        (["--target_modules", "q_proj", "v_proj"], "lora.target_modules", ["q_proj", "v_proj"]),
        (["--logging", "tensorboard"], "logging", ["tensorboard"]),
        (["--logging", "tensorboard", "trackio", "--lr", "1"], "logging", ["tensorboard", "trackio"]),
        (["--betas", "0.8", "0.9"], "train.betas", (0.8, 0.9)),
        (["--betas", "[0.8, 0.9]"], "train.betas", (0.8, 0.9)),
        (["--rslora"], "lora.rslora", True),
        (["--double-quant", "false"], "quant.double_quant", False),
        (["--resume"], "resume", "auto"),
        (["--resume", "--lr", "1"], "resume", "auto"),
        (["--resume", "out/step-000100"], "resume", "out/step-000100"),
        (["--model", "2024-01-01"], "model", "2024-01-01"),
        (["--output_dir=a=b"], "output_dir", "a=b"),
        (["--train", "a.jsonl"], "data.train", "a.jsonl"),
        (["--train", "a.jsonl", "b.csv"], "data.train", ["a.jsonl", "b.csv"]),
        (["--weights", "3", "1", "--train", "a.jsonl", "b.csv"], "data.weights", [3.0, 1.0]),
        (["--eval", "null"], "data.eval", None),
        (["--lr", "1", "--lr", "2"], "train.lr", 2.0),
        ([], "lora.r", 16),  # of a block without keys
    ],
)
def test_any_key_from_the_command_line(tmp_path: Path, words: list[str], key: str, value: Any) -> None:
    got: Any = TrainConfig.from_file(write(tmp_path, MINIMAL + "lora:\n  # r: 8\ntrain:\n  lr: 5e-5\n"), words)
    for part in key.split("."):
        got = getattr(got, part)
    assert got == value and type(got) is type(value)


def test_a_length_from_the_command_line_replaces_the_one_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "train: {steps: 5}\n")
    config = TrainConfig.from_file(path, ["--epochs", "2"])
    assert (config.train.steps, config.train.epochs) == (None, 2.0)
    (line,) = mistakes(tmp_path, MINIMAL + "train: {steps: 5}\n", "--epochs", "2", "--steps", "3")
    assert line.startswith("run.yaml: train.steps is 3 and epochs is 2.0: ")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{train: rows.jsonl}", "--learning_rate 1"),
        ("{train: rows.jsonl}", "--lr fast"),
        ("{train: rows.jsonl}", "1e-4"),
        ("{train: rows.jsonl}", "--rslora 1 2"),
        ("x", "--max_length 3"),  # a flag does not hide a mistake in the file
    ],
)
def test_mistakes_on_the_command_line_name_the_flag(tmp_path: Path, data: str, words: str, sentence: Check) -> None:
    (line,) = mistakes(tmp_path, f"model: base\ndata: {data}\n", *words.split())
    sentence(line)


def test_every_key_has_a_name_of_its_own_and_a_sentence() -> None:
    """`--lr` can only stand for `--train.lr` while no other block has an lr."""
    leaves = [key.rpartition(".")[2] for key in keys()]
    assert len(leaves) == len(set(leaves)) and len(leaves) > 30
    assert all(field.description for field in keys().values())
    assert set(ALIASES.values()) <= set(keys()) and not set(ALIASES) & set(leaves)


def test_the_start_of_an_adapter_is_no_key_and_is_read_in_older_configs() -> None:
    section = TypeAdapter(LoraSection)
    assert section.validate_python({"init": "zero", "r": 4}).r == 4
    with pytest.raises(ValueError, match="init\n"):
        section.validate_python({"init": "h_svd"})


def test_the_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = TrainConfig.from_file(write(tmp_path, MINIMAL), ["--lr", "3e-5", "--target_modules", "[a, b]", "--resume"])
    again = TrainConfig.from_file(write(tmp_path, config.to_yaml()))
    assert again.resume is None
    assert again.model_copy(update={"resume": "auto"}) == config
    written = yaml.safe_load(config.to_yaml())
    assert {key for key in keys() if "." not in key} - {"resume"} <= set(written)
    assert set(written["train"]) == {key.split(".")[1] for key in keys() if key.startswith("train.")}


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config: Any = TrainConfig.from_file(write(tmp_path, MINIMAL))
    for key in keys():
        section, _, name = key.rpartition(".")
        with pytest.raises((ValidationError, FrozenInstanceError)):
            setattr(getattr(config, section) if section else config, name, None)
    assert config == TrainConfig.from_file(write(tmp_path, MINIMAL))


def test_the_section_has_the_fields_of_an_adapter() -> None:
    """Defined once: what they are by default, what they are for, and the limits of their numbers."""
    section, ours = LoraSection(r=3, rank_pattern={"a": 2}, dropout=0.5), LoraConfig(r=3, dropout=0.5, seed=7)
    found = section.as_config(seed=7)
    assert type(found) is LoraConfig and replace(found, rank_pattern={}, trainable_tokens=()) == ours
    for field in fields(LoraSettings):
        assert keys()[f"lora.{field.name}"].description == field.metadata["description"]
    assert {field.name for field in fields(LoraConfig)} - {*LORA} == {"seed"}


def test_shipped_configs_are_valid_and_explain_every_line() -> None:
    for name, path in shipped().items():
        config = TrainConfig.from_file(path)
        lines = path.read_text(encoding="utf-8").splitlines()
        program = "qlora" if config.parallel == "none" else "torchrun --nproc-per-node 4 -m qlora_native"
        assert lines[1] == f"#   {program} train {name}.yaml"
        for line in lines:
            key = re.match(r"\s*\w+: \S", line)
            assert key is None or re.search(r"  +# \S", line), f"{path.name}: {line} has no comment"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_explain_every_line(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, preset(name))
    config = TrainConfig.from_file(path)
    assert hub_id(config.model) and config.output_dir == f"{name}-qlora" and config.data.files == ["train.jsonl"]
    lines = path.read_text().splitlines()
    assert lines[1] == f"#   qlora train {name}.yaml"
    assert all("  # " in line for line in lines if re.match(r"\s*\w+: \S", line)) and max(map(len, lines)) < 120


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What ``qlora config`` prints, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def printed(*words: str) -> str:
        assert main(["config", *words]) == 0
        return capsys.readouterr().out

    return printed


def test_config_init_list_and_check(config: Callable[..., str]) -> None:
    names = [line.split()[0] for line in config("list").splitlines()]
    assert names == ["cpu", "llama-70b", "multi-gpu", "smollm2", "--preset"]
    next_step = "then: torchrun --nproc-per-node 4 -m qlora_native train four.yaml\n"
    assert next_step in config("init", "multi-gpu", "--out", "four.yaml")
    assert "qlora train mine.yaml" in config("init", "--out", "mine.yaml")
    assert "#   qlora train mine.yaml" in Path("mine.yaml").read_text()
    Path("train.jsonl").touch()
    Path("SmolLM2-135M-Instruct").mkdir()
    assert yaml.safe_load(config("check", "mine.yaml", "--lr", "7e-5"))["train"]["lr"] == 7e-5
    assert config("init", "llama-70b") == shipped()["llama-70b"].read_text()
    assert "; set data.train in it, " in config("init", "--preset", "mistral-7b", "--out", "m.yaml")
    text = Path("m.yaml").read_text()
    assert "qlora estimate m.yaml --gpu" in text and "mistralai/Mistral-7B-Instruct-v0.3" in text


@pytest.mark.usefixtures("config")
def test_check_names_every_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(
        "model: none\ndata: {train: [run.yaml, rows.jsonl], eval: more.jsonl, chat_template: t.jinja}\n"
        "quant: {calibration: text}\n"
    )
    assert main(["config", "check", "run.yaml"]) == 2
    found = re.findall(r"run.yaml: (\S+) is (\S+), which", capsys.readouterr().err)
    assert {("data.train", "rows.jsonl"), ("data.eval", "more.jsonl"), ("model", "none")} < set(found)
    assert ("data.chat_template", "t.jinja") in found and len(found) == 5


@pytest.mark.usefixtures("config")
def test_check_names_what_is_read_from_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    """A missing folder has the form of an id; a template is never one."""
    text = "model: models/llama\ndata: {train: [org/rows:train], eval: org/rows:test%s}\n"
    Path("run.yaml").write_text(text % "")
    assert main(["config", "check", "run.yaml"]) == 0
    on_hub = [f"read from the hub: {name}" for name in ("models/llama", "org/rows:train", "org/rows:test")]
    assert capsys.readouterr().err.splitlines() == on_hub
    Path("run.yaml").write_text(text % ", chat_template: files/t.jinja")
    assert main(["config", "check", "run.yaml"]) == 2
    *first, last = capsys.readouterr().err.splitlines()
    assert first == on_hub and "data.chat_template is files/t.jinja, which is not there" in last


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("init --out there.yaml", "there.yaml exists already"),
        ("init smolm2", "'smolm2'; did you mean smollm2?"),
        ("init --out no/such/folder.yaml", "write no/such/folder.yaml: No such file"),
        ("check", "config check needs a file"),
        ("check there.yaml", "there.yaml:1: modle is not a key"),
        ("list --lr 3", "qlora config list takes no --lr"),
        ("init --preset llama", "invalid choice: 'llama'"),
        ("chekc there.yaml", "argument action: invalid choice: 'chekc'"),
    ],
)
@pytest.mark.usefixtures("config")
def test_config_mistakes(mistake: Callable[..., str], words: str, expected: str) -> None:
    Path("there.yaml").write_text("modle: base\n" + MINIMAL)
    assert expected in mistake("config", *words.split())


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size", "--train.batch-size"])
@pytest.mark.parametrize("joint", [" ", "="])
def test_a_flag_is_named_as_it_was_typed(mistake: Callable[..., str], flag: str, joint: str) -> None:
    Path("there.yaml").write_text(MINIMAL)
    assert f"{flag} is 0: expected" in mistake("config", "check", "there.yaml", *f"{flag}{joint}0".split())
