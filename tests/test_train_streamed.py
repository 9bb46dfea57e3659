"""Training on weights that stay in the files: as in memory, whatever is killed, cut short, changed or removed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from gguf_files import write_gguf
from runs import metrics, steps_made, wait_until
from transformers import AutoTokenizer

import qlora_native as qn
from qlora_native import _C
from qlora_native._memory import Free
from qlora_native.errors import UserError
from qlora_native.models import mapped
from qlora_native.models.convert import convert
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer, TrainSummary
from qlora_native.weights.files import read_header

pytestmark = [
    pytest.mark.skipif(not hasattr(_C, "MappedFile"), reason="files are mapped on Linux"),
    pytest.mark.usefixtures("one_thread"),  # as in the subprocesses: their number changes the order of sums
]
STEPS = 4
WEIGHTS = Path("model", "model.safetensors")
ADAPTER = Path("adapter", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit folder with six layers, rows, and the output of a streamed run that nothing happened to, ``whole``."""
    folder = tmp_path_factory.mktemp("streamed")
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_key_value_heads": 4}
    tiny.write_model(folder / "dense", **sizes)
    (folder / "model").mkdir()
    convert(folder / "dense", folder / "model", "qlora")
    tiny.write_rows(folder / "train.jsonl", 20)
    train(folder, "whole")
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    """A copy of it all."""
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def settings(files: Path, name: str, **options: Any) -> dict[str, Any]:
    """A streamed run: of its layers, none stays."""
    train = {"steps": STEPS, "batch_size": 2, "grad_accum": 2, "lr": 5e-3, "save_every": 1}
    made = runs.settings(files, files / name, lora={"r": 4, "dropout": 0.1}, **train)
    return {**made, "residency": "mapped", "weight_budget": 1, **options}


def train(files: Path, name: str, on_step: Any = None, **options: Any) -> TrainSummary:
    return Trainer(TrainConfig.model_validate(settings(files, name, **options)), on_step=on_step).train()


def assert_same(out: Path, other: Path) -> None:
    assert metrics(out) == metrics(other)
    assert (out / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in other.iterdir())


def test_a_streamed_run_is_the_run_in_memory_and_tells_of_it(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(files, "memory", residency="memory", weight_budget=None).weight_bytes_read == 0
    assert "layers are read" not in capsys.readouterr().out
    summary = train(files, "streamed")
    assert_same(files / "streamed", files / "memory")
    layers = sum(t.num_bytes for n, t in read_header(files / WEIGHTS).items() if ".layers." in n and t.num_bytes >> 16)
    # In each pass there and back, all but those in the two slots; what the start and the end read besides is less.
    assert 2 * STEPS * layers < summary.weight_bytes_read < 4 * STEPS * layers
    streamed = capsys.readouterr().out
    assert "6 of 6 layers" in streamed
    assert "did not fit" in streamed
    held = json.loads((files / "streamed" / "report.json").read_text())["memory"]["mapped"]
    assert layers / 3 < held < layers  # two of six layers, and the head
    found = re.findall(
        r"([\d,]+) MiB of it are mapped weights, of ([\d,]+) MiB in the files; .* ([\d,]+) MiB", streamed
    )
    (part, whole, beside), *others = [[int(text.replace(",", "")) for text in each] for each in found]
    assert part < whole < beside and part == round(held / 2**20) and not others


def test_a_gguf_file_streams_as_a_folder_does(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "gguf").mkdir()
    model = str(write_gguf(files / "gguf" / "model.gguf", num_hidden_layers=4))
    train(files, "memory", model=model, residency="memory", weight_budget=None)
    assert train(files, "streamed", model=model).weight_bytes_read > 0
    assert "4 of 4 layers" in capsys.readouterr().out
    assert_same(files / "streamed", files / "memory")
    with pytest.raises(UserError, match="no weight of .*/dense is mapped"):
        train(files, "dense", model=str(files / "dense"), residency="auto")


def test_weights_stream_where_they_do_not_fit_what_is_free(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for free, streams in ((1 << 40, False), (1 << 20, True)):
        limit = Free(free, free, "a test's limit")
        monkeypatch.setattr(mapped, "free_memory", partial(Free, *limit))
        summary = train(files, f"free-{free}", weight_budget=None, residency="auto")
        assert (summary.weight_bytes_read > 0) is streams
        assert ("a test's limit" in capsys.readouterr().out) is streams
        words = ["--prompt", "what is red?", "--max-tokens", "2"]
        assert main(["chat", str(files / "model"), *words]) == 0
        assert ("layers are read" in capsys.readouterr().err) is streams


def test_a_killed_streamed_run_leaves_nothing_and_goes_on_with_the_same_bits(
    files: Path, request: pytest.FixtureRequest
) -> None:
    expected = {path.name for path in files.iterdir()} | {"config.yaml", "killed"}
    for number in range(request.config.getoption("kills")):
        process = runs.start(settings(files, "killed"), files)
        least = 1 - number % 2  # every other one is killed while it loads, or takes its first step
        wait_until(lambda: (files / "killed").is_dir() and steps_made(files / "killed") >= least, process)  # noqa: B023
        time.sleep(random.Random(process.pid).uniform(0, 0.2 + number % 2))  # some three steps
        process.kill()
        process.communicate()
        train(files, "killed", resume="auto")
        assert_same(files / "killed", files / "whole")
        assert {path.name for path in files.iterdir()} == expected
        shutil.rmtree(files / "killed")


def test_a_file_that_is_cut_short_ends_the_run_with_a_sentence(files: Path) -> None:
    whole = (files / WEIGHTS).read_bytes()
    process = runs.start(settings(files, "cut"), files)
    wait_until(lambda: steps_made(files / "cut") >= 2, process)
    os.truncate(files / WEIGHTS, len(whole) // 3)
    out, errors = process.communicate()
    assert process.returncode == 2, (out, errors)
    assert "Traceback" not in errors and "Bus error" not in errors
    assert len([line for line in errors.splitlines() if "model.safetensors" in line]) == 1
    (files / WEIGHTS).write_bytes(whole)
    train(files, "cut", resume="auto")
    assert_same(files / "cut", files / "whole")


def test_a_page_that_is_gone_ends_the_process_with_a_sentence(files: Path) -> None:
    code = (
        "import os, sys, qlora_native as qn; model = qn.load_model(sys.argv[1] + '/model'); "
        "os.truncate(sys.argv[1] + '/model/model.safetensors', 4096); model.lm_head.weight.sum()"
    )
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, str(files)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("the last checkpoint is intact.")
    assert "Fatal Python error" not in done.stderr


def test_a_changed_file_is_noticed_within_a_step(files: Path) -> None:
    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            os.utime(files / WEIGHTS)

    with pytest.raises(UserError, match="was written to"):
        train(files, "changed", on_step)
    assert steps_made(files / "changed") == 2


def test_a_removed_file_serves_to_the_end(files: Path) -> None:
    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            (files / WEIGHTS).unlink()

    train(files, "removed", on_step)
    assert_same(files / "removed", files / "whole")


def put_nan(files: Path, name: str, row: int) -> None:
    """In place of the first number of a row of 256, in 16 bits."""
    stored = read_header(files / WEIGHTS)[name]
    with (files / WEIGHTS).open("r+b") as file:
        file.seek(stored.start + 2 * 256 * row)
        file.write(torch.full((1,), float("nan")).bfloat16().view(torch.uint8).numpy().tobytes())


def test_a_nan_in_a_row_that_no_text_uses_changes_nothing(files: Path) -> None:
    words = (files / "train.jsonl").read_text(encoding="utf-8")
    unused, used = (AutoTokenizer.from_pretrained(files / "model").convert_tokens_to_ids(sign) for sign in "#?")
    assert "#" not in words and "?" in words
    put_nan(files, "model.embed_tokens.weight", unused)
    train(files, "unused")
    assert_same(files / "unused", files / "whole")
    put_nan(files, "model.embed_tokens.weight", used)
    with pytest.raises(UserError, match=r"tensor model.embed_tokens.weight holds a NaN"):
        train(files, "used")


def test_a_nan_is_named_when_a_loss_shows_it(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_nan(files, "lm_head.weight", 5)
    qn.load_model(files / "model")  # which reads nothing
    named = "tensor lm_head.weight holds a NaN"
    with pytest.raises(UserError, match=named):
        train(files, "nan", weight_budget=None)
    assert main(["eval", str(files / "model"), "--data", str(files / "train.jsonl")]) == 2
    assert named in capsys.readouterr().err
    with pytest.raises(UserError, match=named):
        qn.load_model(files / "model", residency="memory")
