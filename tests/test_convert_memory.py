"""The memory that convert takes, measured from outside: parts of tensors, whatever the size of the model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_load_memory import peak_of, write_model

pytestmark = [pytest.mark.slow_memory, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
HIDDEN, INNER = 2048, 16384
LARGEST = 4 * HIDDEN * INNER  # bytes of the largest tensor

# From the folder sys.argv[1] into sys.argv[2]; sys.argv[3] is the target, or a merge's base.
WORK = """
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


def check_peak(work: str, source: Path, out: Path, word: str, limit: float) -> None:
    peak, *_ = peak_of(WORK.replace("{work}", work), source, out, word)
    print(f"{out.name}: {peak:,} bytes; the largest tensor has {LARGEST:,}")
    assert peak <= limit


def test_peak_is_below_the_largest_tensor(tmp_path: Path) -> None:
    write_model(tmp_path / "source", HIDDEN, INNER, 2, 4096, 16, torch.float32)
    check_peak(CONVERT, tmp_path / "source", tmp_path / "four", "bitsandbytes", 1.1 * LARGEST)
    check_peak(CONVERT, tmp_path / "four", tmp_path / "dense", "16bit", 1.1 * LARGEST)


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
        check_peak(MERGE, tmp_path / "source", tmp_path / base, base, 1.1 * (LARGEST + four_bit))
