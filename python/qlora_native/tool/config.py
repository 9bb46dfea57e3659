"""The config of a training run: one YAML file, checked whole before anything heavy starts.

Its keys are those of the classes in ``sections``. Unknown keys are refused, every mistake is reported at once with its
line, and any key can be set from the command line as ``--key value``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from qlora_native._io import as_user_error, reading, regular, user_path
from qlora_native._version import __version__
from qlora_native.errors import UserError
from qlora_native.tool.sections import (
    Bytes,
    DataConfig,
    LoopSection,
    LoraSection,
    Positive,
    QuantConfig,
    Section,
    option,
)


class TrainConfig(Section):
    """Everything that determines a run; ``from_file`` reads and checks a YAML file."""

    model: str = Field(description="model folder or .gguf file")
    residency: Literal["auto", "mapped", "memory"] = option(
        "auto",
        "weights of a 4-bit folder or GGUF file: mapped = used where they lie in its files, which several runs share; "
        "memory = copied; auto = mapped on the CPU",
    )
    weight_budget: Bytes | None = option(
        None,
        "bytes of mapped weights that may be in memory at once, the others are read in each pass; without it decided "
        "from what is free",
    )
    output_dir: str = option(
        "qlora-out", "folder for the adapter, checkpoints, metrics.jsonl and report.html"
    )
    resume: str | None = option(
        None,
        "auto = continue from the newest checkpoint in output_dir, if any; or the folder of a checkpoint",
    )
    logging: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = option(
        [],
        "other programs to send the figures of metrics.jsonl to: tensorboard, trackio, wandb, mlflow",
    )
    parallel: Literal["none", "ddp", "fsdp"] = option(
        "none",
        "of several processes, as torchrun starts them: ddp = each has the whole model, fsdp = each has a "
        "part; the rows of a step are divided, so the result is that of one process",
    )
    rank_timeout: Positive = option(
        600, "seconds that one process may keep the others waiting before the run ends"
    )
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
                raise ValueError(
                    f"lora.modules_to_save is set and {key} is {value}: expected one of them"
                )
            if self.lora.trainable_tokens and value in ("fsdp", "gguf", "nf4"):
                raise ValueError(
                    f"lora.trainable_tokens is set and {key} is {value}: expected one of them"
                )
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
        if (
            adapter is not None
            and "quant" not in given
            and (record := adapter / "config.yaml").is_file()
        ):
            sections["quant"] = quant = QuantConfig.model_validate(
                read_yaml(record)[0].get("quant") or {}
            )
            if quant.method != "rtn" and not quant.save:
                made = f"weights made by {quant.method}, which its run did not store"
                raise ValueError(f"{adapter} was trained on {made}: set quant")
        return check(sections)

    @property
    def adapter(self) -> Path | None:
        """The folder of ``lora.adapter``."""
        return user_path(self.lora.adapter) if self.lora.adapter else None

    @property
    def row_options(self) -> dict[str, Any]:
        """As :func:`qlora_native.data.dataset.load_split` takes them."""
        data = self.data
        split = {"held_out": data.eval, "fraction": data.eval_fraction, "seed": self.train.seed}
        return {"train": data.train, **split, **data.options}

    def add_tokens_and_template(self, tokenizer: Any) -> Any:
        """Give the tokenizer the run's new tokens, and its chat template: a text with a brace, or a file."""
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
        values = {
            key: {} if value is None and key in sections else value for key, value in values.items()
        }
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
                    raise UserError(
                        f"{path}:{line}: {name} was already set on line {lines[name]}; remove one of them"
                    )
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
        raise UserError(
            f"{path} holds {type(values).__name__} {str(values)[:40]!r}: expected `key: value` lines"
        )
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
