"""The CUDA part as far as a machine without a GPU or a toolkit can see it, and its bits where there is a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import revert
import torch
from emulated import arguments, names_in_stub
from helpers import same_bytes
from laws import ROOT
from sentences import Check

import qlora_native as qn
from qlora_native import errors
from qlora_native.ops import _cuda_kernels, _library
from qlora_native.ops.linear_4bit import DECODED, cuda_engine
from qlora_native.tool.cli import doctor

COMPILER = shutil.which("g++") or shutil.which("clang++")
compiles = pytest.mark.skipif(COMPILER is None, reason="no g++ on PATH")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Wsign-conversion", "-Werror")

# A call whose addresses are never read: the checks come first.
CALL: dict[str, Any] = {"dtype": 1, "out": 4096, "panel": (64, 0, 1, 0, 64), "stream": 0, "weight": {}}


@pytest.fixture
def cuda() -> Any:
    if not qn.build_info()["cuda"]:
        pytest.skip("no nvcc on PATH when this was built")
    from qlora_native import _cuda

    return _cuda


def test_the_module_loads_without_a_device(cuda: Any) -> None:
    """With the names of the stub; and nothing to decode needs no device."""
    assert names_in_stub() == {name for name in vars(cuda) if not name.startswith("_")}
    cuda.dequantize_4bit(**arguments(CALL, numel=0, out=0, packed=0, absmax=0, panel=(0, 0, 1, 0, 0)))
    assert cuda.device_count() >= 0 and cuda.runtime_version() >= 12000 and cuda.driver_version() >= 0
    if torch.cuda.is_available() and cuda.driver_version() >= cuda.runtime_version():
        assert cuda.device_count() == torch.cuda.device_count()


def test_what_revert_py_reverts_stands_in_the_sources() -> None:
    for mend in revert.MENDS:
        assert (ROOT / mend.path).read_text(encoding="utf-8").count(mend.today) == 1, mend.finding


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"absmax": 0}, "either fp32 scales or 8-bit scale codes"),
        ({"packed": 0}, "packed .*null pointer, but 32"),
        ({"out": 4097}, "out is not aligned to 2"),
        ({"dtype": 3}, "dtype is 3: expected 0"),
        ({"quant_type": 12}, "quant_type is 12: expected 0"),
        ({"block_size": 48}, "block_size is 48: expected a power"),
        ({"numel": -1}, "numel is -1: expected 0 to 2"),
        ({"panel": (32, 0, 3, 0, 32)}, "inside a weight of 64"),
    ],
)
def test_wrong_arguments_are_refused_in_words(cuda: Any, wrong: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cuda.dequantize_4bit(**arguments(CALL, **wrong))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which could read the made-up addresses")
def test_a_failed_launch_is_reported(cuda: Any) -> None:
    with pytest.raises(RuntimeError, match=r"^dequantize_4bit: CUDA failed with cudaError\w+ \(.+\)\. .+\.$"):
        cuda.dequantize_4bit(**arguments(CALL))


def test_importing_the_package_registers_the_kernels_and_wakes_nothing() -> None:
    script = (
        "import sys, torch, qlora_native\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(has('qlora_native::dequantize_4bit', 'CUDA'), has('qlora_native::dequantize_4bit.out', 'CUDA'))\n"
        "print('qlora_native._cuda' in sys.modules, torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["True", "True", "False", "False"]), done.stderr


def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device was examined yet, and nothing was said."""
    monkeypatch.setattr(errors, "_warned", set())
    for name in ("_loaded", "examined", "native"):
        monkeypatch.setattr(_cuda_kernels, name, cache(getattr(_cuda_kernels, name).__wrapped__))


def test_a_build_without_kernels_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    build = {"cuda_archs": "", "cuda_lacking": "no nvcc was found"}
    monkeypatch.setattr(_cuda_kernels._C, "build_info", lambda: build)
    undecided(monkeypatch)
    words = r"this build has no CUDA kernels \(no nvcc was found\).*QLORA_NATIVE_CUDA=ON"
    with pytest.warns(UserWarning, match=words):
        assert _library.module_for(torch.device("cuda", 0)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_driver_that_is_too_old_is_named_once(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    undecided(monkeypatch)
    with pytest.warns(UserWarning, match=r"built with CUDA 1\d\.\d, the driver .*CUDA \d+\.\d"):
        assert _library.module_for(torch.device("cuda", 0)) is None


def faked_devices(monkeypatch: pytest.MonkeyPatch, capabilities: list[int], images: set[int]) -> Any:
    """Devices of these compute capabilities, kernels for ``images`` alone. Returns the module that they share."""
    current = [0]

    @contextmanager
    def launching(device: torch.device) -> Iterator[int]:
        before, current[0] = current[0], device.index
        yield 0
        current[0] = before

    def image_error() -> str:
        return "" if capabilities[current[0]] in images else "cudaErrorNoKernelImageForDevice"

    module = SimpleNamespace(image_error=image_error)
    undecided(monkeypatch)
    monkeypatch.setattr(_cuda_kernels, "_loaded", lambda: module)
    monkeypatch.setattr(_cuda_kernels, "launching", launching)
    monkeypatch.setattr(_cuda_kernels, "facts", lambda device: _cuda_kernels.Facts(capabilities[device.index], 80))
    return module


def test_a_device_without_an_image_says_so_once_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Volta, an Orin, a Thor, a later major; beside them an A100 and an H100."""
    capabilities, images = [80, 70, 87, 110, 130, 90], {80, 90}
    module = faked_devices(monkeypatch, capabilities, images)
    for number, capability in enumerate(capabilities):
        device = torch.device("cuda", number)
        if capability in images:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert _library.module_for(device) is module
            continue
        with pytest.warns(UserWarning, match=rf"cuda:{number} .* {capability // 10}\.{capability % 10}.*NoKernelImage"):
            assert _library.module_for(device) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert _library.module_for(device) is None and cuda_engine(device) is DECODED


@pytest.mark.parametrize(
    "build",
    [
        {"cuda_archs": "", "cuda_lacking": "no nvcc was found"},
        {"cuda_archs": "", "cuda_lacking": "/opt/cuda/bin/nvcc fails: error: unsupported GNU version!"},
        {"cuda_archs": "80,90", "cuda_lacking": ""},  # and a driver that is too old
    ],
)
def test_doctor_says_why_cards_have_no_kernels_and_what_mends_it(
    build: dict[str, str], monkeypatch: pytest.MonkeyPatch, sentence: Check
) -> None:
    """Once for two cards; CUDA 13 in the binary and a driver of CUDA 12.4."""
    old = SimpleNamespace(device_count=lambda: 0, runtime_version=lambda: 13000, driver_version=lambda: 12040)
    monkeypatch.setattr(_cuda_kernels._C, "build_info", lambda: build)
    monkeypatch.setattr(qn, "_cuda", old, raising=False)
    monkeypatch.setitem(sys.modules, "qlora_native._cuda", old)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    undecided(monkeypatch)
    (item,) = doctor._missing_kernels()
    sentence(f"{item['packages']}: {item['mend']}")


def test_doctor_sees_a_card_without_an_image(monkeypatch: pytest.MonkeyPatch, sentence: Check) -> None:
    """Kernels were built, and run on the card beside it."""
    faked_devices(monkeypatch, [80, 110], {80, 90})
    monkeypatch.setattr(_cuda_kernels._C, "build_info", lambda: {"cuda_archs": "80,90", "cuda_lacking": ""})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (item,) = doctor._missing_kernels()
    sentence(f"{item['packages']}: {item['mend']}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_device_gives_the_bits_of_the_cpu(cuda: Any, double_quant: bool, dtype: torch.dtype) -> None:
    assert _cuda_kernels.native(torch.device("cuda", 0)) is not None
    for block_size in (32, 64, 4096):
        for numel in (0, 1, 31, 32, 33, 65, 4097, 1 << 20):
            w = qn.quantize(torch.randn(numel), block_size=block_size, double_quant=double_quant)
            truth = w.dequantize(dtype)
            there = w.to("cuda")
            assert same_bytes(there.dequantize(dtype).cpu(), truth), (block_size, numel)
            # Neither the packed bytes nor the output at a multiple of 16 bytes; another stream than the default one.
            there.packed = torch.cat([there.packed[:0].new_zeros(1), there.packed])[1:]
            out = torch.empty(numel + 1, dtype=dtype, device="cuda")[1:]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                there.dequantize(out=out)
            side.synchronize()
            assert same_bytes(out.cpu(), truth), (block_size, numel)


def compiled(*options: str, source: str) -> subprocess.CompletedProcess[str]:
    """By the C++ compiler, with the declarations of CUDA's runtime that stand in tests/cuda_12."""
    folders = (f"-I{ROOT / folder}" for folder in ("cpp", ".", "tests/cuda_12"))
    command = [str(COMPILER), "-std=c++20", *folders, *options, "-x", "c++", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True)


def check(version: int, source: str) -> subprocess.CompletedProcess[str]:
    return compiled("-fsyntax-only", *WARNINGS, f"-DCUDART_VERSION={version}", source=source)


@compiles
@pytest.mark.parametrize("version", [12080, 13000])
@pytest.mark.parametrize("file", ["managed_store.cc", "pinned_store.cc", "page_store.cc"])
def test_the_page_stores_compile_with_both_signatures(file: str, version: int) -> None:
    """Those of CUDA 12 and of CUDA 13, without a toolkit."""
    done = check(version, f'#include "cuda/{file}"\n')
    assert done.returncode == 0, done.stderr[-3000:]


@compiles
@pytest.mark.parametrize("version", [12080, 13000])
def test_the_declarations_differ_by_version(version: int) -> None:
    call = "return cudaMemPrefetchAsync(nullptr, 1, 0, nullptr);" if version == 13000 else "return cudaMemLocation{};"
    assert check(version, f"#include <cuda_runtime_api.h>\nauto f() {{ {call} }}\n").returncode != 0


# A runtime in which setting a device makes a context there, as since CUDA 12; a store of device 1 lives and dies in a
# thread whose current device is 0, of which nothing was used.
CONTEXTS = r"""
#include <set>

#include "cuda/page_store.h"

namespace {
thread_local int current = 0;
std::set<int> contexts;
std::set<int> waited;
int made = 0;  // streams and events

struct Store final : qlora_native::cuda::PageStore {
  Store() : PageStore({}, {}) { (void)open(false); }
  ~Store() override { wait_for_device(); }
  cudaError_t zero(int64_t, cudaStream_t) override { return cudaSuccess; }
  std::vector<qlora_native::PageMove> moves_of(const std::vector<bool>&, const std::vector<bool>&,
                                               int64_t) const override {
    return {};
  }
  cudaError_t move_in(int64_t, cudaStream_t) override { return cudaSuccess; }
  cudaError_t move_out(int64_t, cudaStream_t) override { return cudaSuccess; }
};
}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return contexts.insert(current = device), cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return waited.insert(current), cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return ++made, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return ++made, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
}

int main() {
  bool is_lazy = false;
  {
    current = 1;
    Store store;
    current = 0;
    is_lazy = made == 0 && store.finish() == cudaSuccess && made == 0;
    (void)store.page_out(nullptr);
    is_lazy = is_lazy && made > 0;
  }
  const bool makes_none = contexts.count(0) == 0 && waited == std::set<int>{1} && current == 0;
  return (makes_none ? 0 : 1) + (is_lazy ? 0 : 2);
}
"""


@pytest.fixture(scope="module")
def store_exit_code(tmp_path_factory: pytest.TempPathFactory) -> int:
    program = str(tmp_path_factory.mktemp("stores") / "contexts")
    done = compiled("-O1", "-pthread", str(ROOT / "cuda/page_store.cc"), "-o", program, source=CONTEXTS)
    assert done.returncode == 0, done.stderr[-3000:]
    return subprocess.run([program]).returncode


@compiles
def test_a_store_makes_no_context_on_another_device(store_exit_code: int) -> None:
    assert store_exit_code in (0, 2)


@compiles
def test_a_store_makes_streams_and_events_when_something_moves(store_exit_code: int) -> None:
    """One that is the memory of streamed layers makes none."""
    assert store_exit_code in (0, 1)
