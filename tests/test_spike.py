"""A spike of memory in a training run under a hard limit, in processes of their own: unpaged it dies, paged it ends
with the same losses, bit for bit.

The limit is RLIMIT_DATA, which counts private writable memory. It is put between the peaks of two runs without a limit,
one with the optimizer's states in memory and one with them in a file.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from helpers import needs_page_files
from runs import metrics, settings, start

from qlora_native._memory import kib_fields

pytestmark = [pytest.mark.slow_memory, needs_page_files]

MIB = 1 << 20
RANK = 1536  # adapters far larger than the layers they stand on, so that their states matter: 120 MiB
WORDS = 150  # of the one long row, whose activations take more than the states; the other rows have five
ROWS = 4
STEPS = 2 * ROWS  # the first epoch begins with the long row, when there are no states yet; in the second it is a spike


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spike")
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "max_position_embeddings": 8192}
    tiny.write_model(folder / "model", **sizes)
    rows = tiny.write_rows(folder / "train.jsonl", ROWS - 1)
    answer = " ".join(tiny.FACTS[number % len(tiny.FACTS)][1] for number in range(WORDS))
    messages = [{"role": "user", "content": "all of them"}, {"role": "assistant", "content": answer}]
    with rows.open("a") as file:
        file.write(json.dumps({"messages": messages}) + "\n")
    return folder


class Run(NamedTuple):
    """One run of `qlora train`."""

    status: int
    printed: str
    errors: str
    metrics: list[dict[str, Any]]
    files: list[str]
    peak: int  # bytes of private writable memory


def run(files: Path, name: str, driver: str = "", **options: Any) -> Run:
    folder = files / name
    folder.mkdir()
    lora = {"r": RANK, "alpha": RANK, "dropout": 0.1, "target_modules": ["down_proj"]}
    # fp32 takes twice the bytes for half the products.
    options = {"steps": STEPS, "batch_size": 1, "grad_accum": 1, "lr": 1e-4, "dtype": "float32", **options}
    options["grad_checkpointing"] = False
    config = settings(files, folder / "out", {"max_length": 8192}, lora, **options)
    # malloc gives every tensor back at once, so that peaks are those of what is needed.
    process = start(config, folder, driver, MALLOC_MMAP_THRESHOLD_="65536")
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        peak = max(peak, kib_fields(status.read_text()).get("VmData", 0))
        time.sleep(0.001)
    printed, errors = process.communicate()
    left = sorted(path.name for path in (folder / "out").glob("*"))
    lines = metrics(folder / "out") if "metrics.jsonl" in left else []
    return Run(process.returncode, printed, errors, lines, left, peak)


LIMITED = "import resource\nresource.setrlimit(resource.RLIMIT_DATA, ({0}, {0}))\n"
# Without the thread that looks ahead, the loop's second try is on its own.
UNWATCHED = "from qlora_native.optim import pressure\npressure.INTERVAL = 1e6\n"


@pytest.fixture(scope="module")
def unlimited(files: Path) -> Run:
    """States in memory, as much as is wanted."""
    done = run(files, "unlimited", paged=False)
    assert done.status == 0, done.errors
    assert "pag" not in done.printed
    return done


@pytest.fixture(scope="module")
def limit(files: Path, unlimited: Run) -> int:
    paged = run(files, "paged", paged=True, page_budget=16 * MIB)
    assert paged.status == 0, paged.errors
    assert paged.metrics == unlimited.metrics
    message = f"peaks {unlimited.peak / MIB:,.0f} MiB unpaged, {paged.peak / MIB:,.0f} MiB paged"
    assert unlimited.peak - paged.peak > 90 * MIB, message
    limit = (paged.peak + unlimited.peak) // 2  # a short row must have room beside the states
    print(f"{message}, limit {limit / MIB:,.0f}")
    return limit


@pytest.mark.long
def test_unpaged_it_dies(files: Path, unlimited: Run, limit: int) -> None:
    done = run(files, "dies", LIMITED.format(limit), paged=False)
    assert done.status == 2, done.errors
    message = r"qlora: step \d needs .*RLIMIT_DATA.*; lower data.max_length .* train.grad_check.* train.paged .*"
    assert re.fullmatch(message, done.errors.splitlines()[-1]) and "Traceback" not in done.errors, done.errors
    assert ROWS <= len(done.metrics) < STEPS
    assert done.metrics == unlimited.metrics[: len(done.metrics)]


@pytest.mark.parametrize("driver", ["", pytest.param(UNWATCHED, marks=pytest.mark.long)], ids=["watched", "unwatched"])
def test_paged_it_ends_with_the_same_losses(files: Path, unlimited: Run, limit: int, driver: str) -> None:
    done = run(files, "unwatched" if driver else "watched", LIMITED.format(limit) + driver)
    print(done.printed)
    assert done.status == 0 and "Error" not in done.errors, done.errors
    assert (done.metrics, done.files) == (unlimited.metrics, unlimited.files)
    assert done.peak <= limit
    (began,) = [line for line in done.printed.splitlines() if "memory is short" in line]
    assert re.search(r"12\d MiB .* paged out", began)
    report = re.search(r"^paging moved ([\d,]+) MiB .*; (\d) steps? began", done.printed, re.M)
    assert report is not None and int(report[1].replace(",", "")) >= 100
    assert not driver or report[2] == "1"
