"""Encode one row as token ids and labels with the chat template.

A label is the token's own id where it is trained and -100 where it is not; the loss shifts them. Trained are what the
assistant wrote and the token that ends its turn, the completion after a prompt, and every token of a plain text, but
never the first token of a row: it has no context, and in packed rows it would be predicted from another row.

1. A template may mark answers with a ``{% generation %}`` block: transformers' assistant mask, plus the end-of-turn
   token if the block stops short of it (a model never trained on that token never stops).
2. Otherwise an answer starts where the conversation so far, rendered with the generation prompt, ends. In templates
   that rewrite earlier turns, it is replaced by a probe word, and starts where the probe is. It ends where the probe
   does.
3. A position in the text becomes one in the tokens by the tokenizer's offsets where a token begins or ends exactly
   there; else by tokenizing the prefix alone, if that is a prefix of the tokens; else every token that overlaps the
   answer is trained.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qlora_native.data._limits import bound_operators, bounded_memory, bounded_time
from qlora_native.data.formats import Message, Row
from qlora_native.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
TEMPLATE = "chat_template.jinja"  # in a folder, as transformers names it
TrainOn = Literal["answers", "all"]
Masked = tuple[list[int], list[bool]]  # token ids, and which of them are trained
Spans = list[tuple[int, int]]  # start and end in characters of a text

# For a tokenizer without a template of its own. A role's name on a line, its text, a blank line; an answer ends with
# the tokenizer's end-of-sequence token, so that generation stops. Answers are marked, so that other trainers find them.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and labels of one row, equally long; ``truncated`` tokens were left out at its right end."""

    input_ids: list[int]
    labels: list[int]
    truncated: int = 0

    @property
    def trained(self) -> int:
        """How many tokens have a label."""
        return sum(label != IGNORE_INDEX for label in self.labels)


class ChatEncoder:
    """Encodes rows with a tokenizer's chat template, or with :data:`DEFAULT_CHAT_TEMPLATE` if it has none.

    Rows longer than ``max_length`` tokens lose their right end. ``folded_system`` counts the rows whose system message
    was put before the first user message, as the template has no system role.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None, train_on: TrainOn = "answers"
    ) -> None:
        if train_on not in ("answers", "all"):
            raise ValueError(f"train_on is {train_on!r}, expected 'answers' or 'all'")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}, expected at least 2: one token to read and one to predict")
        self.tokenizer: Any = tokenizer
        self.max_length = max_length
        self.train_on = train_on
        self.folded_system = 0
        self._fast = bool(getattr(tokenizer, "is_fast", False))
        self._lead = self._leading_ids()
        own = self._own_template()
        self.uses_default_template = own is None
        bos = "{{ bos_token }}" if self._lead == [tokenizer.bos_token_id] else ""
        self.chat_template = bos + DEFAULT_CHAT_TEMPLATE if own is None else own
        self._marked = self._fast and bool(_GENERATION_BLOCK.search(self.chat_template))
        self._control_ids = self._control_tokens()
        self._blank: dict[int, bool] = {}
        self._has_prompt: bool | None = None  # whether the template has a generation prompt
        self._tools: list[dict[str, Any]] | None = None  # of the current row

    def encode(self, row: Row) -> Encoded:
        """Token ids and labels; UserError if the template refuses the row, or an answer is not found in its text."""
        self._tools = list(row.tools) or None
        with bounded_time(row.where):
            ids, trained = self._plain(row) if row.messages is None else self._messages(row, row.messages)
        if self.train_on == "all":
            trained = [True] * len(ids)
        labels = [token if keep else IGNORE_INDEX for token, keep in zip(ids, trained, strict=True)]
        if labels:
            labels[0] = IGNORE_INDEX
        limit = self.max_length if self.max_length is not None else len(ids)
        return Encoded(ids[:limit], labels[:limit], truncated=max(0, len(ids) - limit))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation with the header of the answer that is to be generated."""
        self._tools = None
        with bounded_time("the conversation"):
            _, text, _ = self._rendered(list(messages), "the conversation", add_generation_prompt=True)
        return self._tokenize(text)[0]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued, as of a row with a prompt and a completion."""
        return [*self._lead, *self._tokenize(text)[0]]

    # ---- plain text and prompt + completion

    def _plain(self, row: Row) -> Masked:
        context = row.prompt or ""
        text = context + (row.completion if row.completion is not None else row.text or "")
        ids, trained = self._mask(text, [(len(context), len(text))])
        if ids[: len(self._lead)] != self._lead:
            ids = [*self._lead, *ids]
            trained = [row.prompt is None] * len(self._lead) + trained
        return self._with_eos(ids, trained)

    def _with_eos(self, ids: list[int], trained: list[bool]) -> Masked:
        eos = self.tokenizer.eos_token_id
        if eos is None or ids[-1:] == [eos]:
            return ids, trained
        return [*ids, eos], [*trained, True]

    # ---- conversations

    def _messages(self, row: Row, given: Sequence[Message]) -> Masked:
        messages, text, shift = self._rendered(list(given), row.where)
        self._check_tools(messages, text, row.where)
        untrained = {index - shift for index in row.untrained}
        if self.train_on == "all":
            ids, _ = self._tokenize(text)
            trained = [True] * len(ids)
        elif self._marked and not untrained and (marked := self._assistant_mask(messages)):
            ids, trained = marked
        else:
            ids, trained = self._mask(text, self._answers(messages, text, untrained, row.where))
        ends_in_answer = messages[-1]["role"] == "assistant" and len(messages) - 1 not in untrained
        return self._close_turns(ids, trained, ends_in_answer)

    def _check_tools(self, messages: list[Message], text: str, where: str) -> None:
        """UserError if the template leaves out a tool or a call: the model would learn from text without it."""
        calls = [call for message in messages for call in message.get("tool_calls", ())]
        names = [tool["function"]["name"] for tool in [*(self._tools or ()), *calls]]
        if absent := [name for name in names if name not in text]:
            raise UserError(
                f"{where}: the chat template does not show tools ('{absent[0]}' is not in what it renders); use a "
                "model whose template does, or remove the row."
            )

    def _assistant_mask(self, messages: list[Message]) -> Masked | None:
        out = self._apply_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        trained = [bool(flag) for flag in out["assistant_masks"]]
        # A template may have a block that it does not reach; then the answers are found by text.
        return (list(out["input_ids"]), trained) if any(trained) else None

    def _answers(self, messages: list[Message], text: str, untrained: set[int], where: str) -> Spans:
        """Start and end of every trained answer in characters of ``text``."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index in untrained:
                continue
            before, after = self._around(messages, index)
            prompt = self._generation_prompt(messages[:index])
            start = end = None
            if prompt is not None and text.startswith(prompt):
                start = len(prompt)
            elif before is not None and text.startswith(before):
                start = len(before)
            if after is not None and text.endswith(after):
                end = len(text) - len(after)
            elif (through := self._try_render(messages[: index + 1])) is not None and text.startswith(through):
                end = len(through.rstrip())
            if start is None or end is None or end < start:
                raise UserError(
                    f"{where}: the answer in message {index + 1} of {len(messages)} cannot be found in what the chat "
                    "template renders; mark answers in the template with {% generation %}, or set train_on to 'all'."
                )
            spans.append((start, end))
        return spans

    def _around(self, messages: list[Message], index: int) -> tuple[str | None, str | None]:
        """The rendered text before and after the content and tool calls of one message."""
        probe = "ProbeWordForTheAnswer"
        while any(probe in message["content"] for message in messages):
            probe += "X"
        plain = {key: value for key, value in messages[index].items() if key != "tool_calls"}
        changed = [*messages[:index], {**plain, "content": probe}, *messages[index + 1 :]]
        pieces = (self._try_render(changed) or "").split(probe)
        return (pieces[0], pieces[1]) if len(pieces) == 2 else (None, None)

    def _generation_prompt(self, before: list[Message]) -> str | None:
        """The conversation so far and the header of an answer; None if the template has no generation prompt."""
        if not before or self._has_prompt is False:
            return None
        prompt = self._try_render(before, add_generation_prompt=True)
        if self._has_prompt is None and prompt is not None:
            self._has_prompt = prompt != self._try_render(before)
        return prompt if self._has_prompt else None

    def has_generation_prompt(self) -> bool:
        """Whether the template begins the turn of an assistant for a prompt."""
        return self._generation_prompt([{"role": "user", "content": "a"}]) is not None

    def _close_turns(self, ids: list[int], trained: list[bool], ends_in_answer: bool) -> Masked:
        """Train the token that ends each answer; add the end-of-sequence token if the last answer has no such token."""
        if self.train_on == "all":
            return (ids, trained) if not ends_in_answer or self.ends_turn(ids, 0) else self._with_eos(ids, trained)
        trained = list(trained)
        start = 0
        end = 0
        for at in range(len(ids)):
            if not trained[at]:
                continue
            start = start if at == end else at
            end = at + 1
            if (end < len(ids) and trained[end]) or self.ends_turn(ids[:end], start):
                continue
            stop = end
            while stop < len(ids) and self._is_blank(ids[stop]):
                stop += 1
            if stop < len(ids) and ids[stop] in self._control_ids:
                trained[end : stop + 1] = [True] * (stop + 1 - end)
        open_ended = end > 0 and not self.ends_turn(ids[:end], start) and all(map(self._is_blank, ids[end:]))
        if ends_in_answer and open_ended and self.tokenizer.eos_token_id is not None:
            return self._with_eos(ids[:end], trained[:end])  # without the white space, which would follow the end
        return ids, trained

    def ends_turn(self, ids: list[int], start: int) -> bool:
        """Whether ``ids[start:]`` ends in a token that ends a turn, white space after it or not."""
        last = next((token for token in reversed(ids[start:]) if not self._is_blank(token)), None)
        return last in self._control_ids

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = token not in self._control_ids and not self.tokenizer.decode([token]).strip()
        return self._blank[token]

    # ---- rendering

    def _rendered(
        self, messages: list[Message], where: str, *, add_generation_prompt: bool = False
    ) -> tuple[list[Message], str, int]:
        """The messages that the template accepts, their text, and how many leading messages were merged into others."""
        try:
            return messages, self._render(messages, add_generation_prompt=add_generation_prompt), 0
        except ImportError as error:
            raise UserError(f"chat templates need jinja2: {error}; type pip install jinja2.") from error
        except Exception as error:  # a template is a program and may raise anything
            folded = _fold_system(messages)
            text = self._try_render(folded, add_generation_prompt=add_generation_prompt) if folded else None
            if folded and text is not None:
                self.folded_system += 1
                return folded, text, 1
            roles = ", ".join(message["role"] for message in messages)
            why = str(error) or type(error).__name__
            raise UserError(
                f"{where}: the chat template refuses the conversation ({why}), got roles {roles}; "
                "change the row to what the template expects."
            ) from error

    def _apply_template(self, messages: Sequence[Message], **options: bool) -> Any:
        template = {"tools": self._tools, "chat_template": self.chat_template}
        bound_operators()
        with bounded_memory():
            return self.tokenizer.apply_chat_template(list(messages), **template, **options)

    def _render(self, messages: Sequence[Message], **options: bool) -> str:
        return str(self._apply_template(messages, tokenize=False, **options))

    def _try_render(self, messages: Sequence[Message], **options: bool) -> str | None:
        try:
            return self._render(messages, **options)
        except Exception:  # as above; a template may refuse a probe
            return None

    # ---- tokens

    def _tokenize(self, text: str) -> tuple[list[int], Spans | None]:
        # verbose=False: transformers would warn of rows longer than the model's context, which are truncated here.
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self._fast, verbose=False)
        return list(out["input_ids"]), (list(out["offset_mapping"]) if self._fast else None)

    def _mask(self, text: str, spans: Spans) -> Masked:
        ids, offsets = self._tokenize(text)
        trained = [False] * len(ids)
        if offsets is None:
            return self._mask_slow(text, spans, ids)
        starts = [start for start, _ in offsets]
        ends = [end for _, end in offsets]
        for span_start, span_end in spans:
            first = 0
            stop = len(ids)
            if span_start > 0:
                first = bisect_right(ends, span_start)
                if first == len(ids) or starts[first] != span_start:
                    first = self._by_prefix(text[:span_start], ids, first)
            if span_end < len(text):
                stop = bisect_left(starts, span_end)
                if stop == 0 or ends[stop - 1] != span_end:
                    stop = self._by_prefix(text[:span_end], ids, stop)
            trained[first:stop] = [True] * max(0, stop - first)
        return ids, trained

    def _by_prefix(self, prefix: str, ids: list[int], otherwise: int) -> int:
        prefix_ids, _ = self._tokenize(prefix)
        return len(prefix_ids) if ids[: len(prefix_ids)] == prefix_ids else otherwise

    def _mask_slow(self, text: str, spans: Spans, ids: list[int]) -> Masked:
        """Without offsets: by token prefixes if they all are prefixes, else by tokenizing each piece on its own."""
        trained = [False] * len(ids)
        for start, end in spans:
            first, stop = (self._by_prefix(text[:at], ids, -1) for at in (start, end))
            if first < 0 or stop < 0:
                break
            trained[first:stop] = [True] * (stop - first)
        else:
            return ids, trained
        ids = []
        trained = []
        done = 0
        for start, end in [*spans, (len(text), len(text))]:
            for piece, keep in ((text[done:start], False), (text[start:end], True)):
                piece_ids = self._tokenize(piece)[0] if piece else []
                ids += piece_ids
                trained += [keep] * len(piece_ids)
            done = end
        return ids, trained

    # ---- properties of the tokenizer

    def _leading_ids(self) -> list[int]:
        """The ids (a beginning-of-sequence token, or none) that this tokenizer puts before a plain text."""
        bare = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(self.tokenizer("a")["input_ids"])
        for at in range(len(full) - len(bare) + 1):
            if full[at : at + len(bare)] == bare:
                return full[:at]
        return []

    def _own_template(self) -> str | None:
        with suppress(ValueError):  # several named templates and none called "default"
            if getattr(self.tokenizer, "chat_template", None):
                return str(self.tokenizer.get_chat_template())
        return None

    def _control_tokens(self) -> frozenset[int]:
        """Ids that may end a turn: special tokens and added ones of the template; not begin, pad or unknown."""
        found = set(self.tokenizer.all_special_ids)
        for token, added in getattr(self.tokenizer, "added_tokens_decoder", {}).items():
            content = str(added)
            if getattr(added, "special", False) or (content.strip() and content in self.chat_template):
                found.add(token)
        found -= {self.tokenizer.bos_token_id, self.tokenizer.pad_token_id, self.tokenizer.unk_token_id}
        return frozenset(token for token in found | {self.tokenizer.eos_token_id} if token is not None)


def check_vocabulary(highest: int, tokenizer: Any, model: Any, where: str) -> None:
    """UserError if a token has no row in the model's embedding, which transformers reports by an IndexError."""
    rows = len(model.get_input_embeddings().weight)
    if highest >= rows:
        raise UserError(
            f"{where}: token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) of the tokenizer is beyond the "
            f"{rows:,} rows of the model's embedding: copy the tokenizer of this model into its folder."
        )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's own, else its end-of-sequence id, else 0 (padding is masked either way)."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(token, int)), 0)


def _fold_system(messages: list[Message]) -> list[Message] | None:
    """The system message's text put before the first user message, for templates without a system role."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]
