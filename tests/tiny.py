"""A random llama of a few hundred thousand weights with a tokenizer, and rows few enough to learn by heart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FACTS = [
    ("red", "apple"), ("yellow", "banana"), ("green", "pear"), ("blue", "plum"), ("orange", "carrot"),
    ("white", "leek"), ("brown", "walnut"), ("black", "olive"), ("pink", "radish"), ("violet", "aubergine"),
    ("grey", "mussel"), ("gold", "maize"),
]  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 300 entries with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"what is {color}? {thing}" for color, thing in FACTS], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)


def write_model(folder: Path, **options: Any) -> Path:
    """A llama with random weights, bf16, and its tokenizer; the same weights every time."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    # With a range of 0.02 the frozen output embedding bounds the logits to about 1.
    config = LlamaConfig(**{**sizes, "tie_word_embeddings": False, "initializer_range": 0.2, **options})
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_rows(path: Path, count: int = len(FACTS)) -> Path:
    """``count`` rows in the messages format; rows differ in length."""
    rows = []
    for number in range(count):
        color, thing = FACTS[number % len(FACTS)]
        question = f"what is {color}?" if number % 3 else f"say, what is {color} and good?"
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": thing}]})
    return write_jsonl(path, rows)
