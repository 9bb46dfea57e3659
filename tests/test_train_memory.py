"""keep_freed_memory: done under glibc, in a process of its own, and not against the user's settings. What a run's
memory was: its own, not that of an earlier run in the same process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from runs import settings, write_files

from qlora_native._memory import USER_SETTINGS, keep_freed_memory

FAULTS = """
import ctypes, resource, sys, torch
from qlora_native._memory import keep_freed_memory

libc = ctypes.CDLL(None)
PR_SET_THP_DISABLE, M_MMAP_THRESHOLD = 41, -3
libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # one fault a small page, however free memory is scattered
if sys.argv[1] == "kept":
    assert keep_freed_memory()
else:
    # glibc's first threshold, held: else it grows at the first free, and what then goes back depends on the heap's top.
    libc.mallopt(M_MMAP_THRESHOLD, 128 << 10)
for step in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 20) for _ in range(30)]  # 4 MiB each
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is configured")
def test_the_same_sizes_are_had_without_new_pages() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], env=environment, capture_output=True).stdout)
        for how in ("given back", "kept")
    }
    assert faults["given back"] > 5_000  # of 30,720 pages
    assert faults["kept"] < 500


def test_the_users_settings_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in USER_SETTINGS:
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not keep_freed_memory()


# Prints the MiB measured of each of three runs; before the last one more was held, which the system does not forget.
RUNS = """
import json, sys, torch
from pathlib import Path
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train import memory
from qlora_native.tool.train.loop import Trainer
write = Path.write_text
def refused(path, *args, **options):
    if path.name == "clear_refs":
        raise PermissionError(13, "Permission denied")
    return write(path, *args, **options)
for name, config in json.loads(sys.argv[1]).items():
    if name == "refused":
        torch.ones(128 << 20)
        memory.Path.write_text = refused
    Trainer(TrainConfig.model_validate(config), quiet=True).train()
    print(json.loads((Path(config["output_dir"]) / "report.json").read_text())["memory"]["measured"] >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_measured_is_the_memory_of_the_run(tmp_path: Path) -> None:
    files = write_files(tmp_path, vocab_size=16000, hidden_size=256)
    lora = {"modules_to_save": ["embed_tokens", "lm_head"]}  # of 125 MiB with gradients and the optimizer's states
    names = ("first", "second", "refused")
    configs = {name: settings(files, tmp_path / name, lora=lora, steps=2, paged=False) for name in names}
    done = subprocess.run([sys.executable, "-c", RUNS, json.dumps(configs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, refused = map(int, done.stdout.splitlines())
    assert first > 125 and second == pytest.approx(first, abs=8) and refused == 0
