"""``qlora train`` on several processes: the same adapter as on one, from the same config."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from gguf_files import write_gguf
from ranks import distance, on_ranks
from runs import Crash, crash_at, metrics, settings, steps_made, wait_until, write_files
from safetensors.torch import load_file
from tiny import write_rows

from qlora_native.distributed import RankLost
from qlora_native.distributed.ranks import Ranks
from qlora_native.errors import UserError
from qlora_native.models.convert import convert
from qlora_native.models.load import load_model
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer
from qlora_native.tool.train.setup import prepare_model

TOLERANCE = 1e-5
ROWS = {"r": 3, "trainable_tokens": [2, 4]}
HANGING = 15  # seconds until a rank counts as lost: more than a start takes beside other tests


def config(folder: Path, out: str, **changes: Any) -> TrainConfig:
    train = {"steps": 10, "batch_size": 3, "grad_accum": 2, "lr": 1e-3, "dtype": "float32", "save_every": 4}
    train |= {"paged": False, "samples": 0, **changes.pop("train", {})}
    data = {"eval": str(folder / "held.jsonl"), "max_length": 48}
    return TrainConfig.model_validate({**settings(folder, folder / out, data, {"r": 3}, **train), **changes})


def apart(folder: Path, one: str, other: str) -> float:
    """Distance of the adapters of two runs."""
    first, second = (load_file(folder / out / "adapter" / "adapter_model.safetensors") for out in (one, other))
    return distance(first, second)


def run(folder: Path, name: str, on_step: Any = None, **changes: Any) -> Trainer:
    trainer = Trainer(config(folder, name, **changes), quiet=True, on_step=on_step)
    trainer.train()
    return trainer


def same_bytes(rank: int, model: Any, folder: Path) -> float:
    """The 4-bit bytes of a model sharded over ranks against those of a load on one process; the share held here."""
    alone = load_model(folder / "model", dtype=torch.float32)
    held = whole = 0
    for path, layer in alone.named_modules():
        if not hasattr(layer, "quantized"):
            continue
        sharded = model.get_submodule(f"{path}.base_layer").quantized
        for name in ("packed", "absmax"):
            assert torch.equal(getattr(sharded, name).full_tensor(), getattr(layer.quantized, name))
        for name in ("nested_absmax", "nested_offset"):
            assert torch.equal(getattr(sharded, name), getattr(layer.quantized, name))
        held, whole = held + sharded.packed.to_local().numel(), whole + layer.quantized.packed.numel()
    return held / whole


def until(folder: Path, name: str, step: int, **changes: Any) -> None:
    """A run that every rank gives up after ``step``."""
    with pytest.raises(Crash):
        run(folder, name, crash_at(step), **changes)


def on_two(rank: int, world: int, folder: Path) -> dict[str, Any]:
    run(folder, "ddp", parallel="ddp", train={"samples": 2})
    trainer = run(folder, "fsdp", parallel="fsdp", train={"paged": True, "grad_checkpointing": False, "samples": 2})
    found = {"share": same_bytes(rank, trainer.model, folder), "read": trainer.model.reading.bytes_read}

    run(folder, "ddp, rows", parallel="ddp", lora=ROWS)
    run(folder, "ddp, streamed", parallel="ddp", model=str(folder / "gguf" / "model.gguf"), weight_budget=1)
    run(folder, "calibrated on two", model=str(folder / "wmse"), parallel="fsdp")
    until(folder, "sharded for one", 6, parallel="fsdp")
    until(folder, "copies for four", 6, parallel="ddp")
    for mode in ("fsdp", "ddp"):
        coded: dict[str, Any] = {"parallel": mode, "lora": {"r": 64}}  # matrices large enough for 8-bit states
        coded["train"] = {"optimizer": "adamw8bit", "steps": 4, "save_every": 2, "eval_every": 0, "paged": True}
        run(folder, f"{mode}, coded", **coded)
        until(folder, f"{mode}, resumed", 3, **coded)
        run(folder, f"{mode}, resumed", resume="auto", **coded)
    return found


def on_four(rank: int, world: int, folder: Path) -> None:
    run(folder, "sharded for four", parallel="fsdp", resume="auto")
    run(folder, "copies for four", parallel="ddp", resume="auto")


def dies(rank: int, world: int, folder: Path, name: str, dying: int, step: int) -> str:
    """A run in which rank ``dying`` is killed after ``step``; the message of the others."""

    def die(record: dict[str, Any]) -> None:
        if rank == dying and record["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankLost) as lost:
        run(folder, name, die, parallel="fsdp", train={"save_every": 2})
    return str(lost.value)


def hangs(rank: int, world: int, folder: Path, port: int) -> tuple[str, float]:
    """A run that joins by itself, as under torchrun, and in which rank 1 does nothing more after step 3; the message of
    the other, and how long it waited."""
    dist.destroy_process_group()
    names = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    reported, since = folder / "hung, reported", [0.0]

    def hang(record: dict[str, Any]) -> None:
        since[0] = time.monotonic()
        if rank == 1 and record["step"] == 3:
            while not reported.exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankLost) as lost:
        run(folder, "hung", hang, parallel="ddp", rank_timeout=HANGING)
    reported.touch()
    return str(lost.value), time.monotonic() - since[0]


def makes_a_mistake(rank: int, world: int) -> str:
    def together() -> None:
        with Ranks("ddp", rank, world).together():
            if rank == 1:
                raise UserError("a mistake")

    with pytest.raises(UserError if rank == 1 else RankLost) as error:
        together()
    return str(error.value)


def resumes(rank: int, world: int, folder: Path, name: str) -> None:
    run(folder, name, parallel="fsdp", train={"save_every": 2}, resume="auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and in ``one`` the run of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    write_files(folder, num_hidden_layers=2)  # 20 rows in steps of 6: the last one of an epoch has two
    write_rows(folder / "held.jsonl", 5)
    run(folder, "one")
    run(folder, "rows", lora=ROWS)
    (folder / "gguf").mkdir()
    run(folder, "gguf", model=str(write_gguf(folder / "gguf" / "model.gguf")), residency="memory")
    return folder


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> Path:
    """The folder, with the model in 4 bits by wmse, made by the command of the error on two processes, and its run."""
    quant = {"method": "wmse", "calibration": str(write_rows(folder / "text.jsonl", 150))}
    with pytest.raises(UserError, match="calibrates on one process, and 2 ") as refused:
        prepare_model(config(folder, "refused", parallel="fsdp", quant=quant), ranks=Ranks("fsdp", 0, 2))
    name, *words = re.findall(r"`qlora (.*) DIR`", str(refused.value))[0].split()
    assert main([name, *words, str(folder / "wmse")]) == 0
    run(folder, "calibrated", model=str(folder / "wmse"))
    return folder


def test_weights_that_processes_read_together_are_not_mapped(folder: Path) -> None:
    (folder / "four-bit").mkdir()
    convert(folder / "model", folder / "four-bit", "qlora")
    refused = config(folder, "refused", parallel="ddp", model=str(folder / "four-bit"), residency="mapped")
    with pytest.raises(UserError, match="residency 'mapped' needs one process"):
        prepare_model(refused, ranks=Ranks("ddp", 0, 2))


def test_two_ranks(calibrated: Path) -> None:
    folder = calibrated
    found = on_ranks(2, on_two, folder)
    answers = {}
    for name in ("ddp", "fsdp"):
        assert apart(folder, name, "one") <= TOLERANCE, name
        lines = metrics(folder / name)
        answers[name] = [line.pop("samples") for line in lines if "samples" in line]
        for got, expected in zip(lines, metrics(folder / "one"), strict=True):
            assert got == pytest.approx(expected, rel=1e-4), name
        assert apart(folder, f"{name}, resumed", f"{name}, coded") == 0
    assert answers["fsdp"] == answers["ddp"] and len(answers["ddp"][-1]) == 2
    assert apart(folder, "ddp, rows", "rows") <= TOLERANCE
    assert apart(folder, "ddp, streamed", "gguf") <= TOLERANCE
    memory = json.loads((folder / "ddp, streamed" / "report.json").read_text())["memory"]
    assert memory["mapped"] > 0 < memory["predicted"]["activations"]
    assert apart(folder, "fsdp, coded", "ddp, coded") <= 1e-3
    assert apart(folder, "calibrated on two", "calibrated") <= TOLERANCE
    assert apart(folder, "calibrated", "one") > 1e-3
    assert sum(of_rank["share"] for of_rank in found) == 1
    total = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    reads = [of_rank["read"] for of_rank in found]
    assert 0.9 * total < sum(reads) <= total and max(reads) < 0.6 * total, (reads, total)

    shutil.copytree(folder / "sharded for one", folder / "sharded for four")
    run(folder, "sharded for one", resume="auto")
    on_ranks(4, on_four, folder)
    for name in ("sharded for one", "sharded for four", "copies for four"):
        assert apart(folder, name, "one") <= TOLERANCE, name


def test_a_mistake_on_one_rank_ends_all_with_its_sentence() -> None:
    assert on_ranks(2, makes_a_mistake) == ["", "a mistake"]


def test_a_killed_rank_ends_the_rest_and_the_run_resumes(folder: Path, pytestconfig: pytest.Config) -> None:
    chance = random.Random(7)
    for number in range(pytestconfig.getoption("--rank-kills")):
        name, dying, step = f"killed {number}", chance.randrange(2), chance.randrange(1, 10)
        messages = on_ranks(2, dies, folder, name, dying, step, dying=dying)
        assert re.match(rf"rank {1 - dying} of 2 .* checkpoint is intact", messages[1 - dying])
        on_ranks(2, resumes, folder, name)
        assert apart(folder, name, "one") <= TOLERANCE


def test_a_rank_that_hangs_ends_the_rest_after_the_timeout(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    message, seconds = on_ranks(2, hangs, folder, port, dying=1)[0]
    assert re.match(r"rank 0 of 2 .* checkpoint is intact", message)
    assert HANGING - 1 < seconds < HANGING + 20


def test_torchrun_restarts_from_the_checkpoint(folder: Path, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """Two processes of torchrun, one of which is killed again and again at steps of chance."""
    if not pytestconfig.getoption("--torchrun"):
        pytest.skip("--torchrun was not given; .ci/full gives it")
    kills, chance = pytestconfig.getoption("--rank-kills"), random.Random(11)
    train = {"save_every": 5, "steps": 15 * kills + 15}
    run(folder, "one, longer", train=train)
    path, out = tmp_path / "config.yaml", folder / "torchrun"
    path.write_text(yaml.safe_dump(config(folder, "torchrun", parallel="fsdp", train=train).model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(kills)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "qlora_native", "train", str(path)]
    stderr, environment = (tmp_path / "stderr").open("w+"), {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    for number in range(kills):
        step = 15 * number + chance.randrange(1, 15)
        wait_until(lambda step=step: steps_made(out) >= step, process, 180)  # type: ignore[misc]
        before = set(children(process.pid))
        os.kill(chance.choice(sorted(before)), signal.SIGKILL)
        wait_until(lambda before=before: not before & set(children(process.pid)), process, 60)  # type: ignore[misc]
    printed = process.communicate(timeout=300)[0]
    stderr.seek(0)
    errors = stderr.read()
    sentences = re.findall(r"^qlora: rank [01] of 2 .* is intact", errors, re.MULTILINE)
    # torchrun ends the survivor of a kill itself where that is still starting and has not noticed.
    assert process.returncode == 0 and len(sentences) <= kills and "terminate called" not in errors, errors
    assert sentences or kills == 1, errors
    assert printed.count("continuing from") <= kills  # a kill before the first checkpoint starts anew
    assert apart(folder, "torchrun", "one, longer") <= TOLERANCE


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started and that live."""
    found = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if not line.split()[1].startswith("Z")]


def test_a_small_dev_shm(folder: Path, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """64 KiB, as some containers have less than they need: nothing of ours lies there."""
    if not pytestconfig.getoption("--torchrun"):
        pytest.skip("--torchrun was not given; .ci/full gives it")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config(folder, "small shm", parallel="fsdp").model_dump(mode="json")))
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounted += ['mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77; "$@"', "sh"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [*mounted, *torchrun, "-m", "qlora_native", "train", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode == 77:
        pytest.skip("no file system may be mounted here")
    assert process.returncode == 0, process.stderr
    assert (folder / "small shm" / "adapter").is_dir()


def test_the_nccl_script_says_that_there_are_no_two_gpus(monkeypatch: Any, capsys: Any, sentence: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["nccl_check.py"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    import nccl_check

    assert nccl_check.main() == nccl_check.SKIPPED == 77
    sentence(capsys.readouterr().out)


def test_estimate_of_several_cards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["estimate", str(folder / "model"), "--gpus", "4", "--gpu", "1GB"]
    assert main([*command, "--json"]) == 0
    copies, sharded = json.loads(capsys.readouterr().out)["ranks"]
    assert (copies["mode"], copies["cut"], sharded["mode"], sharded["cut"]) == ("ddp", False, "fsdp", True)
    assert sharded["frozen"] < 0.3 * copies["frozen"]
    assert copies["trained"] == pytest.approx(4 * sharded["trained"], rel=0.05)
    assert main(command) == 0
    assert "fsdp on 4: " in capsys.readouterr().out
    assert main(["estimate", str(folder / "model"), "--gpus", "17"]) == 2
    assert "--gpus is 17: expected 2 to 16" in capsys.readouterr().err
