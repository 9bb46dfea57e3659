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
from paged import LEAST, Made, is_in_file, made, page_dir, parameters, same_states, same_training, train, train_all

import qlora_native as qn

__all__ = ["page_dir"]

pytestmark = pytest.mark.usefixtures("page_dir")


def copy_params(source: Made, target: Made) -> None:
    for p, q in zip(source[0], target[0], strict=True):
        q.data.copy_(p.data)


KINDS: dict[str, dict[str, Any]] = {
    "file": {"paged": True, "page_budget": LEAST},
    "auto": {"paged": "auto"},
    "paged out": {"paged": "auto"},
    "plain": {"paged": False},
}
WAYS = [(bits, source, target, torch) for bits in (32, 8) for source in ("file", "auto") for target in KINDS]


@pytest.mark.parametrize(("bits", "source", "target", "way"), [*WAYS, (32, "file", "file", dcp)])
def test_a_checkpoint_continues_bit_equal(bits: int, source: str, target: str, way: Any, tmp_path: Path) -> None:
    """It replaces the states that are there, where they are: no second file comes to be."""
    first, second = (made(page_dir=tmp_path, bits=bits, **KINDS[kind]) for kind in (source, target))
    train_all([first], range(3))
    train_all([second], range(9, 11))  # each parameter has had a gradient
    first[1].page_out()
    if target == "paged out":
        second[1].page_out()
    files = len(os.listdir("/proc/self/fd"))
    for number in range(2 if way is torch else 1):
        saved, place = first[1].state_dict(), tmp_path / f"saved-{number}"
        if way is torch:
            torch.save(saved, place)
            given = torch.load(place)
        else:
            dcp.save({"optimizer": saved}, checkpoint_id=place, no_dist=True)
            target_dict = {"optimizer": second[1].state_dict()}
            dcp.load(target_dict, checkpoint_id=place, no_dist=True)
            given = target_dict["optimizer"]
        second[1].load_state_dict(given)
        copy_params(first, second)
        assert is_in_file(second[1]) == (target in ("file", "paged out"))
        assert (second[1].states_in_memory() > 0) == (target == "auto")
        assert len(os.listdir("/proc/self/fd")) == files
        train_all((first, second), range(3, 6))
        assert same_training(first, second)


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
    assert is_in_file(ours[1])
    torch.testing.assert_close(ours[0], params, rtol=0, atol=1e-6)
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
    assert is_in_file(second[1])
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
    assert is_in_file(twin[1]) == (kind == "file") and twin[1].paging_statistics()["state_bytes"] > 0
    assert same_training(original, twin)
    own = original[1].state[original[0][2]]["exp_avg"], twin[1].state[twin[0][2]]["exp_avg"]
    assert own[0].data_ptr() != own[1].data_ptr()
    twin[1].page_out()
    train_all((original, twin), range(2, 5))
    assert is_in_file(twin[1]) and same_training(original, twin) and twin[1].grad_norm == original[1].grad_norm


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
