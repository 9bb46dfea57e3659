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

from qlora_native.data.formats import Message, Row
from qlora_native.data.template import DEFAULT_CHAT_TEMPLATE, IGNORE_INDEX, ChatEncoder, Encoded
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
    assert (encoded.trained, encoded.truncated) == (3, 0)


# ---- answers in every kind of template

HEADERS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
# Qwen3's way: the same answer is rendered differently when it is the last, so earlier prefixes are no prefixes.
THOUGHTS = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > last.user %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1].strip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Mistral's way: what stands before the first answer depends on how the conversation goes on.
MISTRAL = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}"
    "{% set later = messages[loop.index0 + 1:] | selectattr('role', 'eq', 'user') | list %}"
    "{{ '[INST] ' + (system + '\n\n' if system and not later else '') + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
# GLM's way, which lists <|user|> among the tokens that stop generation.
GLM = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
WORDS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
BLOCK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] + ENDS }}{%- endgeneration -%}{% else %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endif %}AFTER{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHORT_BLOCK = BLOCK.replace(" + ENDS", "").replace("AFTER", "{{ '<|im_end|>\n' if m['role'] == 'assistant' else '' }}")
TURN = CHATML.replace("<|im_end|>", "<turn/>")
PROBE = "ProbeWordForTheAnswer"
REASONED = (*chat("u:a"), {"role": "assistant", "content": "b", "reasoning_content": "r"})
TWO = ("u:a", "a!b", "u:c", "a!d")
EOS = {"eos": "</s>"}
Case = tuple[str, dict[str, Any], Row, str]  # template, options of the tokenizer, row, expectation


def im(*turns: str) -> str:
    """``im("u:a", "a!b")``: CHATML's text of the messages, that after "!" trained."""
    text = ""
    for turn, message in zip(turns, chat(*turns), strict=True):
        end = f"{message['content']}<|im_end|>"
        text += f"<|im_start|>{message['role']}\n{f'[[{end}]]' if turn[1] == '!' else end}\n"
    return text


def case(template: str, *turns: str, expected: str | None = None, **options: Any) -> Case:
    """A row of these turns, answers after ":" untrained; by default CHATML's text is expected."""
    untrained = [index for index, turn in enumerate(turns) if turn.startswith("a:")]
    return template, options, row(*turns, untrained=untrained), im(*turns) if expected is None else expected


CASES: dict[str, Case] = {
    "every answer of a long conversation": case(CHATML, "s:Be kind.", "u:one", "a!1", "u:two", "a!2\n\n2é", "u:three"),
    "answers that quote each other": case(CHATML, *("u:assistant", "a!assistant") * 2),
    "the probe word": case(CHATML, f"u:{PROBE}", f"a!{PROBE}X"),
    "opens with an answer": case(CHATML, "a!Hello", "u:Hi", "a!Yo"),
    "an untrained answer": case(CHATML, "u:a", "a:bad", "u:b", "a!good"),
    "no generation prompt": case(HEADERS, *TWO),
    # What follows the generation prompt is the model's to write.
    "thoughts in the last turn only": case(
        THOUGHTS, "u:a", "a!<think>hm</think> b", *TWO[2:], expected=im(*TWO[:3], "a!<think>\n\n</think>\n\nd")
    ),
    # DeepSeek's way: generation starts inside a thought, history shows none.
    "a generation prompt that is not in the history": case(
        CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"), "u:a", "a!<b", *TWO[2:]
    ),
    "the system message in the last question": case(
        MISTRAL, "s:S", *TWO, **EOS, expected="<s>[INST] a[/INST] [[b</s>]][INST] S\n\nc[/INST] [[d</s>]]"
    ),
    # The end is then where the conversation up to this answer ends.
    "an answer unlike any probe": case(
        CHATML.replace("m['content'] + '<|im_end|>", "m['content'] + (m['content'] | length) | string + '<|im_end|>"),
        *("u:a", "a!four"),
        expected=im("u:a1", "a!four4"),
    ),
    "trimmed content": case(
        CHATML.replace("m['content']", "m['content'] | trim"), "u: a ", "a!\n b \n", expected=im("u:a", "a!b")
    ),
    "white space around an answer": case(CHATML, "u:a", "a!\n b \n"),
    "reasoning": (
        CHATML.replace(
            "+ m['content']", "+ (m['reasoning_content'] + '|' if m['reasoning_content'] else '') + m['content']"
        ),
        *({}, Row("d", 1, messages=REASONED), im("u:a", "a!r|b")),
    ),
    # How an answer ends.
    "white space before the end of turn": case(
        SPACED, *TWO, **EOS, expected="[INST] a [/INST] [[b </s>]][INST] c [/INST] [[d </s>]]"
    ),
    "an added token of the answer": case(
        TURN,
        "u:a",
        "a!x<b>",
        **EOS,
        added=["<turn/>", "<b>"],
        expected=im("u:a", "a!x<b>").replace("<|im_end|>", "<turn/>"),
    ),
    "an added token that ends turns": case(
        TURN, *TWO, **EOS, added=["<turn/>"], expected=im(*TWO).replace("<|im_end|>", "<turn/>")
    ),
    "the next header ends a turn": case(
        GLM, *TWO, **EOS, expected="<|user|>\na\n<|assistant|>\n[[b\n<|user|>]]\nc\n<|assistant|>\n[[d</s>]]"
    ),
    "words": case(WORDS, *TWO, **EOS, expected="user: a\nassistant: [[b]]\nuser: c\nassistant: [[d</s>]]"),
    "words, a question last": case(WORDS, *TWO[:3], **EOS, expected="user: a\nassistant: [[b]]\nuser: c\n"),
    "words, no end of sequence": case(WORDS, *TWO[:2], eos=None, expected="user: a\nassistant: [[b]]\n"),
    "content alone": case(
        "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",
        *("u:a", "a!b", "u: "),
        **EOS,
        expected="a\n[[b]]\n \n",
    ),
    "a beginning ends nothing": case(
        "{% for m in messages %}{{ '<s>' + m['content'] }}{% endfor %}",
        *TWO,
        **EOS,
        expected="<s>a<s>[[b]]<s>c<s>[[d</s>]]",
    ),
    # Generation blocks; without offsets the answers are found by text.
    "a block without the end of turn": case(SHORT_BLOCK, "s:S", *TWO),
    "a block with an untrained answer": case(SHORT_BLOCK, "u:a", "a:b", "u:c", "a!d"),
    "a block that is never reached": case(
        "{% if tools %}{% generation %}{{ 'x' }}{% endgeneration %}{% endif %}" + CHATML, "u:a", "a!b"
    ),
}


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_trained_tokens(name: str, slow: bool) -> None:
    template, options, which, expected = CASES[name]
    assert encode(maybe_slow(byte_tokenizer(template, **options), slow), which) == expected


def test_a_generation_block_is_taken_as_wide_as_it_is() -> None:
    wide = BLOCK.replace("ENDS", "'<|im_end|>\n'").replace("AFTER", "")
    assert encode(byte_tokenizer(wide), row(*TWO)) == im(*TWO).replace("<|im_end|>]]\n", "<|im_end|>\n]]")


@BOTH
def test_rows_without_a_trained_token(slow: bool) -> None:
    encoder = ChatEncoder(maybe_slow(byte_tokenizer(), slow))
    assert encoder.encode(row("u:a", "a:bad", untrained=[1])).trained == 0
    assert encoder.encode(row("s:x", "u:y")).trained == 0


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
    with pytest.raises(UserError, match=r"^d.jsonl:3: .*\(no system role here\), [^\n]* assistant; [^\n]*\.$"):
        ChatEncoder(byte_tokenizer(NO_SYSTEM)).encode(row("s:S", "a:b"))
    with pytest.raises(UserError, match=r"^the conversation: .* got roles system;"):
        ChatEncoder(byte_tokenizer(NO_SYSTEM)).prompt_ids(chat("s:S"))


def test_an_answer_that_cannot_be_found_is_an_error_and_not_a_wrong_mask() -> None:
    template = "{{ messages | map(attribute='content') | map('upper') | join('|') }}{{ messages | length }}"
    with pytest.raises(UserError, match=r"^d.jsonl:3: .* message 2 of 3 .*{% generation %}, .* 'all'\.$"):
        ChatEncoder(byte_tokenizer(template)).encode(row("u:a", "a:b", "u:c"))
    assert encode(byte_tokenizer(template), row("u:a", "a:b", "u:c"), train_on="all") == "A[[|B|C3]]"
