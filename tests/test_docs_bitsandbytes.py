"""The scripts of docs/bitsandbytes.md, run as they stand there, one after the other in one folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

from qlora_native.cli.main import main

PAGE = Path(__file__).parents[1] / "docs" / "bitsandbytes.md"


def test_every_script_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    tiny.write_model(tmp_path / "my-model")
    scripts = re.findall(r"```(python|sh)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert {kind for kind, _ in scripts} == {"python", "sh"}
    for kind, script in scripts:
        if kind == "sh":
            for line in script.splitlines():
                assert main(line.removeprefix("qlora ").split()) == 0, line
            continue
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert result.returncode == 0, f"{script}\n{result.stderr}"
    ours, again = (load_file(tmp_path / name / "model.safetensors") for name in ("my-model-nf4", "my-model-nf4-again"))
    assert ours.keys() == again.keys()


def test_the_page_names_what_is_offered() -> None:
    import qlora_native.bitsandbytes as bnb

    page = PAGE.read_text(encoding="utf-8")
    for module in (bnb.nn, bnb.functional):
        for name in module.__all__:
            stem = re.sub(r"_(nf4|fp4)$", "", name)
            assert f"`{name}`" in page or f"`{stem}_4bit`" in page, name
