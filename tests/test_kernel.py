"""A notebook's kernel: plain lines, mistakes as sentences, an interrupt that saves, and a second run that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import runs
from runs import steps_made, wait_until, write_files

from qlora_native.tool.train.checkpoint import checkpoints

client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")

STEPS = 7
TRAINED = "adapter/adapter_model.safetensors"
# Each step of the run is slow enough to interrupt one in the middle.
BEGIN = """
import gc, json, signal, time, weakref
import torch, qlora_native as qn
from qlora_native.tool.train import loop
torch.set_num_threads(1)
plain, begun = loop.learning_rate, signal.getsignal(signal.SIGTERM)
def run(name, slow=False, **changes):
    global alive
    loop.learning_rate = lambda *args, **options: time.sleep(0.3 * slow) or plain(*args, **options)
    trainer = qn.Trainer(qn.TrainConfig.from_values({**json.loads(files[name]), **changes}))
    alive = weakref.ref(trainer)
    return trainer.train()
"""


class Cell(NamedTuple):
    """What a cell left: its output, and the error that a notebook shows, if any."""

    text: str
    error: dict[str, Any] | None


class Kernel:
    def __init__(self, folder: Path) -> None:
        self.manager, self.client = client.manager.start_new_kernel(kernel_name="python3", cwd=str(folder))

    def start(self, code: str) -> str:
        return str(self.client.execute(code))

    def finish(self, cell: str) -> Cell:
        text, error = "", None
        while True:
            message = self.client.get_iopub_msg(timeout=180)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != cell:
                continue
            if kind == "stream":
                text += content["text"]
            elif kind == "error":
                error = content
            elif kind == "status" and content["execution_state"] == "idle":
                return Cell(text, error)

    def run(self, code: str) -> str:
        """The output of a cell that must not fail."""
        cell = self.finish(self.start(code))
        assert cell.error is None, cell
        return cell.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Iterator[Kernel]:
    options = {"steps": STEPS, "batch_size": 3, "grad_accum": 2, "eval_every": 3, "log_every": 2}
    data, lora = {"eval_fraction": 0.2}, {"r": 4, "alpha": 8, "dropout": 0.3}
    files = {name: json.dumps(runs.settings(folder, folder / name, data, lora, **options)) for name in ("one", "two")}
    kernel = Kernel(folder)
    try:
        kernel.run(f"files = {files!r}\n{BEGIN}")
        yield kernel
    finally:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel(now=True)


def is_released(kernel: Kernel) -> bool:
    """Whether nothing holds the trainer of the last run, and with it the model."""
    return kernel.run("gc.collect(); print(alive() is None)") == "True\n"


def test_a_run_prints_plain_lines(kernel: Kernel, folder: Path) -> None:
    text = kernel.run("run('one')\n0;")
    assert [line.split()[1] for line in text.splitlines() if line.startswith("step ") and "loss" in line] == [
        f"{step}/{STEPS}" for step in (0, 1, 2, 3, 4, 6, 6, 7, 7)
    ]
    assert "\x1b" not in text and "\r" not in text
    assert (folder / "one" / TRAINED).is_file()


def test_a_mistake_is_its_sentence_alone(kernel: Kernel) -> None:
    cell = kernel.finish(kernel.start("run('two', data={'train': 'none.jsonl'})"))
    assert cell.error is not None and cell.error["ename"] == "UserError"
    (shown,) = cell.error["traceback"]
    assert shown == f"UserError: {cell.error['evalue']}" and "none.jsonl" in shown and "\n" not in shown
    assert is_released(kernel)
    cell = kernel.finish(kernel.start("qn.quantize(torch.zeros(4), quant_type='nf5')"))  # a wrong call has its place
    assert cell.error is not None and len("\n".join(cell.error["traceback"]).splitlines()) > 4


def test_an_interrupt_saves_and_the_next_run_goes_on(kernel: Kernel, folder: Path) -> None:
    kernel.run("run('one', output_dir='whole')\n0;")
    started = kernel.start("run('two', slow=True)")
    wait_until(lambda: steps_made(folder / "two") >= 2)
    kernel.manager.interrupt_kernel()
    cell = kernel.finish(started)
    assert cell.error is not None and cell.error["ename"] == "Interrupted", cell
    (saved,) = checkpoints(folder / "two")
    (shown,) = cell.error["traceback"]
    assert str(saved) in shown and steps_made(folder / "two") == int(saved.name[5:]) < STEPS
    assert is_released(kernel)
    assert kernel.run("print(signal.getsignal(signal.SIGTERM) == begun)") == "True\n"

    cell = kernel.finish(kernel.start("run('two')"))  # without a word it would train the same steps again
    assert cell.error is not None and cell.error["ename"] == "UserError"
    assert kernel.run("print(run('two', resume='auto').steps)").splitlines()[-1] == str(STEPS)
    assert (folder / "two" / TRAINED).read_bytes() == (folder / "whole" / TRAINED).read_bytes()


def test_an_interrupt_outside_of_a_run_is_the_usual_one(kernel: Kernel, folder: Path) -> None:
    started = kernel.start("open('begun', 'w').close(); time.sleep(60)")
    wait_until((folder / "begun").exists)
    kernel.manager.interrupt_kernel()
    cell = kernel.finish(started)
    assert cell.error is not None and cell.error["ename"] == "KeyboardInterrupt"
