"""Greedy decoding with transformers' `generate`, one token at a time: tokens a second of SmolLM2-135M.

    python bench/bench_generate.py --json

All sides start from the same 16-bit weights and take turns in one process. `ours` is a model as `qn.load_model` returns
it and `unfused` the same with `fuse=False`, transformers' own code between the products; `dequantized` is the dense
bf16 model with the weights that ours stands for, the truth of the match column; `bitsandbytes` runs its inference path,
in fp32 on a CPU without a dot product for bf16. `free` is `ours` with linear layers that return zeros at once, the
output head included, and `layers free` the same with the head left as it is: what `generate` costs without the
products. `match`: whether our tokens are the truth's, or part from them first where the truth itself nearly wavers.
The floor is reading each weight once a token at the memory's best rate in this run. Needs the extra `bench`.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import isa_env  # noqa: F401  (before torch)
import torch
from ceilings import Ceilings, ceilings, floor
from common import Bar, Bench, interleaved, limit_bitsandbytes, multiplies_bf16, peer_dtype, timings, tokens_a_second
from peer_models import dense_model, nf4_config, quantized_layers, tokenizer
from torch import Tensor, nn

import qlora_native as qn
from qlora_native.nn import QuantizedLinear

BARS = [Bar("bitsandbytes", 2.0, faster=True)]
if multiplies_bf16():  # either is enough
    BARS = [Bar("bitsandbytes", 1.5, faster=True), Bar("layers free", 1.15)]
NEAR_TIE = 0.25  # logits: two steps of bf16 where the best ones lie
PROMPT = "Explain in a few sentences why the sky is blue and a sunset is red."


class FreeLinear(nn.Module):
    """Zeros of the shape of a linear layer's output, made once for each shape."""

    def __init__(self, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.dtype = out_features, dtype
        self.outputs: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to zeros [..., N], the same memory every time."""
        shape = x.shape[:-1]
        if shape not in self.outputs:
            self.outputs[shape] = torch.zeros(*shape, self.out_features, dtype=self.dtype)
        return self.outputs[shape]


def with_layers(model: Any, kind: type[nn.Linear], replace: Callable[[Any], nn.Module]) -> Any:
    """A copy of the model in which every layer of a kind is what ``replace`` returns.

    Weights that nothing replaces are shared with the model.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for path, layer in list(twin.named_modules()):
        if isinstance(layer, kind):
            twin.set_submodule(path, replace(layer))
    return twin


def bitsandbytes_model(folder: Path) -> Any:
    """NF4 with double quantization as transformers loads it, or None without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    limit_bitsandbytes()
    options = {"dtype": peer_dtype(), "quantization_config": nf4_config(BitsAndBytesConfig, peer_dtype())}
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)


def sides(folder: Path) -> dict[str, Any]:
    """The models that take part, from a folder with a 16-bit one."""
    ours: Any = qn.load_model(folder)
    unfused: Any = qn.load_model(folder, fuse=False)

    def freed(layer: nn.Linear) -> nn.Module:
        return FreeLinear(layer.out_features, ours.dtype)

    models = {
        "ours": ours,
        "unfused": unfused,
        "dequantized": with_layers(unfused, QuantizedLinear, QuantizedLinear.dequantize),
        "free": with_layers(ours, nn.Linear, freed),
        "layers free": with_layers(ours, QuantizedLinear, freed),
        "bitsandbytes": bitsandbytes_model(folder),
    }
    return {name: model.eval() for name, model in models.items() if model is not None}


@torch.inference_mode()
def decode(model: Any, prompt: Tensor, count: int) -> Tensor:
    """The ``count`` most likely tokens after prompt [1, T], one at a time, an end of text not heeded. int64 [count]."""
    model.generation_config.eos_token_id = None
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, use_cache=True
    )
    return output[0, prompt.shape[1] :]


def first_difference(tokens: Tensor, others: Tensor) -> int | None:
    """The first position at which two rows of tokens differ, or None."""
    found = (tokens != others).nonzero()
    return int(found[0]) if len(found) else None


@torch.inference_mode()
def lead(model: Any, prompt: Tensor, tokens: Tensor) -> float:
    """By how much the model prefers the token that comes next to the second best, in logits."""
    text = torch.cat([prompt[0], tokens])[None]
    best = model(text).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def compare(models: dict[str, Any], prompt: Tensor, count: int, repeats: int, measured: Ceilings) -> dict[str, Any]:
    """Tokens of all sides against the truth, then tokens a second in turn; a row."""
    truth = models["dequantized"]
    expected = decode(truth, prompt, count)
    tokens: dict[str, Any] = {}
    for name, model in models.items():
        if "free" in name:
            continue
        at = first_difference(decode(model, prompt, count), expected)
        tokens[name] = {"equal": at is None}
        if at is not None:
            tokens[name] |= {"first_difference": at, "lead_of_the_truth_there": lead(truth, prompt, expected[:at])}
    seconds = interleaved({name: partial(decode, model, prompt, count) for name, model in models.items()}, repeats)
    megabytes = {
        "layers": sum(layer.quantized.nbytes for layer in quantized_layers(models["ours"]).values()) / 1e6,
        "head": models["ours"].get_output_embeddings().weight.nbytes / 1e6,
    }
    row: dict[str, Any] = {"prompt_tokens": prompt.shape[1], "new_tokens": count}
    sides_of_ours = [tokens[name] for name in ("ours", "unfused")]
    row["match"] = all(t["equal"] or t["lead_of_the_truth_there"] <= NEAR_TIE for t in sides_of_ours)
    row |= {"tokens": tokens, "megabytes_read_a_token": megabytes}
    row |= timings(seconds, BARS, floor(measured, 1e6 * sum(megabytes.values()) * count)) | {"either_bar": True}
    return row | {"tokens_per_second": tokens_a_second(seconds, count)}


def main() -> None:
    bench = Bench("generate", __doc__, new_tokens=64, repeats=9)
    message = [{"role": "user", "content": PROMPT}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer().apply_chat_template(message, **options)["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        dense_model().save_pretrained(folder)
        models = sides(Path(folder))
    measured = ceilings(dots=False)
    bench.begin(ceilings=measured)
    row = compare(models, prompt, bench.options.new_tokens, bench.options.repeats, measured)
    bench.add(row, "tokens", "tokens_per_second")
    bench.write()


if __name__ == "__main__":
    main()
