"""A tokenizer as GGUF holds it: tokens, their kinds, merges or scores, and the name of the rule that splits text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of GGUF

# How llama.cpp calls a way to split text before the merges, by the steps of the tokenizers library that do the same.
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


def add_tokenizer(writer: Any, tokenizer: Any, folder: Path, vocabulary: int) -> None:
    """Put a Hugging Face tokenizer into a gguf.GGUFWriter.

    Args:
        tokenizer: as AutoTokenizer gives it. folder: where its files are, for SentencePiece's tokenizer.model.
        vocabulary: rows of the embedding; missing tokens are filled up with unused ones.

    Raises:
        UserError: llama.cpp has no rule, known here, that splits text as this tokenizer does.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = stored.get("model") or {}
    if (folder / "tokenizer.model").is_file():
        tokens, types, scores = _sentencepiece(folder / "tokenizer.model")
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
    elif model.get("type") == "BPE" and not model.get("byte_fallback"):
        by_id = {number: token for token, number in model["vocab"].items()}
        tokens = [by_id.get(number, f"[UNUSED{number}]") for number in range(max(by_id) + 1)]
        types, scores = [NORMAL if number in by_id else UNUSED for number in range(len(tokens))], None
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(stored.get("pre_tokenizer"), folder))
    else:
        raise UserError(
            f"the tokenizer of {folder} is {model.get('type', 'of an unknown kind')}: expected byte-level BPE, or "
            "SentencePiece with its tokenizer.model; export --to safetensors and convert that with llama.cpp."
        )
    for added in stored.get("added_tokens") or ():
        number = added["id"]
        while len(tokens) <= number:
            tokens.append(f"[UNUSED{len(tokens)}]")
            types.append(UNUSED)
        tokens[number], types[number] = added["content"], CONTROL if added["special"] else USER_DEFINED
    while len(tokens) < vocabulary:
        tokens.append(f"[UNUSED{len(tokens)}]")
        types.append(UNUSED)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores([*scores, *[-1000.0] * (len(tokens) - len(scores))][: len(tokens)])
    else:
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        writer.add_token_merges(merges)
    _add_special(writer, tokenizer)


def copy_tokenizer(writer: Any, path: Path) -> None:
    """Put the tokenizer of another GGUF file into a gguf.GGUFWriter, as it is."""
    import gguf

    for name, field in gguf.GGUFReader(path).fields.items():
        if name.startswith("tokenizer."):
            kind, *rest = field.types
            writer.add_key_value(name, field.contents(), kind, sub_type=rest[-1] if rest else None)


def _add_special(writer: Any, tokenizer: Any) -> None:
    for name, add in {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
        "unk": writer.add_unk_token_id,
    }.items():
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split(stored: dict[str, Any] | None, folder: Path) -> str:
    steps = (stored or {}).get("pretokenizers") or ([stored] if stored else [])
    told = []
    for step in steps:
        name = step["type"]
        if name == "Split":
            name = f"Split {next(iter(step['pattern'].values()))}"
        elif name == "ByteLevel" and not step.get("use_regex", True):
            name = "ByteLevel without regex"
        told.append(name)
    try:
        return SPLITS[tuple(told)]
    except KeyError:
        raise UserError(
            f"the tokenizer of {folder} splits text by {' then '.join(told) or 'nothing'}, for which no name of "
            f"llama.cpp is known here ({', '.join(SPLITS.values())} are); export --to safetensors and convert that "
            "with llama.cpp."
        ) from None


def _sentencepiece(path: Path) -> tuple[list[str], list[int], list[float]]:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UserError(f"{path} needs sentencepiece: pip install 'qlora_native[train]'") from error
    pieces = SentencePieceProcessor(model_file=str(path))
    tokens, types, scores = [], [], []
    for number in range(pieces.vocab_size()):
        tokens.append(pieces.id_to_piece(number))
        scores.append(pieces.get_score(number))
        kinds = ((pieces.is_unknown, UNKNOWN), (pieces.is_control, CONTROL), (pieces.is_byte, BYTE))
        types.append(next((kind for is_one, kind in (*kinds, (pieces.is_unused, UNUSED)) if is_one(number)), NORMAL))
    return tokens, types, scores
