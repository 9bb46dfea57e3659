"""`qlora merge --to nf4 --method gptq`, over a 4-bit base whose scales stay and over the original."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import write_model_and_adapter
from helpers import gguf_weight
from safetensors.torch import load_file, save_file
from tiny_models import assert_same, four_bit_layers
from torch import Tensor
from transformers import AutoTokenizer

import qlora_native as qn
from qlora_native import _native, gguf_blocks, reference
from qlora_native.calibration import adapted
from qlora_native.calibration.adapted import DAMPING, adapted_codes, correction, least_gain
from qlora_native.calibration.quantize import feedback_factor
from qlora_native.lora import lora_layers
from qlora_native.tool.cli import main

CALIBRATION = "calibration.jsonl"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its 4-bit form, an adapter that changes weights by far less than half a level, and text."""
    folder = write_model_and_adapter(tmp_path_factory.mktemp("four"))
    stored = folder / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor * (0.1 if "lora_B" in name else 1) for name, tensor in load_file(stored).items()}
    save_file(tensors, stored, {"format": "pt"})
    qn.load_model(folder / "model").save_pretrained(folder / "nf4")
    tiny.write_tokenizer(folder / "nf4")
    rows = ({"text": f"what is blue and good number {number}? sky. what is red? blood"} for number in range(900))
    (folder / CALIBRATION).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def merge(files: Path, model: str, out: str, *words: str) -> Path:
    command = ["merge", str(files / model), str(files / "adapter"), "--out", str(files / out), "--to", "nf4", *words]
    assert main.main([*command, "--json"]) == 0
    return files / out


@torch.no_grad()
def test_outputs_move_as_the_adapter_moves_them(files: Path) -> None:
    """On the 4-bit base alone, whose scales stay; to nearest almost nothing would move."""
    words = ["--base", "dequantized"]
    calibrated = merge(files, "nf4", "folder/gptq-nf4", *words, "--calibration", str(files / CALIBRATION))
    merged: Any = qn.load_model(calibrated)
    nearest: Any = qn.load_model(merge(files, "nf4", "rtn-nf4", *words))
    assert (merged.load_report.method, nearest.load_report.method) == ("gptq", "rtn")
    model: Any = qn.load_adapter(qn.load_model(files / "nf4", fuse=False), files / "adapter")
    inputs: dict[Any, torch.Tensor] = {}

    def note(layer: Any, arguments: Any) -> None:
        inputs[layer] = arguments[0].flatten(0, 1).float()

    layers: dict[str, Any] = dict(lora_layers(model))
    for layer in layers.values():
        layer.register_forward_pre_hook(note)
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    texts = [json.loads(line)["text"] for line in (files / CALIBRATION).read_text().splitlines()[:400:3]]
    model(tokenizer(" ".join(texts), return_tensors="pt").input_ids[:, :512])
    shares = []
    for path, layer in layers.items():
        old = layer.base_layer.quantized
        new: Any = four_bit_layers(merged)[path].quantized
        assert torch.equal(new.absmax, old.absmax) and torch.equal(new.nested_absmax, old.nested_absmax), path
        wanted = inputs[layer] @ layer.delta().t()
        for weight in (new, four_bit_layers(nearest)[path].quantized):
            moved = inputs[layer] @ (weight.dequantize(torch.float32) - old.dequantize(torch.float32)).t()
            shares.append(float((moved * wanted).sum() / wanted.square().sum()))
    share, share_of_nearest = torch.tensor(shares).view(-1, 2).mean(0).tolist()
    assert share == pytest.approx(1, abs=0.15) and share_of_nearest < 0.7


TYPES = ["nf4", "nf4 of a table", "q4_0", "q4_1", "q5_0", "q8_0", "q4_k", "q6_k", "iq4_nl"]


def weight_of(quant_type: str, n: int, k: int) -> Any:
    """Of elements of the order of 1, or of 0.1 in a GGUF type."""
    if not quant_type.startswith("nf4"):
        return gguf_weight(quant_type, (n, k))
    weight = qn.quantize(torch.randn(n, k))
    if quant_type != "nf4":
        weight.code = (_native.levels(0) * 0.9).roll(3)
    return weight


def with_codes(weight: Any, packed: Tensor) -> Tensor:
    """The values of other codes, fp64."""
    changed: Tensor = weight.with_packed(packed).dequantize(torch.float32).double()
    return changed


def directions(n: int, k: int, change: float) -> tuple[Tensor, Tensor, Tensor]:
    """A [r, K] and B [N, r] whose product is of the order of ``change``, and the second moments of inputs that differ
    in size from column to column and have directions in common."""
    x = torch.randn(999, k) @ (torch.eye(k) + torch.randn(k, k) / 16) * torch.randn(k).exp()
    return torch.randn(4, k), torch.randn(n, 4) * change / 2, x.t() @ x / len(x)


@torch.no_grad()
@pytest.mark.parametrize("quant_type", TYPES)
def test_a_column_hands_on_what_it_lacks(quant_type: str) -> None:
    """Against a search of all levels in fp64."""
    n, k = 40, 256
    weight, (_, _, hessian) = weight_of(quant_type, n, k), directions(n, k, 1)
    old, number = weight.dequantize(torch.float32), weight.op_args().quant_type
    target = (old + torch.randn(n, k) * old.std() / 9).double()
    factor, order, _ = feedback_factor(hessian, DAMPING)  # type: ignore[misc]
    if weight.is_gguf:
        blocks = weight.packed.view(-1, _native.GGUF_BLOCKS[number][1])
        codes = torch.arange(len(gguf_blocks.levels(number)), dtype=torch.uint8)[:, None, None]
        codes = codes.expand(-1, len(blocks), n * k // len(blocks))
        fields = [gguf_blocks.with_codes(blocks, code, number).view(-1) for code in codes]
    else:
        fields = [torch.full_like(weight.packed, 17 * code) for code in range(16)]
    values, aim, expected = torch.stack([with_codes(weight, field) for field in fields]), target.clone(), old.double()
    for i, column in enumerate(order.tolist()):
        of_levels = values[:, :, column]
        expected[:, column] = of_levels.gather(0, (of_levels - aim[:, column]).abs().argmin(0)[None])[0]
        error = target[:, column] - expected[:, column]
        aim[:, order[i + 1 :]] += error[:, None] * factor[i, i + 1 :].double()
    found = with_codes(weight, adapted._fed_back(target.float(), weight, factor, order).view(weight.packed.shape))
    assert float(torch.isclose(found, expected, rtol=1e-5, atol=1e-6).double().mean()) > 0.999
    assert not torch.equal(found, old.double())


@torch.no_grad()
@pytest.mark.parametrize(("quant_type", "k"), [*((name, 256) for name in TYPES), ("nf4", 176)])  # and broken blocks
@pytest.mark.parametrize("change", [1e-3, 1e-1])
def test_a_gain_makes_good_what_error_feedback_leaves(quant_type: str, k: int, change: float) -> None:
    """Also for inputs of no weight, of which nearest codes move nothing against the adapter."""
    weight = weight_of(quant_type, 256, k)
    a, b, hessian = directions(256, k, change / (10 if weight.is_gguf else 1))
    delta, old = (b @ a).double(), with_codes(weight, weight.packed)

    def share(new: Tensor, hessian: Tensor) -> float:
        pull = delta @ hessian.double()
        return float(((new - old) * pull).sum() / (delta * pull).sum())

    found = with_codes(weight, adapted_codes(weight, a, b, 1.0, hessian))
    assert share(found, hessian) == pytest.approx(1, abs=0.1)
    if quant_type == "nf4":
        factor, order, _ = feedback_factor(hessian, DAMPING)  # type: ignore[misc]
        plain = with_codes(weight, reference.gptq((old + delta).float(), factor, order, weight.scales(), 0, 64))
        assert share(plain, hessian) < 0.9 or share(plain, hessian) == pytest.approx(1, abs=0.1)
    found = with_codes(weight, adapted_codes(weight, a, b, 1.0, torch.zeros(k, k)))
    assert share(found, torch.eye(k)) == pytest.approx(1, abs=0.1)
    assert ((found - old) * delta >= -1e-12).all()


def test_a_gain_that_nothing_reaches_is_one() -> None:
    assert least_gain(lambda gain: False) == 1 == least_gain(lambda gain: True)
    assert least_gain(lambda gain: gain >= 5) == pytest.approx(5, rel=0.01)


@torch.no_grad()
def test_a_correction_makes_good_what_the_inputs_lost() -> None:
    k, tokens = 96, 700
    wanted = torch.randn(2, tokens // 2, k) @ torch.randn(k, k)
    given = wanted + 0.3 * torch.randn(2, tokens // 2, k) * wanted.std()
    x, lost = given.view(-1, k).double(), (wanted - given).view(-1, k).double()
    hessian = x.t() @ x / tokens
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    with ThreadPoolExecutor(2) as pool:
        found = correction(hessian.float(), wanted, given, pool)
    assert found is not None
    torch.testing.assert_close(found, (lost.t() @ x / tokens @ damped.inverse()).float(), rtol=1e-3, atol=1e-4)
    weight = torch.randn(64, k, dtype=torch.float64)
    aim = wanted.view(-1, k).double() @ weight.t()
    without, corrected = (aim - x @ w.t() for w in (weight, weight + weight @ found.double()))
    assert corrected.square().mean() < 0.9 * without.square().mean()


def test_the_bytes_are_those_of_any_number_of_threads(files: Path) -> None:
    """And those of the 16-bit model that the 4-bit one was made from."""
    words = ["--base", "dequantized", "--calibration", str(files / CALIBRATION)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((merge(files, "nf4", f"threads-{threads}", *words) / "model.safetensors").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    rounded = load_file(merge(files, "model", "rounded", *words) / "model.safetensors")
    stored = load_file(files / "threads-1" / "model.safetensors")
    assert_same(rounded, stored)


def test_gptq_is_merging_and_then_quantizing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(files / CALIBRATION)
    out = merge(files, "model", "gptq", "--method", "gptq", "--calibration", text)
    assert "calibrating: layer" in capsys.readouterr().err
    assert not list(files.glob(".gptq*"))
    words = [str(files / "model"), str(files / "adapter"), "--out", str(files / "sum")]
    assert main.main(["merge", *words]) == 0
    words = [str(files / "sum"), "--method", "gptq", "--calibration", text, "--out", str(files / "expected")]
    assert main.main(["quantize", *words]) == 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (files / "expected", out))
    assert_same(found, expected)
    assert qn.load_model(out).load_report.method == "gptq"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("{0}/model {0}/adapter --method gptq --to nf4", "go together"),
        ("{0}/model {0}/adapter --method rtn --to nf4 --calibration {0}/x", "go together"),
        ("{0}/model {0}/adapter --method gptq", "are for --to nf4, and --to is bf16"),
        ("{0}/nf4 {0}/adapter --base dequantized --to nf4 --calibration {0}/gone.jsonl", "gone.jsonl"),
    ],
)
def test_mistakes(files: Path, words: str, match: str, mistake: Callable[..., str]) -> None:
    assert match in mistake("merge", *words.format(files).split(), "--out", files / "new")
    assert not (files / "new").exists()
