"""Damaged files, checkpoints, optimizer states and records of a run: one sentence, or left out, or finite values."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import workers

import qlora_native as qn
from qlora_native.distributed import OneProcess
from qlora_native.distributed.sharding import load_sharded_states, save_sharded_states
from qlora_native.optim import AdamW
from qlora_native.tool.train.checkpoint import STATE as TRAINER
from qlora_native.tool.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from qlora_native.tool.train.progress import Metrics, Progress, RunReport, plot_losses, read_metrics

DEEP = "[" * 200_000


def test_damaged_files(
    pytestconfig: pytest.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
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


def trained(**options: Any) -> AdamW:
    parameter = torch.nn.Parameter(torch.ones(8))
    parameter.grad = torch.ones(8)
    optimizer = AdamW([parameter], **options)
    optimizer.step()
    return optimizer


class Call:
    """What a pickle makes of this is whatever the function returns."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_several_processes_runs_no_code(tmp_path: Path) -> None:
    optimizer, file = trained(), tmp_path / ".metadata"
    save_sharded_states(tmp_path, optimizer)
    (states,) = load_sharded_states(tmp_path, optimizer).values()
    (expected,) = optimizer.state.values()
    assert all(torch.equal(states[name], expected[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    sound = pickle.loads(file.read_bytes())
    bytes_entry = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    entries = {**sound.state_dict_metadata, "0.exp_avg": bytes_entry}
    place = sound.storage_data[next(iter(sound.storage_data))]
    place.relative_path = "../elsewhere"
    moved = pickle.dumps(sound)
    sound.state_dict_metadata = entries
    for evil in (pickle.dumps(Call(os.mkdir, str(tmp_path / "made"))), pickle.dumps(sound), moved):
        file.write_bytes(evil)
        with pytest.raises(ValueError, match=r"\.metadata names"):
            load_sharded_states(tmp_path, optimizer)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        (["random", "numpy", 2], 10**6),  # numpy would read behind its words
        (["random", "numpy", 1], [1]),
        (["random", "python"], [3, [], None]),
        (["random"], 5),
        (["optimizer"], []),
        (["optimizer"], {"7": {}}),
    ],
    ids=str,
)
def test_a_checkpoint_whose_numbers_are_wrong(tmp_path: Path, keys: list[Any], wrong: object) -> None:
    options: dict[str, Any] = {"state": {}, "config": "", "keep": 1, "ranks": OneProcess()}
    folder = save_checkpoint(tmp_path, 1, save_adapter=lambda partial: None, optimizer=trained(), **options)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask()}
    whole = node = json.loads((folder / TRAINER).read_text())
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = wrong
    (folder / TRAINER).write_text(json.dumps(whole))
    with pytest.raises(qn.UserError, match=r"step-000001 cannot be read: .*; delete"):
        load_checkpoint(folder, trained(), OneProcess())


def umask() -> int:
    os.umask(mask := os.umask(0o022))
    return mask


@pytest.mark.parametrize(
    ("bits", "name", "wrong"),
    [
        (32, "exp_avg", torch.full((8,), float("nan"))),
        (32, "exp_avg", torch.empty(8, device="meta")),
        (32, "exp_avg_sq", torch.ones(8).to_sparse()),
        *((32, "exp_avg_sq", torch.full((8,), number)) for number in (float("inf"), -1.0)),
        (32, "step", float("nan")),
        *((32, "step", torch.tensor(number)) for number in (-1.0, 0.5, 1e30, float(1 << 31))),
        *((32, "exp_avg", torch.ones(8).to(dtype)) for dtype in (torch.bool, torch.int64, torch.complex64, torch.int8)),
        *((32, "exp_avg", torch.ones(8).to(dtype)) for dtype in (torch.float8_e4m3fn, torch.float64)),
        (8, "exp_avg", torch.ones(5000)),
        (8, "exp_avg_sq", torch.ones(5000, dtype=torch.int8)),
        *((8, "exp_avg_absmax", wrong) for wrong in (None, torch.ones(1), torch.ones(20, dtype=torch.bool))),
        (8, "exp_avg_sq_absmax", torch.full((20,), -1.0)),
    ],
    ids=str,
)
def test_optimizer_states_that_are_no_numbers_or_no_codes(bits: Any, name: str, wrong: Any) -> None:
    optimizer = AdamW([torch.nn.Parameter(torch.ones(8 if bits == 32 else 5000))], bits=bits)
    given, (group,) = optimizer.state_dict(), optimizer.param_groups
    given["state"] = {0: {**optimizer._new_state(group["params"][0], group), name: wrong}}
    with pytest.raises(ValueError, match=f"AdamW: {name} of a parameter"):
        optimizer.load_state_dict(given)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_optimizer_options_that_are_no_numbers(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is inf"):
        trained(**{key: float("inf")})
    given = trained().state_dict()
    given["param_groups"][0][key] = float("nan")
    with pytest.raises(ValueError, match=f"{key} is nan"):
        trained().load_state_dict(given)


def test_metrics_and_notes_that_are_damaged(tmp_path: Path) -> None:
    whole = [{"step": 1, "loss": 2.5, "grad_norm": None}, {"step": 2, "eval_loss": 2, "samples": [{"prompt": "a"}]}]
    damaged = ["[]", "5", "{}", '{"step": "2"}', '{"step": true}', '{"step": 1.5, "loss": 1}', DEEP, '{"step": 1']
    damaged += ['{"step": 2, "loss": "1"}', '{"step": 2, "loss": NaN}', '{"step": 2, "samples": 5}', "1" * 5000]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([json.dumps(whole[0]), *damaged, json.dumps(whole[1])]))
    assert read_metrics(path) == whole
    plot_losses(tmp_path)
    notes = [{"step": 1, "text": "a"}, {"step": 1}, {"step": "1", "text": "a"}]
    for number in (1, 2):
        (tmp_path / "report.json").write_text(json.dumps({"notes": notes[:number]}))
        page = RunReport(tmp_path, {"steps": 2, "rows": []}, Progress(2, 2, 1, quiet=True), TrainState(step=2))
        page.evaluated({})
        assert json.loads((tmp_path / "report.json").read_text())["notes"] == notes[: 2 - number]
    metrics = Metrics(path, 2)
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_metrics(path) == whole[:1]
