"""A tokenizer as GGUF holds it: tokens, their kinds, merges or scores, and the name of the rule that splits text."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from qlora_native.errors import UserError

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
    if model.get("type") != "BPE":
        raise UserError(
            f"the tokenizer of {folder} is {model.get('type', 'of an unknown kind')}: expected BPE, of bytes or as "
            "SentencePiece has it; export --to safetensors and convert that with llama.cpp."
        )
    by_id = {number: token for token, number in model["vocab"].items()}
    tokens = [by_id.get(number, f"[UNUSED{number}]") for number in range(max(by_id) + 1)]
    types = [NORMAL if number in by_id else UNUSED for number in range(len(tokens))]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    scores: list[float] | None = None
    if model.get("byte_fallback"):
        types = [
            BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else kind for token, kind in zip(tokens, types, strict=True)
        ]
        scores = _scores(folder / "tokenizer.model", tokens, merges)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(stored))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(stored.get("pre_tokenizer"), folder))
    for added in stored.get("added_tokens") or ():
        number = added["id"]
        while len(tokens) <= number:
            tokens.append(f"[UNUSED{len(tokens)}]")
            types.append(UNUSED)
        kind = CONTROL if added["special"] else USER_DEFINED
        tokens[number], types[number] = added["content"], UNKNOWN if number == tokenizer.unk_token_id else kind
    while len(tokens) < vocabulary:
        tokens.append(f"[UNUSED{len(tokens)}]")
        types.append(UNUSED)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores([*scores, *[0.0] * (len(tokens) - len(scores))])
    else:
        writer.add_token_merges([" ".join(pair) for pair in merges])
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


def _scores(path: Path, tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece's own scores if its file is there; else, to the same effect, the order of the merges."""
    if path.is_file() and importlib.util.find_spec("sentencepiece") is not None:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(path))
        told = {pieces.id_to_piece(number): pieces.get_score(number) for number in range(pieces.vocab_size())}
        return [told.get(token, 0.0) for token in tokens]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else 0.0 for token in tokens]


def _adds_space(stored: dict[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    before, first = stored.get("normalizer") or {}, stored.get("pre_tokenizer") or {}
    steps = before.get("normalizers") or [before]
    return any(step.get("type") == "Prepend" for step in steps) or first.get("prepend_scheme") in ("first", "always")
