"""A model, with an adapter merged if there is one, as one GGUF file that llama.cpp runs; tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from qlora_native.errors import UserError
from qlora_native.export.tokenizer import add_tokenizer, copy_tokenizer
from qlora_native.hf.merge import Merging
from qlora_native.hf.plan import Converted, FourBit, Plain
from qlora_native.hf.source import GgufSource

OUT_TYPES = {"f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "f32": Kind.F32}
_FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "f32": gguf.LlamaFileType.ALL_F32,
}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp knows a model type of transformers.

    Attributes:
        name: in GGUF.
        interleaved: q and k rows of a head stand in pairs (0, half), (1, half + 1), ... there, because its rotary
            embedding turns neighbors where transformers' turns halves.
        norm_offset: what the norms' weights have added to them there.
    """

    name: str
    interleaved: bool = False
    norm_offset: float = 0.0


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", norm_offset=1.0),
}


class _Tensor:
    """What GGUFWriter writes: its bytes come row by row and are never all in memory."""

    def __init__(self, rows: Iterator[Tensor], kind: Kind, num_bytes: int) -> None:
        self._rows, self._kind, self.nbytes = rows, kind, num_bytes

    def tofile(self, file: BinaryIO) -> None:
        """Write the rows, encoded."""
        for part in self._rows:
            gguf.quants.quantize(part.float().numpy(), self._kind).tofile(file)


def export_gguf(work: Merging, path: Path, out_type: str, tokenizer: Any) -> dict[str, Any]:
    """Write ``path``, a GGUF file with weights, hyperparameters, tokenizer and chat template.

    Matrices take ``out_type`` (those whose rows are no multiple of 32 take F16 instead of Q8_0); vectors are F32.
    Memory is that of :func:`qlora_native.hf.merge.merge_files`; for llama and mistral, q
    and k are in memory whole, one at a time.

    Args:
        work: the model and its adapter.
        out_type: "f16", "bf16", "q8_0" or "f32".
        tokenizer: from AutoTokenizer; not used where the model is a GGUF file, whose own is copied.

    Returns:
        ``tensors``, ``num_bytes`` of them, and ``not_q8_0``, names of matrices that took F16 instead.

    Raises:
        UserError: the architecture, its rotary scaling or its tokenizer is one that is not mapped to GGUF here.
    """
    config = work.source.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UserError(
            f"{work.source.path} is a {config.model_type} model, which this library does not export to GGUF; it does "
            f"{', '.join(ARCHITECTURES)}. Export --to safetensors and convert that with llama.cpp."
        )
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        _add_metadata(writer, config, out_type, work.source.path)
        if isinstance(work.source, GgufSource):
            copy_tokenizer(writer, work.source.path)
        else:
            add_tokenizer(writer, tokenizer, work.source.path, config.vocab_size)
        tensors = list(_tensors(work, architecture, OUT_TYPES[out_type]))
        for name, shape, tensor in tensors:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor._kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, tensor in tensors:
            writer.write_tensor_data(tensor)  # type: ignore[arg-type]
    finally:
        writer.close()
    return {
        "tensors": len(tensors),
        "num_bytes": sum(tensor.nbytes for _, _, tensor in tensors),
        "not_q8_0": [
            name
            for name, shape, tensor in tensors
            if out_type == "q8_0" and tensor._kind is Kind.F16 and len(shape) > 1
        ],
    }


def _add_metadata(writer: Any, config: Any, out_type: str, path: Path) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None and config.model_type != "gemma2":
        context = min(context, window)  # beyond it these architectures of llama.cpp attend to everything
    writer.add_name(path.stem if path.is_file() else path.name)
    writer.add_file_type(_FILE_TYPES[out_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] not in ("default", "llama3"):
        raise UserError(
            f"{path} scales its rotary embedding by {rope['rope_type']!r}: expected 'default', 'linear' or 'llama3'; "
            "export --to safetensors and convert that with llama.cpp."
        )
    if config.model_type == "gemma2":
        # llama.cpp knows no such number: it takes the width of a head, but for the 27B model, which has 46 layers.
        if config.query_pre_attn_scalar != head_dim and config.num_hidden_layers != 46:
            raise UserError(
                f"{path} divides scores by the root of {config.query_pre_attn_scalar}, llama.cpp by that of a head's "
                f"width, {head_dim}: the model cannot be a GGUF file."
            )
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _tensors(work: Merging, architecture: Architecture, kind: Kind) -> Iterator[tuple[str, tuple[int, ...], _Tensor]]:
    """(name in GGUF, shape, contents) of each tensor."""
    config = work.source.config
    names = gguf.get_tensor_name_map(
        next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name),
        config.num_hidden_layers,
    )
    if config.rope_parameters["rope_type"] == "llama3":
        factors = _rope_factors(config)
        yield "rope_freqs.weight", tuple(factors.shape), _Tensor(iter([factors]), Kind.F32, factors.nbytes)
    for step in work.merged_steps():
        if isinstance(step, Converted):
            raise UserError(f"{work.source.path} stores {step.name} in several tensors: merge it to bf16 first.")
        if step.name in work.tree.tied and not work.untied:
            continue  # llama.cpp takes the embedding where there is no output tensor
        name = names.get_name(step.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(
                f"{work.source.path}: GGUF's {architecture.name} has no place for {step.name}; export --to safetensors "
                "and convert that with llama.cpp."
            )
        shape = tuple(work.tree.shapes[step.name].shape)
        stored = Kind.F32 if len(shape) == 1 else kind
        if stored is Kind.Q8_0 and shape[-1] % 32:
            stored = Kind.F16
        block, size = gguf.GGML_QUANT_SIZES[stored]
        num_bytes = work.tree.shapes[step.name].numel() // block * size
        yield name, shape, _Tensor(_rows(work, step, architecture), stored, num_bytes)


def _rows(work: Merging, step: Plain | FourBit, architecture: Architecture) -> Iterator[Tensor]:
    config, (path, _, leaf) = work.source.config, step.name.rpartition(".")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or config.num_attention_heads}
    count = heads.get(path.rpartition(".")[2])
    vector = len(work.tree.shapes[step.name].shape) == 1
    if architecture.interleaved and count:
        whole = torch.cat(list(work.rows(step)))
        whole = whole.flatten() if vector else whole
        halves = whole.view(count, 2, len(whole) // count // 2, *whole.shape[1:])
        yield halves.transpose(1, 2).reshape(whole.shape)
        return
    offset = architecture.norm_offset if path.endswith("norm") and leaf == "weight" else 0.0
    for part in work.rows(step):
        yield (part.flatten() if vector else part) + offset if offset or vector else part


def _rope_factors(config: Any) -> Tensor:
    """What llama.cpp divides each frequency by, fp32 [head_dim / 2]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain / scaled
