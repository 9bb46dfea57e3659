"""Which tokens are trained: of each template, tokenizer and kind of row, against expectations written by hand.

Expectations are the rendered text with the trained part in double brackets. The tokenizer spells every byte as one
token (but for the merges a test asks for), so a place in the text is a place in the tokens that a reader can count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from helpers import demo_model_or_skip
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_native.data.formats import Message, Row
from qlora_native.data.template import DEFAULT_CHAT_TEMPLATE, IGNORE_INDEX, ChatEncoder, Encoded, padding_id
from qlora_native.errors import UserError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = TURNS + PROMPT


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


class CollapsedOffsets(SlowTokenizer):
    """A fast tokenizer whose tokens all end where they begin, as Llama 3's did for a while."""

    is_fast = True

    def __call__(self, text: str, **options: Any) -> Any:
        out = self._fast(text, **options)
        if "offset_mapping" in out:
            out["offset_mapping"] = [(start, start) for start, _ in out["offset_mapping"]]
        return out


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


def maybe_slow(tokenizer: Any, slow: bool) -> Any:
    return SlowTokenizer(tokenizer) if slow else tokenizer


# ---- answers in every kind of template

# Qwen3's way: the same answer is rendered differently when it is the last, so earlier prefixes are no prefixes.
THOUGHTS = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > last.user %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1].strip() + '<|im_end|>\n' }}{% endfor %}" + PROMPT
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
BARE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
WORDS = BARE + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
BLOCK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] + ENDS }}{%- endgeneration -%}{% else %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endif %}AFTER{% endfor %}" + PROMPT
)
SHORT_BLOCK = BLOCK.replace(" + ENDS", "").replace("AFTER", "{{ '<|im_end|>\n' if m['role'] == 'assistant' else '' }}")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
CONTENT = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
STARTS = "{% for m in messages %}{{ '<s>' + m['content'] }}{% endfor %}"
TURN = CHATML.replace("<|im_end|>", "<turn/>")
DEFAULT = "### System:\nS\n\n### User:\na\n\n### Assistant:\n[[b</s>]]\n\n### User:\nc\n\n### Assistant:\n[[d</s>]]\n\n"
PROBE = "ProbeWordForTheAnswer"
REASONED = (*chat("u:a"), {"role": "assistant", "content": "b", "reasoning_content": "r"})
TWO = ("u:a", "a!b", "u:c", "a!d")
EOS = {"eos": "</s>"}
Case = tuple[str | None, dict[str, Any], Row, str]  # template, options of the tokenizer, row, expectation


def im(*turns: str) -> str:
    """``im("u:a", "a!b")``: CHATML's text of the messages, that after "!" trained."""
    text = ""
    for turn, message in zip(turns, chat(*turns), strict=True):
        end = f"{message['content']}<|im_end|>"
        text += f"<|im_start|>{message['role']}\n{f'[[{end}]]' if turn[1] == '!' else end}\n"
    return text


def case(template: str | None, *turns: str, expected: str = "", end: str = "<|im_end|>", **options: Any) -> Case:
    """A row of these turns, answers after ":" untrained; by default CHATML's text, its turns ended so, is expected."""
    untrained = [index for index, turn in enumerate(turns) if turn.startswith("a:")]
    return template, options, row(*turns, untrained=untrained), expected or im(*turns).replace("<|im_end|>", end)


def plain(expected: str, **options: Any) -> Case:
    """A row of plain text, of a tokenizer that ends texts by </s>."""
    texts = {name: options.pop(name) for name in ("text", "prompt", "completion") if name in options}
    return CHATML, {**EOS, **options}, Row("d", 1, **texts), expected


CASES: dict[str, Case] = {
    "every answer of a long conversation": case(CHATML, "s:Be kind.", "u:one", "a!1", "u:two", "a!2\n\n2é", "u:three"),
    "answers that quote each other": case(CHATML, *("u:assistant", "a!assistant") * 2),
    "the probe word": case(CHATML, f"u:{PROBE}", f"a!{PROBE}X"),
    "opens with an answer": case(CHATML, "a!Hello", "u:Hi", "a!Yo"),
    "no trained answer": case(CHATML, "u:a", "a:bad"),
    "no answer": case(CHATML, "s:x", "u:y"),
    "no system role": case(NO_SYSTEM, "s:S", "u:a", "a:b", "u:c", "a!d", expected=im("u:S\n\na", "a:b", "u:c", "a!d")),
    "an untrained answer": case(CHATML, "u:a", "a:bad", "u:b", "a!good"),
    "no generation prompt": case(TURNS, *TWO),
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
    "an added token of the answer": case(TURN, "u:a", "a!x<b>", **EOS, added=["<turn/>", "<b>"], end="<turn/>"),
    "an added token that ends turns": case(TURN, *TWO, **EOS, added=["<turn/>"], end="<turn/>"),
    "the next header ends a turn": case(
        GLM, *TWO, **EOS, expected="<|user|>\na\n<|assistant|>\n[[b\n<|user|>]]\nc\n<|assistant|>\n[[d</s>]]"
    ),
    "words": case(WORDS, *TWO, **EOS, expected="user: a\nassistant: [[b]]\nuser: c\nassistant: [[d</s>]]"),
    "words, a question last": case(WORDS, *TWO[:3], **EOS, expected="user: a\nassistant: [[b]]\nuser: c\n"),
    "words, no end of sequence": case(WORDS, *TWO[:2], eos=None, expected="user: a\nassistant: [[b]]\n"),
    "content alone": case(CONTENT, "u:a", "a!b", "u: ", **EOS, expected="a\n[[b]]\n \n"),
    "a beginning ends nothing": case(STARTS, *TWO, **EOS, expected="<s>a<s>[[b]]<s>c<s>[[d</s>]]"),
    "the default template": case(None, "s:S", *TWO, **EOS, expected=DEFAULT),
    "the default template after <s>": case(None, "s:S", *TWO, **EOS, adds_bos=True, expected="<s>" + DEFAULT),
    # Generation blocks; without offsets the answers are found by text.
    "a block without the end of turn": case(SHORT_BLOCK, "s:S", *TWO),
    "a block with an untrained answer": case(SHORT_BLOCK, "u:a", "a:b", "u:c", "a!d"),
    "a block that is never reached": case(
        "{% if tools %}{% generation %}{{ 'x' }}{% endgeneration %}{% endif %}" + CHATML, "u:a", "a!b"
    ),
    "text": plain("a[[bc</s>]]", text="abc"),
    "a text that ends": plain("a[[bc</s>]]", text="abc</s>"),
    "a prompt": plain("q: [[yes</s>]]", prompt="q: ", completion="yes"),
    "an empty prompt": plain("y[[es</s>]]", prompt="", completion="yes"),
    "text after <s>": plain("<s>[[abc</s>]]", text="abc", adds_bos=True),
    "a text that begins": plain("<s>[[abc</s>]]", text="<s>abc", adds_bos=True),
    "a prompt after <s>": plain("<s>q: [[yes</s>]]", prompt="q: ", completion="yes", adds_bos=True),
    "an empty prompt after <s>": plain("<s>[[yes</s>]]", prompt="", completion="yes", adds_bos=True),
}
OVER: dict[str, Any] = {"merges": [("Ġ", "y"), ("Ċ", "Ċ")]}
TRIMMED: dict[str, Any] = {"trims_offsets": True, "merges": [("Ġ", "y")]}
FAST: dict[str, Case] = {  # with offsets alone
    "a block as wide as it is": case(
        BLOCK.replace("ENDS", "'<|im_end|>\n'").replace("AFTER", ""),
        *TWO,
        expected=im(*TWO).replace("<|im_end|>]]\n", "<|im_end|>\n]]"),
    ),
    # A token over the border is trained.
    "a token over the end of a prompt": plain("q:[[ yes</s>]]", prompt="q: ", completion="yes", **OVER),
    "a token at the end of a prompt": plain("q:[[ yes</s>]]", prompt="q:", completion=" yes", **OVER),
    "a token over the beginning of an answer": case(
        CHATML, "u:a", "a!\n b", **EOS, **OVER, expected=im("u:a", "a!\n b").replace("\n[[\n", "[[\n\n")
    ),
    # RoBERTa's and GPT-2's post-processor: the offsets of " b" are those of "b", those of " " are empty.
    "offsets of a merged space": plain("q:[[ yes</s>]]", prompt="q:", completion=" yes", **TRIMMED),
    "offsets of a space": plain("q:[[ b</s>]]", prompt="q:", completion=" b", **TRIMMED),
    "offsets of a line's end": plain("q:\n[[b</s>]]", prompt="q:\n", completion="b", **TRIMMED),
    "offsets of a last space": plain("q:[[b </s>]]", prompt="q:", completion="b ", **TRIMMED),
    "offsets of spaces around a text": plain(" [[b </s>]]", text=" b ", **TRIMMED),
    "offsets of words": case(
        BARE, "u:a", "a!b ", "u:c", **EOS, **TRIMMED, expected="user: a\nassistant: [[b ]]\nuser: c\n"
    ),
    "offsets in turns": case(CHATML, "u:a", "a!\n b \n", "u:c", **EOS, **TRIMMED),
}


@pytest.mark.parametrize(("slow", "name"), [*product([False, True], CASES), *product([False], FAST)])
def test_trained_tokens(name: str, slow: bool) -> None:
    template, options, which, expected = {**CASES, **FAST}[name]
    assert encode(maybe_slow(byte_tokenizer(template, **options), slow), which) == expected


def test_a_slow_tokenizer_splits_where_the_prompt_ends() -> None:
    tokenizer = SlowTokenizer(byte_tokenizer(merges=[("Ġ", "y")], eos="</s>"))
    encoded = ChatEncoder(tokenizer).encode(Row("d", 1, prompt="q: ", completion="yes y"))
    assert marked(tokenizer, encoded) == "q: [[yes y</s>]]"
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["q", ":", "Ġ", "y", "e", "s", "Ġy", "</s>"]


def test_offsets_that_are_wrong_are_noticed_and_prefixes_of_tokens_used() -> None:
    tokenizer = CollapsedOffsets(byte_tokenizer(merges=[("Ġ", "y")], eos="</s>"))
    assert encode(tokenizer, Row("d", 1, prompt="q:", completion=" yes")) == "q:[[ yes</s>]]"
    tokenizer = CollapsedOffsets(byte_tokenizer(BARE.replace("\n", " "), eos="</s>"))
    assert encode(tokenizer, row("u:a", "a:b c", "u:d", "a:e")) == (
        "user: a assistant: [[b c]] user: d assistant: [[e</s>]]"
    )


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("template", [None, CHATML], ids=["default", "own"])
def test_generation_starts_where_the_trained_tokens_do(template: str | None, slow: bool) -> None:
    tokenizer = byte_tokenizer(template, merges=[("Ċ", "Ċ"), ("Ġ", "y")], adds_bos=template is None)
    encoder = ChatEncoder(maybe_slow(tokenizer, slow))
    assert encoder.uses_default_template == (template is None)
    assert encoder.chat_template.endswith(template or DEFAULT_CHAT_TEMPLATE)
    encoded = encoder.encode(row("s:S", "u:a", "a:b"))
    prompt = encoder.prompt_ids(chat("s:S", "u:a"))
    assert encoded.input_ids[: len(prompt)] == prompt
    assert [label != IGNORE_INDEX for label in encoded.labels].index(True) == len(prompt)


# ---- refusals


def test_a_refused_conversation_is_one_sentence_with_the_reason_of_the_template() -> None:
    with pytest.raises(UserError, match=r"^d.jsonl:3: .*\(no system role here\), [^\n]* assistant; [^\n]*\.$"):
        ChatEncoder(byte_tokenizer(NO_SYSTEM)).encode(row("s:S", "a:b"))
    with pytest.raises(UserError, match=r"^the conversation: .* got roles system;"):
        ChatEncoder(byte_tokenizer(NO_SYSTEM)).prompt_ids(chat("s:S"))


def test_a_length_that_holds_no_answer() -> None:
    with pytest.raises(ValueError, match="max_length is 1, expected at least 2"):
        ChatEncoder(byte_tokenizer(), max_length=1)


def test_an_answer_that_cannot_be_found_is_an_error_and_not_a_wrong_mask() -> None:
    template = "{{ messages | map(attribute='content') | map('upper') | join('|') }}{{ messages | length }}"
    with pytest.raises(UserError, match=r"^d.jsonl:3: .* message 2 of 3 .*{% generation %}, .* 'all'\.$"):
        ChatEncoder(byte_tokenizer(template)).encode(row("u:a", "a:b", "u:c"))
    assert encode(byte_tokenizer(template), row("u:a", "a:b", "u:c"), train_on="all") == "A[[|B|C3]]"


# ---- against a mask counted in bytes


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
