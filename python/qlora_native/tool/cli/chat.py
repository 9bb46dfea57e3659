"""``qlora chat``: answers as they come, of the base model and of the adapter side by side."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from qlora_native._io import as_user_error
from qlora_native.tool import card_dtype
from qlora_native.tool.cli._run import add_to, has_rich_terminal, printable
from qlora_native.tool.cli._weights import DTYPE_NAMES, add_quantizing, announce_base, as_trained


def configure(parser: argparse.ArgumentParser) -> None:
    add = add_to(parser)
    add("model", "MODEL", "a model folder or a .gguf file")
    add("--adapter", "DIR", "a folder in PEFT's format; base and adapter then both answer")
    add("--system", "TEXT", "the system message")
    add("--prompt", "TEXT", "answer this and end")
    add("--max-tokens", "N", "the longest answer (default: 256)", default=256)
    add("--temperature", "X", "sampling temperature; 0 is greedy (default: 0)", default=0.0)
    add("--top-p", "X", "probability mass to sample from (default: 1)", default=1.0)
    add("--top-k", "N", "tokens to sample from; 0 is all (default: 0)", default=0)
    add("--seed", "N", "of sampling, the same for both answers (default: 0)", default=0)
    add_quantizing(parser)
    dtype = (
        "of activations and of what is not 4-bit (default: bfloat16, or float16 on a card without it)"
    )
    add("--dtype", DTYPE_NAMES, dtype)
    add("--json", None, "print one JSON object an answer, when it is complete")
    parser.epilog = """Lines are read until the end of input (Ctrl-D); each goes to the model with the turns before it.
Ctrl-C ends an answer and not the program. On a terminal the two answers stand side by side, elsewhere one after the
other.

examples:
  qlora chat Llama-3.1-8B-Instruct --adapter run/adapter
  qlora chat Llama-3.1-8B-Instruct --adapter run/adapter --prompt "Which moons has Mars?" --json"""


@dataclass
class Answer:
    name: str  # "base" or "adapter"; "model" without an adapter
    messages: list[dict[str, str]]  # of its conversation
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    ended: str = "length"  # or "stop", or "interrupted"

    def as_dict(self) -> dict[str, Any]:
        count = len(self.tokens)
        speed = round(count / self.seconds, 1) if self.seconds else 0.0
        values = {"from": self.name, "text": self.text, "tokens": count, "tokens_per_second": speed}
        return {**values, "ended": self.ended}


class Chat:
    """A model, its tokenizer, and the conversations of base and adapter."""

    def __init__(
        self, model: Any, tokenizer: Any, sampling: Any, system: str | None, with_adapter: bool
    ) -> None:
        from qlora_native.data.template import ChatEncoder
        from qlora_native.models.generate import stop_tokens

        self.encoder = ChatEncoder(tokenizer)  # as in training
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.stop = stop_tokens(model, tokenizer)
        first = [{"role": "system", "content": system}] if system else []
        self.conversations = {
            name: [*first] for name in (("base", "adapter") if with_adapter else ("model",))
        }

    def iter_text(self, answer: Answer) -> Iterator[str]:
        """The answer's text in parts as they come. What may yet change (half a character) is held back."""
        from qlora_native.data.template import check_vocabulary
        from qlora_native.lora.layer import adapters_off
        from qlora_native.models.generate import stream

        prompt = self.encoder.prompt_ids(answer.messages)
        check_vocabulary(max(prompt, default=0), self.tokenizer, self.model, "the conversation")
        tokens = stream(self.model, prompt, self.sampling, self.stop)
        token: int | None = 0
        while token is not None:
            began = time.monotonic()
            with adapters_off(self.model) if answer.name == "base" else contextlib.nullcontext():
                token = next(tokens, None)
            answer.seconds += time.monotonic() - began
            if token is not None:
                answer.tokens.append(token)
            elif len(answer.tokens) < self.sampling.max_tokens:
                answer.ended = "stop"
            text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            if token is None or not text.endswith("\ufffd"):
                piece, answer.text = text[len(answer.text) :], text
                yield piece

    def ask(self, text: str, show: Any) -> tuple[list[Answer], bool]:
        """The answers to ``text``, and whether Ctrl-C ended them early; ``show(chat, answers)`` runs them."""
        for messages in self.conversations.values():
            messages.append({"role": "user", "content": text})
        answers = [Answer(name, messages) for name, messages in self.conversations.items()]
        interrupted = True
        with contextlib.suppress(KeyboardInterrupt):
            show(self, answers)
            interrupted = False
        for answer in answers:
            if interrupted and answer.ended != "stop":
                answer.ended = "interrupted"
            answer.messages.append({"role": "assistant", "content": answer.text})
        return answers, interrupted


def show_nothing(chat: Chat, answers: list[Answer]) -> None:
    for answer in answers:
        list(chat.iter_text(answer))


def show_in_turn(chat: Chat, answers: list[Answer]) -> None:
    """One after the other, in plain text."""
    for answer in answers:
        if len(answers) > 1:
            print(f"{answer.name}: ", end="")
        try:
            for piece in chat.iter_text(answer):
                print(printable(piece), end="", flush=True)
        finally:
            print(flush=True)


def show_side_by_side(chat: Chat, answers: list[Answer]) -> None:
    """Both at once, a token of each in turn, in columns of the terminal."""
    from rich.live import Live
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    def columns() -> Table:
        table = Table.grid(expand=True)
        for _ in answers:
            table.add_column(ratio=1)
        table.add_row(*(Panel(Text(printable(answer.text)), title=answer.name) for answer in answers))
        return table

    with Live(columns(), refresh_per_second=12, vertical_overflow="visible") as live:
        running = [chat.iter_text(answer) for answer in answers]
        while running:
            running = [pieces for pieces in running if next(pieces, None) is not None]
            live.update(columns())


def run(args: argparse.Namespace) -> int:
    import torch

    import qlora_native as qn
    from qlora_native.models.device_layers import load_to_device
    from qlora_native.models.generate import Sampling
    from qlora_native.models.mapped import BESIDE, stream_if_needed
    from qlora_native.weights.open import load_tokenizer

    with as_user_error():
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed, args.max_tokens)
        tokenizer = load_tokenizer(str(args.model), args.adapter)
        device = "cuda" if torch.cuda.is_available() else None
        note = partial(print, file=sys.stderr)
        base = as_trained(args)
        announce_base(args, base)
        options = base.options | {"dtype": getattr(torch, args.dtype or card_dtype())}
        model: Any = load_to_device(base.path, device=device, note=note, **options)
        if args.adapter:
            qn.load_adapter(model, args.adapter)
        stream_if_needed(model, None, BESIDE, note)
    model.eval()
    chat = Chat(model, tokenizer, sampling, args.system, bool(args.adapter))
    show = show_side_by_side if has_rich_terminal() and args.adapter else show_in_turn
    for text in [args.prompt] if args.prompt is not None else _iter_lines():
        answers, interrupted = chat.ask(text, show_nothing if args.json else show)
        if args.json:
            values = [answer.as_dict() for answer in answers]
            print(
                json.dumps(
                    {"prompt": text, "system": args.system, "seed": args.seed, "answers": values}
                ),
                flush=True,
            )
        if interrupted and args.prompt is not None:
            raise KeyboardInterrupt("the answer was interrupted")
    return 0


def _iter_lines() -> Iterator[str]:
    """What the user types, or what is piped in, line by line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    print("Ctrl-C ends an answer, Ctrl-D the program.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D ends the program.")
            continue
        if line.strip():
            yield line
