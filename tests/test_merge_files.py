"""`qlora merge`: a folder and an adapter into a folder, against PEFT and against sums of our own in fp64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from adapters import IDS, SCALE, make_adapter, write_model_and_adapter
from helpers import same_bytes
from safetensors.torch import load_file
from tiny_models import distance, edit_tensors, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_native as qn
from qlora_native._io import atomic_folder
from qlora_native.models.load import load_dense
from qlora_native.models.merge_files import Merging
from qlora_native.tool.cli import main
from qlora_native.tool.evaluate import check
from qlora_native.tool.evaluate.measure import measure
from qlora_native.tool.evaluate.texts import load_text
from qlora_native.weights import stream
from qlora_native.weights.files import StoredTensor


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


def test_the_report_has_layer_2_before_layer_10(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model", num_hidden_layers=11)
    adapter = make_adapter(tmp_path / "model", tmp_path / "adapter", ["q_proj", "down_proj"])
    work = Merging(tmp_path / "model", adapter)
    with atomic_folder(tmp_path / "out") as partial:
        work.write(partial, 1 << 30)
    layers = [row["layer"].split(".")[2:] for row in check.check_weights(work, tmp_path / "out")]
    expected = [
        [str(number), *name.split(".")] for number in range(11) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert layers == expected


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
    expected, got = theirs(IDS).logits.float(), merged(IDS).logits.float()
    assert float((got - expected).norm() / expected.norm()) < 2e-2
    assert not torch.equal(got, expected)  # it is not the same sum twice

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
        off = float((expected.dequantize(torch.float32).double() - total).norm() / total.norm())
        assert off > 0.02 and (base == "original" or errors[path] == pytest.approx(off, rel=1e-6))

    # A folder that is 4-bit already: the same layers, in the blocks that it has.
    again = files / f"again-{base}"
    printed("merge", out, files / "adapter", "--out", again, "--base", "dequantized", "--to", "nf4")
    stored = qn.load_model(again).model.layers[0].self_attn.q_proj.quantized
    assert (stored.block_size, stored.double_quant) == (32, True)
    sentence(mistake("merge", out, files / "adapter", "--out", files / "new", "--base", "original"))


def test_memory_is_a_few_parts(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With parts of 512 elements: no reading is longer, none is of a whole weight, and the bytes are the same."""
    sizes: list[int] = []
    read_part = StoredTensor.read_part

    def recorded(stored: StoredTensor, begin: int, end: int) -> torch.Tensor:
        sizes.append(end - begin)
        return read_part(stored, begin, end)

    def refused(stored: StoredTensor, *scratch: Any) -> torch.Tensor:
        raise AssertionError(f"{stored.name} is read whole")

    monkeypatch.setattr(StoredTensor, "read_part", recorded)
    monkeypatch.setattr(StoredTensor, "read", refused)
    monkeypatch.setattr(stream, "PART", 512)
    work = Merging(files / "model", files / "adapter")
    work.write(tmp_path, 4 * 10**9)
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
    folder, out = save(tmp_path / "model", "GPT2", vocab_size=320), tmp_path / "out"
    path = "transformer.h.1.attn.c_proj"
    tiny.write_tokenizer(folder)
    adapter = make_adapter(folder, tmp_path / "adapter", ["attn.c_proj"])
    report = printed("merge", folder, adapter, "--out", out, "--to", "fp32", "--base", base, "--check")
    errors = {row["layer"]: row["error"] for row in report["weights"]}
    assert {path, path.replace("1", "0")} <= errors.keys() and max(errors.values()) < 1e-6
    edit_tensors(out, lambda t: t.update({f"{path}.weight": t[f"{path}.weight"].t().contiguous()}))
    found = check.check_weights(Merging(folder, adapter, base=base, to="fp32"), out)
    assert [row["layer"] for row in found if row["error"] > 1e-6] == [path]


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
        ("{0}/other {0}/adapter --out {0}/new", "the layer of LlamaForCausalLM has"),
        ("{0}/model {0}/adapter --out {0}/new --sample x", "--sample is for --check"),
        ("{0}/model {0}/adapter --out {0}/new --check --sample {0}/gone.txt", "{0}/gone.txt cannot be read"),
    ],
)
def test_mistakes(files: Path, words: str, match: str, mistake: Callable[..., str]) -> None:
    if not (files / "other").is_dir():
        tiny.write_model(files / "other", hidden_size=32, intermediate_size=64)
    assert match.format(files) in mistake("merge", *words.format(files).split())
    assert not (files / "new").exists()
