"""From positions in a text to tokens: borders inside a token, tokenizers without offsets, plain text, truncation.

The notation is that of test_data_template.py: trained tokens stand in double brackets.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers import demo_model_or_skip
from test_data_template import BOTH, CHATML, SlowTokenizer, byte_tokenizer, chat, encode, marked, maybe_slow, row
from transformers import AutoTokenizer

from qlora_native.data.formats import Row
from qlora_native.data.template import IGNORE_INDEX, ChatEncoder, padding_id

# ---- tokens that straddle a border


@BOTH
def test_text_and_prompt_with_completion(slow: bool) -> None:
    tokenizer = maybe_slow(byte_tokenizer(eos="</s>"), slow)
    assert encode(tokenizer, Row("d", 1, text="abc")) == "a[[bc</s>]]"
    assert encode(tokenizer, Row("d", 1, text="abc</s>")) == "a[[bc</s>]]", "no second end"
    assert encode(tokenizer, Row("d", 1, prompt="q: ", completion="yes")) == "q: [[yes</s>]]"
    assert encode(tokenizer, Row("d", 1, prompt="", completion="yes")) == "y[[es</s>]]"
    with_bos = maybe_slow(byte_tokenizer(eos="</s>", adds_bos=True), slow)
    assert encode(with_bos, Row("d", 1, text="abc")) == "<s>[[abc</s>]]"
    assert encode(with_bos, Row("d", 1, text="<s>abc")) == "<s>[[abc</s>]]", "no second beginning"
    assert encode(with_bos, Row("d", 1, prompt="", completion="yes")) == "<s>[[yes</s>]]"
    assert encode(with_bos, Row("d", 1, prompt="q: ", completion="yes")) == "<s>q: [[yes</s>]]"


def test_a_token_over_the_border_is_trained() -> None:
    tokenizer = byte_tokenizer(merges=[("Ġ", "y"), ("Ċ", "Ċ")], eos="</s>")
    assert encode(tokenizer, Row("d", 1, prompt="q: ", completion="yes")) == "q:[[ yes</s>]]"
    assert encode(tokenizer, Row("d", 1, prompt="q:", completion=" yes")) == "q:[[ yes</s>]]"
    assert encode(tokenizer, row("u:a", "a:\n b")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant[[\n\n b<|im_end|>]]\n"
    )


def test_a_slow_tokenizer_splits_where_the_prompt_ends() -> None:
    tokenizer = SlowTokenizer(byte_tokenizer(merges=[("Ġ", "y")], eos="</s>"))
    encoded = ChatEncoder(tokenizer).encode(Row("d", 1, prompt="q: ", completion="yes y"))
    assert marked(tokenizer, encoded) == "q: [[yes y</s>]]"
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["q", ":", "Ġ", "y", "e", "s", "Ġy", "</s>"]


def test_offsets_that_leave_out_white_space() -> None:
    # RoBERTa's and GPT-2's post-processor: the offsets of " b" are those of "b", those of " " are empty.
    tokenizer = byte_tokenizer(merges=[("Ġ", "y")], trims_offsets=True, eos="</s>")
    for prompt, completion in (("q:", " yes"), ("q:", " b"), ("q:\n", "b"), ("q:", "b ")):
        encoded = encode(tokenizer, Row("d", 1, prompt=prompt, completion=completion))
        assert encoded == f"{prompt}[[{completion}</s>]]"
    assert encode(tokenizer, Row("d", 1, text=" b ")) == " [[b </s>]]"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert encode(tokenizer, row("u:a", "a:b ", "u:c")) == "user: a\nassistant: [[b ]]\nuser: c\n"
    tokenizer.chat_template = CHATML
    assert encode(tokenizer, row("u:a", "a:\n b \n", "u:c")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[\n b \n<|im_end|>]]\n<|im_start|>user\nc<|im_end|>\n"
    )


class CollapsedOffsets(SlowTokenizer):
    """A fast tokenizer whose tokens all end where they begin, as Llama 3's did for a while."""

    is_fast = True

    def __call__(self, text: str, **options: Any) -> Any:
        out = self._fast(text, **options)
        if "offset_mapping" in out:
            out["offset_mapping"] = [(start, start) for start, _ in out["offset_mapping"]]
        return out


def test_offsets_that_are_wrong_are_noticed_and_prefixes_of_tokens_used() -> None:
    tokenizer = CollapsedOffsets(byte_tokenizer(merges=[("Ġ", "y")], eos="</s>"))
    assert encode(tokenizer, Row("d", 1, prompt="q:", completion=" yes")) == "q:[[ yes</s>]]"
    words = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    tokenizer = CollapsedOffsets(byte_tokenizer(words, eos="</s>"))
    assert encode(tokenizer, row("u:a", "a:b c", "u:d", "a:e")) == (
        "user: a assistant: [[b c]] user: d assistant: [[e</s>]]"
    )


def byte_truth(tokenizer: Any, ids: list[int], pieces: list[tuple[str, bool]]) -> list[bool]:
    """Which tokens overlap a trained piece, from the bytes that each token spells: no offsets, no template."""
    flags = [trained for text, trained in pieces for _ in text.encode()]
    at, expected = 0, []
    for token in tokenizer.convert_ids_to_tokens(ids):
        size = len(token)  # one letter of the byte alphabet is one byte, and special tokens are ASCII
        expected.append(any(flags[at : at + size]))
        at += size
    assert at == len(flags)
    return [False, *expected[1:]]


def test_random_conversations_against_a_mask_counted_in_bytes() -> None:
    merges = [("Ġ", "y"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("a", "b"), ("Ã", "©"), (">", "Ċ")]
    tokenizer = byte_tokenizer(merges=merges)
    encoder = ChatEncoder(tokenizer)
    draw = random.Random(5)
    for _ in range(200):
        turns = ["s:" + draw.choice(["S", "é "])] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 4)):
            turns += [role + "".join(draw.choices("ab y\né>.", k=draw.randint(1, 9))) for role in ("u:", "a:")]
        pieces: list[tuple[str, bool]] = []
        for message in chat(*turns):
            pieces.append((f"<|im_start|>{message['role']}\n", False))
            pieces += [(message["content"] + "<|im_end|>", message["role"] == "assistant"), ("\n", False)]
        encoded = encoder.encode(row(*turns))
        expected = byte_truth(tokenizer, encoded.input_ids, pieces)
        assert [label != IGNORE_INDEX for label in encoded.labels] == expected, turns


# ---- all tokens, and length


def test_all_tokens_but_the_first_are_trained_on_request() -> None:
    assert encode(byte_tokenizer(), row("u:a", "a:b"), train_on="all") == (
        "<|im_start|>[[user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n]]"
    )
    assert encode(byte_tokenizer(eos="</s>"), Row("d", 1, prompt="q:", completion="a"), train_on="all") == "q[[:a</s>]]"
    words = "{% for m in messages %}{{ m['content'] + '.' }}{% endfor %}"
    assert encode(byte_tokenizer(words, eos="</s>"), row("u:a", "a:b"), train_on="all") == "a[[.b.</s>]]"
    assert encode(byte_tokenizer(words, eos="</s>"), row("u:a"), train_on="all") == "a[[.]]"


@pytest.mark.parametrize(
    ("extra", "ending"), [(0, "[[Yo<|im_end|>]]\n"), (-1, "[[Yo<|im_end|>]]"), (-2, "[[Yo]]"), (-4, "")]
)
def test_rows_are_truncated_at_their_right_end(extra: int, ending: str) -> None:
    tokenizer = byte_tokenizer()
    before = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    full = 1 + 5 + 2 + 2 + 1 + 10 + 4
    encoded = ChatEncoder(tokenizer, max_length=full + extra).encode(row("u:Hi", "a:Yo"))
    assert marked(tokenizer, encoded) == before + ending
    assert (len(encoded.input_ids), encoded.truncated) == (full + extra, max(0, -extra))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="max_length is 1, expected at least 2"):
        ChatEncoder(byte_tokenizer(), max_length=1)


def test_padding_id() -> None:
    tokenizer = byte_tokenizer(eos="</s>")
    assert padding_id(tokenizer) == tokenizer.convert_tokens_to_ids("</s>")
    tokenizer.pad_token = "<|user|>"
    assert padding_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|user|>")
    assert padding_id(byte_tokenizer(eos=None)) == 0


@pytest.mark.long
def test_the_tokenizer_of_the_demo_model() -> None:
    file = demo_model_or_skip()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert encode(tokenizer, row("u:def f():\n    pass", "a:Do nothing.", "u:Why?", "a:\n  It must (é).")) == (
        f"<|im_start|>system\n{default}<|im_end|>\n<|im_start|>user\ndef f():\n    pass<|im_end|>\n"
        "<|im_start|>assistant\n[[Do nothing.<|im_end|>]]\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant[[\n\n  It must (é).<|im_end|>]]\n"
    )
