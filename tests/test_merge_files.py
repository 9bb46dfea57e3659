"""`qlora merge`: a folder and an adapter into a folder, against PEFT and sums and searches of our own in fp64."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import tiny
import torch
from adapters import IDS, SCALE, make_adapter, write_model_and_adapter
from helpers import gguf_weight, relative_error, same_bytes
from safetensors.torch import load_file, save_file
from tiny_models import assert_same, distance, edit_tensors, four_bit_layers, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_native as qn
from qlora_native import _native, gguf_blocks, reference
from qlora_native.calibration import adapted
from qlora_native.calibration.adapted import DAMPING, adapted_codes, correction, least_gain
from qlora_native.calibration.quantize import feedback_factor
from qlora_native.lora import lora_layers
from qlora_native.models.load import load_dense
from qlora_native.models.merge_files import Merging
from qlora_native.tool.cli import main
from qlora_native.tool.evaluate import check
from qlora_native.tool.evaluate.measure import measure
from qlora_native.tool.evaluate.texts import load_text
from qlora_native.weights import stream
from qlora_native.weights.files import StoredTensor

CALIBRATION = "calibration.jsonl"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_and_adapter(tmp_path_factory.mktemp("merge"))
    tiny.write_rows(folder / "sample.jsonl", 4)
    return folder


def exact(model: Path, adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """W and W + scale * B A of each adapted layer in fp64, from the files alone."""
    weights, pairs = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key in pairs:
        if key.endswith("lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = pairs[key].double(), pairs[key.replace("lora_A", "lora_B")].double()
            w = weights[f"{path}.weight"].double()
            found[path] = (w, w + SCALE * (b @ a))
    return found


@torch.no_grad()
def test_original_in_bf16_answers_like_base_and_adapter(files: Path, printed: Any) -> None:
    out = files / "merged"
    words = (files / "model", files / "adapter", "--out", out, "--check", "--sample", files / "sample.jsonl")
    result = printed("merge", *words, "--shard-size", "200KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.bfloat16 and (out / "tokenizer.json").is_file()
    merged = merged.float()
    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, files / "adapter")
    assert 0 < relative_error(merged(IDS).logits, theirs(IDS).logits) < 2e-2

    truth = exact(files / "model", files / "adapter")
    assert {row["layer"] for row in result["weights"]} == set(truth) and len(truth) == 14
    for row in result["weights"]:
        weight = merged.get_parameter(f"{row['layer']}.weight").double()
        w, total = truth[row["layer"]]
        assert torch.equal(weight, total.float().bfloat16().double())  # rounded once
        off = (weight - total).norm()
        assert row["error"] == pytest.approx(float(off / total.norm()), rel=1e-9)
        assert row["change"] == pytest.approx(float((total - w).norm() / w.norm()), rel=1e-9)
        assert row["lost"] == pytest.approx(float(off / (total - w).norm()), rel=1e-9)
    assert result["largest_drift"] == max(result["weights"], key=lambda row: row["error"])
    assert {**json.loads((out / "merge_report.json").read_text()), "stderr": result["stderr"]} == result
    markdown = (out / "merge_report.md").read_text()
    assert f"`{result['largest_drift']['layer']}`" in markdown and markdown.count("| model.layers.") == 14

    found = result["retention"]
    share = (found["base_loss"] - found["shipped_loss"]) / (found["base_loss"] - found["adapted_loss"])
    assert found["retention"] == pytest.approx(share) and f"{found['shipped_loss']:.4f}" in markdown
    held_out = load_text(files / "sample.jsonl", AutoTokenizer.from_pretrained(files / "model")).rows
    for name, model in (
        ("base", qn.load_model(files / "model")),
        ("adapted", qn.load_adapter(qn.load_model(files / "model"), files / "adapter")),
        ("shipped", load_dense(out)),
    ):
        assert found[f"{name}_loss"] == pytest.approx(measure(model, held_out, 0)[0].loss[0], rel=1e-6), name

    close, far = result["logits"]
    assert "16-bit" in close["against"] and "4-bit" in far["against"]
    assert close["relative"] < 2e-2 < far["relative"] and 0 < close["kl_mean"] < far["kl_mean"]
    assert "is not the model" in result["verdict"] and "--base dequantized" in result["verdict"] in markdown


@torch.no_grad()
def test_the_drift_of_logits_is_that_of_peft(files: Path, printed: Any) -> None:
    """The 4-bit base with the adapter beside it, built of PEFT and decoded weights, gives the figures of the report."""
    out = files / "decoded"
    words = (files / "model", files / "adapter", "--out", out, "--base", "dequantized", "--to", "fp32", "--check")
    result = printed("merge", *words, "--sample", files / "sample.jsonl")
    (found,) = result["logits"]
    assert result["verdict"].startswith("this is the model that")
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    for path, (weight, _) in exact(files / "model", files / "adapter").items():
        base.get_parameter(f"{path}.weight").data = qn.quantize(weight.bfloat16()).dequantize(torch.float32)
    reference = peft.PeftModel.from_pretrained(base, files / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).float()  # as the check loads it
    kl, off, size = [], 0.0, 0.0
    for line in (files / "sample.jsonl").read_text().splitlines():
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        ids = tokenizer(text, return_tensors="pt").input_ids
        p, q = reference(ids).logits[0].double(), ours(ids).logits[0].double()
        off, size = off + float((p - q).square().sum()), size + float(p.square().sum())
        kl.append(torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True))
    divergence = torch.cat(kl).sum(-1)
    assert found["tokens"] == len(divergence)
    assert found["relative"] == pytest.approx((off / size) ** 0.5, rel=1e-3)
    assert found["kl_mean"] == pytest.approx(float(divergence.mean()), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_nf4_is_the_merged_weight_quantized(files: Path, base: str, printed: Any, mistake: Any, sentence: Any) -> None:
    out = files / f"nf4-{base}"
    options = ["--base", base, "--to", "nf4", "--method", "rtn", "--block-size", "32"]
    options += ["--check"] if base == "dequantized" else []
    result = printed("merge", files / "model", files / "adapter", "--out", out, *options)
    got, errors = qn.load_model(out), {row["layer"]: row["error"] for row in result.get("weights", ())}
    for path, (weight, total) in exact(files / "model", files / "adapter").items():
        if base == "dequantized":
            decoded = qn.quantize(weight.bfloat16(), block_size=32).dequantize(torch.float32).double()
            total = total - weight + decoded
        expected = qn.quantize(total.float(), block_size=32)
        stored = got.get_submodule(path).quantized
        assert torch.equal(stored.dequantize(torch.float32), expected.dequantize(torch.float32)), path
        off = relative_error(expected.dequantize(torch.float32), total)
        assert off > 0.02 and (base == "original" or errors[path] == pytest.approx(off, rel=1e-6))

    # A folder that is 4-bit already: the same layers, in the blocks that it has.
    again = files / f"again-{base}"
    printed("merge", out, files / "adapter", "--out", again, "--base", "dequantized", "--to", "nf4")
    stored = qn.load_model(again).model.layers[0].self_attn.q_proj.quantized
    assert (stored.block_size, stored.double_quant) == (32, True)
    sentence(mistake("merge", out, files / "adapter", "--out", files / "new", "--base", "original"))


def test_memory_is_a_few_parts(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With parts of 512 elements: no reading is longer, none is of a whole weight, and the bytes are the same."""
    read_part, sizes = StoredTensor.read_part, list[int]()

    def recorded(stored: StoredTensor, begin: int, end: int) -> Tensor:
        sizes.append(end - begin)
        return read_part(stored, begin, end)

    monkeypatch.setattr(StoredTensor, "read_part", recorded)
    monkeypatch.setattr(StoredTensor, "read", Mock(side_effect=AssertionError("a weight is read whole")))
    monkeypatch.setattr(stream, "PART", 512)
    Merging(files / "model", files / "adapter").write(tmp_path, 4 * 10**9)
    assert max(sizes) == 4096  # 64 rows of 64, which fill a block of any size, are the least
    monkeypatch.undo()
    for path, (_, total) in exact(files / "model", files / "adapter").items():
        weight = load_file(tmp_path / "model.safetensors")[f"{path}.weight"]
        assert torch.equal(weight, total.float().bfloat16())


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "changes", "options"),
    [
        ("Llama", {"tie_word_embeddings": True}, {"targets": ["lm_head", "v_proj"]}),
        ("Llama", {}, {"targets": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
        ("Llama", {}, {"targets": ["q_proj"], "trainable_token_indices": {"lm_head": [11, 3], "embed_tokens": [12]}}),
        ("GPT2", {}, {"targets": ["c_attn", "c_proj"]}),
        ("GPT2", {}, {"targets": ["c_fc"], "base": "dequantized"}),
    ],
    ids=["tied", "trained whole", "tokens", "transposed", "transposed 4-bit"],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning", "ignore:fan_in_fan_out:UserWarning")
def test_other_models(tmp_path: Path, kind: str, changes: dict[str, Any], options: dict[str, Any]) -> None:
    """Against qn.merge, which has tests of its own, in fp32."""
    base = options.pop("base", "original")
    folder = save(tmp_path / "model", kind, **changes)
    adapter = make_adapter(folder, tmp_path / "adapter", **options)
    words = ["merge", str(folder), str(adapter), "--out", str(tmp_path / "out"), "--to", "fp32", "--base", base]
    assert main.main(words) == 0
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = qn.load_adapter(qn.load_model(folder, dtype=torch.float32), adapter)
    expected = qn.merge(model, base, torch.float32)
    assert distance(got(IDS[:, :9]).logits, expected(IDS[:, :9]).logits) < 1e-5


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_the_check_of_square_weights_that_are_transposed(tmp_path: Path, base: str, printed: Any) -> None:
    """Of GPT-2's Conv1D, whose shapes say nothing: no difference, and one where a weight differs."""
    folder, out = save(tmp_path / "model", "GPT2", vocab_size=320, n_layer=11), tmp_path / "out"
    tiny.write_tokenizer(folder)
    adapter = make_adapter(folder, tmp_path / "adapter", ["attn.c_proj"])
    report = printed("merge", folder, adapter, "--out", out, "--to", "fp32", "--base", base, "--check")
    paths = [row["layer"] for row in report["weights"] if row["change"]]
    assert paths == [f"transformer.h.{number}.attn.c_proj" for number in range(11)]  # layer 2 before layer 10
    assert max(row["error"] for row in report["weights"]) < 1e-6
    edit_tensors(out, lambda t: t.update({f"{paths[3]}.weight": t[f"{paths[3]}.weight"].t().contiguous()}))
    found = check.check_weights(Merging(folder, adapter, base=base, to="fp32"), out)
    assert [row["layer"] for row in found if row["error"] > 1e-6] == [paths[3]]


def test_a_4_bit_folder_gives_what_its_original_decoded_gives(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", dtype=torch.bfloat16)
    adapter = make_adapter(folder, tmp_path / "adapter", targets=["q_proj", "up_proj"])
    qn.load_model(folder).save_pretrained(tmp_path / "four")
    made = []
    for source in (folder, tmp_path / "four"):
        out = tmp_path / f"{source.name}-merged"
        words = ["merge", str(source), str(adapter), "--out", str(out), "--to", "bf16", "--base", "dequantized"]
        assert main.main(words) == 0
        made.append(load_file(out / "model.safetensors"))
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
    first, second = made
    assert first.keys() == second.keys()
    assert all(same_bytes(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("{0}/model", "required: ADAPTER, --out"),
        ("{0}/model {0}/adapter --out {0}", "{0} exists already"),
        ("{0}/gone {0}/adapter --out {0}/new", "{0}/gone is not there"),
        ("{0}/model {0}/model --out {0}/new", "{0}/model has no adapter_config.json"),
        ("{0}/model {0} --out {0}/new", "did you mean {0}/adapter?"),
        ("{0}/other {0}/adapter --out {0}/new", "the layer of LlamaForCausalLM has"),
        ("{0}/model {0}/adapter --out {0}/new --sample x", "--sample is for --check"),
        ("{0}/model {0}/adapter --out {0}/new --check --sample {0}/gone.txt", "{0}/gone.txt cannot be read"),
        ("{0}/model {0}/adapter --out {0}/new --method gptq --to nf4", "go together"),
        ("{0}/model {0}/adapter --out {0}/new --method rtn --to nf4 --calibration {0}/x", "go together"),
        ("{0}/model {0}/adapter --out {0}/new --method gptq", "are for --to nf4, and --to is bf16"),
        ("{1}/nf4 {1}/adapter --out {0}/new --base dequantized --to nf4 --calibration {0}/gone.jsonl", "gone.jsonl"),
    ],
)
def test_mistakes(files: Path, fine: Path, words: str, match: str, mistake: Callable[..., str]) -> None:
    if not (files / "other").is_dir():
        tiny.write_model(files / "other", hidden_size=32, intermediate_size=64)
    assert match.format(files) in mistake("merge", *words.format(files, fine).split())
    assert not (files / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Into 4 bits by error feedback: over a 4-bit base whose scales stay, and over the original


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def to_nf4(fine: Path, model: str, out: str, *words: str) -> Path:
    command = ["merge", str(fine / model), str(fine / "adapter"), "--out", str(fine / out), "--to", "nf4", *words]
    assert main.main([*command, "--json"]) == 0
    return fine / out


@torch.no_grad()
def test_outputs_move_as_the_adapter_moves_them(fine: Path) -> None:
    """On the 4-bit base alone, whose scales stay; to nearest almost nothing would move."""
    words = ["--base", "dequantized"]
    calibrated = to_nf4(fine, "nf4", "folder/gptq-nf4", *words, "--calibration", str(fine / CALIBRATION))
    merged: Any = qn.load_model(calibrated)
    nearest: Any = qn.load_model(to_nf4(fine, "nf4", "rtn-nf4", *words))
    assert (merged.load_report.method, nearest.load_report.method) == ("gptq", "rtn")
    model: Any = qn.load_adapter(qn.load_model(fine / "nf4", fuse=False), fine / "adapter")
    inputs: dict[Any, torch.Tensor] = {}

    def note(layer: Any, arguments: Any) -> None:
        inputs[layer] = arguments[0].flatten(0, 1).float()

    layers: dict[str, Any] = dict(lora_layers(model))
    for layer in layers.values():
        layer.register_forward_pre_hook(note)
    tokenizer = AutoTokenizer.from_pretrained(fine / "model")
    texts = [json.loads(line)["text"] for line in (fine / CALIBRATION).read_text().splitlines()[:400:3]]
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


def test_the_bytes_are_those_of_any_number_of_threads(fine: Path) -> None:
    """And those of the 16-bit model that the 4-bit one was made from."""
    words = ["--base", "dequantized", "--calibration", str(fine / CALIBRATION)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((to_nf4(fine, "nf4", f"threads-{threads}", *words) / "model.safetensors").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    rounded = load_file(to_nf4(fine, "model", "rounded", *words) / "model.safetensors")
    stored = load_file(fine / "threads-1" / "model.safetensors")
    assert_same(rounded, stored)


def test_gptq_is_merging_and_then_quantizing(fine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(fine / CALIBRATION)
    out = to_nf4(fine, "model", "gptq", "--method", "gptq", "--calibration", text)
    assert "calibrating: layer" in capsys.readouterr().err
    assert not list(fine.glob(".gptq*"))
    words = [str(fine / "model"), str(fine / "adapter"), "--out", str(fine / "sum")]
    assert main.main(["merge", *words]) == 0
    words = [str(fine / "sum"), "--method", "gptq", "--calibration", text, "--out", str(fine / "expected")]
    assert main.main(["quantize", *words]) == 0
    expected, found = (load_file(folder / "model.safetensors") for folder in (fine / "expected", out))
    assert_same(found, expected)
    assert qn.load_model(out).load_report.method == "gptq"
