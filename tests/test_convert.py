"""Between 16 bits, our 4 bits and bitsandbytes': `qlora convert`, and load and save of what bitsandbytes saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bytes, same_values
from safetensors.torch import load_file
from tiny_models import bitsandbytes_model, distance, edit_config, edit_tensors, four_bit_layers, logits, make, save
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlora_native as qn
from qlora_native import reference
from qlora_native.lora.adapter import StoredAdapter
from qlora_native.models.convert import convert
from qlora_native.models.load import load_model
from qlora_native.nn import QuantizedLinear
from qlora_native.tool.cli.main import main
from qlora_native.weights import stream, transforms
from qlora_native.weights.open import open_source
from qlora_native.weights.shapes import ModelShapes


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PART", 4096)  # so that tiny tensors come in several parts


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_same(folder: Path, expected: dict[str, Tensor]) -> None:
    """That the folder's tensors are these, byte for byte."""
    tensors = read(folder)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bytes(tensors[name], value), name


def made(folder: Path, source: Path, target: str, **options: Any) -> Path:
    folder.mkdir()
    convert(source, folder, target, **options)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


OPTIONS = [
    {},
    {"quant_type": "fp4", "block_size": 256},
    {"double_quant": False, "block_size": 32, "dtype": torch.float32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Gemma2", "Phi3", "GPTNeoX"])
def test_weights_become_those_of_quantize(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    source = save(tmp_path / "source", kind, torch.float16)
    stored = read(source)
    out = made(tmp_path / "out", source, "bitsandbytes", **options)
    dtype = options.get("dtype", torch.float16)
    quantizing = {k: v for k, v in options.items() if k != "dtype"}
    model = load_model(source, dtype=dtype, **quantizing)
    packed = {name for name in stored if f"{name}.absmax" in read(out)}
    assert len(packed) == len(four_bit_layers(model)) > 0
    expected = {name: tensor.to(dtype) for name, tensor in stored.items()}
    for name in packed:
        weight = qn.quantize(stored[name].t().contiguous() if kind == "GPT2" else stored[name], **quantizing)
        weight.dtype = dtype
        expected |= qn.to_bnb(weight, name)
    check_same(out, expected)
    assert torch.equal(logits(load_model(out, dtype=dtype)), logits(model))


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_decoded_weights_are_the_reference(tmp_path: Path, kind: str, quant_type: str) -> None:
    source = save(tmp_path / "source", kind, torch.bfloat16)
    four = made(tmp_path / "four", source, "qlora", quant_type=quant_type)
    model = load_model(four, dtype=torch.bfloat16)
    dense = made(tmp_path / "dense", four, "16bit")
    expected, parts = read(source), read(four)
    decoded = [name for name in expected if f"{name}.absmax" in parts]
    assert len(decoded) == len(four_bit_layers(model))
    for name in decoded:
        weight = reference.dequantize(torch.bfloat16, *qn.from_bnb(parts, name).op_args())
        expected[name] = weight.t().contiguous() if kind == "GPT2" else weight
    check_same(dense, expected)
    assert "quantization_config" not in config_of(dense)
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert distance(logits(plain), logits(load_model(four, dtype=torch.float32))) < 1e-2


def test_the_configs_of_the_two_forms_of_4_bits(tmp_path: Path) -> None:
    """Whose bytes are the same, as those of bitsandbytes' own folders are below."""
    theirs = made(tmp_path / "theirs", save(tmp_path / "source", dtype=torch.bfloat16), "bitsandbytes")
    ours = made(tmp_path / "ours", theirs, "qlora")
    assert config_of(made(tmp_path / "back", ours, "bitsandbytes")) == config_of(theirs)
    assert config_of(ours)["quantization_config"]["quant_method"] == "qlora_native"
    assert config_of(theirs)["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
        "qlora_native": {"method": "rtn"},
    }
    loaded = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.bfloat16)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert distance(logits(loaded).float(), logits(load_model(theirs)).float()) < 1e-2


@pytest.mark.parametrize("target", ["bitsandbytes", "16bit"])
def test_shards_in_and_out(tmp_path: Path, target: str) -> None:
    model = make(num_hidden_layers=4)
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    model.save_pretrained(tmp_path / "whole")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    folder = tmp_path / "out"
    folder.mkdir()
    report = convert(tmp_path / "source", folder, target, shard_bytes=60_000)
    files, count = sorted(folder.glob("*.safetensors")), report.files
    assert count > 2
    assert [file.name for file in files] == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = read(folder)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values()) == report.num_bytes
    for file in files:
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"} and len(raw) < 90_000
        for name, entry in header.items():
            assert index["weight_map"][name] == file.name
            assert entry["data_offsets"][0] % {"F32": 4, "BF16": 2, "U8": 1}[entry["dtype"]] == 0
    assert tensors.keys() == index["weight_map"].keys()
    check_same(made(tmp_path / "one", tmp_path / "whole", target), tensors)


def test_stacks_of_experts(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "Mixtral", torch.bfloat16, num_local_experts=4)
    theirs = read(made(tmp_path / "theirs", source, "bitsandbytes"))  # which has no 4-bit stacks
    assert sum(name.endswith(".absmax") for name in theirs) == 8
    assert read(source).keys() <= theirs.keys()
    ours = made(tmp_path / "ours", source, "qlora")
    assert sum(name.endswith(".absmax") for name in read(ours)) == 12
    assert torch.equal(logits(load_model(ours)), logits(load_model(source)))
    with pytest.raises(qn.UserError, match="stacks of experts in 4 bits .* 16bit"):
        made(tmp_path / "no", ours, "bitsandbytes")
    dense = made(tmp_path / "dense", ours, "16bit")
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert distance(logits(plain), logits(load_model(ours, dtype=torch.float32))) < 1e-2


def test_eight_bit_floats_are_read(tmp_path: Path) -> None:
    source = save(tmp_path / "source", dtype=torch.bfloat16)
    tensors = {k: t.to(torch.float8_e4m3fn) if k.endswith("proj.weight") else t for k, t in read(source).items()}
    edit_tensors(source, lambda stored: stored.update(tensors))
    check_same(made(tmp_path / "dense", source, "16bit"), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    four = read(made(tmp_path / "four", source, "bitsandbytes"))
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            assert same_bytes(four[name].view(-1), qn.quantize(tensor.bfloat16()).packed)


def test_other_files_come_along(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    kept = {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    for name in (*kept, "pytorch_model.bin"):
        (source / name).write_text("{}")
    out = made(tmp_path / "out", source, "16bit")
    assert {path.name for path in out.iterdir()} == kept | {"config.json", "model.safetensors"}


def test_command(tmp_path: Path, printed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source, four, dense = save(tmp_path / "source"), tmp_path / "four", tmp_path / "dense"
    assert main(["convert", str(source), str(four), "--to", "bitsandbytes", "--block-size", "128"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{four}: 14 weights quantized; ") and "MiB in 1 file; took" in said
    result = printed("convert", four, dense, "--to", "16bit")
    assert (result["dequantized"], result["quantized"], result["files"]) == (14, 0, 1)
    assert config_of(dense)["dtype"] == "bfloat16"  # float32 in the source is no 16-bit dtype


def test_mistakes_are_one_sentence(tmp_path: Path, mistake: Callable[..., str]) -> None:
    source = save(tmp_path / "source")
    four = made(tmp_path / "four", source, "bitsandbytes")
    eight = save(tmp_path / "eight")
    edit_config(eight, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    broken = save(tmp_path / "broken")
    edit_tensors(broken, lambda t: t["model.layers.1.mlp.up_proj.weight"][70, 1:2].fill_(torch.inf))
    out, to = tmp_path / "out", ("--to", "bitsandbytes")
    for arguments, words in (
        ([source, source, *to], "exists already; choose another DST"),
        ([tmp_path / "none", out, *to], "is not there: expected a model folder"),
        ([eight, out, *to], "holds 8-bit bitsandbytes weights"),
        ([four, out, "--to", "qlora", "--block-size", "128"], "--block-size .* 4-bit already"),
        ([source, out, "--to", "16bit", "--no-double-quant"], "--double-quant .* 16bit"),
        ([source, out, "--to", "int8"], "'int8'"),
        ([source, out, *to, "--shard-size", "many"], "--shard-size is 'many'"),
        ([source, out, *to, "--skip-modules", "upproj"], "did you mean up_proj"),
        ([broken, out, *to], r"model.layers.1.mlp.up_proj.weight .* element \[70, 1\] .* inf"),
    ):
        assert re.search(words, mistake("convert", *arguments))
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------------------------
# What bitsandbytes saved. Its layers answer in training mode here: in evaluation mode its CPU path rounds to bf16.


def saved(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """A folder that transformers saved with bitsandbytes' layers, and the model in training mode."""
    save(folder / "dense", intermediate_size=128, attention_bias=True)  # its CPU kernels need rows of whole blocks
    options = {f"bnb_4bit_{name}": value for name, value in {"compute_dtype": dtype, **options}.items()}
    model = bitsandbytes_model(folder / "dense", dtype, **options)
    model.save_pretrained(folder / "theirs")
    return model.train()


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_bitsandbytes_saved_is_loaded_saved_and_converted(
    theirs: Any, tmp_path: Path, dtype: torch.dtype, quant_type: str, nested: bool, storage: str
) -> None:
    options = {"quant_type": quant_type, "use_double_quant": nested, "quant_storage": storage}
    bitsandbytes, model, folder = theirs, saved(tmp_path, dtype, **options), tmp_path / "theirs"
    expected, near = logits(model), 1e-5 if dtype == torch.float32 else 1e-2
    ours = load_model(folder, dtype=dtype, quant_type="fp4", block_size=256)  # the files win
    layers, decoded = four_bit_layers(ours), dict[str, Tensor]()
    assert len(layers) == 14
    for path, layer in layers.items():
        weight = model.get_submodule(path).weight
        decoded[path] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert same_values(layer.quantized.dequantize(), decoded[path]), path
        assert same_values(reference.dequantize(dtype, *layer.quantized.op_args()), decoded[path]), path
    assert distance(logits(ours), expected) < near
    ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert config_of(tmp_path / "again")["quantization_config"] == config_of(folder)["quantization_config"]

    assert distance(logits(load_model(folder, dtype=dtype, fuse=False)), expected) < near
    if dtype == torch.bfloat16:
        converted = made(tmp_path / "ours", folder, "qlora")
        back = made(tmp_path / "back", converted, "bitsandbytes")
        for other in (converted, back):
            check_same(other, read(folder))
        again = AutoModelForCausalLM.from_pretrained(back, dtype=dtype, device_map={"": "cpu"})
        assert type(again.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        assert torch.equal(logits(again.train()), expected)
        dense = read(made(tmp_path / "16bit", folder, "16bit"))
        assert all(same_bytes(dense[f"{path}.weight"], weight) for path, weight in decoded.items())


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("change", "nested"),
    [(lambda t: t * 0.75, lambda t: t.flip(0)), (lambda t: torch.nextafter(t, torch.full_like(t, 2)), lambda t: t)],
    ids=["other", "an ulp"],
)
def test_maps_that_differ_are_honored_and_saved(
    tmp_path: Path, change: Callable[[Tensor], Tensor], nested: Callable[[Tensor], Tensor]
) -> None:
    """Both libraries' files hold their maps; bitsandbytes does not read the 16 levels, and this library does."""
    saved(tmp_path, torch.float32, use_double_quant=True)
    name, folder = "model.layers.0.mlp.down_proj.weight", tmp_path / "theirs"
    for key, edit in ((f"{name}.quant_map", change), (f"{name}.nested_quant_map", nested)):
        edit_tensors(folder, lambda t, key=key, edit=edit: t.update({key: edit(t[key])}))  # type: ignore[misc]
    tensors, model = read(folder), load_model(folder, dtype=torch.float32)
    got = model.get_submodule(name.removesuffix(".weight")).quantized.dequantize()
    state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    coded = tensors[f"{name}.nested_quant_map"][tensors[f"{name}.absmax"].long()]
    spread = tensors[f"{name}.nested_absmax"].repeat_interleave(256)[: coded.numel()]
    scales = (coded * spread + torch.tensor(state["nested_offset"])).repeat_interleave(64)
    packed = tensors[name].view(-1)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(-1).long()
    assert torch.equal(got, (tensors[f"{name}.quant_map"][codes] * scales).view(64, 128))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_config_with_4_bits_in_the_other_field(theirs: Any, tmp_path: Path) -> None:
    """Some published folders have only `_load_in_4bit`."""
    expected = logits(saved(tmp_path, torch.float32))
    quantization = config_of(tmp_path / "theirs")["quantization_config"]
    del quantization["load_in_4bit"]
    assert quantization["_load_in_4bit"]
    edit_config(tmp_path / "theirs", quantization_config=quantization)
    assert distance(logits(load_model(tmp_path / "theirs", dtype=torch.float32)), expected) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# The stream of tensors below


def items_of(folder: Path, changes: Sequence[Any] = (), **options: Any) -> dict[str, Any]:
    source = open_source(folder)
    items = stream.stream(source, ModelShapes(source.config, torch.float32), changes, **options)
    return {item.name: item for item in items}


def test_a_weight_in_place_of_another_has_its_own_shape(tmp_path: Path) -> None:
    head = torch.ones(7, 64)
    adding = transforms.adding(StoredAdapter({}, {}), {"lm_head.weight": head})
    item = items_of(save(tmp_path), [adding])["lm_head.weight"]
    assert item.shape == (7, 64) and torch.equal(torch.cat([*item.rows()]), head)


def test_one_layer(tmp_path: Path) -> None:
    prefix = "model.layers.1."
    names = set(items_of(save(tmp_path), prefix=prefix))
    assert len(names) == 9 and all(name.startswith(prefix) for name in names)
