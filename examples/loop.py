"""QLoRA in plain torch: 4-bit weights, adapters, a loop, and the adapter again in PEFT.

    python examples/loop.py base-model train.jsonl adapter

takes a model folder, rows of `messages`, and the folder to make. `qlora train` has held-out rows, checkpoints, paging.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_native as qn

Row = tuple[torch.Tensor, torch.Tensor]  # the ids of its tokens; labels: the same ids, -100 where nothing is trained


def train(folder: str, rows: str, out: str, dtype: torch.dtype = torch.bfloat16, epochs: int = 3) -> None:
    tokenizer, device = AutoTokenizer.from_pretrained(folder), "cuda" if torch.cuda.is_available() else "cpu"

    def encode(line: str) -> Row:
        messages = json.loads(line)["messages"]
        ids = torch.tensor(tokenizer.apply_chat_template(messages, return_dict=False))
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        return ids, torch.where(torch.arange(len(ids)) < len(prompt), -100, ids)  # the answer alone is trained

    def collate(batch: list[Row]) -> Row:
        ids, labels = zip(*batch, strict=True)  # padded behind the row, where no trained token looks: no mask is needed
        return pad_sequence(ids, True, 0).to(device), pad_sequence(labels, True, -100).to(device)

    data = [encode(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    model = qn.load_model(folder, dtype=dtype, device=device)  # linear layers in NF4; every weight is frozen
    qn.add_lora(model, qn.LoraConfig(r=16, alpha=32))  # fp32 matrices beside each linear layer: they alone are trained
    optimizer = qn.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, max_norm=1.0)  # clips, too
    losses = []
    for ids, labels in DataLoader(data * epochs, batch_size=4, shuffle=True, collate_fn=collate):
        hidden, head = model.base_model(ids).last_hidden_state, model.get_output_embeddings()
        # The logits are the largest tensor of a step: this loss computes them, and its gradient, a part at a time.
        loss = qn.linear_cross_entropy(hidden[:, :-1], head.weight, labels[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    qn.save_adapter(model, out)

    # The decoded weights in transformers' layers and the adapter in PEFT's: another implementation of the same model.
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=qn.QLoRANativeConfig(), dtype=dtype)
    theirs = PeftModel.from_pretrained(base.dequantize().to(device), out)
    with torch.no_grad():
        ours, peft = model(ids).logits.float(), theirs(ids).logits.float()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; PEFT's logits differ by {(ours - peft).norm() / peft.norm():.1e}")


if __name__ == "__main__":
    train(*sys.argv[1:4])
