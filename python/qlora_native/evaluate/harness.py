"""Tasks of EleutherAI's lm-eval, run on a model in memory through its own transformers wrapper."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_native.errors import UserError


def check_harness() -> None:
    """UserError unless lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs lm-eval, which is not installed: pip install lm-eval")


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """The metrics of each task by its name, as lm-eval names them ("acc,none", "acc_stderr,none", ...).

    Args:
        tasks: names that lm-eval knows, or paths of its YAML files.
        limit: documents of each task.

    Raises:
        UserError: lm-eval is not installed, does not know a task, or its file is not there.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    absent = [name for name in files if not Path(name).is_file()]
    if absent:
        raise UserError(f"--lm-eval: {absent[0]} is not there: expected a task of lm-eval, or the YAML file of one")
    unknown = [task for task in tasks if task not in files and not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"--lm-eval: lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    found = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager)
    return {
        task: {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }
