"""Calibrated loading: its statistics against those of the whole model, the same bytes in every setting."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import same_bytes, same_bytes_under_threads
from safetensors.torch import load_file, save_file
from sentences import Check
from test_load_memory import measure, write_model
from tiny_models import assert_same, distance, edit_tensors, logits, save, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import qlora_native as qn
from qlora_native.calibration.layers import FinishedLayers, decoder_layers
from qlora_native.calibration.quantize import CalibratedWeight, quantize_calibrated
from qlora_native.models import calibrate as calibrated
from qlora_native.models.load import load_model
from qlora_native.nn import QuantizedLinear
from qlora_native.tool.cli.main import main

IDS = tokens(6, 40)
Seen = list[tuple[Tensor, str, Any, Any]]  # weight, method, moment, hessian


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The arguments of each call of quantize_calibrated."""
    calls: Seen = []

    def noting(
        weight: Tensor, method: str, moment: Any = None, hessian: Any = None, **options: Any
    ) -> CalibratedWeight:
        calls.append((weight.clone(), method, moment, None if hessian is None else hessian.clone()))
        return quantize_calibrated(weight, method, moment=moment, hessian=hessian, **options)

    monkeypatch.setattr(calibrated, "quantize_calibrated", noting)
    return calls


@torch.no_grad()
def inputs_of_the_whole_model(folder: Path, ids: Tensor = IDS) -> Iterator[tuple[Tensor, Tensor]]:
    """(weight [N, K], its input [tokens, K] in fp64) of every linear and expert, by one forward of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[Any, list[tuple[Tensor, ...]]] = {}

    def note(module: Any, args: tuple[Tensor, ...]) -> None:
        found.setdefault(module, []).append(args)

    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) or path.endswith("experts"):
            module.register_forward_pre_hook(note)
    model(ids, use_cache=False)
    for part, calls in found.items():
        if isinstance(part, (nn.Linear, Conv1D)):
            weight = part.weight if isinstance(part, nn.Linear) else part.weight.t()
            yield weight, torch.cat([x.flatten(0, -2) for (x,) in calls]).double()
            continue
        ((hidden, index, _),) = calls
        for expert in range(len(part.down_proj)):
            x = hidden[(index == expert).any(-1)].double()
            gate, up = (x @ part.gate_up_proj[expert].double().t()).chunk(2, -1)
            yield part.gate_up_proj[expert], x
            yield part.down_proj[expert], nn.functional.silu(gate) * up


def input_of(weight: Tensor, truths: list[tuple[Tensor, Tensor]]) -> Tensor:
    (x,) = [x for truth, x in truths if truth.shape == weight.shape and torch.equal(truth, weight)]
    return x


MIXTRAL = {"num_local_experts": 4}
SLIDING = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "changes", "method"),
    [
        ("Llama", {"attention_bias": True, "tie_word_embeddings": True}, "gptq"),
        ("Gemma3Text", SLIDING, "gptq"),
        ("Phi3", {}, "gptq"),
        ("GPT2", {}, "gptq"),  # transposed
        ("Olmo2", {}, "gptq"),  # the first linears see the hidden states themselves
        ("Falcon", {"new_decoder_architecture": False}, "gptq"),  # attention and MLP side by side
        ("Mixtral", MIXTRAL, "gptq"),
        ("Mamba", {}, "gptq"),
        ("Llama", {}, "wmse"),
        ("Mixtral", MIXTRAL, "wmse"),
    ],
    ids=lambda value: str(value)[:10],
)
def test_statistics_are_those_of_the_whole_model(
    tmp_path: Path, seen: Seen, kind: str, changes: dict[str, Any], method: str
) -> None:
    """The first token of a sequence counts four times for wmse, but in an expert, to which positions are unknown."""
    save(tmp_path, kind, **changes)
    ids = IDS if method == "gptq" else IDS.repeat(1, 6)[:, :200]  # so that every expert gets enough of them
    model = load_model(tmp_path, dtype=torch.float32, method=method, calibration=ids)
    counts = torch.ones(ids.shape, dtype=torch.float64)
    counts[:, 0] = 1 if method == "gptq" else 4
    truths = list(inputs_of_the_whole_model(tmp_path, ids))
    for weight, used, moment, hessian in seen:
        x = input_of(weight, truths)
        by = counts.flatten() if len(x) == counts.numel() else torch.ones(len(x))
        assert distance(moment.double(), (by[:, None] * x.square()).sum(0) / len(x)) < 1e-5
        assert used == method and (hessian is not None) == (method == "gptq")
        assert hessian is None or distance(hessian.double(), x.t() @ x / len(x)) < 1e-5
    assert (model.load_report.method, model.load_report.fell_back) == (method, {})
    stacks = 2 * 2 * 4 if kind == "Mixtral" else 0
    assert len(seen) == sum(isinstance(module, QuantizedLinear) for module in model.modules()) + stacks > 0
    plain = load_model(tmp_path, dtype=torch.float32)
    shapes, expected_shapes = ([(name, p.shape) for name, p in one.named_parameters()] for one in (model, plain))
    assert shapes == expected_shapes
    for name, buffer in plain.named_buffers():
        if "absmax" not in name and "offset" not in name:
            assert torch.equal(buffer, model.get_buffer(name)), name


@pytest.mark.parametrize("method", ["wmse", "gptq"])
def test_the_bytes_do_not_depend_on_threads_nor_on_where_hidden_states_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    save(tmp_path, "Mixtral", torch.bfloat16, num_local_experts=4, hidden_size=320, intermediate_size=96)

    def state() -> list[Tensor]:
        threads = torch.get_num_threads()
        model = load_model(tmp_path, method=method, calibration=IDS, fuse=False)
        assert torch.get_num_threads() == threads
        return list(model.state_dict().values())

    one = same_bytes_under_threads(state, (1, 3))
    monkeypatch.setattr(calibrated, "MOST_IN_MEMORY", 0)
    monkeypatch.setattr(calibrated._C, "lies_in_memory", lambda folder: False)
    assert all(map(same_bytes, state(), one))


def test_the_methods_lose_less_in_the_order_of_their_cost(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path)
    torch.manual_seed(0)
    ids = torch.randint(0, 300, (32, 64))
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    errors = {}
    with torch.no_grad():
        expected = dense(ids[:8]).logits
        for method in ("rtn", "wmse", "gptq"):
            data = None if method == "rtn" else ids
            model = load_model(folder, method=method, calibration=data, dtype=torch.float32)
            errors[method] = float((model(ids[:8]).logits - expected).square().mean())
    assert errors["rtn"] > errors["wmse"] > errors["gptq"], errors


def test_experts_that_few_tokens_reach_are_rounded_and_named(tmp_path: Path, seen: Seen) -> None:
    save(tmp_path, "Mixtral", num_local_experts=4)
    report = load_model(tmp_path, method="gptq", calibration=tokens(2, 40)).load_report
    assert report.fell_back
    for name, why in report.fell_back.items():
        if ".experts." in name:
            assert name.endswith("]") and "expected at least 64: 'rtn'" in why
    assert sum(method == "rtn" for _, method, _, _ in seen) == len(report.fell_back)
    assert f"{len(report.fell_back)} weights were not calibrated" in str(report)


def test_what_stands_outside_the_layers_is_rounded_and_named(tmp_path: Path, sentence: Check) -> None:
    save(tmp_path)
    report = load_model(tmp_path, calibration=IDS, skip_modules=[]).load_report
    assert report.method == "wmse"  # the default with data
    sentence(report.fell_back)
    assert report.calibration["tokens"] == 240 and report.seconds > 0


def test_models_whose_layers_cannot_be_run_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path)
    kind = type(AutoModelForCausalLM.from_pretrained(folder).model)
    forward = kind.forward

    def refused(change: Any, match: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", change)
            with pytest.raises(qn.UserError, match=rf"LlamaForCausalLM cannot be calibrated.*{match}.*'rtn'"):
                load_model(folder, calibration=IDS)

    def backwards(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers, self.layers = self.layers, nn.ModuleList(reversed(self.layers))
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.layers = layers

    refused(backwards, "layer 1 is called after 0 others")
    refused(lambda self, input_ids, **kw: forward(self, input_ids, extra=input_ids, **kw), "depends on the tokens")
    refused(lambda *args, **kw: forward(*args, store={}, **kw), "layer 0 is given store, a dict")

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.num_hidden_layers = 7
    with pytest.raises(qn.UserError, match="no list of 7 decoder layers"):
        decoder_layers(model)


def test_hidden_states_that_overflow_are_settings(tmp_path: Path) -> None:
    edit_tensors(save(tmp_path), lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(1e7))
    with pytest.raises(qn.UserError, match=r"layer 1 .* sequence 0.*torch\.float16.*float32"):
        load_model(tmp_path, calibration=IDS, dtype=torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# Kept beside the weights


def test_method_and_data_are_kept_through_every_way_to_save(tmp_path: Path) -> None:
    saved = tmp_path / "four"
    # bitsandbytes needs whole blocks a row
    base = save(tmp_path / "base", dtype=torch.bfloat16, intermediate_size=128)
    load_model(base, method="gptq", calibration=IDS).save_pretrained(saved)

    def settings(folder: Path) -> Any:
        return json.loads((folder / "config.json").read_text())["quantization_config"]["qlora_native"]

    first = settings(saved)
    assert first["method"] == "gptq"
    assert first["calibration"].keys() == {"sha256", "rows", "length", "tokens", "seed"}
    again = load_model(saved)
    assert (again.load_report.method, again.load_report.calibration) == ("gptq", first["calibration"])
    again.save_pretrained(tmp_path / "again")
    assert settings(tmp_path / "again") == first
    assert_same(load_file(saved / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors"))
    for target in ("qlora", "bitsandbytes"):
        assert main(["convert", str(saved), str(tmp_path / target), "--to", target]) == 0
        assert settings(tmp_path / target) == first
        assert load_model(tmp_path / target).load_report.method == "gptq"
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "qlora")
    assert ours.load_report.method == "gptq"
    assert torch.equal(logits(ours), logits(load_model(saved, fuse=False)))
    ours.save_pretrained(tmp_path / "ours")
    assert settings(tmp_path / "ours") == first
    given = AutoModelForCausalLM.from_pretrained(saved, quantization_config=qn.QLoRANativeConfig())
    assert given.load_report.calibration == first["calibration"]
    with pytest.raises(qn.UserError, match="is 4-bit already: method 'wmse' needs"):
        load_model(saved, calibration=IDS)


# ---------------------------------------------------------------------------------------------------------------------
# The command line, and a run that is killed


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny.write_model(folder / "model", num_hidden_layers=3)
    tiny.write_rows(folder / "rows.jsonl", 60)
    return folder


def quantize(files: Path, out: Path, *words: str) -> list[str]:
    start = ["quantize", str(files / "model"), "--calibration", str(files / "rows.jsonl")]
    return [*start, "--calibration-rows", "8", "--calibration-length", "24", "--out", str(out), *words]


def test_quantize_with_calibration(files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(quantize(files, tmp_path / "wmse", "--json")) == 0
    printed = capfd.readouterr()
    result = json.loads(printed.out)
    assert (result["method"], result["calibration"]["tokens"], result["fell_back"]) == ("wmse", 192, {})
    assert "calibrating: layer 3 of 3" in printed.err
    assert not list(tmp_path.glob(".*"))
    assert load_model(tmp_path / "wmse").load_report.calibration == result["calibration"]
    start = ["quantize", str(files / "model"), "--out", str(tmp_path / "other")]
    for words, match in (
        (quantize(files, tmp_path / "other", "--method", "rtn"), "takes no calibration data"),
        (quantize(files, tmp_path / "other", "--calibration-format", "poem"), "format is 'poem'"),
        ([*start, "--method", "gptq"], "--method gptq"),
        ([*start, "--calibration-rows", "3"], "--calibration-rows needs"),
    ):
        assert main(words) == 2
        assert match in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_sees_a_bar(files: Path, tmp_path: Path) -> None:
    leader, follower = os.openpty()
    command = [sys.executable, "-m", "qlora_native", *quantize(files, tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, env={**os.environ, "TERM": "xterm"}):
        os.close(follower)
        output = b""
        with contextlib.suppress(OSError):  # EIO: the other side has gone
            while part := os.read(leader, 4096):
                output += part
    os.close(leader)
    assert (tmp_path / "out" / "config.json").exists()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    assert re.search(r"calibrating\s+3/3", plain), plain
    assert "━" in plain and "layer 3 of 3" not in plain


KILLED = """
import os, signal, sys
from qlora_native.calibration.layers import HiddenStates
from qlora_native.tool.cli.main import main
write, written = HiddenStates.write, []
def killing(self, row, value, layer):
    write(self, row, value, layer)
    if layer == 2 and row == 3:  # in the middle of the second layer
        os.kill(os.getpid(), signal.SIGKILL)
HiddenStates.write = killing
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(quantize(files, tmp_path / "whole", "--method", "gptq")) == 0
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    out, work = tmp_path / "out", tmp_path / ".out.qlora-calibration"
    words = quantize(files, out, "--method", "gptq")
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    names = ["hidden-0001.bin", "hidden-0002.bin", "layer-0000.safetensors", "run.json"]
    assert sorted(path.name for path in work.iterdir()) == names
    ran: list[int] = []
    calibrate = calibrated._Layers.calibrate

    def noting(self: Any, index: int, *rest: Any) -> Any:
        ran.append(index)
        return calibrate(self, index, *rest)

    monkeypatch.setattr(calibrated._Layers, "calibrate", noting)
    capfd.readouterr()
    assert main(words) == 0
    assert "1 layers are finished already" in capfd.readouterr().err
    assert ran == [1, 2]
    assert not work.exists()
    assert_same(load_file(out / "model.safetensors"), expected)

    # Interrupted again, after the second layer, and started with another seed: from the beginning.
    def interrupt(text: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    def load(seed: int, **options: Any) -> Any:
        data = qn.CalibrationData(files / "rows.jsonl", rows=8, length=24, seed=seed)
        return load_model(files / "model", method="gptq", calibration=data, **options)

    with pytest.raises(KeyboardInterrupt):
        load(0, work_dir=work, progress=interrupt)
    ran.clear()
    lines: list[str] = []
    model = load(1, work_dir=work, progress=lambda text, *_: lines.append(text))
    assert lines[0].startswith("calibration changed since the run")
    assert ran == [0, 1, 2]
    assert_same(model.state_dict(), load(1).state_dict())


def test_layers_of_an_older_format_are_discarded(tmp_path: Path) -> None:
    run = {"method": "gptq"}
    FinishedLayers(tmp_path, run)
    assert FinishedLayers(tmp_path, run).changed == []
    (tmp_path / "run.json").write_text(json.dumps(run))  # as before formats had numbers
    save_file({"weight": torch.ones(2)}, tmp_path / "layer-0000.safetensors", {"names": "[]"})
    (tmp_path / "hidden-0001.bin").touch()
    finished = FinishedLayers(tmp_path, run)
    assert (finished.count, finished.changed) == (0, ["format"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_training_calibrates_with_its_own_rows_but_those_held_out(files: Path, tmp_path: Path) -> None:
    from qlora_native.calibration.data import quantize_command
    from qlora_native.data.dataset import load_split
    from qlora_native.tool.config import TrainConfig
    from qlora_native.tool.train.setup import prepare_model
    from qlora_native.weights.open import load_tokenizer

    def config(model: Path = files / "model", **quant: Any) -> TrainConfig:
        data = {"train": str(files / "rows.jsonl"), "eval_fraction": 0.5}
        given = {"model": str(model), "output_dir": str(tmp_path / "run"), "data": data, "quant": quant}
        return TrainConfig.model_validate(given)

    tokenizer = load_tokenizer(str(files / "model"))
    rows, _ = load_split(tokenizer=tokenizer, **config().row_options)
    with pytest.raises(qn.UserError, match=r"calibration: \d+ tokens of text, .* 2,048"):
        prepare_model(config(method="wmse"), None, rows, quiet=True)
    with pytest.raises(qn.UserError, match=r"quant\.calibration is x, .*method rtn takes no text"):
        prepare_model(config(calibration="x"), None, rows, quiet=True)
    long = rows.subset(list(range(len(rows))) * 8)
    model = prepare_model(config(method="wmse"), None, long, quiet=True)
    documents = [torch.from_numpy(row["input_ids"].copy()) for row in long]
    expected = load_model(files / "model", method="wmse", calibration=documents).load_report.calibration
    assert (model.load_report.method, model.load_report.calibration) == ("wmse", expected)
    # What it was calibrated on is kept, and makes the same bytes by the command that the card names.
    kept, made = tmp_path / "run" / "calibration.safetensors", tmp_path / "base"
    command = quantize_command(str(files / "model"), {"method": "wmse"}, "bfloat16", kept, str(made))
    program, *words = shlex.split(command)
    assert program == "qlora" and main(words) == 0
    again = load_model(made)
    assert again.load_report.calibration == expected
    ours = {name.replace(".base_layer.", "."): t for name, t in model.state_dict().items() if ".lora_" not in name}
    assert_same(ours, again.state_dict())
    # Given those files, the same config has nothing to calibrate.
    again = prepare_model(config(made, method="wmse"), None, rows, quiet=True)
    assert again.load_report.calibration == expected
    with pytest.raises(qn.UserError, match="is 4-bit already: method 'gptq' needs"):
        prepare_model(config(made, method="gptq"), None, long, quiet=True)


def test_a_run_with_too_few_rows_to_calibrate_rounds_and_says_so(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sentence: Check
) -> None:
    """What `qlora config init` writes, on the six rows of the tutorial; resuming finds the method that was used."""
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(tmp_path / "train.jsonl", 6)
    assert main(["config", "init", "--out", "config.yaml"]) == 0
    words = ["train", "config.yaml", "--model", str(files / "model"), "--output_dir", "run", "--save_every", "1"]
    capsys.readouterr()
    assert main([*words, "--steps", "1"]) == 0
    sentence(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("quant.method")))
    assert "method: rtn" in (tmp_path / "run" / "adapter" / "config.yaml").read_text()
    assert main([*words, "--steps", "2", "--resume"]) == 0
    assert "after step 1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Memory beyond plain loading: a layer in 16 bits, its statistics, work on it

HIDDEN, INNER, LAYERS, VOCAB = 768, 2304, 2, 4096
ROWS, LENGTH, THREADS = 16, 128, 2


@pytest.mark.slow_memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.long
@pytest.mark.parametrize("method", ["wmse", "gptq"])
def test_peak_is_the_plain_one_and_a_layer(tmp_path: Path, method: str) -> None:
    _, largest = write_model(tmp_path, HIDDEN, INNER, LAYERS, VOCAB)
    ids = f"torch.arange({ROWS * LENGTH}).view({ROWS}, {LENGTH})"
    peak, _, num_bytes, _ = measure(tmp_path, f"load_model(sys.argv[1], method={method!r}, calibration={ids})")
    plain = (num_bytes + largest) * 1.1
    layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    hidden = 2 * ROWS * LENGTH * HIDDEN
    statistics, factors = 0, 0
    if method == "gptq":
        statistics = 4 * (3 * HIDDEN**2 + INNER**2)
        factors = 10 * INNER**2  # one at a time: in fp64, and as the loop over columns reads it
    # A sequence in flight, parts of a weight in fp32, and what the heap of each thread keeps.
    work = THREADS * (24 if method == "gptq" else 12) * 2**20
    figures = f"{method}: peak {peak:,} bytes; plain {plain:,.0f}, layer {layer:,}, statistics {statistics:,}"
    print(figures)
    assert peak <= plain + layer + hidden + statistics + factors + work, figures
