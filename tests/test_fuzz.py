"""Damaged files end in one sentence and exit code 2, or are read into finite values; never in a signal or a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import workers


def test_damaged_files(
    pytestconfig: pytest.Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    asked = pytestconfig.getoption("--fuzz")
    environment = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # as the commands do before the imports
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = workers.outcomes("fuzzed.py", tmp_path, asked)
    count, wrong = workers.summary(found)
    record_property("damaged files", count)
    assert not wrong, "\n".join([count, *wrong])
    known = (Path(__file__).with_name("corpus.jsonl")).read_text(encoding="utf-8").splitlines()
    assert len(found) == len(known) + asked and len(known) >= 8, count
    assert {outcome.partition(":")[0] for _, outcome in found} == {"accepted", "refused"}, count


def test_a_worker_without_a_case_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "nothing.py").write_text("")
    with pytest.raises(AssertionError, match="no case"):
        workers.outcomes(str(tmp_path / "nothing.py"), tmp_path)
