"""The config of a training run: one YAML file, checked whole before anything heavy starts.

The classes below are the documentation of the keys: type, default and what a key trades for what. Unknown keys are
refused, every mistake is reported at once with its line, and any key can be set from the command line as
``--key value``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from qlora_native._io import as_user_error, reading, regular, user_path
from qlora_native._version import __version__
from qlora_native.data.formats import FORMATS, KEYS
from qlora_native.errors import UserError
from qlora_native.lora import LoraConfig, adapter_settings
from qlora_native.lora.config import ALL_LINEAR, LoraSettings
from qlora_native.weight import CALIBRATED

# Limits of numbers, beyond which sums and products of them do not fit what computes with them.
Positive = Annotated[int, Field(gt=0, lt=1 << 31)]
NonNegative = Annotated[int, Field(ge=0, lt=1 << 62)]
Bytes = Annotated[int, Field(gt=0, lt=1 << 62)]
Rows = Annotated[int, Field(gt=0, le=1 << 20)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]

# Frozen: what a run decides makes another config (train/setup.py: resolve), so that each value has one time and place.
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class _Section(BaseModel):
    model_config = ConfigDict(**_STRICT, frozen=True)


def _key(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


class DataConfig(_Section):
    """Which rows to learn from, and which of their tokens."""

    train: str | list[str] = Field(
        description="file of training rows (.jsonl, .csv, .parquet), hub id, or list of them"
    )
    weights: list[PositiveFloat] | None = _key(None, "the files' shares of an epoch; null = every row once")
    eval: str | None = _key(None, "file of held-out rows; without it eval_fraction of the training rows is held out")
    eval_fraction: float = _key(
        0.05, "share of the training rows to hold out when data.eval is not set; 0 = none", ge=0, lt=1
    )
    format: str = _key("auto", f"layout of a row: {', '.join(FORMATS)}; auto: detected from the first rows")
    columns: dict[str, str] = _key(
        {}, "the files' columns by the keys of the format that they stand for: {prompt: question, completion: sql}"
    )
    max_length: Positive = _key(
        1024, "tokens per row at most, longer rows are truncated; memory grows with it", le=1 << 24
    )
    chat_template: str | None = _key(None, "Jinja template, or a file of it, in place of the tokenizer's")
    train_on: Literal["answers", "all"] = _key("answers", "learn the answers only, or every token of the row")
    packing: bool = _key(
        False,
        "concatenate whole rows up to max_length, without attention across rows; batch_size then counts "
        "such sequences, so a step learns from more rows",
    )

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value not in ("auto", *FORMATS):
            raise ValueError(f"expected auto, {', '.join(FORMATS)}")
        return value

    @field_validator("columns")
    @classmethod
    def _known_keys(cls, value: dict[str, str]) -> dict[str, str]:
        for key in value.keys() - set(KEYS):
            near = ", ".join(get_close_matches(key, KEYS, n=1))
            hint = f"did you mean {near}?" if near else f"expected {', '.join(KEYS)}"
            raise ValueError(f"{key} is no key of a format; {hint}")
        return value

    @model_validator(mode="after")
    def _a_weight_each(self) -> DataConfig:
        if not self.files or (self.weights is not None and len(self.weights) != len(self.files)):
            raise ValueError(f"train is {self.train} and weights is {self.weights}: expected a weight for each file")
        return self

    @property
    def files(self) -> list[str]:
        """What ``train`` names."""
        return [self.train] if isinstance(self.train, str) else self.train


class QuantConfig(_Section):
    """How the frozen weights are stored."""

    type: Literal["auto", "nf4", "fp4", "keep"] = _key(
        "auto",
        "the 16 levels; nf4 fits normally distributed weights better; keep = the weights of a GGUF file as they are; "
        "auto = keep for such a file, nf4 for all else and for the other methods",
    )
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = _key(
        64, "weights that share one scale; smaller is more exact and larger on disk"
    )
    double_quant: bool = _key(True, "store the scales in 8 bits: saves about 0.37 bits per weight")
    method: Literal["rtn", "wmse", "gptq"] = _key(
        "rtn",
        "how codes and scales are chosen: rtn = nearest; wmse and gptq calibrate with text, lose less, and take "
        "seconds or minutes longer to load",
    )
    calibration: str | None = _key(None, "file of that text for wmse and gptq; without it the training rows are used")
    save: bool = _key(
        True,
        "store weights that another method than rtn made in output_dir/base-4bit, where --resume and every command on "
        "the adapter find them: 0.52 bytes a weight, and the embeddings in 2",
    )

    @model_validator(mode="after")
    def _kept_or_rounded(self) -> QuantConfig:
        if self.type == "keep" and self.method != "rtn":
            raise ValueError(f"type is keep and method is {self.method}: expected nf4 or fp4 with a method")
        return self

    @property
    def falls_back(self) -> bool:
        """Whether rtn takes the method's place if the training rows turn out to be too few to calibrate with."""
        return self.method in CALIBRATED and self.calibration is None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of :func:`qlora_native.load_model`."""
        quant_type = "nf4" if self.type == "auto" and self.method != "rtn" else self.type
        return {"quant_type": quant_type, "block_size": self.block_size, "double_quant": self.double_quant}


@dataclass(frozen=True, config=_STRICT)
class LoraSection(LoraSettings):
    """The small matrices that are trained: the fields of :class:`qlora_native.LoraConfig`, and what a run adds."""

    adapter: str | None = _key(
        None, "folder of an adapter to start from, with a new optimizer; rank, alpha and layers are then its own"
    )
    lora_plus_ratio: PositiveFloat = _key(
        1.0, "the learning rate of B as a multiple of train.lr, which A has (LoRA+, Hayou et al., 2024)"
    )
    trainable_tokens: list[NonNegative | str] = Field(
        default_factory=list,
        description="tokens whose rows of the embeddings are trained, by text or id; the tokenizer gets those that it "
        "lacks",
    )
    ship: Literal["nf4", "gguf"] | None = _key(
        None,
        "also write a 4-bit model without an adapter, the one that the last evaluation is of, merged with rows of "
        "train as calibration; gguf: over a GGUF file, each weight in the type it has there",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_init(cls, values: Any) -> Any:
        """Configs that 0.1 wrote out have ``init: zero``, the only start that is left."""
        is_old = isinstance(values, dict) and values.get("init") == "zero"
        return {name: value for name, value in values.items() if name != "init"} if is_old else values

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _are_patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        LoraConfig(rank_pattern=dict.fromkeys(value, 1))
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _as_the_adapter(cls, given: Any, check: Callable[[Any], LoraSection]) -> LoraSection:
        """The section with what the adapter to start from has decided: all but dropout, which may be given anew."""
        section = check(given)
        if not section.adapter or isinstance(given, LoraSection):
            return section
        named = given if isinstance(given, Mapping) else given.kwargs or {}
        folder, decided = user_path(section.adapter), dict(named)
        for name, value in adapter_settings(folder).items():
            if name == "dropout" and name in named:
                continue
            mine = getattr(section, name)
            if name in named and mine not in (value, ALL_LINEAR):
                raise ValueError(f"{name} is {mine}, and {value} in {folder}, where the run starts: remove {name}")
            decided[name] = value
        return check(decided)

    def as_config(self, seed: int, tokenizer: Any = None) -> LoraConfig:
        """The adapter as :func:`qlora_native.add_lora` takes it; without the tokenizer, which gets what it lacks of
        ``trainable_tokens``, these have the right number alone."""
        tokens: Sequence[Any] = range(len(self.trainable_tokens))
        if tokenizer is not None and self.trainable_tokens:
            known, names = tokenizer.get_vocab(), [token for token in self.trainable_tokens if isinstance(token, str)]
            tokenizer.add_tokens([name for name in names if name not in known], special_tokens=True)
            ids: dict[Any, int] = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
            tokens = list(dict.fromkeys(ids.get(token, token) for token in self.trainable_tokens))
            if (highest := max(tokens)) >= len(tokenizer):
                raise UserError(f"lora.trainable_tokens has {highest}: expected ids below {len(tokenizer):,}, or texts")
        shared = {field.name: getattr(self, field.name) for field in fields(LoraSettings)}
        return LoraConfig(**shared, trainable_tokens=list(tokens), seed=seed)


class LoopSection(_Section):
    """The optimizer, its schedule, and when to evaluate, save and print."""

    steps: Positive | None = _key(None, "optimizer steps; give this or epochs")
    epochs: float | None = _key(None, "passes over the rows; give this or steps (neither: 1 epoch)", gt=0, le=1e6)
    batch_size: Rows = _key(
        4, "rows held in memory at once; a step learns from batch_size * grad_accum rows however they are divided"
    )
    grad_accum: Rows = _key(
        4, "micro-batches per step; raise it and lower batch_size to save memory without changing the result"
    )
    optimizer: Literal["adamw", "adamw8bit", "lion"] = _key(
        "adamw",
        "adamw8bit keeps AdamW's averages in 2 bytes a trained weight instead of 8; lion keeps one average "
        "in 4 and needs an lr 3 to 10 times smaller",
    )
    paged: Literal["auto", True, False] = _key(
        "auto",
        "where the optimizer's averages lie: auto = in memory until it runs short, then in a page file; "
        "true = in the file from the start; false = in memory, whatever happens",
    )
    page_dir: str | None = _key(None, "folder of that file, on a disk; without it output_dir. No file is left behind")
    page_budget: Bytes | None = _key(
        None, "bytes of paged averages that may be in memory at once; without it decided from what is free"
    )
    lr: PositiveFloat = _key(2e-4, "peak learning rate")
    scheduler: Literal["cosine", "linear", "constant"] = _key(
        "cosine", "how the learning rate falls to 0 after the warm-up"
    )
    warmup: float = _key(0.03, "steps over which the learning rate rises; below 1 it is a share of all steps", ge=0)
    weight_decay: float = _key(0.0, "pull of the adapter towards 0, apart from the gradient's", ge=0, le=1e9)
    betas: tuple[float, float] = _key((0.9, 0.999), "AdamW or Lion betas; lion is usually given [0.9, 0.99]")
    eps: float = _key(1e-8, "added to AdamW's denominator", gt=0)
    clip: float = _key(1.0, "largest norm of a step's gradient; 0 = no clipping", ge=0)
    seed: NonNegative = _key(0, "fixes the adapter's start, the order of the rows and dropout")
    grad_checkpointing: bool = _key(
        True, "recompute activations in the backward pass: about a third slower, far less memory"
    )
    cuda_graph: Literal["auto", "off"] = _key(
        "auto",
        "on a CUDA device, capture forward and backward passes into CUDA graphs, one for each shape of a "
        "micro-batch, where that is possible: less work for the host",
    )
    eval_every: NonNegative = _key(100, "steps between evaluations; 0 = at the start and the end only")
    patience: Positive | None = _key(
        None, "stop after so many evaluations in a row without a lower held-out loss; without it, never early"
    )
    samples: NonNegative | list[str] = _key(
        2,
        "prompts, or a number of held-out rows, that are answered at each evaluation: greedy, up to 64 tokens; 0 where "
        "no rows are held out",
    )
    save_every: NonNegative = _key(100, "steps between checkpoints; 0 = at Ctrl-C only")
    keep: Positive = _key(2, "how many of the newest checkpoints stay on disk")
    log_every: Positive = _key(10, "steps between printed lines when the output is not a terminal")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _key(
        "auto",
        "type of activations and of the unquantized weights; auto = bfloat16, and on a card without it float16, with a "
        "scaled loss",
        validate_default=True,
    )

    @field_validator("cuda_graph", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads it as false

    @field_validator("dtype")
    @classmethod
    def _of_the_card(cls, value: str) -> str:
        if value != "auto":
            return value
        has_it = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_it else "float16"

    @model_validator(mode="after")
    def _one_length(self) -> LoopSection:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps is {self.steps} and epochs is {self.epochs}: expected one of them")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {list(self.betas)}: expected two numbers from 0 up to, not including, 1")
        return self


class TrainConfig(_Section):
    """Everything that determines a run; ``from_file`` reads and checks a YAML file."""

    model: str = Field(description="model folder or .gguf file")
    residency: Literal["auto", "mapped", "memory"] = _key(
        "auto",
        "weights of a 4-bit folder or GGUF file: mapped = used where they lie in its files, which several runs share; "
        "memory = copied; auto = mapped on the CPU",
    )
    weight_budget: Bytes | None = _key(
        None,
        "bytes of mapped weights that may be in memory at once, the others are read in each pass; without it decided "
        "from what is free",
    )
    output_dir: str = _key("qlora-out", "folder for the adapter, checkpoints, metrics.jsonl and report.html")
    resume: str | None = _key(
        None, "auto = continue from the newest checkpoint in output_dir, if any; or the folder of a checkpoint"
    )
    logging: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = _key(
        [], "other programs to send the figures of metrics.jsonl to: tensorboard, trackio, wandb, mlflow"
    )
    parallel: Literal["none", "ddp", "fsdp"] = _key(
        "none",
        "of several processes, as torchrun starts them: ddp = each has the whole model, fsdp = each has a "
        "part; the rows of a step are divided, so the result is that of one process",
    )
    rank_timeout: Positive = _key(600, "seconds that one process may keep the others waiting before the run ends")
    data: DataConfig
    quant: QuantConfig = QuantConfig()
    lora: LoraSection = LoraSection()
    train: LoopSection = Field(default_factory=LoopSection)  # not at the import: it looks at the card

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if self.train.patience is not None and self.lora.ship is not None:
            raise ValueError(
                "train.patience and lora.ship are set: expected one, as what ships is made after the last step"
            )
        for key, value in (("parallel", self.parallel), ("lora.ship", self.lora.ship)):
            if self.lora.modules_to_save and value in ("fsdp", "gguf"):
                raise ValueError(f"lora.modules_to_save is set and {key} is {value}: expected one of them")
            if self.lora.trainable_tokens and value in ("fsdp", "gguf", "nf4"):
                raise ValueError(f"lora.trainable_tokens is set and {key} is {value}: expected one of them")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _with_what_follows(cls, given: Any, check: Callable[[Any], TrainConfig]) -> TrainConfig:
        """The config with what one section decides for another: no samples where no rows are held out, and the weights
        that the adapter to start from was trained on."""
        config = check(given)
        if not isinstance(given, Mapping):
            return config
        sections = {name: getattr(config, name) for name in given}
        data, train, adapter = config.data, config.train, config.adapter
        if data.eval is None and data.eval_fraction == 0 and "samples" not in train.model_fields_set:
            sections["train"] = train.model_copy(update={"samples": 0})
        if adapter is not None and "quant" not in given and (record := adapter / "config.yaml").is_file():
            sections["quant"] = quant = QuantConfig.model_validate(read_yaml(record)[0].get("quant") or {})
            if quant.method != "rtn" and not quant.save:
                made = f"weights made by {quant.method}, which its run did not store"
                raise ValueError(f"{adapter} was trained on {made}: set quant")
        return check(sections)

    @property
    def adapter(self) -> Path | None:
        """The folder of ``lora.adapter``."""
        return user_path(self.lora.adapter) if self.lora.adapter else None

    def prepared(self, tokenizer: Any) -> Any:
        """The tokenizer, with the run's tokens and chat template: a text with a brace, or a file."""
        with as_user_error():
            self.lora.as_config(self.train.seed, tokenizer)  # gives it the new tokens
        if (given := self.data.chat_template) is not None:
            with reading(Path(given), "expected a Jinja template, or a file of one"):
                file = None if "{" in given else regular(user_path(given), MAX_BYTES)
                tokenizer.chat_template = given if file is None else file.read_text(encoding="utf-8")
        return tokenizer

    @field_validator("logging", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Read a YAML file and apply command-line overrides (``["--lr", "1e-4", "--lora.r=8"]``).

        UserError with one line per mistake: the place, what was got, what was expected.
        """
        values, lines = read_yaml(user_path(path))
        return cls.from_values(values, overrides, str(path), lines)

    @classmethod
    def from_values(
        cls,
        values: dict[str, Any],
        overrides: Sequence[str] = (),
        source: str = "the command line",
        lines: Mapping[str, int] | None = None,
    ) -> TrainConfig:
        """The same from nested values; ``source`` is what a mistake names, ``lines`` are those of the dotted keys."""
        flags: dict[str, str] = {}
        if overrides:
            from qlora_native._flags import apply_flags

            flags = apply_flags(values, overrides, keys(), _value_of)
        # A block whose keys are all commented out is an empty block, not a mistake.
        sections = cls.model_fields.keys() - keys()
        values = {key: {} if value is None and key in sections else value for key, value in values.items()}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            from qlora_native._mistakes import explain

            mistakes: dict[str, str] = {}
            for item in error.errors():
                key = _key_of(item)
                mistakes.setdefault(key, explain(key, item, source, lines or {}, flags, keys()))
            raise UserError(*mistakes.values()) from None

    def to_yaml(self) -> str:
        """The resolved config as YAML with every default written out, without ``resume``, which is one invocation's."""
        values = yaml.safe_dump(self.model_dump(mode="json", exclude={"resume"}), sort_keys=False)
        return f"# Resolved by qlora_native {__version__}: full config, defaults filled in.\n{values}"


def keys(section: Any = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Every key by its dotted name, with pydantic's field (description, default, annotation); none if ``section``, a
    pydantic model or dataclass, is the type of a value."""
    found: dict[str, Any] = {}
    own = getattr(section, "model_fields", None) or getattr(section, "__pydantic_fields__", {})
    for name, field in own.items():
        found |= keys(field.annotation, f"{prefix}{name}.") or {prefix + name: field}
    return found


def _key_of(item: Mapping[str, Any]) -> str:
    """The dotted key of a pydantic error, without the branch of a union or the index in a list."""
    parts = [str(part) for part in item["loc"]]
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((key for key in prefixes if key in keys()), ".".join(parts))


MAX_BYTES = 1 << 18  # of a config; PyYAML reads a megabyte in some 10 s
MOST_NODES, MOST_DEPTH = 20_000, 32  # a node counts as often as it is used by an alias


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's values and the line of each dotted key (counted from 1); UserError if it is no YAML of safe types.

    The file may be one that came with an adapter or a checkpoint, and so from anyone: its size is bounded.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist; `qlora config init --out {path}` writes a commented config to start from"
        )
    lines: dict[str, int] = {}
    with reading(path, "expected YAML as `qlora config init` writes it"):
        text = regular(path, MAX_BYTES).read_text(encoding="utf-8")
        try:
            for name, line in _iter_lines(yaml.compose(text, Loader=yaml.SafeLoader)):
                if name in lines:
                    raise UserError(f"{path}:{line}: {name} was already set on line {lines[name]}; remove one of them")
                lines[name] = line
                if len(lines) > MOST_NODES:
                    raise ValueError(f"it has more than {MOST_NODES:,} values")
            values = yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{path}:{mark.line + 1}" if mark else str(path)
            raise UserError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__} {str(values)[:40]!r}: expected `key: value` lines")
    return values, lines


def _iter_lines(node: yaml.Node | None, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Every value inside a node, as often as aliases use it: its dotted key, or number in a list, and its line."""
    if depth > MOST_DEPTH:
        raise ValueError(f"it has more than {MOST_DEPTH} values inside one another")
    for number, entry in enumerate(node.value if isinstance(node, yaml.CollectionNode) else ()):
        pair = entry if isinstance(entry, tuple) else ()  # a key and its value
        has_name = bool(pair) and isinstance(pair[0], yaml.ScalarNode)
        name = f"{prefix}{pair[0].value if has_name else number}"
        yield name, (pair or [entry])[0].start_mark.line + 1
        for inner in pair or [entry]:
            yield from _iter_lines(inner, f"{name}.", depth + 1)


def _value_of(text: str) -> Any:
    with suppress(Exception):  # the check reports the text
        return yaml.safe_load(text)
    return text
