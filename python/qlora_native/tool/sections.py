"""The sections of a run's config. The classes below are the documentation of the keys: type, default and what a key
trades for what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from qlora_native._io import user_path
from qlora_native.data.formats import FORMATS, KEYS
from qlora_native.errors import UserError
from qlora_native.lora import LoraConfig, adapter_settings
from qlora_native.lora.config import ALL_LINEAR, LoraSettings
from qlora_native.tool import card_dtype
from qlora_native.weight import CALIBRATED

# Limits of numbers, beyond which sums and products of them do not fit what computes with them.
Positive = Annotated[int, Field(gt=0, lt=1 << 31)]
NonNegative = Annotated[int, Field(ge=0, lt=1 << 62)]
Bytes = Annotated[int, Field(gt=0, lt=1 << 62)]
Rows = Annotated[int, Field(gt=0, le=1 << 20)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]

# Frozen: what a run decides makes another config (train/setup.py: resolve), so that each value has one time and place.
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class Section(BaseModel):
    model_config = ConfigDict(**_STRICT, frozen=True)


def option(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


class DataConfig(Section):
    """Which rows to learn from, and which of their tokens."""

    train: str | list[str] = Field(
        description="file of training rows (.jsonl, .csv, .parquet), hub id, or list of them"
    )
    weights: list[PositiveFloat] | None = option(
        None, "the files' shares of an epoch; null = every row once"
    )
    eval: str | None = option(
        None, "file of held-out rows; without it eval_fraction of the training rows is held out"
    )
    eval_fraction: float = option(
        0.05, "share of the training rows to hold out when data.eval is not set; 0 = none", ge=0, lt=1
    )
    format: str = option(
        "auto", f"layout of a row: {', '.join(FORMATS)}; auto: detected from the first rows"
    )
    columns: dict[str, str] = option(
        {},
        "the files' columns by the keys of the format that they stand for: {prompt: question, completion: sql}",
    )
    max_length: Positive = option(
        1024, "tokens per row at most, longer rows are truncated; memory grows with it", le=1 << 24
    )
    chat_template: str | None = option(
        None, "Jinja template, or a file of it, in place of the tokenizer's"
    )
    train_on: Literal["answers", "all"] = option(
        "answers", "learn the answers only, or every token of the row"
    )
    packing: bool = option(
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
            raise ValueError(
                f"train is {self.train} and weights is {self.weights}: expected a weight for each file"
            )
        return self

    @property
    def files(self) -> list[str]:
        """What ``train`` names."""
        return [self.train] if isinstance(self.train, str) else self.train

    @property
    def options(self) -> dict[str, Any]:
        """As :func:`qlora_native.data.dataset.load_dataset` takes them."""
        found = {name: getattr(self, name) for name in ("max_length", "train_on", "columns")}
        return {**found, "format": None if self.format == "auto" else self.format}

    def longest(self, lengths: Any) -> int:
        """Tokens of the longest sequence of a run on rows of these lengths."""
        return self.max_length if self.packing else int(lengths.max())


class QuantConfig(Section):
    """How the frozen weights are stored."""

    type: Literal["auto", "nf4", "fp4", "keep"] = option(
        "auto",
        "the 16 levels; nf4 fits normally distributed weights better; keep = the weights of a GGUF file as they are; "
        "auto = keep for such a file, nf4 for all else and for the other methods",
    )
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = option(
        64, "weights that share one scale; smaller is more exact and larger on disk"
    )
    double_quant: bool = option(True, "store the scales in 8 bits: saves about 0.37 bits per weight")
    method: Literal["rtn", "wmse", "gptq"] = option(
        "rtn",
        "how codes and scales are chosen: rtn = nearest; wmse and gptq calibrate with text, lose less, and take "
        "seconds or minutes longer to load",
    )
    calibration: str | None = option(
        None, "file of that text for wmse and gptq; without it the training rows are used"
    )
    save: bool = option(
        True,
        "store weights that another method than rtn made in output_dir/base-4bit, where --resume and every command on "
        "the adapter find them: 0.52 bytes a weight, and the embeddings in 2",
    )

    @model_validator(mode="after")
    def _kept_or_rounded(self) -> QuantConfig:
        if self.type == "keep" and self.method != "rtn":
            raise ValueError(
                f"type is keep and method is {self.method}: expected nf4 or fp4 with a method"
            )
        return self

    @property
    def falls_back(self) -> bool:
        """Whether rtn takes the method's place if the training rows turn out to be too few to calibrate with."""
        return self.method in CALIBRATED and self.calibration is None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of :func:`qlora_native.load_model`."""
        quant_type = "nf4" if self.type == "auto" and self.method != "rtn" else self.type
        return {
            "quant_type": quant_type,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
        }


@dataclass(frozen=True, config=_STRICT)
class LoraSection(LoraSettings):
    """The small matrices that are trained: the fields of :class:`qlora_native.LoraConfig`, and what a run adds."""

    adapter: str | None = option(
        None,
        "folder of an adapter to start from, with a new optimizer; rank, alpha and layers are then its own",
    )
    lora_plus_ratio: PositiveFloat = option(
        1.0,
        "the learning rate of B as a multiple of train.lr, which A has (LoRA+, Hayou et al., 2024)",
    )
    trainable_tokens: list[NonNegative | str] = Field(
        default_factory=list,
        description="tokens whose rows of the embeddings are trained, by text or id; the tokenizer gets those that it "
        "lacks",
    )
    ship: Literal["nf4", "gguf"] | None = option(
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
                raise ValueError(
                    f"{name} is {mine}, and {value} in {folder}, where the run starts: remove {name}"
                )
            decided[name] = value
        return check(decided)

    def as_config(self, seed: int, tokenizer: Any = None) -> LoraConfig:
        """The adapter as :func:`qlora_native.add_lora` takes it; without the tokenizer, which gets what it lacks of
        ``trainable_tokens``, these have the right number alone."""
        tokens: Sequence[Any] = range(len(self.trainable_tokens))
        if tokenizer is not None and self.trainable_tokens:
            known, names = (
                tokenizer.get_vocab(),
                [token for token in self.trainable_tokens if isinstance(token, str)],
            )
            tokenizer.add_tokens([name for name in names if name not in known], special_tokens=True)
            ids: dict[Any, int] = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
            tokens = list(dict.fromkeys(ids.get(token, token) for token in self.trainable_tokens))
            if (highest := max(tokens)) >= len(tokenizer):
                raise UserError(
                    f"lora.trainable_tokens has {highest}: expected ids below {len(tokenizer):,}, or texts"
                )
        shared = {field.name: getattr(self, field.name) for field in fields(LoraSettings)}
        return LoraConfig(**shared, trainable_tokens=list(tokens), seed=seed)


class LoopSection(Section):
    """The optimizer, its schedule, and when to evaluate, save and print."""

    steps: Positive | None = option(None, "optimizer steps; give this or epochs")
    epochs: float | None = option(
        None, "passes over the rows; give this or steps (neither: 1 epoch)", gt=0, le=1e6
    )
    batch_size: Rows = option(
        4,
        "rows held in memory at once; a step learns from batch_size * grad_accum rows however they are divided",
    )
    grad_accum: Rows = option(
        4,
        "micro-batches per step; raise it and lower batch_size to save memory without changing the result",
    )
    optimizer: Literal["adamw", "adamw8bit", "lion"] = option(
        "adamw",
        "adamw8bit keeps AdamW's averages in 2 bytes a trained weight instead of 8; lion keeps one average "
        "in 4 and needs an lr 3 to 10 times smaller",
    )
    paged: Literal["auto", True, False] = option(
        "auto",
        "where the optimizer's averages lie: auto = in memory until it runs short, then in a page file; "
        "true = in the file from the start; false = in memory, whatever happens",
    )
    page_dir: str | None = option(
        None, "folder of that file, on a disk; without it output_dir. No file is left behind"
    )
    page_budget: Bytes | None = option(
        None,
        "bytes of paged averages that may be in memory at once; without it decided from what is free",
    )
    lr: PositiveFloat = option(2e-4, "peak learning rate")
    scheduler: Literal["cosine", "linear", "constant"] = option(
        "cosine", "how the learning rate falls to 0 after the warm-up"
    )
    warmup: float = option(
        0.03, "steps over which the learning rate rises; below 1 it is a share of all steps", ge=0
    )
    weight_decay: float = option(
        0.0, "pull of the adapter towards 0, apart from the gradient's", ge=0, le=1e9
    )
    betas: tuple[float, float] = option(
        (0.9, 0.999), "AdamW or Lion betas; lion is usually given [0.9, 0.99]"
    )
    eps: float = option(1e-8, "added to AdamW's denominator", gt=0)
    clip: float = option(1.0, "largest norm of a step's gradient; 0 = no clipping", ge=0)
    seed: NonNegative = option(0, "fixes the adapter's start, the order of the rows and dropout")
    grad_checkpointing: bool = option(
        True, "recompute activations in the backward pass: about a third slower, far less memory"
    )
    cuda_graph: Literal["auto", "off"] = option(
        "auto",
        "on a CUDA device, capture forward and backward passes into CUDA graphs, one for each shape of a "
        "micro-batch, where that is possible: less work for the host",
    )
    eval_every: NonNegative = option(
        100, "steps between evaluations; 0 = at the start and the end only"
    )
    patience: Positive | None = option(
        None,
        "stop after so many evaluations in a row without a lower held-out loss; without it, never early",
    )
    samples: NonNegative | list[str] = option(
        2,
        "prompts, or a number of held-out rows, that are answered at each evaluation: greedy, up to 64 tokens; 0 where "
        "no rows are held out",
    )
    save_every: NonNegative = option(100, "steps between checkpoints; 0 = at Ctrl-C only")
    keep: Positive = option(2, "how many of the newest checkpoints stay on disk")
    log_every: Positive = option(10, "steps between printed lines when the output is not a terminal")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
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
        return card_dtype() if value == "auto" else value

    @model_validator(mode="after")
    def _one_length(self) -> LoopSection:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}: expected one of them"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"betas is {list(self.betas)}: expected two numbers from 0 up to, not including, 1"
            )
        return self
