"""Files read with bounds, files written whole or not at all by one process at a time, their checksums, and the errors
that a user can mend."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]
from safetensors import SafetensorError

from qlora_native import _C
from qlora_native.errors import UserError

MAX_JSON_BYTES = 16 << 20  # the index of the largest models has 10 MB
_MAX_BYTES = {
    "adapter_config.json": 1 << 20,
    "generation_config.json": 1 << 20,
    "config.json": MAX_JSON_BYTES,
}
_CODE = re.compile(r"\(os error (\d+)\)")  # so end the messages of what is written in Rust
# Suffixes that no one else's hidden file is likely to have.
PARTIAL, OLD = (".qlora-partial", ".qlora-old")


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal whose lines can be drawn again, as that of a notebook's ``!command`` cannot."""
    # Jupyter's kernels give this variable to what they start.
    return stream.isatty() and "JPY_PARENT_PID" not in os.environ


@contextmanager
def as_user_error() -> Iterator[None]:
    """Raise as UserError a ValueError of a call whose arguments are all the user's, and a PageFileError."""
    try:
        yield
    except (ValueError, _C.PageFileError) as error:
        raise UserError(str(error)) from error


@contextmanager
def reading(path: Path, advice: str = "copy the file again") -> Iterator[None]:
    """Raise as UserError, with the file's name, whatever is raised inside by the readers of a file, which come from
    anywhere: a RecursionError, an OverflowError, a struct.error."""
    try:
        yield
    except UserError:
        raise
    except _C.PageFileError as error:  # of the optimizer whose states are read
        raise UserError(str(error)) from error
    except Exception as error:
        raise UserError(f"{path} cannot be read: {reason(error)}; {advice}.") from error


@contextmanager
def panics_caught() -> Iterator[None]:
    """Raise a panic of Rust code, which prints a trace by itself, as a RuntimeError, without the trace."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        except BaseException as error:
            # A panic is no Exception, and of a module that cannot be imported.
            if type(error).__name__ != "PanicException":
                raise
            file.truncate(file.seek(0))
            raise RuntimeError(str(error)) from None
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            sys.stderr.write(file.read())


def regular(path: Path, most: int | None = None) -> Path:
    """The path. UserError for a pipe, a device or a folder, and for a file of more than ``most`` bytes."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{path} is a folder, a pipe or a device: expected a regular file.")
    if most is not None and about.st_size > most:
        raise UserError(f"{path} has {about.st_size:,} bytes: expected at most {most:,}.")
    return path


def is_own_file(path: Path) -> bool:
    """Whether a path is a file of its folder: no link that leaves it, but for one into the same model of the Hugging
    Face hub's cache, whose ``snapshots/REVISION`` is made of links to ``blobs``. A warning says what is left out."""
    folder = path.parent.resolve()
    home = folder.parents[1] if folder.parent.name == "snapshots" else folder
    if path.is_file() and not path.resolve().is_relative_to(home):
        warnings.warn(
            f"{path} is a link to {path.resolve()}, outside {home}: it is not copied.", stacklevel=2
        )
        return False
    return path.is_file()


def check_folder(folder: Path) -> None:
    """UserError if a model's or an adapter's folder has a pipe or a device in it, on which the readers of transformers
    would wait, or a file larger than its kind can be."""
    with reading(folder):
        for path in (*folder.iterdir(), *folder.glob("*/*")):
            if path.exists() and not path.is_dir():
                regular(path, _MAX_BYTES.get(path.name))


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For JSON: ValueError for an object with a key twice, of which the parser would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def read_json(path: Path, advice: str = "copy the file again", **options: Any) -> dict[str, Any]:
    """The JSON object in a file of bounded size; UserError for anything else. ``options`` are those of json.loads."""
    with reading(path, advice):
        value = json.loads(
            regular(path, _MAX_BYTES.get(path.name, MAX_JSON_BYTES)).read_bytes(), **options
        )
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, not a {type(value).__name__}")
        return value


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path as the user gave it, in which ``~`` is the home folder; UserError for one that no file can have."""
    try:
        path = Path(text).expanduser()
        path.lstat()
    except (OSError, ValueError, RuntimeError) as error:  # of no such user, with a NUL
        if not isinstance(error, OSError) or error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{text} is not a path: {reason(error)}.") from None
    return path


@contextmanager
def as_write_error(target: Path, advice: str = "") -> Iterator[None]:
    """Raise as UserError a failure to write (a full disk, no permission)."""
    try:
        yield
    except Exception as error:
        # save_adapter has its own sentence.
        cause = error.__cause__ if isinstance(error, UserError) else error
        if not isinstance(cause, (OSError, SafetensorError)) and not (
            type(cause) is Exception and _CODE.search(str(cause))
        ):
            raise  # tokenizers has no type for its errors
        space = ""
        with suppress(OSError):
            space = f" ({shutil.disk_usage(target.parent).free / 2**20:,.0f} MiB free)"
        raise UserError(f"could not write {target}: {reason(cause)}{space}{advice}") from error


def partial_folder(final: Path) -> Path:
    """The temporary folder of :func:`atomic_folder`."""
    return final.with_name(f".{final.name}{PARTIAL}")


@contextmanager
def announced(text: str, seconds: float = 3.0) -> Iterator[None]:
    """Print ``text`` on stderr if what is done inside takes longer."""
    timer = threading.Timer(seconds, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder, or of a file, which is made. UserError if another process holds it.

    The lock ends with its process, however that ends. Where there are none (Windows, some network file systems) nothing
    is held.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY | (0 if path.is_dir() else os.O_CREAT), 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It was renamed by who held it until now.
            taken = not os.path.samestat(os.fstat(descriptor), path.stat())
        except OSError as error:
            taken = isinstance(error, (BlockingIOError, FileNotFoundError))
        if taken:
            name = (
                path.with_name(path.name[1 : -len(PARTIAL)]) if path.name.endswith(PARTIAL) else path
            )
            raise UserError(
                f"another process is writing {name}: wait until it ends, or name another output"
            )
        yield
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that replaces ``final`` when the block ends without an exception, and vanishes otherwise.

    UserError if another process is writing the same folder. A kill at any moment leaves ``final`` as it was before or
    as it is after, but for the instant between two renames when an old ``final`` is replaced: then ``recover`` puts the
    old one back.
    """
    partial, old = partial_folder(final), final.with_name(f".{final.name}{OLD}")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        try:
            for path in partial.iterdir():  # what a killed process left
                path.unlink() if path.is_file() else shutil.rmtree(path)
            yield partial
            # The mode is that of the umask; of safetensors' files the owner is the only reader.
            mode = partial.stat().st_mode & 0o666
            for path in (*partial.rglob("*"), partial):
                if path.is_file():
                    path.chmod(mode)
                fsync(path)
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(final, old)
            os.rename(partial, final)
            fsync(final.parent)
        except BaseException:
            if old.exists() and not final.exists():
                os.rename(old, final)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
    """A temporary path whose file replaces ``final`` as :func:`atomic_folder` does with a folder."""
    partial = partial_folder(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        try:
            yield partial
            fsync(partial)
            os.replace(partial, final)
            fsync(final.parent)
        finally:
            partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """``QLORA_NATIVE_CACHE``, or ``qlora_native`` in the user's cache; it need not exist."""
    folder = Path(os.environ.get("QLORA_NATIVE_CACHE", "")).expanduser()
    if folder == Path():
        base = os.environ.get("XDG_CACHE_HOME", "")
        # A relative path there is to be ignored (XDG base directory specification).
        folder = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "qlora_native"
    return folder


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON, which has no NaN: None in place of numbers that are not finite."""
    return {
        key: None if isinstance(one, float) and not math.isfinite(one) else one
        for key, one in values.items()
    }


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def recover(output_dir: Path) -> None:
    """Clean up what a killed run left: half-written folders go, a folder that was being replaced comes back."""
    for path in [*output_dir.glob(f".*{OLD}"), *output_dir.glob(f".*{PARTIAL}")]:
        final = path.with_name(path.name[1 : -len(OLD)])
        if path.name.endswith(OLD) and not final.exists():
            os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It is renamed first: after a kill on the way nothing looks like a checkpoint."""
    doomed = partial_folder(folder)
    with suppress(OSError):  # an old checkpoint too many is no reason to stop training
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def reason(error: Exception) -> str:
    """The system's words for an error, on one line."""
    code = _CODE.search(str(error))
    known = os.strerror(int(code[1])) if code else getattr(error, "strerror", None)
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})"
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return known or " ".join(text.split()).rstrip(".") or type(error).__name__


def shorten(text: str, most: int = 600) -> str:
    """The text, of a longer one its ends and how many characters lie between them."""
    left_out = len(text) - most
    return (
        text
        if left_out <= 0
        else f"{text[: most // 2]} [… {left_out:,} characters …] {text[-most // 2 :]}"
    )


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 16):
            digest.update(part)
    return digest.hexdigest()
