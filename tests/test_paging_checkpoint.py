"""Paged states are torch tensors: state_dict, copies, pickles, torch.save and distributed checkpoints, groups."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import relative_error, same_bytes
from paged import LEAST, Made, give_grads, made, page_dir, parameters, same_states, same_training, train, train_all

import qlora_native as qn

__all__ = ["page_dir"]

pytestmark = pytest.mark.usefixtures("page_dir")


def in_file(optimizer: Any) -> bool:
    return bool(optimizer.states_paged_out() == optimizer.paging_statistics()["state_bytes"] > 0)


def copy_params(source: Made, target: Made) -> None:
    for p, q in zip(source[0], target[0], strict=True):
        q.data.copy_(p.data)


KINDS: dict[str, dict[str, Any]] = {
    "file": {"paged": True, "page_budget": LEAST},
    "auto": {"paged": "auto"},
    "plain": {"paged": False},
}


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("source", ["file", "auto"])
@pytest.mark.parametrize("target", list(KINDS))
def test_a_checkpoint_continues_bit_equal(source: str, target: str, bits: int, tmp_path: Path) -> None:
    first, second = (
        made(page_dir=tmp_path, bits=bits, **KINDS[source]),
        made(page_dir=tmp_path, bits=bits, **KINDS[target]),
    )
    train(first[1], first[0], range(3))
    first[1].page_out()
    torch.save(first[1].state_dict(), tmp_path / "states.pt")
    train(second[1], second[0], range(7, 9))  # states that are there are replaced
    copy_params(first, second)
    second[1].load_state_dict(torch.load(tmp_path / "states.pt"))
    assert in_file(second[1]) == (target == "file")
    assert (second[1].states_in_memory() > 0) == (target == "auto")
    train_all((first, second), range(3, 6))
    assert in_file(second[1]) == (target == "file")
    assert same_training(first, second)


def test_paged_out_states_are_loaded_into_the_file(tmp_path: Path) -> None:
    """And a second time into the same places: no second file comes to be."""
    a, b = made(page_dir=tmp_path), made(page_dir=tmp_path)
    for params, optimizer in (a, b):
        train(optimizer, params, range(2))
        optimizer.page_out()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        train(a[1], a[0], range(2, 3))
        b[1].load_state_dict(a[1].state_dict())
        assert in_file(b[1]) and len(os.listdir("/proc/self/fd")) == files
    assert same_states(a, b)


@pytest.mark.parametrize("kind", ["file", "auto"])
def test_a_checkpoint_of_torch_continues(kind: str, tmp_path: Path) -> None:
    params = parameters()
    theirs = params, torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    train(theirs[1], params, range(3))
    ours = made(page_dir=tmp_path, **KINDS[kind])
    copy_params(theirs, ours)
    ours[1].load_state_dict(theirs[1].state_dict())
    ours[1].page_out()
    train_all((theirs, ours), range(3, 6))
    assert in_file(ours[1])
    for p, q in zip(params, ours[0], strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-6)
    # And back.
    again = torch.optim.AdamW(ours[0], lr=1e-2, weight_decay=0.0)
    again.load_state_dict({**again.state_dict(), "state": ours[1].state_dict()["state"]})
    assert all(same_bytes(again.state[p]["exp_avg"], ours[1].state[p]["exp_avg"]) for p in ours[0])


@pytest.mark.parametrize(("before", "after"), [(32, 8), (8, 32)])
@pytest.mark.parametrize("kind", ["file", "auto"])
def test_states_take_the_form_that_bits_asks_for(before: Any, after: Any, kind: str, tmp_path: Path) -> None:
    first, second = (
        made(page_dir=tmp_path, bits=before, **KINDS[kind]),
        made(page_dir=tmp_path, bits=after, **KINDS[kind]),
    )
    for params, optimizer in (first, second):
        train(optimizer, params, range(3))
        optimizer.page_out()
    second[1].load_state_dict({**second[1].state_dict(), "state": first[1].state_dict()["state"]})
    assert in_file(second[1])
    values, codes = (o.state[p[2]] for p, o in ((second, first) if before == 8 else (first, second)))
    for name in ("exp_avg", "exp_avg_sq"):
        assert relative_error(qn.reference.decode_state(codes[name], codes[f"{name}_absmax"]), values[name]) < 0.02
    # The group's own bits change with it.
    second[1].load_state_dict(first[1].state_dict())
    assert second[1].param_groups[0]["bits"] == before
    assert same_states(first, second)
    copy_params(first, second)
    second[1].page_out()
    train_all((first, second), range(3, 5))
    assert same_training(first, second)


def test_states_may_change_places(tmp_path: Path) -> None:
    """An optimizer's own live states, loaded in another order."""
    params = parameters(sizes=(5000, 5000))
    optimizer = qn.optim.AdamW(params, page_dir=tmp_path)
    train(optimizer, params, range(2))
    before = [optimizer.state[param]["exp_avg"].clone() for param in params]
    given = optimizer.state_dict()
    optimizer.load_state_dict({**given, "state": {0: given["state"][1], 1: given["state"][0]}})
    assert all(torch.equal(optimizer.state[params[i]]["exp_avg"], before[1 - i]) for i in range(2))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["file", "auto"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_page_on_their_own(how: str, kind: str, bits: int, tmp_path: Path) -> None:
    original = made(page_dir=tmp_path, bits=bits, max_norm=1.0, **KINDS[kind])
    train(original[1], original[0], range(2))
    original[1].page_out()
    twin = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
    options = [(o.paged, o.page_dir, o.page_budget, o.max_norm) for _, o in (original, twin)]
    assert options[0] == options[1]
    assert in_file(twin[1]) == (kind == "file") and twin[1].paging_statistics()["state_bytes"] > 0
    assert same_training(original, twin)
    own = original[1].state[original[0][2]]["exp_avg"], twin[1].state[twin[0][2]]["exp_avg"]
    assert own[0].data_ptr() != own[1].data_ptr()
    twin[1].page_out()
    train_all((original, twin), range(2, 5))
    assert in_file(twin[1]) and same_training(original, twin) and twin[1].grad_norm == original[1].grad_norm


WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["qlora_native"] = None
states = torch.load(sys.argv[1], weights_only=True)["state"]
for state in states.values():
    for name, tensor in state.items():
        assert type(tensor) is torch.Tensor and tensor.device.type == "cpu", (name, type(tensor))
print(" ".join(f"{sum(t.double().sum().item() for t in state.values()):.17g}" for state in states.values()))
"""


@pytest.mark.parametrize("bits", [32, 8])
def test_a_process_without_this_package_loads_them(bits: int, tmp_path: Path) -> None:
    params, optimizer = made(page_dir=tmp_path, bits=bits, **KINDS["file"])
    train(optimizer, params, range(2))
    file = tmp_path / "states.pt"
    torch.save(optimizer.state_dict(), file)
    bytes_of_states = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert file.stat().st_size < bytes_of_states + 100_000  # each tensor alone, not the arena around it
    run = subprocess.run([sys.executable, "-c", WITHOUT_THE_PACKAGE, file], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = [sum(t.double().sum().item() for t in state.values()) for state in optimizer.state.values()]
    assert [float(word) for word in run.stdout.split()] == expected


def test_a_distributed_checkpoint(tmp_path: Path) -> None:
    first, second = (made(page_dir=tmp_path, **KINDS["file"]) for _ in range(2))
    train(first[1], first[0], range(3))
    first[1].page_out()
    (tmp_path / "checkpoint").mkdir()
    dcp.save({"optimizer": first[1].state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    train(second[1], second[0], range(9, 11))  # each parameter has had a gradient
    target = {"optimizer": second[1].state_dict()}
    dcp.load(target, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    second[1].load_state_dict(target["optimizer"])
    copy_params(first, second)
    train_all((first, second), range(3, 5))
    assert in_file(second[1]) and same_training(first, second)


@pytest.mark.parametrize("kind", list(KINDS))
def test_groups_added_later_and_parameters_without_gradients(kind: str, tmp_path: Path) -> None:
    def run(options: dict[str, Any]) -> Made:
        params = parameters(sizes=(70_000, 5, 300_000, 4096, 200_000))
        optimizer = qn.optim.AdamW(params[:3], lr=1e-2, page_dir=tmp_path, **options)
        for seed in range(6):
            if seed == 2:
                optimizer.add_param_group({"params": params[3:], "lr": 1e-3})
            give_grads(params, seed)
            params[1].grad = None
            optimizer.step()
            if seed % 2:
                optimizer.page_out()
        return params, optimizer

    expected, got = run(KINDS["plain"]), run(KINDS[kind])
    assert same_training(expected, got)
    assert not got[1].state[got[0][1]]
    if kind != "plain":
        assert in_file(got[1]) and len(got[1]._pages[torch.device("cpu")].stores) == 2


def test_states_of_the_users_own_are_updated_where_they_are_and_cleared_ones_begin_at_zero(tmp_path: Path) -> None:
    expected, got = made(**KINDS["plain"]), made(page_dir=tmp_path, **KINDS["file"])
    for params, optimizer in (expected, got):
        train(optimizer, params, range(2))
        state = optimizer.state[params[2]]
        state["exp_avg"] = own = state["exp_avg"].clone()
        train(optimizer, params, range(2, 4))
        assert optimizer.state[params[2]]["exp_avg"].data_ptr() == own.data_ptr()
    assert same_training(expected, got)
    for params, optimizer in (expected, got):
        optimizer.state.clear()
        train(optimizer, params, range(4, 6))
    assert in_file(got[1]) and same_training(expected, got)
