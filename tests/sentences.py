"""Whole sentences that users read, compared with sentences.json: ``pytest --rewrite-sentences`` writes it anew.

A test asserts numbers, names and exit codes by itself; where the wording as such is worth a review, it also calls the
fixture ``sentence`` with the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("sentences.json")
Check = Callable[[object], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-sentences", action="store_true", help=f"write {FILE.name} anew, from the tests run")


@pytest.fixture
def sentence(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Check]:
    """Compare a text with what sentences.json has for this test; pytest's temporary folders are $TMP there."""
    stored: dict[str, list[str]] = json.loads(FILE.read_text(encoding="utf-8"))
    name = request.node.nodeid.removeprefix("tests/")
    folders = rf"[^\s'\"(=]*{re.escape(tmp_path.parent.name)}[\\/][\w-]+"
    found: list[str] = []
    rewrites = bool(request.config.getoption("--rewrite-sentences"))

    def check(text: object) -> None:
        found.append(re.sub(folders, "$TMP", str(text)))
        if not rewrites:
            assert found == stored.get(name, [])[: len(found)], (
                f"if this is as meant: pytest --rewrite-sentences {name}"
            )

    yield check
    if not rewrites:
        assert len(found) == len(stored.get(name, [])), f"{FILE.name} has a sentence more than {name} printed"
    elif found:
        text = json.dumps({**stored, name: found}, indent=1, sort_keys=True, ensure_ascii=False)
        FILE.write_text(text + "\n", encoding="utf-8")
