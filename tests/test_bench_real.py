"""bench/bench_real.py on a tiny GGUF file: what it compares, not how fast."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench_real as bench
import pytest
import readme

from qlora_native.tool.cli import standard_library

pytest.importorskip("gguf")
CEILINGS = {"read_gb_per_s": 20.0, "write_gb_per_s": 20.0, "copy_gb_per_s": 20.0, "bf16_gflop_per_s": 100.0}
COUNTS = ("--steps", "2", "--learn-steps", "2", "--new-tokens", "3", "--repeats", "1", "--threads", "1")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of a real one, a short task, and no llama.cpp, which does not load so small a model."""
    from gguf_files import write_gguf

    few = [(f"module{n}", f"def f{n}():\n    return {n}", f"Return {n}.") for n in range(64)]
    monkeypatch.setattr(standard_library, "examples", lambda most: iter(few))
    monkeypatch.setattr(bench, "ceilings", lambda: CEILINGS)
    monkeypatch.setattr(bench, "birth", lambda: {"commit": "c0ffee", "changed": False})
    monkeypatch.setattr(bench, "has_llama_cpp", lambda: False)
    file = write_gguf(tmp_path / "model.gguf", num_hidden_layers=1)
    monkeypatch.setattr(bench, "model_file", lambda name: file)
    return file


def row(model: str, part: str, **values: Any) -> dict[str, Any]:
    return {"model": model, "part": part, "kept": model != "gemma-270m", "bars": [], **values}


def test_the_pages_have_a_row_for_each_model() -> None:
    """In README.md one with all figures of a model, in docs/performance.md one in each table."""
    machine = {"cpu": "A", "threads": 2, "torch": "2", "cpu_isa": "amx"}
    rows = []
    for model in ("gemma-270m", "1.5b"):
        for checkpointing in (True, False):
            speeds = {"ours": [1.0, 127.0, 140.0], "theirs": [50.0, 54.0, 55.0]}
            step: dict[str, Any] = {"ours_over": {"theirs": [0.4, 0.425, 0.5]}, "tokens_per_second": speeds}
            step |= {"peak_rss_mib": {"ours": 2400, "theirs": 6200}, "of_floor": 0.5, "peer_dtype": "bfloat16"}
            rows.append(row(model, "train", checkpointing=checkpointing, **step))
    losses = {"ours": [3.0, 2.001], "theirs": [3.0, 2.002]}
    rows.append(row("1.5b", "learn", steps=100, held_out_loss=losses))
    speeds = {"ours": [8.0, 8.1, 8.2], "theirs": [4.0, 4.1, 4.2], "llama.cpp": [9.0, 10.1, 11.0]}
    speeds["ours+adapter"] = [7.0, 7.1, 7.2]
    rows.append(row("1.5b", "generate", tokens_per_second=speeds, new_tokens=64))
    results = {"amx": {"bench": "real", "machine": machine, "rows": rows}}
    tables = [line for line in readme.models(results).splitlines() if line.startswith("| ")]
    assert tables[1:] == [
        "| Gemma 3 270M (NF4) | amx | 2.35 x | 127 / 54 | 2,400 / 6,200 |  |  |",
        "| Qwen2.5-Coder-1.5B-Instruct | amx | 2.35 x | 127 / 54 | 2,400 / 6,200 | 2.001 / 2.002 | 8.1 / 4.1 / 10.1 |",
    ]
    tables = [line for line in readme.SECTIONS["real"](results).splitlines() if line.startswith("| ")]
    assert len(tables) == 3 + 4 + 1 + 2
    assert "| Qwen2.5-Coder-1.5B-Instruct | with | amx | 7.1 |  |  |" in tables
    assert readme.models({}) == ""


def measured(out: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[dict[str, Any]]:
    command = ["bench_real.py", "--models", "1.5b", *COUNTS, "--json", str(out), "--work", str(out.parent / "work")]
    monkeypatch.setattr(sys, "argv", [*command, *words])
    bench.main()
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return rows


def test_rows(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides compute the same; a second run measures nothing that is there, and only what was asked for."""
    monkeypatch.setattr(bench, "BARS", dict.fromkeys(("amx", "avx512_bf16", "avx512", "avx2", "scalar"), (2.4, 0.45)))
    rows = measured(tmp_path / "real.json", monkeypatch)
    kinds = [(row["part"], row.get("checkpointing")) for row in rows]
    assert kinds == [("train", True), ("train", False), ("learn", False), ("generate", None)]
    assert all(row["match"] and row["kept"] and row["model"] == "1.5b" for row in rows)
    bars = [[(bar["measure"], bar["bar"]) for bar in row["bars"]] for row in rows]
    nats = ("nats from the held-out loss", 0.02)
    assert bars == [[("times as fast", 2.4), ("of the peak memory", 0.45)], [], [nats], []]
    assert all(row["of_floor"] > 0 and row["peak_rss_mib"]["ours"] > 0 for row in rows[:3])
    before, after = rows[2]["held_out_loss"]["theirs"]
    assert after < before and rows[2]["bars"][0]["met"]
    assert set(rows[3]["tokens_per_second"]) == {"ours", "ours+adapter", "theirs", "theirs+adapter"}

    def no_child(*_: object) -> None:
        raise AssertionError("a row was measured again")

    monkeypatch.setattr(bench, "child", no_child)
    assert measured(tmp_path / "again.json", monkeypatch, "--parts", "learn") == [rows[2]]
    with pytest.raises(AssertionError, match="measured again"):
        measured(tmp_path / "other.json", monkeypatch, "--parts", "learn", "--lr", "1e-3")
