"""Disks that fail and processes that are killed at every single write: what is there is whole, and nothing is lost."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml
from adapters import make_adapter
from helpers import needs_page_files
from write_faults import Commands, Fault, Outcome

from qlora_native.tool.train.checkpoint import checkpoints

pytestmark = needs_page_files

LORA = {"target_modules": ["up_proj", "down_proj"], "dropout": 0.1}
OPTIONS = {"steps": 3, "batch_size": 2, "grad_accum": 1, "lr": 5e-3, "paged": True, "grad_checkpointing": False}
# One run writes everything, but its states fit the budget; the other sends 1.2 MiB of them through 1 MiB.
TRAINED = {
    "train": ({"eval_fraction": 0.2}, {"r": 8, **LORA}, {"save_every": 1, "eval_every": 1, "keep": 1}),
    "train, shipping": ({"eval_fraction": 0.2}, {"r": 8, **LORA, "ship": "nf4"}, {"save_every": 1, "keep": 1}),
    "train, paging": ({}, {"r": 400, **LORA}, {"save_every": 2, "page_budget": 1 << 20, "keep": 1}),
}
RESUMED = ", resumed"
GGUF = "export {model} --adapter {adapter} --out {out}/new.gguf --to "
OTHERS = {
    "quantize": "quantize {model} --out {out}/new --shard-size 60KB",
    "quantize, calibrated": "quantize {model} --out {out}/new --method wmse --calibration {rows} "
    "--calibration-rows 2 --calibration-length 8",
    "merge": "merge {model} {adapter} --out {out}/new --shard-size 60KB",
    "export to gguf": GGUF + "gguf",
    "export to gguf-adapter": GGUF + "gguf-adapter --base original",
    "export to peft": "export {model} --adapter {adapter} --to peft --out {out}/new",
}
ERRORS = {Fault.ONCE: errno.EIO, Fault.FULL: errno.ENOSPC}
KILLS = (Fault.KILL, Fault.TORN)
STILL = ("fsync ", "sync_file_range ", "chmod ", "close ", "mmap ")  # calls after which a kill finds the same files
CHECKPOINT = re.compile(r"rename .*/(out/step-\d+)$")
WITH_BYTES = ("write ", "pwrite ", "writev ", "sendfile ", "copy_file_range ")  # calls that can do half
# Times, and what differs between a run and its continuation.
VARYING = re.compile(rb'"(?:seconds|tokens_per_second)": [\d.e-]*|(?:keep|resume): .*')
Tree = dict[str, bytes]


def tree(folder: Path) -> Tree:
    """The contents of every file below the folder, by its path from there, without the page, which a run can lack."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "report.html")
    return {str(path.relative_to(folder)): VARYING.sub(b"", contents(path)) for path in files}


def contents(path: Path) -> bytes:
    """The bytes; of report.json what is the same in a continuation."""
    if path.name != "report.json":
        return path.read_bytes()
    return json.dumps({**json.loads(path.read_text()), "config": "", "memory": None, "notes": None}).encode()


def of(files: Tree, folder: str) -> Tree:
    """Those in one folder."""
    return {path: data for path, data in files.items() if path.rpartition("/")[0] == folder}


def shown(files: Tree) -> Tree:
    """Those that are not below a hidden name."""
    return {path: data for path, data in files.items() if not path.startswith(".")}


class Case:
    """A command that writes below ``folder``, and what it does there if nothing happens."""

    def __init__(self, commands: Commands, folder: Path, words: Sequence[object]) -> None:
        self.commands, self.folder, self.words = commands, folder, words
        self.ends = set[int]()  # hashes of what was left, and found to be enough to go on
        self.reset()
        self.run(fork=False)  # imports
        self.reset()
        began = time.monotonic()
        undisturbed = self.run()
        self.seconds = time.monotonic() - began
        assert undisturbed.code == 0, undisturbed.printed
        self.calls, self.expected = undisturbed.calls, tree(folder)

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def run(self, *fault: Any, **how: Any) -> Outcome:
        return self.commands.run(self.words, *fault, **how)

    def check(self, found: Tree, is_done: bool, before: Sequence[str]) -> None:
        """What is there is whole, and all that the calls ``before`` the fault have finished is there."""
        is_there = is_done or any(call.startswith("rename ") and "/." not in call for call in before)
        assert shown(found) == (self.expected if shown(found) or is_there else {})

    def go_on(self) -> None:
        """The command once more: it makes what is missing and cleans up, or refuses (2) as all is there."""
        again, found = self.run(), tree(self.folder)
        assert again.code in (0, 2), again.printed
        assert (shown(found) if again.code else found) == self.expected

    def disturb(self, fault: Fault, number: int = 0, **how: Any) -> None:
        """Run the command with a fault at call ``number``, or killed after ``seconds``, and judge what it left."""
        self.reset()
        outcome = self.run(fault, number, ERRORS.get(fault, 0), **how)
        call = self.calls[number - 1] if number else ""
        try:
            sentences = [line for line in outcome.printed.splitlines() if line.startswith("qlora")]
            if fault not in KILLS and not how:
                assert outcome.code == (2 if sentences else 0)
                assert len(sentences) <= 1 and "Traceback" not in outcome.printed
                assert fault is not Fault.SHORT or not sentences
            else:
                assert outcome.code in (-9, 0)
            found = tree(self.folder)
            self.check(found, outcome.code == 0, outcome.calls[: number - 1] if number else outcome.calls[:-1])
            end = hash(tuple(found.items()))
            if end not in self.ends:
                self.go_on()
                self.ends.add(end)
        except AssertionError as error:
            what = f"{fault.name} at call {number}, {call}: {outcome.code}, {outcome.printed[-300:]}"
            raise AssertionError(f"{what} {str(error)[:300]}") from error


class Training(Case):
    """A run with checkpoints, of which only the newest is kept; or what is left of it after a kill at the first."""

    start: Path | None = None
    oldest = ""  # checkpoint that must be there

    def __init__(self, commands: Commands, folder: Path, name: str, files: Path, build: Path) -> None:
        data, lora, train = TRAINED[name.removesuffix(RESUMED)]
        config = runs.settings(files, folder / "out", {"eval_fraction": 0, **data}, lora, **{**OPTIONS, **train})
        path = build / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        super().__init__(commands, folder, ["train", path])
        self.reset()
        commands.run([*self.words, "--keep", "9"])
        self.all_steps = tree(folder)
        if name.endswith(RESUMED):
            saved = next(number for number, call in enumerate(self.calls, 1) if CHECKPOINT.match(call))
            self.reset()
            self.run(Fault.KILL, saved + 2)
            self.oldest, self.start = f"out/{checkpoints(folder / 'out')[0].name}", build / "start"
            shutil.copytree(folder, self.start)
            self.words = [*self.words, "--resume"]
            self.reset()
            self.calls = self.run().calls

    def reset(self) -> None:
        super().reset()
        if self.start is not None:
            shutil.copytree(self.start, self.folder, dirs_exist_ok=True)

    def check(self, found: Tree, is_done: bool, before: Sequence[str]) -> None:
        saved = [match[1] for match in map(CHECKPOINT.match, before) if match]
        assert max((path for path in found if "/step-" in path), default="") >= (saved or [self.oldest])[-1]
        adapters = [data for path, data in self.all_steps.items() if path.endswith("adapter_model.safetensors")]
        for folder in {path.rpartition("/")[0] for path in found} - {"out"}:
            files, whole = of(found, folder), of(self.all_steps, folder)
            if folder in ("out/best", "out/adapter"):  # best/ may be that of an earlier step
                assert files.keys() == whole.keys() and files[f"{folder}/adapter_model.safetensors"] in adapters
            elif "/." not in folder:
                assert files == whole
        assert not is_done or of(found, "out/adapter") == of(self.expected, "out/adapter")

    def go_on(self) -> None:
        again = self.commands.run([*self.words[:2], "--resume"])
        assert again.code == 0, again.printed
        older = {path: data for path, data in self.all_steps.items() if path not in self.expected}
        found = tree(self.folder)
        assert {**older, **found} == {**older, **self.expected}  # one that was to be deleted may still be there


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    """Cases by name, in one warm process."""
    build, made = tmp_path_factory.mktemp("build"), dict[str, Case]()
    files = runs.write_files(tmp_path_factory.mktemp("files"), num_hidden_layers=1)
    folder = build / "faults"
    names = {"model": files / "model", "rows": files / "train.jsonl", "out": folder}
    names["adapter"] = make_adapter(files / "model", build / "adapter")
    commands = Commands(folder, build)

    def case(name: str) -> Case:
        if name not in made and name in OTHERS:
            made[name] = Case(commands, folder, OTHERS[name].format(**names).split())
        elif name not in made:
            made[name] = Training(commands, folder, name, files, build)
        return made[name]

    yield case
    commands.close()


@pytest.mark.parametrize("name", [*TRAINED, "train, paging, resumed", *OTHERS])
def test_a_fault_at_each_write(make: Callable[[str], Case], name: str, pytestconfig: pytest.Config) -> None:
    """Every call fails alone, or all from there on that need room; writes are cut short; and a kill comes before each,
    or after half of it. Of all of these ``--write-faults`` are tried."""
    case = make(name)
    numbers = range(1, len(case.calls) + 1)
    tried = [(fault, n) for fault in (Fault.ONCE, Fault.FULL) for n in numbers]
    tried += [(Fault.KILL, n) for n in numbers if n == 1 or not case.calls[n - 2].startswith(STILL)]
    tried += [(f, n) for f in (Fault.SHORT, Fault.TORN) for n in numbers if case.calls[n - 1].startswith(WITH_BYTES)]
    tried = random.Random(name).sample(tried, min(len(tried), pytestconfig.getoption("--write-faults")))
    wrong = []
    for fault, number in tried:
        try:
            case.disturb(fault, number)
        except AssertionError as error:
            wrong.append(str(error))
    print(name, len(case.calls), "calls", dict(Counter(fault.name for fault, _ in tried)), len(case.ends), "ends")
    assert not wrong, f"{len(wrong)} of {len(tried)}, such as {'; '.join(wrong[:8])}"


KILLED = ["train, paging", "quantize", "merge", pytest.param("export to gguf", marks=pytest.mark.long)]


@pytest.mark.parametrize("name", KILLED)
def test_kills_at_random_moments(make: Callable[[str], Case], name: str, pytestconfig: pytest.Config) -> None:
    """``--kills`` times."""
    case, chance = make(name), random.Random(name)
    for _ in range(pytestconfig.getoption("--kills")):
        case.disturb(Fault.COUNT, seconds=chance.uniform(0, case.seconds))
