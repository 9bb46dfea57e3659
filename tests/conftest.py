from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuda-binary", help="compiled GPU code to look at in place of the installed module's")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """bitsandbytes' own results; see tests/golden/README.md."""
    return load_file(Path(__file__).parent / "golden" / "bnb_golden.safetensors")
