"""The ``qlora`` dispatcher: finds the command, checks its extras, and turns exceptions into exit codes.

A command is one module in this folder, named like the command, with ``configure(parser)`` and ``run(args) -> int``,
imported only when it is named. Its heavy imports stand in ``run``: ``--help`` costs the import of torch, which the
package itself makes, and no more.

Exit codes: 0 success, 2 user error (one sentence on stderr), 1 internal error (with its trace), 130 stopped by Ctrl-C,
143 by SIGTERM, 129 by SIGHUP.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, NoReturn

from qlora_native import _interrupt
from qlora_native._io import is_terminal
from qlora_native._version import __version__
from qlora_native.errors import UserError
from qlora_native.tool.cli._run import printable, require

EXIT_USER = 2
EXIT_INTERRUPTED = 130


class Command(NamedTuple):
    """One line of ``qlora --help``, and what must be installed before the command can run."""

    summary: str
    needs: tuple[str, ...] = ()  # import names beyond torch, numpy and safetensors
    first: str = ""  # what stands before --key value pairs, where the command takes them: they become args.overrides
    can_lack_first: bool = False


_MODEL = ("transformers", "yaml")
_CONFIG = (*_MODEL, "pydantic")
COMMANDS: dict[str, Command] = {
    "demo": Command(
        "fine-tune a small real model on this machine and show what it learned",
        (*_CONFIG, "gguf", "accelerate", "jinja2"),
    ),
    "train": Command(
        "fine-tune a model on rows of yours", _CONFIG, first="the config file", can_lack_first=True
    ),
    "estimate": Command(
        "predict how much memory a run takes, and what fits a card, before anything is loaded",
        _CONFIG,
        first="the config file or the model",
        can_lack_first=True,
    ),
    "quantize": Command(
        "quantize a 16-bit model to 4 bits, as a folder in bitsandbytes' format", _MODEL
    ),
    "convert": Command(
        "convert a model folder between 16-bit, 4-bit and bitsandbytes' 4-bit weights", _MODEL
    ),
    "chat": Command("talk to a model, with base and adapter side by side", (*_MODEL, "jinja2")),
    "merge": Command("merge an adapter into its base model and report what that cost", _MODEL),
    "export": Command(
        "write a model or its adapter for other programs: safetensors, GGUF, PEFT, the hub", _MODEL
    ),
    "eval": Command(
        "measure whether an adapter is better than its base, and what 4 bits lost", _MODEL
    ),
    "config": Command("list, write or check config files", first="what to do (list, init or check)"),
    "data": Command(
        "show or check the rows of a data file as the model will see them",
        _CONFIG,
        first="what to do (show or check)",
    ),
    "bench": Command("measure this library's ops against torch's on this machine"),
    "doctor": Command("report what this machine and this installation offer, and what is missing"),
}


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one sentence instead of the usage text and an error."""

    def __init__(self, prog: str, description: str) -> None:
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=style, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` lists the options")


def _top_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<8}  {spec.summary}" for name, spec in COMMANDS.items())
    epilog = f"commands:\n{commands}\n\n`qlora COMMAND --help` explains one of them. Example:\n"
    parser = _Parser("qlora", "QLoRA fine-tuning with 4-bit weights on CPU and CUDA.")
    parser.usage = "qlora COMMAND [options]"
    parser.epilog = f"{epilog}  qlora train config.yaml --lr 1e-4"
    parser.add_argument("--version", action="version", version=f"qlora_native {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser


def _run_command(name: str, argv: Sequence[str]) -> int:
    spec = COMMANDS[name]
    module = importlib.import_module(f"qlora_native.tool.cli.{name}")
    parser = _Parser(f"qlora {name}", f"{spec.summary[0].upper()}{spec.summary[1:]}.")
    module.configure(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    argv = [
        other if (other := _hyphenated(word)).partition("=")[0] in options else word for word in argv
    ]
    if spec.first and argv and argv[0].startswith("--") and argv[0] != "--help":
        if not spec.can_lack_first:
            raise UserError(f"qlora {name}: {spec.first} comes first, then --key value")
        # argparse cannot distinguish the value of a key that it does not know from a positional argument.
        argv = ["", *argv]
    args, others = parser.parse_known_args(argv)
    args.overrides = others
    if others and not spec.first:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    require(f"qlora {name}", *spec.needs)
    return int(module.run(args) or 0)


def _hyphenated(word: str) -> str:
    """A flag with hyphens in place of its name's underscores, which keys of a config have."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


# The names that other programs give to our commands; difflib alone would not find them.
_ALIASES = {
    "finetune": "train",
    "fine-tune": "train",
    "sft": "train",
    "generate": "chat",
    "infer": "chat",
}


def _dispatch(argv: Sequence[str]) -> int:
    name = argv[0] if argv else "-"
    if name.startswith("-"):
        _top_parser().parse_args(argv)  # --help and --version end here
        _top_parser().print_help(sys.stderr)
        return EXIT_USER
    if name not in COMMANDS:
        import difflib

        near = [_ALIASES[name]] if name in _ALIASES else difflib.get_close_matches(name, COMMANDS, n=1)
        hint = (
            f"did you mean `qlora {near[0]}`?" if near else f"the commands are {', '.join(COMMANDS)}."
        )
        raise UserError(f"qlora {name} is not a command: {hint}")
    return _run_command(name, argv[1:])


class _Lossy(io.TextIOWrapper):
    """A stderr that may be full or closed: what a library says there ends no command."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


class _Stopped(SystemExit):
    """By a signal; no KeyboardInterrupt, which ends an answer of `qlora chat` alone."""


def _on_signal(number: int, frame: object) -> None:
    # `timeout` sends two; one amid the join of a thread would leave it running.
    signal.signal(number, signal.SIG_IGN)
    stop = _Stopped(f"stopped by {signal.Signals(number).name}")
    stop.code = 128 + number
    raise stop


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP, unless they are ignored or handled, raise _Stopped, so that partial files are removed.
    Not under torchrun, since a process that waits for another one has to end."""
    is_possible = (
        threading.current_thread() is threading.main_thread() and "LOCAL_RANK" not in os.environ
    )
    # Windows has no SIGHUP.
    numbers = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)} if is_possible else ()
    changed = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: ``sys.argv[1:]``) and return its exit code; a bug propagates, and exits with 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        sys.stderr = _Lossy(
            sys.stderr.buffer, sys.stderr.encoding, sys.stderr.errors, line_buffering=True
        )
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # what its encoding lacks
    if not is_terminal(sys.stderr):
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):  # they write over their own line
            os.environ.setdefault(name, "1")
    _interrupt.restore()
    warnings.formatwarning = lambda message, category, *_: (
        _line(f"{category.__name__}: {message}") + "\n"
    )
    try:
        with _stoppable():
            code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        print(end="", flush=True)  # a full disk is an error here, and nothing at exit
        return code
    except UserError as error:
        return _said(EXIT_USER, *map(str, error.args))
    except (KeyboardInterrupt, _Stopped) as stop:
        return _said(getattr(stop, "code", EXIT_INTERRUPTED), str(stop) or "interrupted")
    except BrokenPipeError:
        _drop_output()  # its reader (a pager, `head`) has gone
        return 0
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (KeyboardInterrupt, _Stopped)):
            cause = cause.__cause__ or cause.__context__  # imports turn it into an ImportError
        if cause is not None:
            return _said(getattr(cause, "code", EXIT_INTERRUPTED), "interrupted")
        if not isinstance(error, OSError) or (error.filename is None and error.errno not in _DISK):
            raise
        if error.filename is None:  # of what is open already, such as the output
            _drop_output()
        return _said(EXIT_USER, f"{error.filename or 'could not write'}: {error.strerror}")


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _drop_output() -> None:
    """Send the rest of stdout nowhere: flushing it at exit would fail once more."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


MOST_LINES, MOST_CHARACTERS = 40, 800  # of a message: names in files can be megabytes long


def _said(code: int, *sentences: str) -> int:
    """Print what ended the command, as far as a terminal and its reader can take it, and return the exit code."""
    for sentence in sentences[:MOST_LINES]:
        print(_line(sentence), file=sys.stderr)
    return code


def _line(text: str) -> str:
    # Of a name in a file, which would look like a sentence of its own.
    text = text.replace("\n", "\\n")
    return printable(text if text.startswith("qlora") else f"qlora: {text}", MOST_CHARACTERS)


if __name__ == "__main__":
    raise SystemExit(main())
