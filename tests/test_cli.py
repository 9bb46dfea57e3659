"""The command line from outside: exit codes, one sentence for a mistake, what each command prints and writes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import tiny
import torch
import yaml
from helpers import needs_page_files
from laws import ROOT
from sentences import Check
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_native as qn
from qlora_native.nn import QuantizedLinear
from qlora_native.ops import _library
from qlora_native.tool.cli import doctor, main
from qlora_native.tool.cli._run import DISTRIBUTIONS
from qlora_native.tool.cli.main import COMMANDS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_files(tmp_path_factory.mktemp("files"), rows=8)
    config = runs.settings(folder, folder / "out", steps=2, batch_size=2, grad_accum=1)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    # Bad inputs.
    (folder / "empty").mkdir()
    shutil.copytree(folder / "model", folder / "bare", ignore=shutil.ignore_patterns("*token*", "chat_template*"))
    first = (folder / "train.jsonl").read_text().splitlines()[0]
    (folder / "broken.jsonl").write_text(first + '\n{"messages": [\n')
    shutil.copytree(folder / "model", folder / "nan")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(folder / "nan")
    return folder


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT / "tests")


# ---------------------------------------------------------------------------------------------------------------------
# The dispatcher


def test_help_of_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main.main([command, "--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert re.search(rf"examples?:\n(  .*\n)*  qlora {command}", printed), command


def test_help_of_train_names_values_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["train", "--help"])
    printed = capsys.readouterr().out
    for line in (
        "--train.scheduler            cosine, linear, constant (default cosine): ",
        "--logging                    list of tensorboard, trackio, wandb, mlflow (default []): ",
        "--lora.r                     whole number (default 16): ",
        "--data.train                 text or list of texts (required): ",
    ):
        assert line in printed


@pytest.mark.parametrize(
    ("name", "meant"), [("finetune", "train"), ("sft", "train"), ("qaunt", ""), ("exprot", "export")]
)
def test_a_command_of_another_name_is_suggested(name: str, meant: str, mistake: Any) -> None:
    assert (f"did you mean `qlora {meant}`?" in mistake(name)) == bool(meant)


def test_the_top_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^  (\w+) {2,}\w", printed.partition("commands:")[2], re.MULTILINE) == list(COMMANDS)
    assert main.main([]) == 2
    assert "commands:" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["--version"])
    assert capsys.readouterr().out == f"qlora_native {qn.__version__}\n"


@pytest.mark.parametrize("module", ["qlora_native", "qlora_native.tool.cli.main"])
def test_runs_as_a_module(module: str, sentence: Check) -> None:
    done = python("-m", module, "trian", "x")
    assert done.returncode == 2
    sentence(done.stderr)


def test_a_bug_shows_its_trace_and_exits_with_1() -> None:
    code = "from qlora_native.tool.cli import doctor, main\ndoctor.examine = lambda: 1 / 0\nmain.main(['doctor'])"
    done = python("-c", code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_ctrl_c_outside_the_loop_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert main.main(["doctor"]) == 130
    assert capsys.readouterr().err == "qlora: interrupted\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys\nfrom qlora_native.tool.cli.main import main\nsys.exit(main(['config', 'init']))"
    script = '"$0" -c "$1" | true; echo "${PIPESTATUS[0]}"'
    done = subprocess.run(["bash", "-c", script, sys.executable, code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("0\n", "")


# ---------------------------------------------------------------------------------------------------------------------
# train


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("learning_rate", "1"),
        *(("model", f"{{files}}/{name}") for name in ("gone", "empty", "bare", "nan")),
        *(("data.train", f"{{files}}/{name}.jsonl") for name in ("gone", "broken")),
        ("target_modules", "[q_prj]"),
        ("output_dir", "{files}/train.jsonl"),
        ("resume", "{files}/gone"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_lost(
    files: Path, flag: str, value: str, mistake: Callable[..., str], sentence: Check
) -> None:
    line = mistake("train", files / "config.yaml", f"--{flag}", value.format(files=files))
    line = re.sub(r"\([\d,]+ MiB free\)", "(N MiB free)", line)
    sentence(re.sub(r"(no usable tokenizer in \S+) \(.*\)", r"\1 (REASON)", line))  # which is transformers'
    assert not (files / "out" / "adapter").exists()


def test_train_from_the_command_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["--output_dir", str(out), "--steps=3", "--save_every", "2"]
    assert main.main(["train", str(files / "config.yaml"), *words]) == 0
    printed = capsys.readouterr().out
    assert "step 3/3" in printed and f"adapter: {out / 'adapter'}" in printed
    assert (out / "step-000003" / "trainer.json").is_file()
    model = qn.load_adapter(qn.load_model(files / "model"), out / "adapter")
    assert any("lora_B" in name and bool(value.any()) for name, value in model.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# quantize and doctor


@torch.no_grad()
def test_quantize_writes_what_bitsandbytes_loads(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: Callable[..., str]
) -> None:
    out = tmp_path / "4bit"
    assert main.main(["quantize", str(files / "model"), "--out", str(out), "--block-size", "32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ours = qn.load_model(out)
    assert (result["out"], result["tokenizer"]) == (str(out), True)
    assert (result["bytes_4bit"], result["bytes_dense"]) == (ours.load_report.bytes_4bit, ours.load_report.bytes_dense)
    # As they attend: without bf16 products ours rounds less.
    direct = qn.load_model(files / "model", block_size=32, fuse=False)
    layers = [name for name, module in direct.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14
    for name in layers:
        stored, expected = ours.get_submodule(name).quantized, direct.get_submodule(name).quantized
        assert stored.block_size == 32
        assert torch.equal(stored.packed, expected.packed) and torch.equal(stored.absmax, expected.absmax)
    form = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {"quant_method": "bitsandbytes", **form}.items() <= described.items()

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    theirs = AutoModelForCausalLM.from_pretrained(out).train()  # in training mode it decodes the plain layout
    ids = tokenizer("what is red?", return_tensors="pt").input_ids
    expected, got = theirs(ids).logits.float(), direct(ids).logits.float()
    assert float((got - expected).norm() / expected.norm()) < 1e-3
    assert "is 4-bit already" in mistake("quantize", out, "--out", tmp_path / "again")


def test_quantize_options_reach_the_weights(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "4bit"
    words = ["--quant-type", "fp4", "--no-double-quant", "--dtype", "float32", "--skip-modules", "lm_head", "o_proj"]
    assert main.main(["quantize", str(files / "model"), "--out", str(out), *words, "--shard-size", "100KB"]) == 0
    model = qn.load_model(out, dtype=torch.float32)
    weight = model.model.layers[0].self_attn.q_proj.quantized
    assert (weight.quant_type, weight.double_quant, weight.dtype) == ("fp4", False, torch.float32)
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    assert len(list(out.glob("model-*.safetensors"))) > 1


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["build"] == qn.build_info()
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    plain = importlib.util.find_spec
    gone = {"gguf", "yaml", "peft"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else plain(name))
    assert main.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"{qn.build_info()['cpu_isa']} in use" in printed
    assert "missing: pyyaml, gguf; " in printed and "pip install pyyaml gguf\n" in printed
    gone -= {"gguf", "yaml"}
    assert main.main(["doctor"]) == 0
    *_, last, optional = capsys.readouterr().out.splitlines()
    assert last == "nothing is missing" and "peft" in optional and "missing" not in optional


@needs_page_files
def test_doctor_reports_whether_states_can_be_paged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["doctor"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("paging"))
    kind = subprocess.run(["stat", "-f", "-c", "%T", "."], capture_output=True, text=True).stdout.strip()
    assert re.search(rf"possible in {tmp_path} \(\w+, [\d.]+ GiB free\); [\d.]+ of [\d.]+ ", line), line
    assert doctor.examine()["paging"]["file_system"][:3] == kind[:3]  # stat prints ext2/ext3 of an ext4
    assert list(tmp_path.iterdir()) == []

    monkeypatch.chdir("/proc")
    paging = doctor.examine()["paging"]
    assert paging["file_system"] == "proc" and paging["refused"]
    assert main.main(["doctor"]) == 0
    assert f"paging        /proc: {paging['refused']}" in capsys.readouterr().out


@pytest.mark.parametrize("moves", [True, False])
def test_doctor_reports_how_a_device_pages(monkeypatch: pytest.MonkeyPatch, moves: bool, sentence: Check) -> None:
    properties = SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    module = SimpleNamespace(has_concurrent_managed_access=lambda number: moves)
    monkeypatch.setattr(_library, "module_for", lambda device: module)
    sentence("\n".join(doctor._cuda_devices()))


def test_doctor_has_the_extras_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for extra, names in doctor.EXTRAS.items():
        (listed,) = re.findall(rf"^{extra} = \[(.*)\]$", text, re.MULTILINE)
        packages = [re.match(r"[\w-]+", item)[0] for item in re.findall(r'"([^"]+)"', listed)]  # type: ignore[index]
        ours = [DISTRIBUTIONS.get(name, name).replace("_", "-") for name in names.split()]
        assert [name.replace("_", "-") for name in packages if name != "qlora_native"] == ours


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_under_the_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main.main(["config", "list"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qlora") and "No space left" in line
