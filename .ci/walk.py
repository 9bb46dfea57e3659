"""Run by .ci/full: README.md and docs/tutorial.md as a reader of a clone walks them, command by command.

    python .ci/walk.py FOLDER [WHEEL]

makes a clone of the files that git has and an environment with nothing in it in FOLDER. Every block is run as it is
printed but for EDITS, and installs the WHEEL where there is one in place of compiling the clone. A command that fails,
prints a trace or a warning, or leaves out what the page shows of its output or says of the files it writes, ends the
walk with its name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What a machine without the hub does in place of a command: the demo's own model as a folder.
_FILE = "from qlora_native.tool.cli.demo_model import model_file; print(model_file())"
MODEL = f"qlora export $(python -c '{_FILE}' | tail -n 1)"
EDITS = {
    "hf download ": f"{MODEL} --to safetensors --out base-model",
    "pip install '.[test]' && pytest": "pip install '.[test]' && pytest tests/test_quantize_4bit.py",  # all: .ci/run
}
BLOCK = re.compile(r"^(?:```(\w+)(?: title=\"([^\"]+)\")?|(~~~))\n(.*?)^(?:```|~~~)$", re.MULTILINE | re.DOTALL)
FILES = re.compile(r"`((?:run|adapter|best|merged)[\w./-]*/|[\w-]+\.(?:png|jsonl))`")


class Walk:
    """A reader in a folder, with the environment's programs first on the path."""

    def __init__(self, folder: Path, wheel: str | None) -> None:
        self.folder, self.clone, self.wheel = folder, folder / "clone", wheel
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "venv"], check=True)
        subprocess.run(["git", "clone", "-q", "--no-local", ROOT, self.clone], check=True)
        self.path = f"{folder / 'venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin"

    def run(self, command: str, code: str | None = None) -> str:
        """What a command prints, which must end with 0 and without a trace or a warning."""
        edited = next((other for start, other in EDITS.items() if command.startswith(start)), command)
        if self.wheel is not None:
            edited = edited.replace("pip install '.[", f"pip install '{self.wheel}[")
        print(f"$ {edited}", flush=True)
        environment = {"PATH": self.path, "HOME": str(self.folder), "COLUMNS": "80"}
        environment |= {name: value for name, value in _kept().items() if name not in environment}
        done = subprocess.run(
            ["bash", "-c", edited], cwd=self.clone, env=environment, input=code, capture_output=True, text=True
        )
        if done.returncode or re.search("Traceback|Warning", done.stderr):
            raise SystemExit(f"FAILED: {command}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout

    def page(self, name: str) -> None:
        """Every block of a page, in order."""
        print(f"== {name}", flush=True)
        text, printed, code = (ROOT / name).read_text(encoding="utf-8"), "", ""
        for language, title, is_output, body in BLOCK.findall(text):
            if title:
                (self.clone / title).write_text(body, encoding="utf-8")
            elif language == "sh":
                printed = ""
                for command in filter(None, (line.partition("  #")[0].strip() for line in body.splitlines())):
                    printed += self.run(command)
            elif language in ("python", "py"):
                code += body  # a block goes on where the one before ended
                self.run("python -", code)
            elif is_output:
                self.compare(body, printed)

    def compare(self, shown: str, printed: str) -> None:
        """Lines with figures are printed, whatever their figures; not what a model answered."""
        lines = {_without_figures(line) for line in printed.splitlines()}
        for line in shown.partition("\n\n")[0].splitlines():
            if _without_figures(line) not in lines:
                raise SystemExit(f"FAILED: the page shows a line that is not printed: {line}")


def _kept() -> dict[str, str]:
    """The settings of pip's index, proxies and certificates."""
    names = re.compile(r"PIP_|.*_PROXY$|SSL_|CXX$|QLORA_", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if names.match(name)}


def _without_figures(line: str) -> str:
    return re.sub(r"[\d.,]*\d", "#", line)


def main() -> None:
    wheel = str(Path(sys.argv[2]).resolve()) if len(sys.argv) > 2 else None
    walk = Walk(Path(sys.argv[1]).resolve(), wheel)
    walk.page("docs/tutorial.md")
    for name in FILES.findall((ROOT / "docs/tutorial.md").read_text(encoding="utf-8")):
        if not (walk.clone / name).exists() and not (walk.clone / "run" / name).exists():
            raise SystemExit(f"FAILED: the tutorial names {name}, which no command left")
    walk.run("ln -s base-model SmolLM2-135M")
    walk.page("README.md")
    print("every command of README.md and docs/tutorial.md ran")


if __name__ == "__main__":
    main()
