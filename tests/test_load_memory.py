"""The memory that loading takes, measured from outside on a model of more than 500 MB in 16 bits."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, MixtralConfig

HIDDEN, INNER, LAYERS, VOCAB = 1536, 4096, 10, 8192

# Ways to load the model in the folder sys.argv[1].
LOADERS = {
    "load_model": "load_model(sys.argv[1])",
    "from_pretrained": (
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.bfloat16)"
    ),
}
LOAD = """
import transformers.models.llama.modeling_llama, transformers.models.mixtral.modeling_mixtral
from transformers import AutoModelForCausalLM
from qlora_native import QLoRANativeConfig
from qlora_native.hf import quantizer
from qlora_native.hf.load import load_model
config = QLoRANativeConfig()

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
    folder: Path,
    hidden: int = HIDDEN,
    inner: int = INNER,
    layers: int = LAYERS,
    vocab: int = VOCAB,
    heads: int = 12,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[int, int]:
    """A random llama, one shard a layer, never whole in memory. Returns bytes of all tensors, and of the largest."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        architectures=["LlamaForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    )
    config.save_pretrained(folder)
    attention, mlp, table = (torch.randn(rows, hidden).mul_(0.02).to(dtype) for rows in (hidden, inner, vocab))
    norm = torch.ones(hidden, dtype=dtype)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for number in range(layers):
        prefix = f"model.layers.{number}."
        shards[f"model-{number:02}.safetensors"] = {
            **{f"{prefix}self_attn.{name}_proj.weight": attention for name in "qkvo"},
            f"{prefix}mlp.gate_proj.weight": mlp,
            f"{prefix}mlp.up_proj.weight": mlp,
            f"{prefix}mlp.down_proj.weight": mlp.view(hidden, inner),
            f"{prefix}input_layernorm.weight": norm,
            f"{prefix}post_attention_layernorm.weight": norm,
        }
    shards["model-99.safetensors"] = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.norm.weight": norm,
    }
    sizes = []
    for file, tensors in shards.items():
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file)
        sizes += [tensor.nbytes for tensor in tensors.values()]
    names = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes), max(sizes)


def write_experts(folder: Path) -> int:
    """A random mixtral whose largest tensors are its experts, stored one by one. Returns the bytes of the largest."""
    hidden, inner = 1024, 2048
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=8,
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    weight = torch.randn(inner, hidden).mul_(0.02).bfloat16()
    square, norm = weight[:hidden], torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": square, "lm_head.weight": square, "model.norm.weight": norm}
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        tensors |= {f"{prefix}self_attn.{name}_proj.weight": square for name in "qkvo"}
        tensors |= {f"{prefix}{name}_layernorm.weight": norm for name in ("input", "post_attention")}
        tensors[f"{prefix}block_sparse_moe.gate.weight"] = weight[:8]
        for expert in range(8):
            for name in ("w1", "w2", "w3"):
                part = weight.view(hidden, inner) if name == "w2" else weight
                tensors[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = part
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return weight.nbytes


def anonymous_bytes(pid: int | str) -> int:
    """Memory in use that no file stands behind. Shared anonymous memory counts too: it is no way round the limit."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return sum(int(values[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def peak_of(work: str, *arguments: str | Path) -> tuple[int, int, list[int]]:
    """Run ``work``, code that defines work(), in a process of its own with those arguments.

    Returns anonymous bytes at the peak and after it, beyond those of the imports, and what work() returned.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.replace("{work}", work), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous_bytes(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        deadline = time.monotonic() + 120
        while not select.select([process.stdout], [], [], 0.0005)[0]:
            peak = max(peak, anonymous_bytes(process.pid))
            assert time.monotonic() < deadline
        result = json.loads(process.stdout.readline())
        after = anonymous_bytes(process.pid)
        process.stdin.write("end\n")
        process.stdin.flush()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.stdin.close()
    return peak - before, after - before, result


def measure(folder: Path, loader: str) -> tuple[int, int, int, int]:
    """Anonymous bytes at the peak and after loading, beyond those of the imports; the model's bytes, the 4-bit ones."""
    peak, after, (num_bytes, bytes_4bit) = peak_of(LOAD.replace("{loader}", loader), folder)
    return peak, after, num_bytes, bytes_4bit


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder and the bytes of its largest tensor."""
    folder = tmp_path_factory.mktemp("model")
    stored, largest = write_model(folder)
    assert stored > 500e6
    return folder, largest


@pytest.mark.slow_memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("loader", LOADERS)
def test_peak_is_the_four_bit_model_and_one_tensor(model_folder: tuple[Path, int], loader: str) -> None:
    check_peak(*model_folder, LOADERS[loader], 100e6)


@pytest.mark.slow_memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_experts_are_not_stacked_in_16_bits(tmp_path: Path) -> None:
    check_peak(tmp_path, write_experts(tmp_path), LOADERS["load_model"], 50e6)


def check_peak(folder: Path, largest: int, loader: str, at_least: float) -> None:
    """Load ``folder`` in a process of its own: its peak, and that ``at_least`` so many bytes have become 4-bit."""
    peak, rest, num_bytes, bytes_4bit = measure(folder, loader)
    figures = f"peak {peak:,}, at rest {rest:,} bytes; model {num_bytes:,}, largest tensor {largest:,}"
    print(figures)
    assert bytes_4bit > at_least, "the layers must have become 4-bit"
    assert peak <= (num_bytes + largest) * 1.1, figures
