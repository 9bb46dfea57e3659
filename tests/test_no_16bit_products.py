"""No 16-bit operand reaches torch's own products where the CPU has no dot product for it.

Without AVX512-BF16 torch's bf16 and fp16 GEMM is a plain loop, up to a hundred times slower than its fp32 one. So
training, evaluation, calibration and generation run once in a process that is limited to AVX2, and each product of
torch is recorded. To see where they come from:

    PYTHONPATH=bench QLORA_NATIVE_ISA=avx2 python tests/test_no_16bit_products.py EMPTY_FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import isa_env
import pytest
import recorded
import tiny
import torch
from laws import ROOT
from transformers import AutoTokenizer

import qlora_native as qn
from qlora_native.models.generate import Sampling, stream
from qlora_native.tool.config import TrainConfig
from qlora_native.tool.evaluate.comparison import compare
from qlora_native.tool.evaluate.texts import load_text
from qlora_native.tool.evaluate.variants import Variants
from qlora_native.tool.train.loop import Trainer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BUILT = qn.build_info()
ISA = "scalar" if BUILT["cpu_isa"] == "scalar" else next(isa for isa in ("avx2", "neon") if isa in BUILT["isas_built"])
Run = Callable[[], Any]
RANK = 4
FILE = "found.json"


def adapted(folder: Path, dtype: torch.dtype, dropout: float = 0.0) -> Any:
    """A model whose adapter says something."""
    model = qn.add_lora(qn.load_model(folder, dtype=dtype), qn.LoraConfig(r=RANK, seed=0, dropout=dropout))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def training(folder: Path, dtype: torch.dtype, tied: bool = False, dropout: float = 0.0, packing: bool = False) -> Run:
    """`qlora train`: two steps of rows of different lengths, and the held-out loss; checkpointing a tied model."""
    model_folder = tiny.write_model(folder / "model", tie_word_embeddings=tied)
    rows = tiny.write_rows(folder / "rows.jsonl", 24)
    data = {"train": str(rows), "eval_fraction": 0.2, "packing": packing, "max_length": 64}
    options = {"steps": 2, "batch_size": 4, "grad_accum": 1, "save_every": 0, "grad_checkpointing": tied}
    values = {"model": str(model_folder), "output_dir": str(folder / "out"), "data": data, "train": options}
    config = TrainConfig.model_validate(values | {"lora": {"r": RANK, "dropout": dropout}})
    return Trainer(config, model=adapted(model_folder, dtype, dropout), quiet=True).train


def evaluation(folder: Path, dtype: torch.dtype) -> Run:
    """`qlora eval`: the 16-bit model, its 4-bit form and that one with an adapter, on rows of different lengths."""
    model_folder = tiny.write_model(folder / "model")
    qn.save_adapter(adapted(model_folder, dtype), folder / "adapter")
    variants = Variants(model_folder, ("rtn",), folder / "adapter", options={"dtype": dtype})
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = load_text(tiny.write_rows(folder / "held.jsonl", 12), tokenizer, max_length=64)
    return lambda: compare(variants, [text], tokenizer, pad_id=1)


def calibration(folder: Path, dtype: torch.dtype, method: str) -> Run:
    """Loading with a method that runs the layers on text."""
    model_folder = tiny.write_model(folder / "model")
    ids = torch.randint(5, 300, (4, 64))
    return lambda: qn.load_model(model_folder, dtype=dtype, method=method, calibration=ids)


def generation(folder: Path, dtype: torch.dtype, adapter: bool) -> Run:
    """transformers' greedy `generate` for one row and for two of which one is padded, and `qlora chat`'s own loop."""
    model_folder = tiny.write_model(folder / "model")
    model = adapted(model_folder, dtype) if adapter else qn.load_model(model_folder, dtype=dtype)
    one, two = torch.randint(5, 300, (1, 9)), torch.randint(5, 300, (2, 9))
    mask = torch.ones_like(two)
    mask[1, :4] = 0
    greedy = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 1}

    def generate() -> None:
        model.generate(one, attention_mask=torch.ones_like(one), **greedy)
        model.generate(two, attention_mask=mask, **greedy)
        assert len(list(stream(model, one[0].tolist(), Sampling(max_tokens=4), set()))) == 4

    return generate


CASES: dict[str, Callable[..., Run]] = {
    "train": training,
    "train, tied, checkpointing": partial(training, tied=True),
    "train, dropout": partial(training, dropout=0.1),
    "train, packing": partial(training, packing=True),
    "eval": evaluation,
    "calibrate wmse": partial(calibration, method="wmse"),
    "calibrate gptq": partial(calibration, method="gptq"),
    "generate": partial(generation, adapter=False),
    "generate, adapter": partial(generation, adapter=True),
}
NAMES = [f"{case}, {dtype}" for case in CASES for dtype in DTYPES]


def record(folder: Path, with_lines: bool) -> dict[str, Any]:
    """The child's side: of each case how many products there were, those in 16 bits, and the traceback if it failed."""
    isa_env.limits()
    found: dict[str, Any] = {}
    for name in NAMES:
        case, _, dtype = name.rpartition(", ")
        try:
            place = folder / name
            place.mkdir()
            products = recorded.products_of(CASES[case](place, DTYPES[dtype]), with_lines)
            found[name] = {"all": len(products), "sixteen": sorted({str(p) for p in products if p.is_16bit})}
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("products")
    environment = {**os.environ, **isa_env.settings(ISA), "PYTHONPATH": str(ROOT / "bench")}
    words = [sys.executable, __file__, str(folder), "--json"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("name", NAMES)
def test_torch_multiplies_nothing_in_16_bits(name: str, found: dict[str, Any]) -> None:
    assert "error" not in found[name], found[name]["error"]
    assert found[name]["sixteen"] == []
    assert found[name]["all"] > 0 or "gptq" not in name  # its statistics are fp32 products: they were seen


def products_in_16_bits(code: Run) -> list[str]:
    return [product.operator for product in recorded.products_of(code) if product.is_16bit]


def test_the_recorder_sees_what_the_dispatcher_sees() -> None:
    """Products inside of our own ops, of a backward pass, of another thread, and attention; fp32 ones are none."""
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8, 8, dtype=torch.bfloat16)

    def elsewhere() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: x.detach() @ weight).result()

    def attention() -> None:
        q = torch.randn(1, 2, 5, 16, dtype=torch.bfloat16)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    def in_double() -> None:  # float64 goes through torch inside of the op
        qn.linear(torch.randn(2, 64, dtype=torch.float64), qn.quantize(torch.randn(8, 64)))

    linear = products_in_16_bits(lambda: torch.nn.functional.linear(x, weight).sum().backward())
    assert linear == ["aten::linear", "aten::mm"]
    assert products_in_16_bits(elsewhere) == ["aten::matmul"]
    assert products_in_16_bits(attention) == ["aten::scaled_dot_product_attention"]
    (inside,) = recorded.products_of(in_double)
    assert inside.operator == "aten::mm" and not inside.is_16bit
    assert {dtype for dtype, _ in inside.operands} == {"double"}


if __name__ == "__main__":
    of_every_case = record(Path(sys.argv[1]), with_lines="--json" not in sys.argv)
    Path(sys.argv[1], FILE).write_text(json.dumps(of_every_case), encoding="utf-8")
    for case_name, of_case in of_every_case.items():
        print(case_name, of_case.get("error", ""), *of_case.get("sixteen", ()), sep="\n  ")
