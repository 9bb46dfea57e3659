"""Ids of the Hugging Face hub in place of paths: what is asked of the hub's packages, and the sentence without them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, create_autospec

import datasets
import huggingface_hub
import pytest
import runs
from sentences import Check

from qlora_native.data.readers import content_hash, hub_id, read_rows
from qlora_native.errors import UserError
from qlora_native.tool.cli.main import main
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.train.loop import Trainer
from qlora_native.weights.open import open_source

MODEL = "tiny-org/tiny.model-1"
SNAPSHOT = "hub/models--tiny-org--tiny.model-1/snapshots/0123abc"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the hub's packages are asked for, with their signatures; they give a model and twelve rows."""
    files, seen = runs.write_files(tmp_path / "files", 12, num_hidden_layers=1), list[Any]()

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        seen.append((name, allow_patterns))
        shutil.copytree(files / "model", tmp_path / SNAPSHOT, dirs_exist_ok=True)
        return str(tmp_path / SNAPSHOT)

    def load(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
        seen.append((path, name, split))
        return [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]

    hub = SimpleNamespace(snapshot_download=create_autospec(huggingface_hub.snapshot_download, side_effect=download))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    rows = SimpleNamespace(load_dataset=create_autospec(datasets.load_dataset, side_effect=load))
    monkeypatch.setitem(sys.modules, "datasets", rows)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return seen


NO_IDS = "here/name ./name ../name /org/name name org/train.jsonl org/model.Q4_0.gguf org/rows.CSV a/b/c/d"


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name:test", ("org/name", None, "test")),
        ("org/a.b-c_d/main:train", ("org/a.b-c_d", "main", "train")),
        *((path, None) for path in NO_IDS.split()),
    ],
)
def test_what_is_an_id(calls: list[Any], path: str, parts: Any) -> None:
    Path("here").mkdir()
    found = hub_id(path)
    assert (found and found.groups()) == parts and not calls


def test_rows_of_a_data_set(calls: list[Any]) -> None:
    rows = list(read_rows("org/name/main:test", limit=5))
    assert calls == [("org/name", "main", "test")]
    assert [row.line for row in rows] == [1, 2, 3, 4, 5] and "messages" in rows[0].data
    assert rows[1].where == "org/name/main:test:2"
    assert len(list(read_rows("org/name"))) == 12 and calls[-1] == ("org/name", None, "train")
    assert re.fullmatch("[0-9a-f]{64}", content_hash("org/name"))


def test_a_run_of_a_model_and_a_data_set(calls: list[Any], printed: Any) -> None:
    settings = runs.settings(Path(), Path("out"), {"train": ["org/name"], "eval": "org/name:test"}, steps=1)
    config = Path("config.yaml")
    config.write_text(json.dumps({**settings, "model": MODEL}))
    assert main(["config", "check", str(config)]) == 0 and not calls
    summary = Trainer(TrainConfig.from_file(config), quiet=True).train()
    assert {call[0] for call in calls} == {MODEL, "org/name"}
    about = json.loads((summary.adapter_dir / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == MODEL
    assert f'base_model: "{MODEL}"' in (summary.adapter_dir / "README.md").read_text()
    calls.clear()
    assert printed("estimate", MODEL)
    assert calls == [(MODEL, ["config.json"])], "no weights"


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("is_installed", [True, False])
@pytest.mark.parametrize("read", [read_rows, open_source])
def test_without_a_network_or_a_package(
    is_installed: bool, read: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, sentence: Check
) -> None:
    fails = Mock(side_effect=ConnectionError("Couldn't reach\nthe Hub."))
    package = SimpleNamespace(snapshot_download=fails, load_dataset=fails) if is_installed else None
    for name in ("huggingface_hub", "datasets"):
        monkeypatch.setitem(sys.modules, name, package)  # None: as if it were not installed
    with pytest.raises(UserError) as caught:
        read("org/name")
    sentence(caught.value)
