"""Which checkpoint a run starts from, if any, and whether it fits the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qlora_native.config import TrainConfig
from qlora_native.errors import UserError
from qlora_native.train.checkpoint import CONFIG, STATE, checkpoints

# Changing one of these between two halves of a run would make neither the one run nor the other. The data have a
# check of their own: the sampler compares the rows.
_FIXED_BLOCKS = ("quant", "lora")
_FIXED_KEYS = ("seed", "batch_size", "grad_accum", "dtype", "optimizer")
_BEFORE_THE_KEY = {"train.optimizer": "adamw"}  # what runs did whose config does not have the key yet


def find_checkpoint(config: TrainConfig, output_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint to continue from, or None to start anew.

    UserError if ``resume`` names something else, if the checkpoint was made with other settings, or if ``resume`` is
    not set although ``output_dir`` holds checkpoints of an earlier run.
    """
    found = checkpoints(output_dir)
    if resume is None:
        if found:
            raise UserError(
                f"{output_dir} holds an earlier run ({found[-1].name}); "
                "continue it with --resume, or start anew with another --output_dir"
            )
        return None
    if resume == "auto":
        checkpoint = found[-1] if found else None
    else:
        checkpoint = Path(resume).expanduser()
        if not (checkpoint / STATE).is_file():
            near = f"; {found[-1]} is one" if found else ""
            raise UserError(f"resume is {checkpoint}, which is no checkpoint (it has no {STATE}){near}")
    if checkpoint is not None:
        _check_settings(config, checkpoint)
    return checkpoint


def _check_settings(config: TrainConfig, checkpoint: Path) -> None:
    try:
        before: dict[str, Any] = yaml.safe_load((checkpoint / CONFIG).read_text(encoding="utf-8"))
        now = config.model_dump(mode="json")
        changed = [
            f"{block}.{key} {was} -> {value}"
            for block in (*_FIXED_BLOCKS, "train")
            for key, value in now[block].items()
            if block != "train" or key in _FIXED_KEYS
            if (was := before[block].get(key, _BEFORE_THE_KEY.get(f"{block}.{key}"))) != value
        ]
        if Path(before["model"]).name != Path(config.model).name:  # the folder may have moved
            changed.insert(0, f"model {before['model']} -> {config.model}")
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint / CONFIG} cannot be read ({type(error).__name__}); "
            "delete that checkpoint, and --resume continues from the one before it"
        ) from error
    if changed:
        raise UserError(
            f"{checkpoint} was made with other settings: {', '.join(changed)}; "
            "set them back, or start anew with another --output_dir"
        )
