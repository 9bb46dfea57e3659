"""examples/finetune.ipynb: small and without stored outputs; executed, it ends with a GGUF file of the merged model."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import ROOT
from runs import write_files

import qlora_native as qn

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = ROOT / "examples" / "finetune.ipynb"


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_ten_cells_that_compile_and_stores_no_output() -> None:
    manager = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert len(cells) == 10
    headings = [cell.source.splitlines()[0] for cell in notebook.cells if cell.source.startswith("## ")]
    assert [heading.split()[1] for heading in headings] == [f"{number}." for number in range(1, 11)]
    for cell in cells:
        assert (cell.outputs, cell.execution_count) == ([], None)
        ast.parse(manager.transform_cell(cell.source))


@pytest.mark.long
@pytest.mark.parametrize("rows", ["csv", "jsonl"])
def test_it_runs_from_rows_to_a_merged_file(rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the rows that it writes, and on a file of one's own."""
    client = pytest.importorskip("nbclient").NotebookClient
    pytest.importorskip("ipykernel")
    files = write_files(tmp_path, max_position_embeddings=512)
    given: dict[str, Any] = {"MODEL": files / "model", "OUT": tmp_path / "run", "STEPS": 20}
    given["ROWS"] = files / "train.jsonl" if rows == "jsonl" else tmp_path / "rows.csv"
    for name, value in given.items():
        monkeypatch.setenv(f"QLORA_EXAMPLE_{name}", str(value))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [cell.outputs for cell in code_cells(notebook)]
    texts = ["".join(output.get("text", "") for output in of_cell) for of_cell in outputs]
    assert "\x1b[1;32m" in texts[3] and "step 20/20" in texts[5], texts
    assert any("image/png" in output.get("data", {}) for output in outputs[6])
    assert all(part in texts[4] for part in ("bfloat16", qn.build_info()["cpu_isa"])) or torch.cuda.is_available()
    assert "before:" in texts[7] and "after:" in texts[7] and texts[9].strip()
    # The file moves the logits of the NF4 weights, which were trained on, as far along the adapter's change as the
    # adapter does; Q8_0 adds noise beside it.
    ids = torch.arange(100)[None]
    base: Any = qn.load_model(given["MODEL"], dtype=torch.float32)
    merged: Any = qn.load_model(tmp_path / "run" / "tuned.gguf", dtype=torch.float32)
    with torch.no_grad():
        alone = base(ids).logits
        qn.load_adapter(base, tmp_path / "run" / "adapter")
        change = base(ids).logits - alone
        moved = float(((merged(ids).logits - alone) * change).sum() / change.square().sum())
    assert float(change.norm() / alone.norm()) > 0.03 and 0.95 < moved < 1.05
