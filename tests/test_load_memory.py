"""The memory that loading, `qlora convert` and `qlora merge` take, measured from outside on models over 500 MB."""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

pytestmark = [pytest.mark.slow_memory, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
# Ways to load the model in the folder sys.argv[1].
LOADERS = {
    "load_model": "load_model(sys.argv[1])",
    "from_pretrained": "AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)",
}
LOAD = """
import transformers.models.llama.modeling_llama, transformers.models.mixtral.modeling_mixtral
from transformers import AutoModelForCausalLM
from qlora_native import QLoRANativeConfig
from qlora_native.interop import quantizer
from qlora_native.models.load import load_model
options = {"quantization_config": QLoRANativeConfig(), "dtype": torch.bfloat16}

def work():
    global model
    model = {loader}
    return [model.load_report.num_bytes, model.load_report.bytes_4bit]
"""
# Imports and prints "ready", works when a line comes in, prints the result, and stays alive until the next line.
CHILD = """
import json, sys
from pathlib import Path
import torch
{work}
torch.set_num_threads(2)
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(work()), flush=True)
sys.stdin.readline()
"""


def write_model(
    folder: Path, hidden: int, inner: int, layers: int, vocab: int, heads: int = 12, dtype: torch.dtype = torch.bfloat16
) -> tuple[int, int]:
    """A random llama, one shard a layer, never whole in memory. Returns bytes of all tensors, and of the largest."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    config = LlamaConfig(**sizes, num_attention_heads=heads, architectures=["LlamaForCausalLM"], dtype=dtype)
    config.save_pretrained(folder)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    shards: dict[str, list[str]] = {}
    for name in meta:
        shards.setdefault("-".join(["shard", *re.findall(r"\d+", name)]) + ".safetensors", []).append(name)
    shapes = {tensor.shape for tensor in meta.values()}
    values = {shape: torch.randn(shape).mul_(0.02).to(dtype) + (len(shape) == 1) for shape in shapes}  # norms near 1
    for file, names in shards.items():
        save_file({name: values[meta[name].shape].clone() for name in names}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    lengths = [tensor.nbytes for tensor in meta.values()]
    return sum(lengths), max(lengths)


def anonymous_bytes(pid: int | str) -> int:
    """Memory in use that no file stands behind. Shared anonymous memory counts too: it is no way round the limit."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(size) * 1024 for size in re.findall(r"^(?:RssAnon|RssShmem):\s+(\d+) kB", status, re.MULTILINE))


def peak_of(work: str, *arguments: str | Path) -> tuple[int, int, list[int]]:
    """Run ``work``, code that defines work(), in a process of its own with those arguments.

    Returns anonymous bytes at the peak and after it, beyond those of the imports, and what work() returned.
    """
    command = [sys.executable, "-c", CHILD.replace("{work}", work), *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            before = peak = anonymous_bytes(process.pid)
            print("go", file=process.stdin, flush=True)
            deadline = time.monotonic() + 120
            while not select.select([process.stdout], [], [], 0.0005)[0]:
                peak = max(peak, anonymous_bytes(process.pid))
                assert time.monotonic() < deadline
            result = json.loads(process.stdout.readline())
            after = anonymous_bytes(process.pid)
            print("end", file=process.stdin, flush=True)
            assert process.wait(20) == 0
        finally:
            process.kill()
    return peak - before, after - before, result


def measure(folder: Path, loader: str) -> tuple[int, int, int, int]:
    """Anonymous bytes at the peak and after loading, beyond those of the imports; the model's bytes, the 4-bit ones."""
    peak, after, (num_bytes, bytes_4bit) = peak_of(LOAD.replace("{loader}", loader), folder)
    return peak, after, num_bytes, bytes_4bit


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder and the bytes of its largest tensor."""
    folder = tmp_path_factory.mktemp("model")
    stored, largest = write_model(folder, 1536, 4096, 10, 8192)
    assert stored > 500e6
    return folder, largest


def check_peak(folder: Path, largest: int, loader: str, at_least: float) -> None:
    """Load ``folder`` in a process of its own: its peak, and that ``at_least`` so many bytes have become 4-bit."""
    peak, rest, num_bytes, bytes_4bit = measure(folder, loader)
    figures = f"peak {peak:,}, at rest {rest:,} bytes; model {num_bytes:,}, largest tensor {largest:,}"
    print(figures)
    assert bytes_4bit > at_least, "the layers must have become 4-bit"
    assert peak <= (num_bytes + largest) * 1.1, figures


@pytest.mark.parametrize("loader", ["load_model", pytest.param("from_pretrained", marks=pytest.mark.long)])
def test_peak_is_the_four_bit_model_and_one_tensor(model_folder: tuple[Path, int], loader: str) -> None:
    check_peak(*model_folder, LOADERS[loader], 100e6)


@pytest.mark.long
def test_experts_are_not_stacked_in_16_bits(tmp_path: Path) -> None:
    """A mixtral whose largest tensors are its experts, which save_pretrained stores one by one."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = MixtralConfig(**sizes, vocab_size=1024, num_local_experts=8)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    largest = max(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert largest == 2 * 1024 * 2048
    check_peak(tmp_path, largest, LOADERS["load_model"], 50e6)


# ---------------------------------------------------------------------------------------------------------------------
# Files into files: parts of tensors, whatever the size of the model


HIDDEN, INNER = 2048, 16384
LARGEST = 4 * HIDDEN * INNER  # bytes of the largest tensor
# From the folder sys.argv[1] into sys.argv[2]; sys.argv[3] is the target, or a merge's base.
WRITE = """
import transformers.models.llama.modeling_llama
from qlora_native.models.convert import convert
from qlora_native.models.merge_files import Merging

def work():
    source, folder = map(Path, sys.argv[1:3])
    folder.mkdir()
    {work}
"""
CONVERT = 'convert(source, folder, sys.argv[3], dtype=torch.float32 if sys.argv[3] == "16bit" else None)'
MERGE = 'Merging(source, source / "adapter", base=sys.argv[3], to="nf4").write(folder, 4 * 10**9)'


def check_writing(work: str, source: Path, out: Path, word: str, limit: float) -> None:
    peak, *_ = peak_of(WRITE.replace("{work}", work), source, out, word)
    print(f"{out.name}: {peak:,} bytes; the largest tensor has {LARGEST:,}")
    assert peak <= limit


def test_a_conversion_is_below_the_largest_tensor(tmp_path: Path) -> None:
    write_model(tmp_path / "source", HIDDEN, INNER, 2, 4096, 16, torch.float32)
    check_writing(CONVERT, tmp_path / "source", tmp_path / "four", "bitsandbytes", 1.1 * LARGEST)
    check_writing(CONVERT, tmp_path / "four", tmp_path / "dense", "16bit", 1.1 * LARGEST)


@pytest.mark.long
def test_a_merge_into_4_bits_holds_parts(tmp_path: Path) -> None:
    """Of the weight at hand parts, as a conversion, and the scales of all of it; from its 4-bit form that one too."""
    write_model(tmp_path / "source", HIDDEN, INNER, 1, 4096, 16, torch.float32)
    folder = tmp_path / "source" / "adapter"  # rank 8 on the MLP
    folder.mkdir()
    tensors = {}
    for name, width, height in (("up", HIDDEN, INNER), ("down", INNER, HIDDEN)):
        key = f"base_model.model.model.layers.0.mlp.{name}_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(8, width)
        tensors[f"{key}.lora_B.weight"] = torch.randn(height, 8) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    for base, four_bit in (("original", 0), ("dequantized", LARGEST // 7)):
        check_writing(MERGE, tmp_path / "source", tmp_path / base, base, 1.1 * (LARGEST + four_bit))
