"""Adapter folders in PEFT's format, written and read without PEFT.

``adapter_config.json`` has the adapter's settings, ``adapter_model.safetensors`` its tensors under
``base_model.model.<path>.lora_A.weight`` [r, K] and ``.lora_B.weight`` [N, r].
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_native._io import atomic_file, check_folder, fsync, read_json, reading, reason, user_path
from qlora_native._moved import names_from
from qlora_native._native import DTYPE_NUMBER
from qlora_native.errors import UserError
from qlora_native.lora.config import LoraConfig
from qlora_native.lora.layer import LoRALinear, lora_layers
from qlora_native.lora.targets import matches, plain_modules, saved_modules, token_modules
from qlora_native.lora.tokens import DELTA, token_rows

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

_INIT_KEY = "qlora_native.init"  # in the header of a file that 0.1 wrote of an adapter that began with a correction
# In the header too: the dropout of an adapter with target_parameters, beside which PEFT takes none.
_DROPOUT_KEY = "qlora_native.dropout"
_LORA_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
# PEFT's settings under which a layer computes something else than x W^T + s (x A^T) B^T.
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "target_parameters", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "bias"),
)
# Initializations that change the base model's weights, which an adapter's file does not hold.
_CHANGES_THE_BASE = re.compile(r"pissa.*|olora|corda|loftq|lora_ga")
# Names of layers that PEFT takes for experts in target_modules, by how transformers reads a mixture's files.
_TAKEN_FOR_EXPERTS: dict[str, tuple[str, ...]] = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
# A pattern for the path of a layer, for that of its weight as well.
_OR_WEIGHT = re.compile(r"^\((?P<pattern>.*)\)\(\\\.weight\)\?(?P<end>\$?)$", re.DOTALL)


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    write: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model's adapter in PEFT's format: ``PeftModel.from_pretrained(base, folder)`` loads it.

    Of a sharded model, every rank calls this, since the parts are gathered, and all but one with ``write=False``; or
    one rank alone with the ``state_dict`` of the whole model.

    Both files are written under temporary names and brought to the disk before either is renamed, so that a full disk
    or a crash leaves an adapter that was already in ``folder`` as it was. Tensors are fp32.

    Raises:
        ValueError: the model has no adapter.
        UserError: the folder cannot be written.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError(f"save_adapter: {type(model).__name__} has no adapter: call add_lora first.")
    config: LoraConfig = model.lora_config  # type: ignore[assignment]
    state = state_dict or {}
    tensors = {
        f"{PREFIX}{path}.lora_{side}.weight": gathered(state.get(f"{path}.lora_{side}", own))
        .float()
        .cpu()
        .contiguous()
        for path, layer in layers.items()
        for side, own in (("A", layer.lora_A), ("B", layer.lora_B))
    }
    # Of what is written once without a copy; tied parameters are written twice.
    places: set[int] = set()
    others = {
        path: module.state_dict()
        for path, module in saved_modules(model, config.modules_to_save).items()
    }
    others |= {path: {DELTA: rows.trainable_tokens_delta} for path, rows in token_rows(model).items()}
    for path, named in others.items():
        for name, tensor in named.items():
            tensor = gathered(state.get(f"{path}.{name}", tensor)).cpu().contiguous()
            tensors[f"{PREFIX}{path}.{name}"] = (
                tensor.clone() if tensor.data_ptr() in places else tensor
            )
            places.add(tensor.data_ptr())
    if not write:
        return
    settings = _peft_config(model, config, layers)
    text = json.dumps(settings, indent=2) + "\n"
    header = {"format": "pt"}
    if settings["lora_dropout"] != config.dropout:
        header[_DROPOUT_KEY] = str(config.dropout)
    folder = Path(folder)
    try:
        with ExitStack() as both:  # neither is renamed before both are on disk
            config_file = both.enter_context(atomic_file(folder / CONFIG_NAME))
            tensors_file = both.enter_context(atomic_file(folder / TENSORS_NAME))
            config_file.write_bytes(text.encode())
            fsync(config_file)
            save_file(tensors, tensors_file, metadata=header)
    except (OSError, SafetensorError) as error:
        kept = "; the adapter that was there is unchanged" if (folder / TENSORS_NAME).is_file() else ""
        raise UserError(f"cannot write the adapter to {folder}: {reason(error)}{kept}.") from error


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its file holds it, checked against a model."""

    pairs: dict[str, tuple[Tensor, Tensor, float]]  # path -> lora_A [r, K], lora_B [N, r], scale
    saved: dict[str, Tensor]  # parameters of modules_to_save and rows of tokens, by name
    config: LoraConfig = field(default_factory=LoraConfig)

    def delta(self, path: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the adapter adds to the weight at ``path``: scale * B A [N, K], computed in ``dtype``."""
        a, b, scale = self.pairs[path]
        return (b.to(dtype) @ a.to(dtype)) * scale


def read_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> StoredAdapter:
    """Read an adapter without putting it into the model, which may be on the meta device; UserError as
    :func:`load_adapter`."""
    folder = user_path(folder)
    if folder.is_dir():
        check_folder(folder)
    settings, tensors, saved, config = _read(folder)
    _check(folder, model, config, tensors, settings.get("base_model_name_or_path") or "another model")
    pairs = {path: (pair["A"], pair["B"], config.scale_of(path)) for path, pair in tensors.items()}
    parameters_of(
        folder, model, {name: tensor for name, tensor in saved.items() if not name.endswith(DELTA)}
    )
    try:
        chosen = token_modules(model, config.trainable_tokens)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    for path, ids in dict(config.trainable_tokens).items():
        size = [len(ids), chosen[path][0]._parameters["weight"].shape[1]]  # type: ignore[union-attr]
        if (got := list(saved[f"{path}.{DELTA}"].shape)) != size:
            raise UserError(f"{folder}: the rows of tokens of {path} are {got}: expected {size}.")
    return StoredAdapter(pairs, saved, config)


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What an adapter in PEFT's format is, under the names that the section ``lora`` of a config has for it. UserError
    as :func:`load_adapter`."""
    settings, _, _, config = _read(folder)
    names = settings.get("target_modules")
    if (
        not isinstance(names, list)
        or settings.get("layers_to_transform")
        or settings.get("exclude_modules")
        or settings.get("target_parameters")
    ):
        names = list(config.target_modules)
    same = ("r", "alpha", "dropout", "rslora", "rank_pattern", "alpha_pattern")
    tokens = list(dict.fromkeys(chain.from_iterable(dict(config.trainable_tokens).values())))
    others = {
        "modules_to_save": list(config.modules_to_save),
        "trainable_tokens": tokens,
        "layers_to_transform": None,
    }
    found = {name: getattr(config, name) for name in same}
    return {**found, **others, "target_modules": names}


def gathered(tensor: Tensor) -> Tensor:
    """A tensor, detached; a DTensor is gathered, in which every rank takes part."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy_into(target: Tensor, values: Tensor) -> None:
    """Copy ``values`` into a tensor of the same shape; of a DTensor, into this rank's part."""
    mesh = getattr(target, "device_mesh", None)
    if mesh is None:
        target.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    # None: each rank shards its own copy, nothing is sent.
    target.copy_(distribute_tensor(values.to(target), mesh, target.placements, src_data_rank=None))  # type: ignore[attr-defined]


def _peft_config(
    model: nn.Module, config: LoraConfig, layers: dict[str, LoRALinear]
) -> dict[str, Any]:
    report = getattr(model, "load_report", None)
    base = str(
        (report.path if report else getattr(getattr(model, "config", None), "name_or_path", None))
        or ""
    )
    # The folder may lie in the cache of the Hugging Face hub.
    if hub := re.search(r"models--([^/]+?)--([^/]+)/snapshots/\w+$", base):
        base = "/".join(hub.groups())
    is_causal = callable(getattr(model, "prepare_inputs_for_generation", None))
    rows = token_rows(model)
    weights = _taken_for_experts(model, layers)
    patterns = {
        name: {_or_weight(key) if weights else key: value for key, value in own.items()}
        for name in ("rank_pattern", "alpha_pattern")
        for own in [getattr(config, name)]
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "base_model_name_or_path": base or None,
        "r": config.r,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0 if weights else config.dropout,
        "target_modules": _shortest_names(model, layers.keys() - weights),
        **({"target_parameters": [f"{path}.weight" for path in weights]} if weights else {}),
        "bias": "none",
        "use_rslora": config.rslora,
        "use_dora": False,
        "fan_in_fan_out": any(
            getattr(layer.base_layer, "fan_in_fan_out", False) for layer in layers.values()
        ),
        "init_lora_weights": True,
        "inference_mode": True,
        # By their paths: PEFT would take "norm" for "input_layernorm" too.
        "modules_to_save": list(saved_modules(model, config.modules_to_save)) or None,
        **patterns,
        "layers_to_transform": None,
        "layers_pattern": None,
        **(
            {"trainable_token_indices": {path: part.ids for path, part in rows.items()}}
            if rows
            else {}
        ),
    }
    # But not the patterns, of which the first that matches counts.
    return dict(sorted(settings.items()))


def _taken_for_experts(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The layers that PEFT would take for experts if target_modules had their names, whole paths or patterns for them.

    These names were those of single experts before transformers 5 stacked them, and shared experts and dense layers
    have them still. PEFT adapts such a layer right as a parameter (``target_parameters``), with the same tensors. It
    goes by this table of transformers, which is loaded if the model is one of transformers'.
    """
    table: dict[str, str] = getattr(
        sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {}
    )
    kind = getattr(getattr(model, "config", None), "model_type", "")
    names = _TAKEN_FOR_EXPERTS.get({**table, "mixtral": "mixtral"}.get(kind, ""), ())
    return [path for path in layers if path.rpartition(".")[2] in names]


def _shortest_names(model: nn.Module, layers: Set[str]) -> list[str]:
    """Names that PEFT, which matches path endings over all modules, resolves to exactly ``layers``."""
    short = sorted({path.rpartition(".")[2] for path in layers})
    meant = {path for path, _ in plain_modules(model) if any(matches(path, name) for name in short)}
    return short if meant == layers else sorted(layers)


Pairs = dict[str, dict[str, Tensor]]  # by a layer's path: lora_A as "A", lora_B as "B"


def _read(folder: Path) -> tuple[dict[str, Any], Pairs, dict[str, Tensor], LoraConfig]:
    """What both files hold, and our config of it."""
    settings = read_settings(folder)
    pairs, saved, dropout = _read_tensors(folder)
    if dropout is not None:
        settings["lora_dropout"] = dropout
    return settings, pairs, saved, _our_config(folder, settings, sorted(pairs), saved)


def read_settings(folder: Path) -> dict[str, Any]:
    """What the config of an adapter that can be read here holds."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        inside = folder / "adapter"  # of the output folder of a run
        hint = f"; did you mean {inside}?" if (inside / CONFIG_NAME).is_file() else "."
        raise UserError(
            f"{folder} has no {CONFIG_NAME}: expected an adapter folder as save_adapter or PEFT writes it{hint}"
        )
    stored = read_json(path)
    if stored.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type is {stored.get('peft_type')!r}: expected 'LORA', the one kind read here."
        )
    for name in _UNSUPPORTED:
        value = stored.get(name) or "none"
        # An adapter of a linear layer's weight, named as a parameter, is one of the layer.
        is_of_layers = isinstance(value, list) and all(str(each).endswith(".weight") for each in value)
        if value != "none" and not is_of_layers:
            raise UserError(
                f"{path} sets {name} to {value!r}, which this library does not compute: "
                f"merge that adapter with PEFT and load the merged model."
            )
    init = stored.get("init_lora_weights")
    if isinstance(init, str) and _CHANGES_THE_BASE.fullmatch(init):
        raise UserError(
            f"{path} sets init_lora_weights={init!r}, which changes the base model's weights as well: "
            f"convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion)."
        )
    return stored


def _read_tensors(folder: Path) -> tuple[Pairs, dict[str, Tensor], float | None]:
    """The pairs, by name the rest, and the dropout of the header if it has one."""
    path = folder / TENSORS_NAME
    if not path.is_file():
        pickle = (
            " (a pickle, adapter_model.bin, is not read)"
            if (folder / "adapter_model.bin").is_file()
            else ""
        )
        raise UserError(f"{folder} has no {TENSORS_NAME}{pickle}: save the adapter again.")
    with reading(path), safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = file.metadata() or {}
        dropout = float(header[_DROPOUT_KEY]) if _DROPOUT_KEY in header else None
        if init := header.get(_INIT_KEY):
            warnings.warn(
                f"{path}: the adapter began with a correction of its 4-bit base (init {init}): it fits that base "
                "alone, also decoded (merge with base 'dequantized'), and no 16-bit weights.",
                stacklevel=5,
            )
    pairs: Pairs = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if tensor.dtype not in DTYPE_NUMBER or not bool(tensor.isfinite().all()):
            what = "finite float32, bfloat16 or float16"
            raise UserError(
                f"{path}: {key} is {tensor.dtype}, or holds a NaN or an infinity: expected {what}."
            )
        if match := _LORA_KEY.fullmatch(name):
            pairs.setdefault(match["path"], {})[match["side"]] = tensor
        elif ".lora_" in name:
            raise UserError(
                f"{path}: {key} belongs to a kind of LoRA that this library does not compute."
            )
        # PEFT may store an adapted embedding's own weight; the model has it.
        elif ".base_layer." not in name:
            saved[name] = tensor
    for layer, pair in pairs.items():
        if len(pair) != 2:
            side = next(iter(pair))
            raise UserError(
                f"{path} holds lora_{side} of {layer} but not its partner: save the adapter again."
            )
    if not pairs:
        raise UserError(f"{path} holds no lora_A and lora_B: expected those of at least one layer.")
    return pairs, saved, dropout


def _our_config(
    folder: Path, stored: dict[str, Any], paths: list[str], saved: dict[str, Tensor]
) -> LoraConfig:
    with reading(folder / CONFIG_NAME):
        rows = [name.removesuffix(f".{DELTA}") for name in saved if name.endswith(DELTA)]
        # Targets are ends of module paths, or one list.
        tokens = stored.get("trainable_token_indices") or {}
        tokens = dict.fromkeys(rows, tokens) if isinstance(tokens, list) else tokens
        tokens = {
            path: next((ids for name, ids in tokens.items() if matches(path, name)), [])
            for path in rows
        }
        named = stored.get("modules_to_save") or sorted({name.rpartition(".")[0] for name in saved})
        return LoraConfig(
            r=stored["r"],
            alpha=stored.get("lora_alpha", 8),
            dropout=stored.get("lora_dropout", 0.0),
            target_modules=paths,
            rslora=bool(stored.get("use_rslora", False)),
            rank_pattern=_of_layers(stored.get("rank_pattern") or {}),
            alpha_pattern=_of_layers(stored.get("alpha_pattern") or {}),
            modules_to_save=list(dict.fromkeys(named)) if len(saved) > len(rows) else [],
            trainable_tokens=tokens,
        )


def _or_weight(pattern: str) -> str:
    """One of :data:`_OR_WEIGHT`; a ``$`` at the end stays there."""
    end = "$" if re.search(r"(?<!\\)\$$", pattern) else ""
    return f"({pattern.removesuffix(end)})(\\.weight)?{end}"


def _of_layers(patterns: dict[str, Any]) -> dict[str, Any]:
    """The patterns without :data:`_OR_WEIGHT`."""
    return {_OR_WEIGHT.sub(r"\g<pattern>\g<end>", key): value for key, value in patterns.items()}


def _check(folder: Path, model: nn.Module, config: LoraConfig, pairs: Pairs, base: str) -> None:
    """UserError if the adapter does not fit the model or the adapter that it has."""
    modules = dict(plain_modules(model))
    name = type(model).__name__
    for path, pair in pairs.items():
        layer = modules.get(path)
        if not isinstance(layer, nn.Linear):
            what = "no such module" if layer is None else f"a {type(layer).__name__} there"
            raise UserError(
                f"{folder}: the adapter was trained on {base}: it is for {path}, but {name} has {what}."
            )
        rank = config.rank_of(path)
        got = (tuple(pair["A"].shape), tuple(pair["B"].shape))
        if len(got[0]) != 2 or len(got[1]) != 2 or got[0][0] != rank:
            raise UserError(
                f"{folder}: lora_A of {path} is {list(got[0])}, but {CONFIG_NAME} has rank {rank}; "
                f"the two files are of different adapters."
            )
        if got != ((rank, layer.in_features), (layer.out_features, rank)):
            raise UserError(
                f"{folder}: the adapter was trained on {base}: that of {path} is for {got[0][1]} inputs and "
                f"{got[1][0]} outputs, but the layer of {name} has {layer.in_features} and {layer.out_features}."
            )
    present = dict(lora_layers(model))
    if present and (differing := sorted(pairs.keys() ^ present.keys())):
        where = "the adapter" if differing[0] in pairs else "the model"
        raise UserError(
            f"{folder}: the adapter changes {len(pairs)} layers and the model's adapter {len(present)}: only {where} "
            f"has {differing[0]}; load the model again without an adapter."
        )
    own = {path: rows.ids for path, rows in token_rows(model).items()}
    if present and own != config.trainable_tokens:
        raise UserError(
            f"{folder}: the adapter trains tokens {config.trainable_tokens!r:.200}, the model's adapter {own!r:.200}: "
            "load the model again without an adapter."
        )
    for path, adapted in present.items():
        a, scale = pairs[path]["A"], config.scale_of(path)
        if len(a) != adapted.r or abs(scale - adapted.scale) > 1e-9 * abs(scale):
            raise UserError(
                f"{folder}: the adapter of {path} has rank {len(a)} and scale {scale:g}, the model's has rank "
                f"{adapted.r} and scale {adapted.scale:g}; set the same r, alpha and rslora, or load the model again "
                "without an adapter."
            )


def parameters_of(
    folder: str | os.PathLike[str], model: nn.Module, named: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The model's parameters and buffers of the names of ``named``. UserError if one is missing or of another shape."""
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, tensor in named.items():
        target = state.get(name)
        if target is None or target.shape != tensor.shape:
            has = "nothing of that name" if target is None else f"it as {list(target.shape)}"
            raise UserError(
                f"{folder}: the adapter holds {name} {list(tensor.shape)}, but {type(model).__name__} has {has}; "
                f"load a model whose {name.rpartition('.')[0]} is dense and of that shape."
            )
    return {name: state[name] for name in named}


__getattr__ = names_from(
    __name__, dict.fromkeys(("load_adapter", "save_pretrained"), "qlora_native.lora.model")
)
