"""What a path holds: a model's source, its tokenizer, and what a user should know of both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qlora_native._io import announced, check_folder, panics_caught, regular, user_path
from qlora_native.data.readers import fetch_model, hub_id
from qlora_native.data.template import TEMPLATE
from qlora_native.errors import UserError
from qlora_native.weights.files import first_sentence
from qlora_native.weights.source import AUTO, KEEP, SafetensorsSource, Source


def open_source(path: str | os.PathLike[str] | Source) -> Source:
    """What ``path`` holds, if it is not open already. :class:`UserError` names what is missing."""
    if isinstance(path, Source):
        return path
    path = user_path(path)
    if not path.exists() and hub_id(path):
        path = fetch_model(str(path))
    if (path / "config.json").is_file():
        return SafetensorsSource(path)
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} GGUF files: name the one to load, such as {found[0]}.")
    if found and found[0].suffix == ".gguf" and found[0].exists():
        try:
            from qlora_native.weights.gguf_source import GgufSource
        except ImportError as error:
            raise UserError(f"{found[0]} needs the package gguf: `pip install gguf` brings it.") from error
        return GgufSource(regular(found[0]))
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds an adapter and no model: load its base model, then load_adapter(model, {str(path)!r})."
        )
    if path.is_dir():
        raise UserError(
            f"{path} has no config.json: expected a model folder as save_pretrained or `hf download` makes it."
        )
    if path.exists():
        raise UserError(f"{path} is a file: expected a model folder or a .gguf file; give the folder that holds it.")
    raise UserError(
        f"{path} is not there: expected a model folder or a .gguf file; a model of the Hugging Face hub is "
        "fetched with `hf download NAME --local-dir FOLDER`."
    )


def notes_of(source: Source, quant_type: str = AUTO) -> list[str]:
    """What a user should read before training, a sentence each: whether the weights of a GGUF file stay as they are
    with ``quant_type``, and what llama.cpp cannot run."""
    try:
        from qlora_native.weights.gguf import ARCHITECTURES
    except ImportError:  # of the package gguf, without which nothing is exported for llama.cpp
        return []
    name, kind = source.path.name, source.config.model_type
    notes = []
    if source.path.suffix == ".gguf" and quant_type != KEEP and not source.keeps(quant_type):
        why = f"those of {kind} are not kept"
        why = "without quant.type and quant.method they stay" if source.keeps(AUTO) else why
        notes.append(f"{name}: its weights are converted to 4 bits anew and do not stay as they are; {why}")
    if kind not in ARCHITECTURES:
        notes.append(
            f"{name}: llama.cpp's formats are not written for {kind}; what is trained can be merged into safetensors"
        )
    return notes


def load_tokenizer(model: str | os.PathLike[str] | Source, adapter: Path | None = None) -> Any:
    """The tokenizer in a model's folder or GGUF file, as transformers' ``AutoTokenizer`` makes it.

    Args:
        model: a model folder, a ``.gguf`` file, or an id of the Hugging Face hub.
        adapter: the folder of an adapter, whose tokenizer, or chat template, is taken if it has one.

    Raises:
        UserError: there is no model, or no usable tokenizer.
    """
    from transformers import AutoTokenizer

    path = model.path if isinstance(model, Source) else user_path(model)
    # A GGUF file is opened only for its error: transformers' reader takes seconds each time.
    if not isinstance(model, Source) and not (path.suffix == ".gguf" and path.is_file()):
        path = open_source(path).path
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        path = adapter
    try:
        if path.suffix == ".gguf":
            from qlora_native.weights.gguf_source import without_arrays

            what = f"Loading the tokenizer of {path.name}, which takes longer the more tokens it has"
            with announced(what), without_arrays():
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        else:
            check_folder(path)
            with panics_caught():
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
                tokenizer("a")  # raises here what settings of a wrong type would raise later
        if adapter is not None and (adapter / TEMPLATE).is_file():
            tokenizer.chat_template = (adapter / TEMPLATE).read_text(encoding="utf-8")
        return tokenizer
    except Exception as error:  # the readers raise whatever they stumble on
        open_source(path)  # UserError if the model itself is broken
        reason = first_sentence(error)[:200].rstrip(".")
        raise UserError(
            f"no usable tokenizer in {path} ({reason}); copy tokenizer.json and tokenizer_config.json of the model "
            "into it"
        ) from error
