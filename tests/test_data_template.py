"""Which tokens are trained: the mask of each template against expectations written by hand.

Expectations are the rendered text with the trained part in double brackets. The tokenizer spells every byte as one
token (but for the merges a test asks for), so a place in the text is a place in the tokens that a reader can count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_native.data import DEFAULT_CHAT_TEMPLATE, IGNORE_INDEX, ChatEncoder, Encoded, Message, Row
from qlora_native.errors import UserError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(
    template: str | None = CHATML,
    *,
    merges: Sequence[tuple[str, str]] = (),
    adds_bos: bool = False,
    trims_offsets: bool = False,
    eos: str | None = "<|im_end|>",
    added: Sequence[str] = (),
) -> Any:
    """A fast tokenizer of 256 bytes and a few special tokens; ``merges`` in the alphabet of byte-level BPE."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    inner.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    elif trims_offsets:
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


class SlowTokenizer:
    """The same tokenizer as one without offsets, as transformers' Python tokenizers are."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self._fast = fast

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    def __call__(self, text: str, *, return_offsets_mapping: bool = False, **options: Any) -> Any:
        if return_offsets_mapping:
            raise NotImplementedError("no offsets in a slow tokenizer")
        return self._fast(text, **options)


def chat(*turns: str) -> tuple[Message, ...]:
    """``chat("u:hello", "a:hi")``: messages by the first letter of their role."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return tuple({"role": roles[turn[0]], "content": turn[2:]} for turn in turns)


def row(*turns: str, untrained: Sequence[int] = ()) -> Row:
    return Row("d.jsonl:3", 3, messages=chat(*turns), untrained=frozenset(untrained))


def marked(tokenizer: Any, encoded: Encoded) -> str:
    """The decoded text, every run of trained tokens in double brackets."""
    assert len(encoded.input_ids) == len(encoded.labels)
    pieces: list[tuple[bool, list[int]]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        if not pieces or pieces[-1][0] != (label == token):
            pieces.append((label == token, []))
        pieces[-1][1].append(token)
    text = [(trained, tokenizer.decode(ids, skip_special_tokens=False)) for trained, ids in pieces]
    return "".join(f"[[{part}]]" if trained else part for trained, part in text)


def encode(tokenizer: Any, which: Row, **options: Any) -> str:
    return marked(tokenizer, ChatEncoder(tokenizer, **options).encode(which))


BOTH = pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])


def maybe_slow(tokenizer: Any, slow: bool) -> Any:
    return SlowTokenizer(tokenizer) if slow else tokenizer


# ---- ids, counted by hand


def test_ids_and_labels_of_one_exchange() -> None:
    tokenizer = byte_tokenizer()
    encoded = ChatEncoder(tokenizer).encode(row("u:Hi", "a:Yo"))
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    newline, h, i, y, o = tokenizer.convert_tokens_to_ids(["Ċ", "H", "i", "Y", "o"])
    user, assistant = (tokenizer.convert_tokens_to_ids(list(word)) for word in ("user", "assistant"))
    answer = [y, o, end]
    before = [start, *user, newline, h, i, end, newline, start, *assistant, newline]
    assert encoded.input_ids == [*before, *answer, newline]
    assert encoded.labels == [-100] * len(before) + answer + [-100]
    assert (encoded.trained, encoded.cut) == (3, 0)


# ---- templates without a generation block


@BOTH
def test_every_answer_and_its_end_of_turn_of_a_long_conversation(slow: bool) -> None:
    tokenizer = maybe_slow(byte_tokenizer(), slow)
    assert encode(tokenizer, row("s:Be kind.", "u:one", "a:1", "u:two", "a:2\n\n2é", "u:three")) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\n[[1<|im_end|>]]\n"
        "<|im_start|>user\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n[[2\n\n2é<|im_end|>]]\n"
        "<|im_start|>user\nthree<|im_end|>\n"
    )


def test_answers_that_quote_each_other_or_the_prompt_are_not_confused() -> None:
    assert encode(byte_tokenizer(), row("u:assistant", "a:assistant", "u:assistant", "a:assistant")) == (
        "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n[[assistant<|im_end|>]]\n"
        "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n[[assistant<|im_end|>]]\n"
    )
    probe = "ProbeWordForTheAnswer"
    assert encode(byte_tokenizer(), row(f"u:{probe}", f"a:{probe}X")) == (
        f"<|im_start|>user\n{probe}<|im_end|>\n<|im_start|>assistant\n[[{probe}X<|im_end|>]]\n"
    )


def test_a_conversation_that_opens_with_an_answer() -> None:
    assert encode(byte_tokenizer(), row("a:Hello", "u:Hi", "a:Yo")) == (
        "<|im_start|>assistant\n[[Hello<|im_end|>]]\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Yo<|im_end|>]]\n"
    )


@BOTH
def test_untrained_answers_stay_context(slow: bool) -> None:
    tokenizer = maybe_slow(byte_tokenizer(), slow)
    assert encode(tokenizer, row("u:a", "a:bad", "u:b", "a:good", untrained=[1])) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nbad<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n[[good<|im_end|>]]\n"
    )
    only = ChatEncoder(tokenizer).encode(row("u:a", "a:bad", untrained=[1]))
    assert only.trained == 0


def test_a_conversation_without_an_answer_trains_nothing() -> None:
    assert ChatEncoder(byte_tokenizer()).encode(row("s:x", "u:y")).trained == 0


@BOTH
def test_a_template_that_ignores_the_generation_prompt_does_not_train_the_header(slow: bool) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    tokenizer = maybe_slow(byte_tokenizer(template), slow)
    assert encode(tokenizer, row("u:a", "a:b", "u:c", "a:d")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]\n"
    )


def test_a_template_that_adds_thoughts_to_the_last_turn_only() -> None:
    # Qwen3's way: the same answer is rendered differently when it is the last, so earlier prefixes are no prefixes.
    template = (
        "{% set last = namespace(user=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.index0 > last.user %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'].split('</think>')[-1].strip() + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert encode(byte_tokenizer(template), row("u:a", "a:<think>hm</think> b", "u:c", "a:d")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nd<|im_end|>]]\n"
    ), "what follows the generation prompt is the model's to write"


def test_a_generation_prompt_that_is_not_in_the_history() -> None:
    # DeepSeek's way: generation starts inside a thought, history shows none.
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    assert encode(byte_tokenizer(template), row("u:a", "a:<b", "u:c", "a:d")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[<b<|im_end|>]]\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]\n"
    )


@BOTH
def test_a_template_that_moves_the_system_message_to_the_last_question(slow: bool) -> None:
    # Mistral's way: what stands before the first answer depends on how the conversation goes on.
    template = (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{{ '<s>' }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}"
        "{% set later = messages[loop.index0 + 1:] | selectattr('role', 'eq', 'user') | list %}"
        "{{ '[INST] ' + (system + '\n\n' if system and not later else '') + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    tokenizer = maybe_slow(byte_tokenizer(template, eos="</s>"), slow)
    assert encode(tokenizer, row("s:S", "u:a", "a:b", "u:c", "a:d")) == (
        "<s>[INST] a[/INST] [[b</s>]][INST] S\n\nc[/INST] [[d</s>]]"
    )


def test_a_template_that_writes_an_answer_unlike_any_probe() -> None:
    # The end is then where the conversation up to this answer ends.
    template = CHATML.replace(
        "m['content'] + '<|im_end|>", "m['content'] + (m['content'] | length) | string + '<|im_end|>"
    )
    assert encode(byte_tokenizer(template), row("u:a", "a:four")) == (
        "<|im_start|>user\na1<|im_end|>\n<|im_start|>assistant\n[[four4<|im_end|>]]\n"
    )


def test_a_template_that_trims_content() -> None:
    template = CHATML.replace("m['content']", "m['content'] | trim")
    assert encode(byte_tokenizer(template), row("u: a ", "a:\n b \n")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
    )


def test_an_answer_that_begins_and_ends_in_white_space() -> None:
    assert encode(byte_tokenizer(), row("u:a", "a:\n b \n")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[\n b \n<|im_end|>]]\n"
    )


def test_reasoning_that_a_template_writes_is_trained() -> None:
    template = CHATML.replace(
        "+ m['content']", "+ (m['reasoning_content'] + '|' if m['reasoning_content'] else '') + m['content']"
    )
    messages = (*chat("u:a"), {"role": "assistant", "content": "b", "reasoning_content": "r"})
    assert encode(byte_tokenizer(template), Row("d", 1, messages=messages)) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[r|b<|im_end|>]]\n"
    )


# ---- how an answer ends


def test_white_space_before_the_end_of_turn_is_trained_with_it() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
    )
    assert encode(byte_tokenizer(template, eos="</s>"), row("u:a", "a:b", "u:c", "a:d")) == (
        "[INST] a [/INST] [[b </s>]][INST] c [/INST] [[d </s>]]"
    )


def test_an_added_token_of_the_template_ends_a_turn_even_if_it_is_not_special() -> None:
    template = CHATML.replace("<|im_end|>", "<turn/>")
    tokenizer = byte_tokenizer(template, eos="</s>", added=["<turn/>", "<b>"])
    assert encode(tokenizer, row("u:a", "a:x<b>")) == (
        "<|im_start|>user\na<turn/>\n<|im_start|>assistant\n[[x<b><turn/>]]\n"
    ), "an added token of the answer does not"
    assert encode(tokenizer, row("u:a", "a:b", "u:c", "a:d")) == (
        "<|im_start|>user\na<turn/>\n<|im_start|>assistant\n[[b<turn/>]]\n"
        "<|im_start|>user\nc<turn/>\n<|im_start|>assistant\n[[d<turn/>]]\n"
    )


@BOTH
def test_without_an_end_of_turn_the_next_header_and_at_last_the_end_of_sequence_stop_the_model(slow: bool) -> None:
    # GLM's way, which lists <|user|> among the tokens that stop generation.
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    tokenizer = maybe_slow(byte_tokenizer(template, eos="</s>"), slow)
    assert encode(tokenizer, row("u:a", "a:b", "u:c", "a:d")) == (
        "<|user|>\na\n<|assistant|>\n[[b\n<|user|>]]\nc\n<|assistant|>\n[[d</s>]]"
    )


def test_a_template_of_words_alone_ends_in_the_end_of_sequence() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = byte_tokenizer(template, eos="</s>")
    assert encode(tokenizer, row("u:a", "a:b", "u:c", "a:d")) == (
        "user: a\nassistant: [[b]]\nuser: c\nassistant: [[d</s>]]"
    )
    assert encode(tokenizer, row("u:a", "a:b", "u:c")) == "user: a\nassistant: [[b]]\nuser: c\n"
    bare = byte_tokenizer("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", eos="</s>")
    assert encode(bare, row("u:a", "a:b", "u: ")) == "a\n[[b]]\n \n"
    begins = byte_tokenizer("{% for m in messages %}{{ '<s>' + m['content'] }}{% endfor %}", eos="</s>")
    assert encode(begins, row("u:a", "a:b", "u:c", "a:d")) == "<s>a<s>[[b]]<s>c<s>[[d</s>]]", "a beginning ends nothing"
    assert encode(byte_tokenizer(template, eos=None), row("u:a", "a:b")) == "user: a\nassistant: [[b]]\n"


# ---- generation blocks

BLOCK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] + ENDS }}{%- endgeneration -%}{% else %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endif %}AFTER{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHORT_BLOCK = BLOCK.replace(" + ENDS", "").replace("AFTER", "{{ '<|im_end|>\n' if m['role'] == 'assistant' else '' }}")
WIDE_BLOCK = BLOCK.replace("ENDS", "'<|im_end|>\n'").replace("AFTER", "")


def test_a_generation_block_decides_and_its_end_of_turn_is_added_when_it_stops_short() -> None:
    tokenizer = byte_tokenizer(SHORT_BLOCK)
    turns = row("s:S", "u:a", "a:b", "u:c", "a:d")
    assert encode(tokenizer, turns) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]\n"
    )
    assert encode(SlowTokenizer(tokenizer), turns) == encode(tokenizer, turns), (
        "found by text where there are no offsets"
    )


def test_a_generation_block_is_taken_as_wide_as_it_is() -> None:
    assert encode(byte_tokenizer(WIDE_BLOCK), row("u:a", "a:b", "u:c", "a:d")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>\n]]"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>\n]]"
    )


def test_a_generation_block_with_an_untrained_answer() -> None:
    assert encode(byte_tokenizer(SHORT_BLOCK), row("u:a", "a:b", "u:c", "a:d", untrained=[1])) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]\n"
    )


def test_a_generation_block_that_is_never_reached_falls_back_to_the_text() -> None:
    template = "{% if tools %}{% generation %}{{ 'x' }}{% endgeneration %}{% endif %}" + CHATML
    assert encode(byte_tokenizer(template), row("u:a", "a:b")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
    )


# ---- the default template


@BOTH
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_default_template(slow: bool, adds_bos: bool) -> None:
    tokenizer = maybe_slow(byte_tokenizer(None, eos="</s>", adds_bos=adds_bos), slow)
    encoder = ChatEncoder(tokenizer)
    assert encoder.uses_default_template
    assert encoder.chat_template.endswith(DEFAULT_CHAT_TEMPLATE)
    lead = "<s>" if adds_bos else ""
    assert marked(tokenizer, encoder.encode(row("s:S", "u:a", "a:b", "u:c", "a:d"))) == (
        f"{lead}### System:\nS\n\n### User:\na\n\n### Assistant:\n[[b</s>]]\n\n"
        "### User:\nc\n\n### Assistant:\n[[d</s>]]\n\n"
    )
    prompt = tokenizer.decode(encoder.prompt_ids(chat("u:a")))
    assert prompt == f"{lead}### User:\na\n\n### Assistant:\n"


def test_what_generation_starts_from_is_what_stands_before_the_trained_tokens() -> None:
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ"), ("Ġ", "y")])
    encoder = ChatEncoder(tokenizer)
    assert not encoder.uses_default_template
    encoded = encoder.encode(row("s:S", "u:a", "a:b"))
    prompt = encoder.prompt_ids(chat("s:S", "u:a"))
    assert encoded.input_ids[: len(prompt)] == prompt
    assert [label != IGNORE_INDEX for label in encoded.labels].index(True) == len(prompt)


# ---- system messages and refusals

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML


def test_a_template_without_a_system_role_gets_it_in_the_first_question() -> None:
    tokenizer = byte_tokenizer(NO_SYSTEM)
    encoder = ChatEncoder(tokenizer)
    assert marked(tokenizer, encoder.encode(row("s:S", "u:a", "a:b", "u:c", "a:d", untrained=[2]))) == (
        "<|im_start|>user\nS\n\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]\n"
    )
    encoder.encode(row("u:a", "a:b"))
    assert encoder.folded_system == 1


def test_a_refused_conversation_is_one_sentence_with_the_reason_of_the_template() -> None:
    with pytest.raises(UserError) as caught:
        ChatEncoder(byte_tokenizer(NO_SYSTEM)).encode(row("s:S", "a:b"))
    assert str(caught.value) == (
        "d.jsonl:3: the chat template refuses the conversation (no system role here), got roles system, assistant; "
        "change the row to what the template expects."
    )
    with pytest.raises(UserError, match=r"^the conversation: the chat template refuses .* got roles system;"):
        ChatEncoder(byte_tokenizer(NO_SYSTEM)).prompt_ids(chat("s:S"))


def test_an_answer_that_cannot_be_found_is_an_error_and_not_a_wrong_mask() -> None:
    template = "{{ messages | map(attribute='content') | map('upper') | join('|') }}{{ messages | length }}"
    with pytest.raises(UserError) as caught:
        ChatEncoder(byte_tokenizer(template)).encode(row("u:a", "a:b", "u:c"))
    assert str(caught.value) == (
        "d.jsonl:3: the answer in message 2 of 3 cannot be found in what the chat template renders; "
        "mark answers in the template with {% generation %}, or set train_on to 'all'."
    )
    assert encode(byte_tokenizer(template), row("u:a", "a:b", "u:c"), train_on="all") == "A[[|B|C3]]"
