"""What the loop does when memory runs out: the optimizer's states leave it, and the step begins again."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from qlora_native import _C
from qlora_native._memory import free_device_memory, free_memory, release_free_memory
from qlora_native.config import TrainConfig
from qlora_native.distributed.states import random_state, set_random_state
from qlora_native.errors import UserError
from qlora_native.optim import AdamW, Lion

Result = TypeVar("Result")

# What libraries say in a plain RuntimeError: torch's CPU allocator, C++, oneDNN, cuBLAS and cuDNN.
_WORDS = re.compile(r"can't allocate memory|not enough memory|bad_alloc|could not create a memory|_ALLOC_FAILED")
_ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


def is_shortage(error: BaseException) -> bool:
    """Whether an exception means that memory could not be had, on the host or on a device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


class OOMRetry:
    """Runs the passes of a training step or an evaluation, and runs them again, once, if memory runs out on the way.

    Args:
        config: for ``train.paged``, which False leaves no second try, and for the advice.
        optimizer: whose states leave memory in between.
        tell: takes the one line that says that paging began.
        alone: there is one process. Of several none can begin again by itself, and the run ends.

    ``retries`` and ``lost_seconds`` count the first tries that failed, with the paging out after them.
    """

    def __init__(
        self, config: TrainConfig, optimizer: AdamW | Lion, tell: Callable[[str], None], *, alone: bool = True
    ) -> None:
        self.config, self.optimizer, self._tell, self._alone = config, optimizer, tell, alone
        self.retries, self.lost_seconds = 0, 0.0
        self._told = False

    def run(self, passes: Callable[[], Result], what: str) -> Result:
        """``passes()``. A second try starts from the random state of the first, without gradients: it computes the
        same. UserError, which begins with ``what``, if memory runs out again."""
        if not self._alone:
            return self.told(passes, what)
        before, began = random_state(), time.monotonic()
        try:
            return passes()
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            asked = _asked(error)
        # Behind the except clause, since the exception's traceback keeps the tensors of the pass alive.
        self.optimizer.zero_grad()
        gc.collect()
        if self.config.train.paged is False:
            raise self._error(what, asked)
        self.optimizer.page_out()
        release_free_memory()
        self.report_paging(what)
        set_random_state(*before)
        self.retries += 1
        self.lost_seconds += time.monotonic() - began
        return self.told(passes, what)

    def told(self, work: Callable[[], Result], what: str) -> Result:
        """``work()``, which cannot be done twice: UserError if memory runs out or the page file fails."""
        try:
            return work()
        except _C.PageFileError as error:
            raise UserError(f"{what}: {error}") from error
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            asked = _asked(error)
        raise self._error(what, asked)

    def report_paging(self, when: str) -> None:
        """Says once that states are paged out, whoever moved them."""
        num_bytes = 0 if self._told else self.optimizer.states_paged_out()
        if num_bytes:
            self._told = True
            cause = "as train.paged says" if self.config.train.paged is True else "memory is short"
            self._tell(f"{when}: {cause}, so {num_bytes / 2**20:,.0f} MiB of optimizer states are paged out")

    def _error(self, what: str, asked: str) -> UserError:
        options, data = self.config.train, self.config.data
        device: torch.device = self.optimizer.param_groups[0]["params"][0].device
        free = free_device_memory(device) if device.type == "cuda" else free_memory()
        advice = [f"lower data.max_length (now {data.max_length})"]
        if options.batch_size > 1:
            advice.insert(0, f"halve train.batch_size (now {options.batch_size}) and double train.grad_accum")
        if not options.grad_checkpointing:
            advice.append("set train.grad_checkpointing to true")
        if options.paged is False:
            advice.append("set train.paged to auto")
        return UserError(
            f"{what} needs more memory than there is ({asked}{f'; {free}' if free else ''}); {', or '.join(advice)}"
        )


def _asked(error: BaseException) -> str:
    found = _ASKED.search(str(error))
    return f"it asked for {found[1]}" if found else "an allocation failed"
