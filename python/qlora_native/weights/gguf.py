"""A GGUF file as it lies on the disk: its metadata, where its tensors are, and how llama.cpp's names and order of rows
translate into transformers'.

The format is described in docs/gguf.md of https://github.com/ggml-org/ggml. The package's own reader makes an array of
every word of the vocabulary, which takes seconds; here only what is asked for is decoded.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from qlora_native._io import reading
from qlora_native._native import GGUF_BLOCKS, QUANT_TYPES
from qlora_native.errors import UserError
from qlora_native.weight import QuantizedWeight
from qlora_native.weights.files import map_file, view_of

DENSE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}  # formats of plain floats
# By which llama.cpp divides the frequencies of the rotary embedding.
ROPE_FACTORS = "rope_freqs.weight"
KEPT = frozenset(QUANT_TYPES[number] for number in GGUF_BLOCKS)  # formats whose bytes are kept
_STRING, _ARRAY = 8, 9  # numbers of metadata types; the others are numbers of a fixed size
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_DIMS = 4


class Architecture(NamedTuple):
    """GGUF's architecture for a model type of transformers."""

    name: str
    # q and k rows of a head are ordered (0, half), (1, half + 1), ...: its rotary embedding rotates neighbors.
    interleaved: bool = False
    norm_offset: float = 0.0  # added to the weights of the norms

    def name_map(self, layers: int) -> gguf.TensorNameMap:
        """GGUF's names of tensors, by transformers'."""
        return gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.name.upper()], layers)


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", norm_offset=1.0),
}


def reordered_heads(config: Any, architecture: Architecture, module: str) -> int | None:
    """Heads whose rows llama.cpp has in another order, of the linear layer at the path ``module``; None for others."""
    kind = module.rpartition(".")[2]
    if not architecture.interleaved or kind not in ("q_proj", "k_proj"):
        return None
    heads: int = config.num_attention_heads
    return heads if kind == "q_proj" else config.num_key_value_heads or heads


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows [N, ...] of q or k in llama.cpp's order."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def deinterleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows [N, ...] of q or k in transformers' order."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


class GgufTensor(NamedTuple):
    """Where one tensor lies: ``num_bytes`` bytes from byte ``start`` of the file."""

    name: str
    kind: str  # its format, such as "q4_k"
    shape: tuple[int, ...]  # [N, K], as torch has it
    start: int
    num_bytes: int


class GgufFile:
    """The header of one GGUF file, checked against its length. UserError for one that is damaged.

    Attributes:
        fields: the metadata but for arrays, by key; of an array the number of its elements.
        tensors: by name.
        data: the whole file, a mapped buffer.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, map_file(path)
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        with reading(path):
            self._raw = memoryview(self.data)
            self._at = 4
            if bytes(self._raw[:4]) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            (version,) = self._take("I")
            if version not in (2, 3):
                raise ValueError(f"it is of version {version}: expected 2 or 3")
            count, keys = self._take("QQ")
            # Where the bytes of a key and its value begin and end.
            self._entries: dict[str, tuple[int, int]] = {}
            for _ in range(keys):
                begin = self._at
                key = self._string()
                self.fields[key] = self._value(*self._take("I"))
                self._entries[key] = begin, self._at
            tensors = [self._tensor() for _ in range(count)]
            alignment = self.fields.get("general.alignment", 32)
            if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment % 8:
                raise ValueError(f"general.alignment is {alignment!r}: expected a multiple of 8")
            data = -(-self._at // alignment) * alignment
            for tensor in tensors:
                end = data + tensor.start + tensor.num_bytes
                if tensor.name in self.tensors or tensor.start % alignment or end > len(self._raw):
                    raise ValueError(
                        f"tensor {tensor.name[:80]!r} is there twice, or does not lie in the {len(self._raw):,} bytes "
                        f"at a multiple of {alignment}"
                    )
                self.tensors[tensor.name] = tensor._replace(start=data + tensor.start)

    def _take(self, formats: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + formats, self._raw, self._at)
        self._at += struct.calcsize("<" + formats)
        return found

    def _skip(self, num_bytes: int) -> int:
        """Where the bytes begin that are skipped."""
        begin, self._at = self._at, self._at + num_bytes
        if self._at > len(self._raw):
            raise ValueError("its header is truncated")
        return begin

    def _string(self) -> str:
        (length,) = self._take("Q")
        begin = self._skip(length)
        return str(self._raw[begin : self._at], "utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take(_NUMBERS[kind])[0]
        kind, count = self._take("IQ")
        if kind == _STRING:
            for _ in range(count):
                self._skip(self._take("Q")[0])
        else:
            self._skip(count * struct.calcsize("<" + _NUMBERS[kind]))
        return count

    def _tensor(self) -> GgufTensor:
        """A tensor whose ``start`` is from the begin of the data."""
        name, (dims,) = self._string(), self._take("I")
        if dims > _MOST_DIMS:
            raise ValueError(f"tensor {name[:80]!r} has {dims} dimensions")
        shape = self._take(f"{dims}Q")[::-1]
        number, start = self._take("IQ")
        block, size = gguf.GGML_QUANT_SIZES[Kind(number)]
        if shape and shape[-1] % block:
            raise ValueError(f"rows of tensor {name[:80]!r} are no whole blocks of {block}")
        return GgufTensor(
            name, Kind(number).name.lower(), shape, start, math.prod(shape) // block * size
        )

    def bytes_of(self, tensor: GgufTensor) -> Tensor:
        """uint8 [N, bytes a row], N = 1 for a vector: a view of the mapped file."""
        rows = math.prod(tensor.shape[:-1])
        return view_of(self.data, torch.uint8, tensor.start, (rows, tensor.num_bytes // max(rows, 1)))

    def write_skeleton(self, path: Path) -> None:
        """Write a GGUF file with the same scalars of metadata and the same tensors' names, of one number each.

        transformers' reader of configurations, which reads every array of a file's metadata, gets this one.
        """
        arrays = [f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")]
        kept = {
            key: bytes(self._raw[slice(*place)])
            for key, place in self._entries.items()
            if key not in arrays
        }
        key = f"{self.fields.get('general.architecture')}.vocab_size"
        if key not in kept and arrays[0] in self.fields:
            kept[key] = _packed(key) + struct.pack("<II", 4, self.fields[arrays[0]])
        infos = b"".join(
            _packed(name) + struct.pack("<IQIQ", 1, 1, Kind.F32, 0) for name in self.tensors
        )
        header = (
            b"GGUF"
            + struct.pack("<IQQ", 3, len(self.tensors), len(kept))
            + b"".join(kept.values())
            + infos
        )
        path.write_bytes(header + bytes(-len(header) % 32 + 32))


def decode(tensor: GgufTensor, rows: Tensor) -> Tensor:
    """The values of rows [n, bytes] of a tensor as [n, K]: fp32, or the very floats of a file that has them."""
    if tensor.kind in DENSE:
        # torch.save refuses views of one storage in several dtypes.
        return rows.clone().view(DENSE[tensor.kind])
    if tensor.kind in KEPT:
        about: dict[str, Any] = {"shape": (len(rows), tensor.shape[-1]), "dtype": torch.float32}
        return QuantizedWeight.of_blocks(
            rows.reshape(-1), quant_type=tensor.kind, **about
        ).dequantize()
    try:
        return torch.from_numpy(
            np.array(gguf.quants.dequantize(rows.numpy(), Kind[tensor.kind.upper()]))
        )
    except NotImplementedError:
        raise UserError(
            f"{tensor.name} is in {tensor.kind}: expected a format that the package gguf decodes."
        ) from None


def _packed(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def more_of_config(file: GgufFile, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Values for the configuration of a model type that transformers' reader leaves out of the file's metadata."""
    prefix = file.fields["general.architecture"]
    found: dict[str, Any] = {}
    if (width := file.fields.get(f"{prefix}.attention.key_length")) is not None:
        found["head_dim"] = width
    # As llama.cpp has it: the 27B model alone divides by another number.
    if kind == "gemma2" and width is not None:
        is_27b = values.get("num_hidden_layers") == 46
        found["query_pre_attn_scalar"] = (
            values["hidden_size"] // values["num_attention_heads"] if is_27b else width
        )
    if kind in ("llama", "qwen3"):
        found["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    scaling = file.fields.get(f"{prefix}.rope.scaling.type", "none")
    if scaling == "linear":
        factor = file.fields.get(f"{prefix}.rope.scaling.factor")
        found["rope_scaling"] = {"rope_type": scaling, "factor": factor}
    elif scaling != "none":
        raise UserError(
            f"{file.path} scales its rotary embedding by {scaling!r}, not 'linear'; load the 16-bit model."
        )
    return found


def rope_of(config: Any, factors: Tensor) -> dict[str, Any]:
    """The parameters of a rotary embedding whose frequencies are divided by ``factors``, fp32 [head_dim / 2]."""
    divided = factors.tolist()
    if not bool(((factors > 0) & factors.isfinite()).all()):
        raise ValueError(f"{ROPE_FACTORS} holds a number that is not over 0")
    lengths = {"original_max_position_embeddings": config.max_position_embeddings, "factor": 1.0}
    same = {
        "rope_type": "longrope",
        "attention_factor": 1.0,
        "short_factor": divided,
        "long_factor": divided,
    }
    return {**config.rope_parameters, **lengths, **same}
