"""Calibrated quantization of one weight: the error of each method, bad statistics, bitsandbytes as the reader; and the
tokens of calibration data, the same ones every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import same_bytes, same_bytes_under_threads, same_weight
from safetensors.torch import save_file
from transformers import AutoTokenizer

import qlora_native as qn
from qlora_native import reference
from qlora_native.calibration.data import CalibrationData, as_calibration, take_tokens
from qlora_native.calibration.quantize import METHODS, CalibratedWeight, quantize_calibrated

N, K = 48, 192


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    """[tokens, K] that are correlated, with channels of very different size."""
    torch.manual_seed(1)
    mixed = torch.randn(1024, K) @ (torch.eye(K) + 0.1 * torch.randn(K, K))
    return mixed * torch.randn(K).exp()


def weight(dtype: torch.dtype = torch.bfloat16, k: int = K) -> torch.Tensor:
    return (torch.randn(N, k) * 0.05).to(dtype)


def calibrated(inputs: torch.Tensor, t: torch.Tensor, method: str, **options: object) -> CalibratedWeight:
    return quantize_calibrated(t, method, hessian=inputs.t() @ inputs, **options)  # type: ignore[arg-type]


def output_error(inputs: torch.Tensor, t: torch.Tensor, w: qn.QuantizedWeight) -> float:
    """|X (W - W')^T|^2 in double precision."""
    return float((inputs.double() @ (t.double() - w.dequantize(torch.float32).double()).t()).square().sum())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_each_method_is_better_than_the_last(inputs: torch.Tensor, quant_type: str, double_quant: bool) -> None:
    """In the error of the products with the very inputs, which is that of the report."""
    t = weight()
    errors = {}
    for method in METHODS:
        result = calibrated(inputs, t, method, quant_type=quant_type, double_quant=double_quant)
        errors[method] = output_error(inputs, t, result.weight)
        assert (result.report.method, result.report.fallback) == (method, None)
        assert result.report.error == pytest.approx(errors[method], rel=1e-4)
        assert result.report.rtn_error == pytest.approx(errors["rtn"], rel=1e-4)
        assert result.weight.double_quant == double_quant
        assert same_bytes(result.weight.dequantize(), reference.dequantize(t.dtype, *result.weight.op_args()))
    plain = qn.quantize(t, quant_type=quant_type, double_quant=double_quant)
    assert same_weight(calibrated(inputs, t, "rtn", quant_type=quant_type, double_quant=double_quant).weight, plain)
    assert errors["wmse"] < 0.7 * errors["rtn"]
    assert errors["gptq"] < 0.5 * errors["wmse"]


def test_signs_are_chosen_by_the_squared_error() -> None:
    """A negated weight of equal moments gets the scales negated, and some are negative where the format allows it."""
    t, moment = weight(torch.float32), torch.ones(K)
    w, mirrored = (quantize_calibrated(x, "wmse", moment=moment, double_quant=False).weight for x in (t, -t))
    assert 40 < int((w.absmax < 0).sum()) < w.absmax.numel() - 40
    assert torch.equal(w.absmax, -mirrored.absmax)
    symmetric = quantize_calibrated(t, "wmse", moment=moment, double_quant=False, quant_type="fp4").weight
    assert bool((symmetric.absmax > 0).all())


def test_moments_alone_are_enough_for_wmse(inputs: torch.Tensor) -> None:
    t, moment = weight(), inputs.square().mean(0)
    result = quantize_calibrated(t, "wmse", moment=moment)
    for factor in (2.0**-60, 2.0**60):  # sums or means, however small or large
        assert same_weight(quantize_calibrated(t, "wmse", moment=moment * factor).weight, result.weight)
    error = ((t.double() - result.weight.dequantize(torch.float32).double()).square() * moment.double()).sum()
    assert result.report.error == pytest.approx(float(error), rel=1e-6)


@pytest.mark.parametrize("method", ["wmse", "gptq"])
def test_rows_that_are_no_multiple_of_the_block(inputs: torch.Tensor, method: str) -> None:
    some = inputs[:, :77]
    for dtype in (torch.float32, torch.float16):
        t = weight(dtype, 77)
        t[5:9] = 0  # blocks of zeros
        result = calibrated(some, t, method)
        assert result.report.fallback is None
        assert output_error(some, t, result.weight) < 0.8 * output_error(some, t, qn.quantize(t))
        assert bool((result.weight.dequantize()[6:8] == 0).all())


def test_threads_do_not_change_the_bytes(inputs: torch.Tensor) -> None:
    t = weight()
    same_bytes_under_threads(lambda: list(qn.to_bnb(calibrated(inputs, t, "gptq").weight).values()), (1, 2, 4))


def test_dead_channels_and_a_hessian_of_low_rank(inputs: torch.Tensor) -> None:
    few = inputs[:20].clone()  # fewer tokens than channels
    few[:, 3] = few[:, 100] = 0
    t = weight()
    result = calibrated(few, t, "gptq")
    assert (result.report.method, result.report.damping, result.report.fallback) == ("gptq", 0.01, None)
    assert output_error(few, t, result.weight) < 0.1 * output_error(few, t, qn.quantize(t))
    undamped = calibrated(few, t, "gptq", damping=0.0)
    assert undamped.report.damping is not None and undamped.report.damping > 0
    assert bool(torch.isfinite(undamped.weight.dequantize()).all())


def test_a_hessian_that_is_not_positive_definite_is_damped_more_or_given_up() -> None:
    indefinite = torch.eye(K)
    indefinite[0, 1] = indefinite[1, 0] = 1.05  # an eigenvalue of -0.05 beside a mean of 1
    result = quantize_calibrated(weight(), "gptq", hessian=indefinite)
    assert result.report.damping == pytest.approx(0.1)
    assert bool(torch.isfinite(result.weight.dequantize()).all())
    hopeless = torch.full((K, K), 1e6)
    hopeless.fill_diagonal_(1.0)
    t = weight()
    given_up = quantize_calibrated(t, "gptq", hessian=hopeless)
    assert given_up.report.method == "rtn" and "not positive definite" in str(given_up.report.fallback)
    assert same_weight(given_up.weight, qn.quantize(t))


def test_no_tokens_at_all_fall_back_to_rounding() -> None:
    t = weight()
    for options in ({"method": "wmse", "moment": torch.zeros(K)}, {"method": "gptq", "hessian": torch.zeros(K, K)}):
        result = quantize_calibrated(t, **options)  # type: ignore[arg-type]
        assert same_weight(result.weight, qn.quantize(t))
        assert "no token reached" in str(result.report.fallback)
    assert quantize_calibrated(t[:0], "wmse", moment=torch.zeros(K)).weight.numel() == 0


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e30, 3e38])
def test_extreme_weights_give_finite_ones(inputs: torch.Tensor, size: float) -> None:
    t = torch.randn(N, K).clamp(-1, 1) * size
    for method in METHODS:
        assert bool(torch.isfinite(calibrated(inputs, t, method).weight.dequantize()).all())


def test_bad_arguments(inputs: torch.Tensor) -> None:
    t, moment, hessian = weight(), inputs.square().mean(0), inputs.t() @ inputs
    nan, lopsided, negative, infinite = hessian.clone(), hessian.clone(), moment.clone(), t.clone()
    nan[3, 4], negative[7], infinite[2, 5] = float("nan"), -1.0, float("inf")
    lopsided[0, 1] += hessian.max()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "mse"}, "method is 'mse': expected one of rtn, wmse, gptq"),
        ({"method": "wmse"}, "needs the second moments"),
        ({"method": "gptq", "moment": moment}, "needs the hessian"),
        ({"method": "wmse", "moment": moment[1:]}, r"moment is torch.float32 \[191\]: expected float32 \[192\]"),
        ({"method": "wmse", "moment": moment.half()}, "moment is torch.float16"),
        ({"method": "wmse", "moment": negative}, "second moment of channel 7 is -1.0"),
        ({"method": "wmse", "moment": moment * float("inf")}, r"element \[0\] of the moment is inf"),
        ({"method": "gptq", "hessian": nan}, r"element \[3, 4\] of the hessian is nan"),
        ({"method": "gptq", "hessian": lopsided}, "differs from its transpose"),
        ({"method": "gptq", "hessian": hessian, "damping": -1.0}, "damping is -1.0"),
        ({"weight": t[0], "method": "rtn"}, r"weight is \[192\]: expected two dimensions"),
        ({"weight": infinite, "method": "rtn"}, r"element \[2, 5\] of the \[48, 192\] tensor is inf"),
    ]
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            quantize_calibrated(**{"weight": t, **options})


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_decodes_and_saves_the_same(inputs: torch.Tensor, double_quant: bool) -> None:
    """Their dequantize_4bit gives our bits, their matmul_4bit the product, and their state our tensors again."""
    functional = pytest.importorskip("bitsandbytes.functional")
    import bitsandbytes

    for method in ("wmse", "gptq"):
        w = calibrated(inputs, weight(), method, double_quant=double_quant).weight
        assert bool((w.scales() < 0).any())
        tensors = qn.to_bnb(w)
        about = {key: value for key, value in tensors.items() if key != "weight"}
        state = functional.QuantState.from_dict(dict(about), device=torch.device("cpu"))
        theirs = functional.dequantize_4bit(tensors["weight"], state)
        assert same_bytes(theirs, w.dequantize())
        saved = state.as_dict(packed=True)
        assert set(saved) == {key.removeprefix("weight.") for key in about}
        again = qn.to_bnb(qn.from_bnb({"weight": tensors["weight"], **{f"weight.{k}": v for k, v in saved.items()}}))
        assert all(same_bytes(again[key], tensors[key]) for key in tensors)
        for tokens in (1, 3):
            x = inputs[:tokens].bfloat16()
            y = bitsandbytes.matmul_4bit(x, tensors["weight"].t(), quant_state=state)
            truth = x.double() @ w.dequantize().double().t()
            assert float((y.double() - truth).norm() / truth.norm()) < 6e-3
            assert float((qn.linear(x, w).double() - truth).norm() / truth.norm()) < 6e-3


# ---------------------------------------------------------------------------------------------------------------------
# Data

TEXTS = [f"what is {color}? {thing} and nothing else, number {n}" for n in range(8) for color, thing in tiny.FACTS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def take(given: Any, tokenizer: Any = None, method: str = "wmse", positions: int | None = 256) -> Any:
    return take_tokens(as_calibration(given), method, lambda: tokenizer, 300, positions)


def test_texts_become_sequences_in_an_order_of_the_seed(tokenizer: Any) -> None:
    def taken(seed: int) -> Any:
        return take(CalibrationData(TEXTS, rows=4, length=32, seed=seed), tokenizer)

    one = taken(0)
    assert (one.ids.shape, one.ids.dtype) == ((4, 32), torch.int64)
    assert torch.equal(one.ids, taken(0).ids)
    brought = CalibrationData(TEXTS, rows=4, length=32, tokenizer=tokenizer)
    assert torch.equal(one.ids, take(brought, None).ids)
    assert one.sha256 == taken(0).sha256 != taken(1).sha256
    assert one.describe() == {"sha256": one.sha256, "rows": 4, "length": 32, "tokens": 128, "seed": 0}
    # Whole documents, each ended by the end token, one after another.
    texts = tokenizer.decode(take(CalibrationData(TEXTS, rows=1, length=128), tokenizer).ids[0]).split("<|end|>")
    assert len(texts) > 2 and set(texts[:-1]) < set(TEXTS)


def test_a_file_gives_the_rows_that_training_sees(tokenizer: Any, tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl")
    text = tokenizer.decode(take(CalibrationData(path, rows=2, length=40), tokenizer).ids.flatten())
    assert text.count("<|user|>") >= 3 and text.count("<|assistant|>") >= 3
    plain = tiny.write_jsonl(tmp_path / "plain.jsonl", [{"text": text} for text in TEXTS])
    from_file = take(CalibrationData(plain, rows=4, length=32, seed=3), tokenizer)
    assert torch.equal(from_file.ids, take(CalibrationData(TEXTS, rows=4, length=32, seed=3), tokenizer).ids)


def test_long_documents_give_their_first_tokens_and_more_only_where_needed(tokenizer: Any) -> None:
    documents = [torch.full((100,), number) for number in range(3)]
    few = take(CalibrationData(documents, rows=3, length=20)).ids
    assert sorted(few.unique().tolist()) == [0, 1, 2]
    assert torch.equal(few, few[:, :1].expand(-1, 20))
    all_of_it = take(CalibrationData(documents, rows=15, length=20)).ids
    assert all_of_it.flatten().bincount().tolist() == [100, 100, 100]


def test_defaults(tokenizer: Any) -> None:
    long = [torch.arange(200).repeat(100)] * 8
    assert take(long, positions=None).ids.shape == (16, 512)
    assert take(long, method="gptq", positions=None).ids.shape == (128, 512)
    assert take(long).ids.shape == (16, 256)  # no longer than the model takes
    short = take([torch.arange(200).repeat(15)], positions=None)  # 3000 tokens, of 8192 wanted
    assert short.ids.shape == (5, 512)
    assert short.wanted == 8192


def test_a_tensor_is_taken_as_it_is() -> None:
    ids = torch.arange(60, dtype=torch.int32).view(4, 15)
    assert torch.equal(take(ids).ids, ids.long())


def test_drawn_sequences_are_kept_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "kept.safetensors"
    documents = [torch.arange(200).repeat(30)]
    drawn = take(CalibrationData(documents, rows=4, length=20, seed=7, keep=file), positions=None)
    again = take(file, positions=None)
    assert torch.equal(again.ids, drawn.ids)
    assert again.describe() == drawn.describe()
    assert again.describe()["seed"] == 7
    with pytest.raises(ValueError, match="leave rows and length out"):
        take(CalibrationData(file, rows=2))


def test_errors_have_numbers(tokenizer: Any, tmp_path: Path) -> None:
    def refused(source: Any, match: str, kind: type[Exception] = qn.UserError, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            take(source, tokenizer, **options)

    refused(["too short"], r"calibration: \d+ tokens of text, expected at least 2,048 to calibrate wmse \(16 sequences")
    refused(["too short"], "expected at least 8,192 to calibrate gptq", method="gptq")
    refused([], "calibration: 0 tokens of text")
    refused(["", "  \n"], "calibration: 0 tokens of text")
    refused(CalibrationData(TEXTS, rows=1, length=300), "sequences of 300 tokens, but the model has 256 positions")
    refused([torch.full((4000,), 300)], "token numbers from 300 to 300, but the model's lie from 0 to 299")
    refused(CalibrationData(TEXTS, rows=0), "rows is 0", ValueError)
    refused([torch.ones(3, 3)], r"entry 0 of the list is a tensor \[3, 3\] of torch.float32", ValueError)
    refused([3], "entry 0 of the list is a int", ValueError)
    ids = torch.arange(60).view(4, 15)
    for wrong in (ids[0], ids.float(), ids[:0]):
        refused(wrong, r"calibration is a tensor .* \[rows, length\]", ValueError)
    refused(CalibrationData(ids, rows=2), "leave rows and length out", ValueError)
    refused(tmp_path / "none.jsonl", "no such data file")
    (tmp_path / "header.safetensors").write_bytes(b"not one")
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "other.safetensors")
    save_file({"input_ids": torch.ones(2, 3)}, tmp_path / "floats.safetensors")
    for name, match in {
        "none": ":? cannot be read: No such file",
        "header": ":? cannot be read: .*header",
        "other": ":? cannot be read: .*input_ids",
        "floats": r":? input_ids is \[2, 3\] of torch.float32: expected token numbers",
    }.items():
        refused(tmp_path / f"{name}.safetensors", rf"{name}\.safetensors{match}")
    path = tmp_path / "rows.jsonl"
    for text, match in {
        '{"id": 3, "score": 0.5}': ":1.*(score|id)",
        "": ".*the file has no rows",
        '{"text": "a"}': r": \d+ tokens of text, expected at least 2,048",
    }.items():
        path.write_text(text)
        refused(path, rf"rows\.jsonl{match}")
