"""A 4-bit folder of a Llama's shape without the 16-bit model: random codes and scales, seeded.

python bench/four_bit_folder.py 8B FOLDER     5.6 GB
python bench/four_bit_folder.py 70B FOLDER    39.6 GB
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_timing import LLAMA, VOCABULARY
from torch import Tensor
from transformers import LlamaConfig

from qlora_native.models.build import MetaModel
from qlora_native.weight import QuantizedWeight, to_bnb
from qlora_native.weights.config import bitsandbytes_config
from qlora_native.weights.files import WEIGHTS_NAME, Output, ShardWriter
from qlora_native.weights.shapes import OUTPUT_EMBEDDING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

PART = 1 << 24  # elements written at a time


def llama_config(name: str) -> Any:
    """Llama 3's config of that size."""
    words = {"vocab_size": 320, "num_key_value_heads": 2} if name == "tiny" else {"vocab_size": VOCABULARY}
    sizes = {"num_key_value_heads": 8, "max_position_embeddings": 8192, **LLAMA[name], **words}
    return LlamaConfig(**sizes, rms_norm_eps=1e-5, tie_word_embeddings=False)


def write_folder(name: str, folder: Path, seed: int = 0) -> Path:
    """config.json, a tokenizer of 300 words and one safetensors file in bitsandbytes' format: NF4, double-quantized."""
    import tiny

    folder.mkdir(parents=True)
    config = llama_config(name)
    meta = MetaModel(config, torch.bfloat16, torch.device("cpu"))
    four_bit = meta.four_bit_weights((OUTPUT_EMBEDDING,), 64)
    outputs = [
        output
        for key, tensor in meta.shapes.items()
        for output in (_outputs(key, tensor) if key in four_bit else [Output(key, torch.bfloat16, tuple(tensor.shape))])
    ]
    rng = np.random.default_rng(seed)
    with ShardWriter(folder / WEIGHTS_NAME, outputs) as writer:
        for output in writer.outputs:
            key = output.name.partition(".weight.")[0].removesuffix(".weight") + ".weight"
            for part in _parts(output, meta.shapes[key], rng):
                writer.write(output.name, part)
    options = {"quant_type": "nf4", "block_size": 64, "double_quant": True}
    config.architectures = ["LlamaForCausalLM"]
    config.quantization_config = bitsandbytes_config(torch.bfloat16, options, [OUTPUT_EMBEDDING])
    values = {**config.to_dict(), "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    tiny.write_tokenizer(folder)
    return folder


def _tensors(key: str, shape: torch.Size) -> dict[str, Tensor]:
    """The stored form of a weight whose codes are 0, as views of one byte."""
    blocks = math.ceil(shape.numel() / 64)
    weight = QuantizedWeight(
        torch.zeros(1, dtype=torch.uint8).expand(shape.numel() // 2),
        torch.zeros(1, dtype=torch.uint8).expand(blocks),
        shape=shape,
        dtype=torch.bfloat16,
        nested_absmax=torch.full((math.ceil(blocks / 256),), 0.2 / shape[1] ** 0.5),
        nested_offset=torch.full((), 1.0 / shape[1] ** 0.5),
    )
    return to_bnb(weight, key)


def _outputs(key: str, tensor: Tensor) -> list[Output]:
    return [
        Output(name, part.dtype, None if ".quant_state." in name else tuple(part.shape))
        for name, part in _tensors(key, tensor.shape).items()
    ]


def _parts(output: Output, like: Tensor, rng: np.random.Generator) -> Iterator[Tensor]:
    suffix = output.name.partition(".weight")[2]
    if suffix in ("", ".absmax") and output.dtype == torch.uint8:
        assert output.shape is not None
        count = math.prod(output.shape)
        for begin in range(0, count, PART):
            words = rng.integers(0, 1 << 64, -(-min(PART, count - begin) // 8), dtype=np.uint64)
            yield torch.from_numpy(words.view(np.uint8)[: min(PART, count - begin)])
    elif suffix:
        yield _tensors(output.name.partition(".weight")[0] + ".weight", like.shape)[output.name]
    elif like.dim() == 1:
        yield torch.ones(like.shape, dtype=torch.bfloat16)
    else:
        for begin in range(0, like.numel(), PART):
            part = rng.standard_normal(min(PART, like.numel() - begin), dtype=np.float32) * 0.02
            yield torch.from_numpy(part).bfloat16()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("8B", "70B", "tiny"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_folder(arguments.name, arguments.folder)
