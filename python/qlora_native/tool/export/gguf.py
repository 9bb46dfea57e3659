"""A model, with an adapter merged if there is one, as one GGUF file that llama.cpp runs; tensor by tensor."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType, TokenType
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_native.errors import UserError
from qlora_native.models.merge_files import Merging
from qlora_native.tool.export.gguf_encode import encode
from qlora_native.weights.files import check_finite
from qlora_native.weights.gguf import ARCHITECTURES, Architecture, interleaved, reordered_heads
from qlora_native.weights.gguf_source import GgufSource
from qlora_native.weights.stream import Item, Source

_INSTEAD = "export --to safetensors and convert that with llama.cpp."
# Of the matrices, and the name of such a file.
OUT_TYPES = {
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_S,
    "iq4_nl": LlamaFileType.MOSTLY_IQ4_NL,
    "f32": LlamaFileType.ALL_F32,
}
# What stands in where rows are no whole blocks, as in llama.cpp.
_NARROWER = {Kind.Q4_K: Kind.Q5_0}
_WIDER = ("token_embd.weight", "output.weight")  # Q8_0 beside matrices of 4 bits

# llama.cpp's names of pre-tokenizers, by the equivalent steps of the tokenizers library.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (f"Split {_LLAMA_3}", "ByteLevel without regex"): "llama-bpe",
    (f"Split {_QWEN_2}", "ByteLevel without regex"): "qwen2",
}


class _Tensor(NamedTuple):
    """A tensor for GGUFWriter, whose bytes are made row by row and are never all in memory."""

    name: str
    shape: torch.Size
    kind: Kind
    rows: Iterator[Tensor]
    source: Path

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.shape.numel() // block * size

    def tofile(self, file: BinaryIO) -> None:
        for part in self.rows:
            check_finite(part, self.name, str(self.source))
            encode(part.float(), self.kind).tofile(file)


def architecture_of(source: Source) -> Architecture:
    """Where llama.cpp has the weights of a model; UserError if it is not mapped to GGUF here."""
    kind = source.config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{source.path} is a {kind} model, which this library does not export to GGUF; it does "
            f"{', '.join(ARCHITECTURES)}. Export --to safetensors and convert that with llama.cpp."
        )
    return ARCHITECTURES[kind]


def names_of(source: Source) -> Callable[[str], str]:
    """llama.cpp's names of a model's tensors, by ours; UserError for one that it has no place for."""
    architecture = architecture_of(source)
    names = architecture.name_map(source.config.num_hidden_layers)

    def name_of(name: str) -> str:
        found = names.get_name(name, (".weight", ".bias"))
        if found is None:
            raise UserError(
                f"{source.path}: GGUF's {architecture.name} has no place for {name}; {_INSTEAD}"
            )
        return found

    return name_of


def export_gguf(
    work: Merging, path: Path, out_type: str, tokenizer: Any, model: Path
) -> dict[str, Any]:
    """Write ``path``, a GGUF file with weights, hyperparameters, tokenizer and chat template.

    Matrices are stored as ``out_type``, vectors as F32. The embedding and the output are Q8_0 where that has 4 bits,
    and rows that are no whole blocks Q5_0 or F16; ``other_types`` of the result has these types by name. Memory is that
    of :class:`Merging`; for llama and mistral, q and k are in memory whole, one at a time. ``tokenizer`` lies
    in the folder ``model``; or it is a GGUF file, whose own is copied. UserError if the architecture, its rotary
    scaling or its tokenizer is not mapped to GGUF here.
    """
    config = work.source.config
    architecture = architecture_of(work.source)
    wanted = Kind[out_type.upper()]
    with closing(gguf.GGUFWriter(path, architecture.name)) as writer:
        _add_metadata(writer, config, out_type, work.source.path)
        if isinstance(tokenizer, Path):
            if work.adapter.config.trainable_tokens:
                raise UserError(
                    f"{tokenizer} keeps its own tokenizer, and the adapter trains tokens: `qlora merge` both "
                    "into a folder, and export that."
                )
            for name, field in gguf.GGUFReader(tokenizer).fields.items():
                if name.startswith("tokenizer."):
                    kind, *rest = field.types
                    writer.add_key_value(
                        name, field.contents(), kind, sub_type=rest[-1] if rest else None
                    )
        else:
            _add_tokenizer(writer, tokenizer, model, config.vocab_size)
        tensors = list(_tensors(work, architecture, wanted))
        for one in tensors:
            writer.add_tensor_info(
                one.name, one.shape, np.dtype(np.float32), one.nbytes, raw_dtype=one.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in tensors:
            writer.write_tensor_data(one)  # type: ignore[arg-type]
    return {
        "tensors": len(tensors),
        "num_bytes": sum(one.nbytes for one in tensors),
        "other_types": {
            one.name: one.kind.name.lower()
            for one in tensors
            if len(one.shape) > 1 and one.kind is not wanted
        },
    }


def near_type(source: Source) -> str:
    """The type for a merged model of a GGUF file that is near the file's own: that of most of its bytes if these are
    floats, else Q8_0, since rounding a sum to fewer bits again loses much of what an adapter adds."""
    assert isinstance(source, GgufSource)
    sizes: Counter[str] = Counter()
    for tensor in source.gguf.tensors.values():
        sizes[tensor.kind] += tensor.num_bytes
    kind = sizes.most_common(1)[0][0]
    return kind if kind in ("f16", "bf16", "f32") else "q8_0"


def _kind_of(name: str, shape: torch.Size, kind: Kind) -> Kind:
    """The type of a tensor in a file whose matrices are ``kind``."""
    if len(shape) == 1:
        return Kind.F32
    if name in _WIDER and kind.name.startswith(("Q4", "IQ4")):
        kind = Kind.Q8_0
    kinds = (kind, _NARROWER.get(kind, Kind.F16), Kind.F16)
    return next(one for one in kinds if shape[-1] % gguf.GGML_QUANT_SIZES[one][0] == 0)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_metadata(writer: Any, config: Any, out_type: str, path: Path) -> None:
    head_dim = _head_dim(config)
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window and config.model_type != "gemma2":
        # Beyond it these architectures of llama.cpp attend to everything.
        context = min(context, window)
    writer.add_name(path.stem if path.is_file() else path.name)
    writer.add_file_type(OUT_TYPES[out_type])
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
            f"{_INSTEAD}"
        )
    if config.model_type == "gemma2":
        # llama.cpp reads no such number: it takes the width of a head, but for the 27B model, which has 46 layers.
        if config.query_pre_attn_scalar != head_dim and config.num_hidden_layers != 46:
            raise UserError(
                f"{path} divides scores by the root of {config.query_pre_attn_scalar}, llama.cpp by that of a head's "
                f"width, {head_dim}: the model cannot be a GGUF file."
            )
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _tensors(work: Merging, architecture: Architecture, kind: Kind) -> Iterator[_Tensor]:
    config = work.source.config
    name_of = names_of(work.source)
    if config.rope_parameters["rope_type"] == "llama3":
        exponents = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        # llama.cpp divides by this number.
        factors = config.rope_parameters["rope_theta"] ** -exponents / scaled
        yield _Tensor("rope_freqs.weight", factors.shape, Kind.F32, iter([factors]), work.source.path)
    for item in work.items():
        if item.entry.converter is not None:
            raise UserError(
                f"{work.source.path} stores {item.name} in several tensors: merge it to bf16 first."
            )
        if item.name in work.meta.tied and not work.untied:
            continue  # llama.cpp takes the embedding where there is no output tensor
        name = name_of(item.name)
        shape = torch.Size(item.shape)
        rows = _rows(item, config, architecture)
        yield _Tensor(name, shape, _kind_of(name, shape, kind), rows, work.source.path)


def _rows(item: Item, config: Any, architecture: Architecture) -> Iterator[Tensor]:
    path, _, leaf = item.name.rpartition(".")
    heads = reordered_heads(config, architecture, path)
    parts = (part.flatten() if len(item.shape) == 1 else part for part in item.rows())
    if heads is not None:
        yield interleaved(torch.cat([*parts]), heads)
        return
    offset = architecture.norm_offset if path.endswith("norm") and leaf == "weight" else 0.0
    for part in parts:
        yield part.float() + offset if offset else part


def _add_tokenizer(writer: Any, tokenizer: Any, folder: Path, vocabulary: int) -> None:
    """Put a Hugging Face tokenizer into a gguf.GGUFWriter, with unused tokens up to the size of the ``vocabulary``."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = stored.get("model", {})
    if model.get("type") != "BPE":
        raise UserError(
            f"the tokenizer of {folder} is {model.get('type', 'of an unknown kind')}: expected BPE, of bytes or as "
            f"SentencePiece has it; {_INSTEAD}"
        )
    entries = {number: (token, TokenType.NORMAL) for token, number in model["vocab"].items()}
    merges: list[list[str]] = model["merges"]
    scores: dict[str, float] | None = None
    if model.get("byte_fallback"):
        scores = _scores(folder / "tokenizer.model", merges)
        of_bytes = {f"<0x{byte:02X}>" for byte in range(256)}
        entries |= {
            number: (token, TokenType.BYTE)
            for number, (token, _) in entries.items()
            if token in of_bytes
        }
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        before = stored.get("normalizer") or {}
        first = stored.get("pre_tokenizer") or {}
        prepends = any(step.get("type") == "Prepend" for step in before.get("normalizers") or [before])
        writer.add_add_space_prefix(prepends or first.get("prepend_scheme") in ("first", "always"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(stored.get("pre_tokenizer"), folder))
    for added in stored["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        kind = TokenType.UNKNOWN if added["id"] == tokenizer.unk_token_id else kind
        entries[added["id"]] = added["content"], kind
    size = max(vocabulary, max(entries) + 1)
    tokens = [entries.get(number, (f"[UNUSED{number}]", TokenType.UNUSED)) for number in range(size)]
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    if scores is not None:
        writer.add_token_scores([scores.get(text, 0.0) for text, _ in tokens])
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    for name in ("bos", "eos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split(stored: dict[str, Any] | None, folder: Path) -> str:
    names = []
    for step in (stored or {}).get("pretokenizers") or ([stored] if stored else []):
        name = step["type"]
        if name == "Split":
            name = f"Split {next(iter(step['pattern'].values()))}"
        elif name == "ByteLevel" and not step.get("use_regex", True):
            name = "ByteLevel without regex"
        names.append(name)
    if tuple(names) not in SPLITS:
        raise UserError(
            f"the tokenizer of {folder} splits text by {' then '.join(names) or 'nothing'}, for which no name of "
            f"llama.cpp is known here ({', '.join(SPLITS.values())} are); {_INSTEAD}"
        )
    return SPLITS[tuple(names)]


def _scores(path: Path, merges: list[list[str]]) -> dict[str, float]:
    """SentencePiece's own scores if its file is there; else, to the same effect, the order of the merges."""
    if path.is_file() and importlib.util.find_spec("sentencepiece") is not None:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(path))
        return {
            pieces.id_to_piece(number): pieces.get_score(number)
            for number in range(pieces.vocab_size())
        }
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    return scores
