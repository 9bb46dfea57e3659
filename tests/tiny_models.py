"""Random models of a few thousand parameters, folders that hold them, and their dense twins in plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_native.models.build import four_bit_parts
from qlora_native.nn import QuantizedLinear

VOCAB = 128
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


def make(kind: str = "Llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A causal LM of transformers' class ``kind`` + "Config" with random weights."""
    sizes = GPT2_SIZES if kind == "GPT2" else SIZES
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**{**sizes, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero as made: a lost one would go unseen
                parameter.normal_(0, 0.02)
    return model.to(dtype).eval()


def save(folder: Path, kind: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save such a model into ``folder`` and return the folder."""
    make(kind, dtype, **changes).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    """Set keys of the folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let ``edit`` change the tensors by name of the folder's one file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bitsandbytes_model(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """The model of a dense folder with bitsandbytes' 4-bit layers, NF4 unless ``options`` (bnb_4bit_...) differ."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **options})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"})


@torch.no_grad()
def dense_twin(folder: Path, model: PreTrainedModel) -> tuple[PreTrainedModel, float]:
    """What transformers loads from ``folder`` in fp32, with the weights that ``model`` holds in 4 bits.

    Also returns the largest relative distance between such a weight and the one in the folder: about 0.1 for the right
    tensor, about 1.4 for any other.
    """
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst = 0.0
    for name, quantized in four_bit_parts(model).items():
        name = name.replace(".base_layer", "")
        there, weight = twin.get_parameter(name), quantized.dequantize(torch.float32)
        owner = twin.get_submodule(name.rpartition(".")[0])
        weight = weight.mT if isinstance(owner, Conv1D) or getattr(owner, "is_transposed", False) else weight
        worst = max(worst, float((weight - there).norm() / there.norm()))
        there.data.copy_(weight)
    return twin, worst


def fill(model: Any, seed: int = 3) -> Any:
    """Values for what is zero in a new adapter, ours or PEFT's, or nothing would show; the same ones by name."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or (parameter.requires_grad and "lora_A" not in name):
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def four_bit_layers(model: Any) -> dict[str, QuantizedLinear]:
    """The model's 4-bit linear layers by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def assert_same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Both hold the same tensors under the same names."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def tokens(rows: int = 2, columns: int = 9, seed: int = 1) -> torch.Tensor:
    """Random token numbers, int64 [rows, columns], special ones left out."""
    return torch.randint(3, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """The model's logits for the same tokens every time."""
    return model(tokens()).logits


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference against the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max())
