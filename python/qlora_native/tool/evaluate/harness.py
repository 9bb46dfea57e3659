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
    """The metrics of each task by its name, named as lm-eval does ("acc,none", "acc_stderr,none", ...).

    Tasks are names of lm-eval's tasks, or paths of YAML files of such tasks; ``limit`` documents of each are used.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for task in tasks:
        is_file = task.endswith((".yaml", ".yml"))
        if not (Path(task).is_file() if is_file else manager.match_tasks([task])):
            raise UserError(
                f"--lm-eval: {task} is not there: expected a task of lm-eval (`lm-eval ls tasks` lists them), or the "
                "YAML file of one"
            )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    found = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager)
    return {
        task: {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }
