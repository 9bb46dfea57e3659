"""Small GGUF files with weights in the formats that llama.cpp's quantization makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from helpers import gguf_weight

from qlora_native.tool.cli import main
from qlora_native.weights.gguf import KEPT

gguf = pytest.importorskip("gguf")

# Every format that is kept, and two of plain floats.
MIX = {
    "token_embd": "q8_0", "output": "q6_k", "attn_q": "q4_k", "attn_k": "q4_1", "attn_v": "q5_0",
    "attn_output": "iq4_nl", "ffn_gate": "q5_k", "ffn_up": "q4_0", "ffn_down": "q5_1",
    "blk.1.attn_v": "f16", "blk.1.ffn_up": "bf16", "blk.1.ffn_gate": "mxfp4",
}  # fmt: skip
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def write_gguf(path: Path, mix: dict[str, str] | None = None, **sizes: Any) -> Path:
    """The tiny llama as a GGUF file whose matrices are in the formats of ``mix``."""
    folder = tiny.write_model(path.parent / "model", **{**SIZES, **sizes})
    plain = path.with_name("plain.gguf")
    assert main.main(["export", str(folder), "--to", "gguf", "--type", "f32", "--out", str(plain)]) == 0
    rewrite(plain, path, MIX if mix is None else mix)
    plain.unlink()
    return path


def rewrite(source: Path, path: Path, mix: dict[str, str], **changed: Any) -> Path:
    """The same file with matrices in other formats, whose values are near, and with changes to its metadata."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            kind, *rest = field.types
            writer.add_key_value(name, changed.get(name, field.contents()), kind, sub_type=rest[-1] if rest else None)
    torch.manual_seed(0)
    for tensor in reader.tensors:
        short = tensor.name.removesuffix(".weight")
        name = mix.get(short, mix.get(short.rpartition(".")[2], "f32")) if tensor.data.ndim == 2 else "f32"
        kind = gguf.GGMLQuantizationType[name.upper()]
        try:
            data = gguf.quants.quantize(tensor.data, kind)
        except NotImplementedError:  # the package decodes these formats alone
            size = gguf.GGML_QUANT_SIZES[kind]
            data = blocks(name, tensor.data.shape, *size)
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(name: str, shape: tuple[int, int], elements: int, size: int) -> np.ndarray:
    """Random bytes [N, bytes] of matrices of about 0.1."""
    if name in KEPT:
        return gguf_weight(name, shape).packed.view(shape[0], -1).numpy()
    made = torch.randint(256, (shape[0] * shape[1] // elements, size), dtype=torch.uint8)
    made[:, -4:] = torch.tensor([0.01, 0.01], dtype=torch.float16).view(torch.uint8)  # where Q2_K has its two scales
    return made.view(shape[0], -1).numpy()
