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
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

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
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        train_on: TrainOn = "answers",
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ValueError(
                f"max_length is {max_length}, expected at least 2: one token to read and one to predict"
            )
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
        self._tools: list[dict[str, Any]] | None = None  # of the current row

    def encode(self, row: Row) -> Encoded:
        """Token ids and labels; UserError if the template refuses the row, or an answer is not found in its text."""
        self._tools = list(row.tools) or None
        with bounded_time(row.where):
            ids, trained = (
                self._plain(row) if row.messages is None else self._messages(row, row.messages)
            )
        if self.train_on == "all":
            trained = [True] * len(ids)
        labels = [token if keep else IGNORE_INDEX for token, keep in zip(ids, trained, strict=True)]
        if labels:
            labels[0] = IGNORE_INDEX
        kept = ids[: self.max_length]
        return Encoded(kept, labels[: self.max_length], truncated=len(ids) - len(kept))

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
        text = context + (row.completion or row.text or "")
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
            ids, trained = self._mask(text, [(0, len(text))])
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
            prompt = None
            if index > 0 and self.has_generation_prompt:
                prompt = self._try_render(messages[:index], add_generation_prompt=True)
            heads = [head for head in (prompt, before) if head is not None and text.startswith(head)]
            end = -1
            if after is not None and text.endswith(after):
                end = len(text) - len(after)
            elif (through := self._try_render(messages[: index + 1])) is not None and text.startswith(
                through
            ):
                end = len(through.rstrip())
            if not heads or end < len(heads[0]):
                raise UserError(
                    f"{where}: the answer in message {index + 1} of {len(messages)} cannot be found in what the chat "
                    "template renders; mark answers in the template with {% generation %}, or set train_on to 'all'."
                )
            spans.append((len(heads[0]), end))
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

    @cached_property
    def has_generation_prompt(self) -> bool:
        """Whether the template begins the turn of an assistant for a prompt."""
        question = [{"role": "user", "content": "a"}]
        prompt = self._try_render(question, add_generation_prompt=True)
        return prompt is not None and prompt != self._try_render(question)

    def _close_turns(self, ids: list[int], trained: list[bool], ends_in_answer: bool) -> Masked:
        """Train the token that ends each answer; add the end-of-sequence token if the last answer has no such token."""
        for start, end in trained_runs(trained):
            if self.ends_turn(ids[start:end]):
                continue
            stop = end
            while stop < len(ids) and self._is_blank(ids[stop]):
                stop += 1
            if stop < len(ids) and ids[stop] in self._control_ids:
                trained[end : stop + 1] = [True] * (stop + 1 - end)
            elif stop == len(ids) and ends_in_answer and self.tokenizer.eos_token_id is not None:
                # White space would follow the end: it is left out.
                return self._with_eos(ids[:end], trained[:end])
        return ids, trained

    def ends_turn(self, ids: list[int]) -> bool:
        """Whether the last of the tokens ends a turn, white space after it or not."""
        last = next((token for token in reversed(ids) if not self._is_blank(token)), None)
        return last in self._control_ids

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = (
                token not in self._control_ids and not self.tokenizer.decode([token]).strip()
            )
        return self._blank[token]

    # ---- rendering

    def _rendered(
        self, messages: list[Message], where: str, *, add_generation_prompt: bool = False
    ) -> tuple[list[Message], str, int]:
        """The messages that the template accepts, their text, and how many leading messages were merged into others."""
        try:
            return messages, self._render(messages, add_generation_prompt=add_generation_prompt), 0
        except ImportError as error:
            raise UserError(
                f"chat templates need jinja2: {error}; type pip install jinja2."
            ) from error
        except Exception as error:  # a template is a program and may raise anything
            folded = _fold_system(messages)
            text = (
                self._try_render(folded, add_generation_prompt=add_generation_prompt)
                if folded
                else None
            )
            if text is not None:
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
        out = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=self._fast, verbose=False
        )
        return list(out["input_ids"]), (list(out["offset_mapping"]) if self._fast else None)

    def _mask(self, text: str, spans: Spans) -> Masked:
        ids, offsets = self._tokenize(text)
        if offsets is None:
            ids, found = self._without_offsets(text, spans, ids)
        else:
            starts = [start for start, _ in offsets]
            ends = [end for _, end in offsets]
            found = []
            for start, end in spans:
                first = bisect_right(ends, start) if start > 0 else 0
                if start > 0 and starts[first : first + 1] != [start]:
                    first = self._by_prefix(text[:start], ids, first)
                stop = bisect_left(starts, end) if end < len(text) else len(ids)
                if end < len(text) and ends[max(0, stop - 1) : stop] != [end]:
                    stop = self._by_prefix(text[:end], ids, stop)
                found.append((first, stop))
        trained = [False] * len(ids)
        for first, stop in found:
            trained[first:stop] = [True] * max(0, stop - first)
        return ids, trained

    def _by_prefix(self, prefix: str, ids: list[int], otherwise: int) -> int:
        prefix_ids, _ = self._tokenize(prefix)
        return len(prefix_ids) if ids[: len(prefix_ids)] == prefix_ids else otherwise

    def _without_offsets(self, text: str, spans: Spans, ids: list[int]) -> tuple[list[int], Spans]:
        """Tokens, and where the spans are in them: those of the text if they begin with those of the text before each
        border, else those of each piece on its own."""
        borders = [0, *chain.from_iterable(spans), len(text)]
        places = [self._by_prefix(text[:at], ids, -1) for at in borders]
        if -1 in places:
            pieces = [self._tokenize(text[start:end])[0] for start, end in pairwise(borders)]
            ids = list(chain.from_iterable(pieces))
            places = [0, *accumulate(map(len, pieces))]
        return ids, list(zip(places[1::2], places[2::2], strict=False))

    # ---- properties of the tokenizer

    def _leading_ids(self) -> list[int]:
        """The ids (a beginning-of-sequence token, or none) that this tokenizer puts before a plain text."""
        bare, full = (
            list(self.tokenizer("a", add_special_tokens=all_of_it)["input_ids"])
            for all_of_it in (False, True)
        )
        return full[: full.index(bare[0])] if bare and bare[0] in full else []

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
        found -= {
            self.tokenizer.bos_token_id,
            self.tokenizer.pad_token_id,
            self.tokenizer.unk_token_id,
        }
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
    return next(
        (
            token
            for token in (tokenizer.pad_token_id, tokenizer.eos_token_id)
            if isinstance(token, int)
        ),
        0,
    )


def trained_runs(trained: Iterable[bool]) -> Spans:
    """Begin and end of each run of trained tokens."""
    edges = np.flatnonzero(np.diff([False, *trained, False])).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _fold_system(messages: list[Message]) -> list[Message]:
    """The system message's text put before the first user message, for templates without a system role; [] if there
    are no such two."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return []
    system, question, *rest = messages
    return [{**question, "content": f"{system['content']}\n\n{question['content']}"}, *rest]
