"""Greedy decoding of SmolLM2-135M by transformers' `generate`: ours, bitsandbytes' inference path, and no products.

    python bench/bench_decode.py --json bench/results/decode.json

    ours                     qn.load_model
    bitsandbytes_inference   BitsAndBytesConfig, NF4 with double quantisation, in evaluation mode
    bf16                     the 16-bit model
    linears_free             ours, with quantised layers that return zeros: what everything else takes

All three generate the same number of tokens from the same prompt, in turns, in one process; the output embedding stays
in bf16 everywhere. `match` says whether our loss on a text is that of transformers' code in fp32 on the decoded
weights, to 0.5 %. The floor is reading each weight once a token at the memory's rate. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_train import LOSS_TOLERANCE
from ceilings import ceilings, floor
from common import Bar, Functions, interleaved, line, machine, quartiles, rounded, timings, write_json
from torch import nn
from train_sides import prepare

PROMPT_TOKENS, NEW_TOKENS = 24, 48
# Either is enough.
BARS = (Bar("bitsandbytes_inference", 1.5, faster=True), Bar("linears_free", 1.15))


class Free(nn.Module):
    """A linear layer that costs nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.made: dict[torch.Size, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros [..., N], the same each time."""
        if x.shape not in self.made:
            self.made[x.shape] = torch.zeros(*x.shape[:-1], self.width, dtype=x.dtype)
        return self.made[x.shape]


def models(folder: Path) -> dict[str, Any]:
    """Each contender, in evaluation mode."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import qlora_native as qn
    from qlora_native.nn import QuantizedLinear

    def theirs(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options)

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    free: Any = qn.load_model(folder)
    for name, module in list(free.named_modules()):
        if isinstance(module, QuantizedLinear):
            free.set_submodule(name, Free(module.out_features))
    found = {"ours": qn.load_model(folder), "linears_free": free, "bf16": theirs()}
    found["bitsandbytes_inference"] = theirs(quantization_config=nf4)
    return {name: model.eval() for name, model in found.items()}


def generating(model: Any, prompt: torch.Tensor) -> Any:
    """A call that generates."""
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measured = ceilings(dots=False)
    result: dict[str, Any] = {"bench": "decode", "machine": machine(), "ceilings": measured, "rows": []}
    print(json.dumps(result["machine"]), json.dumps(measured), sep="\n")
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        prepared = prepare(Path(name), steps=1, seed=0, full_length=True)
        contenders = models(Path(name) / "model")
        batch = torch.load(Path(name) / "batches.pt")["train"][0]
        ours = contenders["ours"]
        loss = float(ours(**batch).loss)
        prompt = batch["input_ids"][:1, :PROMPT_TOKENS]
        functions: Functions = {label: generating(model, prompt) for label, model in contenders.items()}
        lengths = {function().shape[1] for function in functions.values()}
        seconds = interleaved(functions, arguments.repeats)
        from qlora_native.nn import QuantizedLinear

        weights = [m.quantized.nbytes for m in ours.modules() if isinstance(m, QuantizedLinear)]
        num_bytes = sum(weights) + ours.get_output_embeddings().weight.nbytes
    row: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    close = abs(loss - prepared["loss"]) <= LOSS_TOLERANCE * prepared["loss"]
    row["match"] = close and lengths == {PROMPT_TOKENS + NEW_TOKENS}
    row["loss"] = {"reference": prepared["loss"], "ours": loss}
    row |= timings(seconds, BARS, floor(measured, num_bytes * NEW_TOKENS)) | {"either_bar": True}
    row["tokens_per_second"] = {
        label: rounded(quartiles([NEW_TOKENS / s for s in values])) for label, values in seconds.items()
    }
    result["rows"].append(row)
    print(line(row), row["tokens_per_second"])
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
