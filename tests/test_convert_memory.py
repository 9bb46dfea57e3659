"""The memory that convert takes, measured from outside: parts of tensors, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_load_memory import anonymous_bytes
from transformers import LlamaConfig

HIDDEN, INNER, LAYERS, VOCAB = 2048, 16384, 3, 4096

# Imports, says so, converts once told to, and stays alive until it is no longer measured.
CHILD = """
import sys
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama
from qlora_native.hf.convert import convert

torch.set_num_threads(2)
print("ready", flush=True)
sys.stdin.readline()
folder = Path(sys.argv[2])
folder.mkdir()
convert(Path(sys.argv[1]), folder, sys.argv[3], dtype=torch.float32 if sys.argv[3] == "16bit" else None)
print("done", flush=True)
sys.stdin.readline()
"""


# The same for a merge into nf4; the base is the target's place on the command line.
MERGE = CHILD.replace(
    'convert(Path(sys.argv[1]), folder, sys.argv[3], dtype=torch.float32 if sys.argv[3] == "16bit" else None)',
    'merge_files(Merging(Path(sys.argv[1]), Path(sys.argv[1]) / "adapter", base=sys.argv[3], to="nf4"), folder)',
).replace("hf.convert import convert", "hf.merge import Merging, merge_files")


def write_adapter(folder: Path) -> None:
    """Rank 8 on the MLP of the first layer."""
    folder.mkdir()
    tensors = {}
    for name, width, height in (("up", HIDDEN, INNER), ("down", INNER, HIDDEN)):
        key = f"base_model.model.model.layers.0.mlp.{name}_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(8, width)
        tensors[f"{key}.lora_B.weight"] = torch.randn(height, 8) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def write_model(folder: Path) -> int:
    """A random llama in fp32, one shard a layer. Returns the bytes of the largest tensor."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    for number in range(LAYERS):
        prefix = f"model.layers.{number}."
        shard = {
            **{f"{prefix}self_attn.{name}_proj.weight": torch.randn(HIDDEN, HIDDEN) for name in "qkvo"},
            **{f"{prefix}mlp.{name}_proj.weight": torch.randn(INNER, HIDDEN) for name in ("gate", "up")},
            f"{prefix}mlp.down_proj.weight": torch.randn(HIDDEN, INNER),
            f"{prefix}input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
        if number == 0:
            shard |= {name: torch.randn(VOCAB, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")}
            shard["model.norm.weight"] = torch.ones(HIDDEN)
        save_file(shard, folder / f"{number}.safetensors")
        weight_map |= dict.fromkeys(shard, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return 4 * HIDDEN * INNER


def peak_of(source: Path, out: Path, target: str, script: str = CHILD) -> int:
    """Anonymous bytes at the highest, above those before the conversion."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(out), target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    import select

    try:
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous_bytes(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.001)[0]:
            peak = max(peak, anonymous_bytes(process.pid))
        assert process.stdout.readline() == "done\n"
        process.stdin.write("end\n")
        process.stdin.flush()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.stdin.close()
    return peak - before


@pytest.mark.slow_memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_below_the_largest_tensor(tmp_path: Path) -> None:
    largest = write_model(tmp_path / "source")
    peak = peak_of(tmp_path / "source", tmp_path / "four", "bitsandbytes")
    print(f"to 4 bits: {peak:,} bytes; the largest tensor has {largest:,}")
    assert peak <= 1.1 * largest
    peak = peak_of(tmp_path / "four", tmp_path / "dense", "16bit")
    print(f"to fp32: {peak:,} bytes; the largest tensor has {largest:,}")
    assert peak <= 1.1 * largest


@pytest.mark.slow_memory
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_merge_into_4_bits_holds_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weight at hand parts, as a conversion, and the scales of all of it; from its 4-bit form that one too."""
    assert "merge_files(" in MERGE
    monkeypatch.setattr("test_convert_memory.LAYERS", 1)
    largest = write_model(tmp_path / "source")
    write_adapter(tmp_path / "source" / "adapter")
    for base, four_bit in (("original", 0), ("dequantized", largest // 7)):
        peak = peak_of(tmp_path / "source", tmp_path / base, base, MERGE)
        print(f"merged to 4 bits from the {base}: {peak:,} bytes; the largest tensor has {largest:,}")
        assert peak <= 1.1 * (largest + four_bit)
