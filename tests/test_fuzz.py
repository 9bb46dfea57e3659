"""Damaged files end in one sentence and exit code 2, or are read into finite values; never in a signal or a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import workers


def test_damaged_files(
    request: pytest.FixtureRequest, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    count, wrong = workers.summary(workers.outcomes("fuzzed.py", tmp_path, request.config.getoption("--fuzz")))
    record_property("damaged files", count)
    assert not wrong, "\n".join([count, *wrong])
