"""Several Python threads, torch's number of threads, forked processes and spawned ones."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from helpers import exit_code_of_fork, needs_page_files
from paged import OPTIMIZERS, parameters, train
from torch import Tensor
from torch.utils.data import DataLoader

import qlora_native as qn
from qlora_native import _interrupt, _threads
from qlora_native._threads import CHOSEN

M, N, K, R = 96, 320, 512, 8  # of which several threads take parts
needs_forks = pytest.mark.skipif(sys.platform != "linux", reason="forks, and threads in /proc, are Linux's")


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def weight() -> qn.QuantizedWeight:
    return qn.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(1)))


def results(w: qn.QuantizedWeight, paged: bool = False) -> list[bytes]:
    """Of every kind of native call, on operands that are the same at each call."""
    generator = torch.Generator().manual_seed(2)
    tensors: list[Tensor | None] = []
    for dtype in (torch.float32, torch.bfloat16):
        made = qn.quantize(torch.randn(N, K, generator=generator).to(dtype))
        tensors += [made.packed, made.absmax, w.dequantize(dtype), made.dequantize(dtype)]
        leaves = [torch.randn(shape, generator=generator) for shape in ((M, K), (R, K), (N, R))]
        x, a, b = leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        with torch.no_grad():
            tensors += [qn.linear(x[:1], w), qn.lora_linear(x[:1], w, a, b, 2.0)]
        tensors.append(y := qn.lora_linear(x, w, a, b, 2.0))
        tensors.append(loss := qn.linear_cross_entropy(x, w, torch.arange(M)))
        (loss + y.float().square().mean()).backward()
        tensors += [leaf.grad for leaf in leaves]
    with tempfile.TemporaryDirectory() as folder:
        for rule in OPTIMIZERS:
            params = parameters(sizes=(5, 70_000, 200_000))
            options = {"paged": True, "page_dir": folder, "page_budget": 1 << 20} if paged else {"paged": False}
            optimizer: Any = rule(params, lr=1e-2, max_norm=1.0, **options)
            train(optimizer, params, range(3))
            tensors += params
            tensors += [value for param in params for value in optimizer.state[param].values()]
        del optimizer
    found = (t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors if t is not None)
    return list(found)


@pytest.mark.isa
@pytest.mark.parametrize("paged", [False, pytest.param(True, marks=needs_page_files)])
def test_eight_threads_give_the_bytes_of_one(paged: bool) -> None:
    w, count = weight(), 8
    expected, start = results(w), threading.Barrier(count)

    def together(_: int) -> bool:
        start.wait()
        return all(results(w, paged) == expected for _ in range(2))

    with ThreadPoolExecutor(count) as threads:
        assert all(threads.map(together, range(count)))


STORES = """from concurrent.futures import ThreadPoolExecutor
from qlora_native import _C
with ThreadPoolExecutor(8) as threads:
    list(threads.map(lambda _: [_C.FileStore(0, "", False) for _ in range(8000)], range(8)))
"""


def test_eight_threads_make_stores() -> None:
    """pybind11 lists every object in one table, by the thread that holds Python's lock."""
    assert subprocess.run([sys.executable, "-c", STORES]).returncode == 0


@needs_forks
@pytest.mark.parametrize("count", [1, 5])
def test_a_new_thread_takes_as_many_threads_as_torch(count: int) -> None:
    def started() -> int:
        """Threads that its first native loop starts."""
        before = os.listdir("/proc/self/task")
        qn.quantize(values, double_quant=False)  # one loop: a shorter one after it would end a thread
        return len({*os.listdir("/proc/self/task")}.difference(before))

    values = torch.randn(1 << 20)
    torch.set_num_threads(count)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(started).result() == count - 1


@needs_forks
@pytest.mark.parametrize("by_thread", [False, True])
def test_a_forked_child_goes_on(by_thread: bool) -> None:
    """Native loops and torch's on several threads, after both have run in the parent; no backward passes, which a torch
    that was built with CUDA refuses in a child."""
    w, values, x = weight(), torch.randn(1 << 20), torch.randn(M, K)

    def everything() -> list[bytes]:
        made = qn.quantize(values), w.dequantize(), qn.linear(x, w), values.exp()
        return [made[0].packed.numpy().tobytes(), *(tensor.numpy().tobytes() for tensor in made[1:])]

    def in_child() -> None:
        assert torch.get_num_threads() == 3 and everything() == expected
        assert len(os.listdir("/proc/self/task")) >= 3

    def fork() -> None:
        expected.extend(everything())
        found.extend([exit_code_of_fork(in_child), torch.get_num_threads(), everything() == expected])

    expected: list[bytes] = []
    found: list[int | None] = []
    if by_thread:
        thread = threading.Thread(target=fork)  # no executor's, which a child cannot leave behind
        thread.start()
        thread.join()
    else:
        fork()
    assert found == [0, 3, True]


def rolled(w: qn.QuantizedWeight, rows: list[int]) -> Tensor:
    """A batch of weights that are decoded and quantized where they are loaded."""
    return torch.stack([qn.quantize(w.dequantize().roll(row)).packed for row in rows])


@pytest.mark.parametrize("method", [pytest.param("fork", marks=needs_forks), "spawn"])
def test_workers_of_a_data_loader(method: str) -> None:
    collate: Any = partial(rolled, weight())
    options: Any = {"num_workers": 2 if method == "fork" else 1, "multiprocessing_context": method, "timeout": 120}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        (batch,) = DataLoader(range(4), batch_size=4, collate_fn=collate, **options)  # type: ignore[arg-type]
    assert torch.equal(batch, collate(range(4)))


# Prints how often threads went to sleep in 2,000 small sums, and how many threads there are, first while one is said to
# wait for a CPU, then not.
# The first such second passes while torch has as many threads as the argument says, as it has one in a calibration.
SLEEPS = """
import os, resource, sys, time, torch
from qlora_native import _threads
torch.set_num_threads(2)
busy, x = [True], torch.zeros(1 << 17)
_threads.SECONDS, _threads._waited = 0.01, lambda: {"1": time.monotonic() * busy[0]}
_threads.sleep_while_busy()
torch.set_num_threads(int(sys.argv[1]))
for busy[0] in (True, False):
    time.sleep(1)
    torch.set_num_threads(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(2000):
        x.add_(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux" or os.cpu_count() == 1, reason="libgomp is Linux's, and needs two CPUs")
@pytest.mark.parametrize("meanwhile", [1, 2])
def test_threads_sleep_while_other_programs_want_the_cpus(meanwhile: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    done = subprocess.run(
        [sys.executable, "-c", SLEEPS, str(meanwhile)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    sleeps, threads, _, threads_if_idle = map(int, done.stdout.split())  # the third is as large beside real programs
    assert sleeps > 1000 and threads - threads_if_idle > (os.cpu_count() or 1)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_how_long_threads_have_waited_is_read() -> None:
    waited = _threads._waited()
    assert str(threading.get_native_id()) in waited and all(seconds >= 0 for seconds in waited.values())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/opt/bin/qlora", "train"], True),
        (["C:/Scripts/qlora.exe", "train"], True),
        (["/opt/bin/qlora-page", "train"], False),
        (["train.py", "qlora"], False),
    ],
)
def test_the_script_is_a_command(words: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "orig_argv", ["python", *words])
    assert _interrupt.is_command() is expected


@pytest.mark.parametrize(
    ("chosen", "threads", "expected"), [({}, 2, 1), ({CHOSEN[0]: "x"}, 2, 0), ({CHOSEN[1]: "9"}, 2, 0), ({}, 1, 0)]
)
def test_loading_looks_at_the_cpus_once(
    chosen: dict[str, str], threads: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_models.save(tmp_path, num_hidden_layers=1)
    for name in CHOSEN:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(threads)
    started: list[object] = []
    monkeypatch.setattr(_threads, "_watch", lambda: started.append(1))
    theirs = partial(AutoModelForCausalLM.from_pretrained, quantization_config=qn.QLoRANativeConfig())
    for load in (qn.load_model, theirs):
        _threads._start.cache_clear()
        load(folder)
        _threads.sleep_while_busy()
        assert len(started) == expected
        started.clear()
    _threads._start.cache_clear()
