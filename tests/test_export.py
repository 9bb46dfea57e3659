"""`qlora export`: GGUF files read by transformers and, with --llama-cpp, run by llama.cpp; adapters read by PEFT."""

from __future__ import annotations

import ctypes
import inspect
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import huggingface_hub.cli.hf
import huggingface_hub.cli.upload
import peft
import pytest
import tiny
import torch
from adapters import IDS, write_model_and_adapter
from helpers import bytes_of, gguf_weight, relative_error, same_bytes, same_bytes_under_threads
from tiny_models import distance, make
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_native as qn
from qlora_native import gguf_blocks
from qlora_native.models.load import load_dense
from qlora_native.tool.cli import main
from qlora_native.tool.export.gguf_encode import encode
from qlora_native.weights.gguf import KEPT

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType

TEXT = "what is green? say, what is 12 and good?\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_adapter(tmp_path_factory.mktemp("export"))


def model_of(folder: Path, kind: str, **changes: Any) -> Path:
    """A random model of a kind, with the tiny tokenizer."""
    model = make(kind, vocab_size=320, **changes)  # more rows than the tokenizer has tokens
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.1))
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder


def export(*words: str | Path) -> None:
    assert main.main(["export", *map(str, words)]) == 0


def read_back(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def with_adapter(files: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, files / "adapter")


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("Mistral", {"head_dim": 32, "sliding_window": None}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 128}),  # transformers' reader assumes this and the next model's sizes
    ("Gemma2", {"head_dim": 256, "query_pre_attn_scalar": 256}),
]
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# What transformers' reader leaves out and llama.cpp does not.
MORE: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"attention_bias": True}),
    ("Llama", {"rope_parameters": LLAMA_3, "max_position_embeddings": 512}),
    ("Qwen3", {"head_dim": 16}),
    ("Gemma", {"head_dim": 16}),
    ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "changes"), [*KINDS, *MORE], ids=lambda value: str(value)[:40])
def test_the_same_model_is_read_back(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """By transformers what its reader knows, and by this library what transformers has a config for."""
    folder, file = model_of(tmp_path / "model", kind, **changes), tmp_path / "model.gguf"
    export(folder, "--to", "gguf", "--type", "f32", "--out", file)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    if kind != "Gemma":
        assert distance(load_dense(file, dtype=torch.float32)(IDS).logits, expected) < 1e-5
    if (kind, changes) in KINDS:
        assert distance(read_back(file)(IDS).logits, expected) < 1e-5
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
        ours = AutoTokenizer.from_pretrained(folder)
        assert theirs(TEXT).input_ids == ours(TEXT).input_ids
        assert theirs.chat_template == tiny.CHAT_TEMPLATE and theirs.eos_token_id == ours.eos_token_id


def sentencepiece_model(folder: Path, with_file: bool) -> Path:
    """A random llama with a tokenizer of SentencePiece's kind, with its own file beside it or without."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    make("Llama", vocab_size=330, num_hidden_layers=1).save_pretrained(folder)
    lines = iter([f"what is {color}? {thing} {number}" for number in range(30) for color, thing in tiny.FACTS])
    options = {"model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    trainer.train(sentence_iterator=lines, model_prefix=str(folder / "tokenizer"), vocab_size=325, **options)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    if not with_file:
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        (folder / "tokenizer.model").unlink()
    return folder


SPOKEN = "what is green? walnut 12  \u00fc?\n"


@pytest.mark.parametrize("with_file", [True, False])
def test_tokenizers_of_sentencepiece(request: pytest.FixtureRequest, tmp_path: Path, with_file: bool) -> None:
    folder = sentencepiece_model(tmp_path / "model", with_file)
    export(folder, "--to", "gguf", "--type", "f32", "--out", tmp_path / "model.gguf")
    expected = AutoTokenizer.from_pretrained(folder)(SPOKEN).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")(SPOKEN).input_ids == expected
    if request.config.getoption("--llama-cpp"):
        import llama_cpp

        runner = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
        assert runner.tokenize(SPOKEN.encode(), add_bos=True) == expected


@torch.no_grad()
@pytest.mark.parametrize(
    ("out_type", "most"), [("f16", 2e-3), ("q8_0", 5e-2), ("q4_0", 0.5), ("q4_1", 0.5), ("iq4_nl", 0.5)]
)
def test_adapter_and_types(files: Path, out_type: str, most: float) -> None:
    path = files / f"{out_type}.gguf"
    export(files / "model", "--adapter", files / "adapter", "--to", "gguf", "--type", out_type, "--out", path)
    assert relative_error(read_back(path)(IDS).logits, with_adapter(files)(IDS).logits) < most
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == out_type.upper() and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["output.weight"] == ("Q8_0" if "4" in out_type else out_type.upper())
    assert not list(files.glob(".*"))


def test_blocks_are_those_of_the_encoders(tmp_path: Path, printed: Any) -> None:
    """Of the gguf package where it has the type; rows that are no whole blocks take another one."""
    folder = model_of(tmp_path / "model", "Qwen2", intermediate_size=256, num_hidden_layers=1)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[0].mlp
    for out_type in ("q8_0", "q4_0", "q4_1", "iq4_nl", "q4_k"):
        path = tmp_path / f"{out_type}.gguf"
        result = printed("export", folder, "--to", "gguf", "--type", out_type, "--out", path)
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        kind = Kind[out_type.upper()]
        for name, weight in (("ffn_up", stored.up_proj.weight), ("ffn_down", stored.down_proj.weight)):
            tensor = found[f"blk.0.{name}.weight"]
            wanted = Kind.Q5_0 if out_type == "q4_k" and name == "ffn_up" else kind
            assert tensor.tensor_type is wanted
            assert (tensor.data == encode(weight.detach(), wanted)).all()
        others = result["other_types"]
        assert others.get("token_embd.weight") == (None if out_type == "q8_0" else "q8_0")
        assert others.get("blk.0.ffn_up.weight") == ("q5_0" if out_type == "q4_k" else None)
        assert result["num_bytes"] == sum(tensor.n_bytes for tensor in found.values())


@torch.no_grad()
def test_a_gguf_file_keeps_its_tokenizer(files: Path) -> None:
    first, second = files / "first.gguf", files / "second.gguf"
    export(files / "model", "--to", "gguf", "--type", "f32", "--out", first)
    export(first, "--adapter", files / "adapter", "--to", "gguf", "--type", "f32", "--out", second)
    before, after = (
        {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if key.startswith("tokenizer.")}
        for path in (first, second)
    )
    assert before == after and before["tokenizer.ggml.pre"] == "gpt-2"
    merged = qn.merge(qn.load_adapter(qn.load_model(files / "model"), files / "adapter"), dtype=torch.float32)
    assert distance(read_back(second)(IDS).logits, merged(IDS).logits) < 1e-2  # the base came by way of bf16


def test_peft_reads_an_adapter_of_another_place(files: Path) -> None:
    out, file = files / "for-peft", files / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    # The first pattern that matches counts; both say what is so already.
    patterns = dict.fromkeys((".*up_proj", ".*down_proj"), settings["lora_alpha"])
    file.write_text(json.dumps({**settings, "alpha_pattern": patterns}))
    export(files / "model", "--adapter", files / "adapter", "--to", "peft", "--out", out)
    file.write_text(json.dumps(settings))
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(files / "model")
    assert list(written["alpha_pattern"]) == list(patterns)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(theirs(IDS).logits, with_adapter(files)(IDS).logits)


def test_safetensors_of_a_4_bit_model(files: Path, printed: Any) -> None:
    printed("quantize", files / "model", "--out", files / "four-bit")
    words = ("--to", "safetensors", "--type", "f32", "--out", files / "dense")
    assert printed("export", files / "four-bit", *words)["files"] == 1
    four_bit, dense = qn.load_model(files / "four-bit"), AutoModelForCausalLM.from_pretrained(files / "dense")
    weight = four_bit.model.layers[1].mlp.down_proj.quantized.dequantize(torch.float32)
    assert torch.equal(weight, dense.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("{0}/model --out {0}/new", "required: --to"),
        ("{0}/model --to gguf --out {0}/new", "ends in .gguf"),
        ("{0}/model --to gguf --out {0}/old.gguf", "{0}/old.gguf exists already"),
        ("{0}/model --to peft --out {0}/new", "--to peft needs MODEL"),
        ("{0}/model --to safetensors --type q8_0 --out {0}/new", "--type q8_0 is of GGUF"),
        ("{0}/gpt2 --to gguf --out {0}/new.gguf", "is a gpt2 model"),
        ("{0}/yarn --to gguf --out {0}/new.gguf", "rotary embedding by 'yarn'"),
        ("{0}/gemma --to gguf --out {0}/new.gguf", "root of 99"),
        ("{0}/split --to gguf --out {0}/new.gguf", "splits text by Whitespace"),
        ("{0}/model --adapter {0}/gone --to peft --out {0}/new", "adapter_config.json"),
    ],
)
def test_mistakes(files: Path, words: str, match: str, mistake: Callable[..., str]) -> None:
    if not (files / "old.gguf").exists():
        (files / "old.gguf").touch()
        model_of(files / "gpt2", "GPT2", n_layer=1)
        rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
        model_of(files / "yarn", "Llama", num_hidden_layers=1, max_position_embeddings=128, rope_parameters=rope)
        model_of(files / "gemma", "Gemma2", num_hidden_layers=1, query_pre_attn_scalar=99)
        shutil.copytree(files / "model", files / "split")
        text = json.loads((files / "split" / "tokenizer.json").read_text())
        text["pre_tokenizer"] = {"type": "Whitespace"}
        (files / "split" / "tokenizer.json").write_text(json.dumps(text))
    assert match.format(files) in mistake("export", *words.format(files).split())
    assert not (files / "new").exists() and not (files / "new.gguf").exists() and not list(files.glob(".*"))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "changes"), [*KINDS, *MORE])
def test_llama_cpp_runs_it(llama_cpp: Any, tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    folder = model_of(tmp_path / "model", kind, **changes)
    export(folder, "--to", "gguf", "--type", "f32", "--out", tmp_path / "model.gguf")
    runner = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT * 3).input_ids
    assert runner.tokenize(TEXT.encode() * 3, add_bos=False) == ids
    runner.eval(ids)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    assert relative_error(torch.tensor(runner.scores[: len(ids)]), expected) < 1e-2  # its K and V are fp16


def uploaded(api: Any) -> list[Any]:
    """The repository, whether it is private, and the names of the files that were sent to it."""
    create, upload = (
        inspect.signature(method).bind(*method.call_args.args, **method.call_args.kwargs).arguments
        for method in (api.create_repo, api.upload_folder)
    )
    assert create["exist_ok"] is True and create["repo_id"] == upload["repo_id"]
    assert upload.get("path_in_repo", ".") == "."
    names = (path.name for path in Path(upload["folder_path"]).iterdir())
    kept = sorted(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=upload["allow_patterns"]))
    api.reset_mock()
    return [create["repo_id"], create["private"], kept]


def test_an_adapter_goes_to_the_hub(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: Any, mistake: Any
) -> None:
    """By the command, and by hub's own where ours fails: its command line is what the sentence prints."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)  # has its signatures
    api.create_repo.return_value = SimpleNamespace(repo_id="me/tuned")
    api.upload_folder.return_value = "https://huggingface.co/me/tuned"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr("huggingface_hub.cli.upload.get_hf_api", lambda token: api)
    folder = Path(shutil.copytree(files / "adapter", tmp_path / "an adapter"))
    for name in ("config.yaml", "tokenizer.json"):
        (folder / name).write_text("{}")
    words = "export", folder, "--to", "hub", "--repo", "me/tuned"
    assert printed(*words)["url"] == "https://huggingface.co/me/tuned"
    expected = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]  # not config.yaml
    assert uploaded(api) == ["me/tuned", None, expected]

    api.create_repo.side_effect = ConnectionError("no network")
    said = [mistake(*words), mistake(*words, "--private")]
    assert all("(no network)" in text for text in said)
    api.create_repo.side_effect = None
    for text, private in zip(said, (None, True), strict=True):
        program, *command = shlex.split(text.partition("can be done: ")[2])
        huggingface_hub.cli.hf.app(command, standalone_mode=False)
        assert program == "hf" and uploaded(api) == ["me/tuned", private, expected]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "hf upload me/tuned" in mistake(*words)
    assert "--to hub takes an adapter" in mistake("export", files / "model", *words[2:])


# ---------------------------------------------------------------------------------------------------------------------
# Element types: codes of blocks taken out and put back; the encoders against searches in double precision


def rows() -> dict[str, Tensor]:
    """Rows [n, 512] as weights have them, and stranger ones."""
    normal = torch.randn(24, 512)
    return {
        "normal": normal * 0.02,
        "heavy": normal / torch.randn(24, 512).square().add(0.3),
        "blocks": normal * torch.randn(24, 16).exp().repeat_interleave(32, 1),
        "moved": normal + 0.7,
    }


def decoded(x: Tensor, kind: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(encode(x, kind), kind))


@pytest.mark.parametrize("quant_type", sorted(KEPT))
def test_blocks_take_other_codes(quant_type: str) -> None:
    one, two = (gguf_weight(quant_type, (8, 512)) for _ in range(2))
    number, (first, second) = one.op_args().quant_type, (w.packed.view(-1, bytes_of(w)) for w in (one, two))
    codes = gguf_blocks.codes(second, number)
    made = gguf_blocks.with_codes(first, codes, number)
    assert same_bytes(gguf_blocks.codes(made, number), codes)
    assert same_bytes(gguf_blocks.with_codes(made, gguf_blocks.codes(first, number), number), first)
    assert len(gguf_blocks.levels(number)) > int(codes.max()) > 13


def best_of_iq4_nl(x: Tensor) -> Tensor:
    """The least squared error of each block of 32, of 1,000 scales."""
    x, levels = x.double().view(-1, 1, 32), gguf_blocks.levels(10).double()
    tried = torch.linspace(-0.02, 0.02, 1000, dtype=torch.float64)[:, None] * x.abs().amax(-1, keepdim=True)
    errors = []
    for scale in tried.split(50, 1):
        code = torch.bucketize(x / scale, (levels[1:] + levels[:-1]) / 2)
        errors.append((levels[code] * scale - x).square().sum(-1))
    return torch.cat(errors, 1).nan_to_num(0).amin(1)


def best_of_q4_k(x: Tensor) -> Tensor:
    """The least squared error of each run of 32, of 40 times 40 scales and minima that no 6 bits round."""
    x = x.double().view(-1, 1, 32)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0, 1.25, 40).tolist():
        scale = (high - low) * torch.linspace(0.03, 0.09, 40, dtype=torch.float64)[:, None]
        code = ((x - share * low) / scale).round().clamp(0, 15)
        best = best.minimum((code * scale + share * low - x).square().sum(-1).nan_to_num(0).amin(1))
    return best


@pytest.mark.parametrize("name", rows())
def test_near_the_best_of_a_search(name: str) -> None:
    x = rows()[name]
    for kind, search, most in ((Kind.IQ4_NL, best_of_iq4_nl, 1.1), (Kind.Q4_K, best_of_q4_k, 1.15)):
        found, best = float((decoded(x, kind) - x).square().sum()), float(search(x).sum())
        assert 0.9 * best < found < most * best, kind.name


@pytest.mark.parametrize("kind", [Kind.IQ4_NL, Kind.Q4_K], ids=str)
def test_blocks_with_nothing_to_search(kind: Any) -> None:
    zeros, edge = torch.zeros(1, 512), torch.zeros(1, 512)
    edge[0, 37] = -3.0
    assert same_bytes(decoded(zeros, kind), zeros)
    for x, most in ((edge, 0.05), (torch.full((1, 512), 0.3), 1e-3), (torch.full((1, 512), -0.3), 1e-3)):
        assert relative_error(decoded(x, kind), x) < most  # IQ4_NL has no level of 0


@pytest.mark.parametrize("kind", [Kind.IQ4_NL, Kind.Q4_K], ids=str)
def test_threads_and_parts_do_not_matter(kind: Any) -> None:
    x = torch.randn(1024, 512)
    whole = same_bytes_under_threads(lambda: torch.from_numpy(encode(x, kind)))
    assert same_bytes(torch.cat([torch.from_numpy(encode(part, kind)) for part in x.split(37)]), whole)


def test_no_worse_than_llama_cpp(llama_cpp: Any) -> None:
    """By more than half a percent, which Q4_K may lose where runs of a block differ much in size."""
    quantize = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib*/libggml-base.*")))).ggml_quantize_chunk
    for kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.IQ4_NL):
        for name, x in rows().items():
            out = torch.empty(encode(x, kind).shape, dtype=torch.uint8)
            call = partial(quantize, int(kind), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
            call(ctypes.c_int64(0), *map(ctypes.c_int64, x.shape), None)
            theirs = torch.from_numpy(gguf.quants.dequantize(out.numpy(), kind))
            assert relative_error(decoded(x, kind), x) <= 1.005 * relative_error(theirs, x), (kind.name, name)
