"""README.md's two commands as somebody types them who has nothing yet: how long they take and what they download.

    python bench/bench_start.py --json                    # without nvcc on PATH
    python bench/bench_start.py --nvcc --json             # the CUDA kernels are compiled too
    python bench/bench_start.py --commands demo --json

Each command runs in a clone of the commit that is checked out and an environment with nothing in it: no cache of pip's
or ours, an empty home, the system's programs on PATH (Debian's cmake, where there is one), and of this environment's
variables those of pip's index and proxies alone. `install` is what stands before `&&`, `run` what stands behind it.
`download_mb` are the packages that pip installed, torch from where this machine has it, which may be a CPU build;
`index_mb` those that it would take from the package index with no settings, torch with CUDA among them. The demo's
model is in neither: `model_mb`. A run of some rows leaves the others of its class in the stored result.

Takes about 30 minutes on two cores, most of it for the tests. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import isa_env  # noqa: F401  (before torch)
from common import Bench
from pages import ROOT

SECTION = "## Two commands"
# Of what the second half prints, as README shows it: the demo's figures, and pytest's closing line.
SHOWN = re.compile(r"^(?:model: .*|step .* held-out .*|\d+ steps, .*|.*\d+ passed.* in [\d.]+s.*)$", re.MULTILINE)
KEPT = re.compile(r"PIP_|.*_PROXY$|SSL_", re.IGNORECASE)


def commands() -> dict[str, tuple[str, str]]:
    """README.md's own, by the name of their extra: what installs, and what runs."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition(SECTION)[2].partition("```sh\n")[2]
    lines = block.partition("```")[0].splitlines()
    halves = [line.partition("  #")[0].strip().split(" && ") for line in lines]
    extras = [re.search(r"\[(\w+)\]", install) for install, _ in halves]
    return {extra[1]: (install, run) for extra, (install, run) in zip(extras, halves, strict=True) if extra}


def environment(folder: Path, nvcc: bool) -> dict[str, str]:
    """The variables of an account that was made today."""
    path = [str(folder / "venv" / "bin"), "/usr/bin", "/bin"]
    if nvcc:
        found = shutil.which("nvcc")
        if found is None:
            raise SystemExit("there is no nvcc on PATH: leave out --nvcc")
        path.append(str(Path(found).parent))
    home, temporary = folder / "home", folder / "tmp"
    for each in (home, temporary):
        each.mkdir()
    own = {name: value for name, value in os.environ.items() if KEPT.match(name)}
    places = {"PATH": os.pathsep.join(path), "HOME": str(home), "TMPDIR": str(temporary)}
    return own | places | {"LANG": "C.UTF-8", "PIP_NO_CACHE_DIR": "1"}


def num_bytes(url: str) -> int:
    """Of a file in an index or in a folder; 0 for the clone itself."""
    place = urllib.parse.urlparse(url)
    if place.scheme == "file":
        path = Path(urllib.request.url2pathname(place.path))
        return path.stat().st_size if path.is_file() else 0
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
        return int(answer.headers["Content-Length"])


def packages_mb(report: Path) -> int:
    listed = json.loads(report.read_text(encoding="utf-8"))["install"]
    return round(sum(num_bytes(package["download_info"]["url"]) for package in listed) / 1e6)


def index_mb(install: str, clone: Path, variables: dict[str, str], report: Path) -> int:
    """What the command would download without this machine's settings of pip."""
    plain = {name: value for name, value in variables.items() if name not in ("PIP_FIND_LINKS", "PIP_CONSTRAINT")}
    words = install.replace("pip install", f"pip install --dry-run --ignore-installed --report {report}", 1)
    plain["PIP_CONFIG_FILE"] = os.devnull
    subprocess.run(["bash", "-c", words], cwd=clone, env=plain, check=True, stdout=subprocess.DEVNULL)
    return packages_mb(report)


def measured(name: str, install: str, run: str, nvcc: bool, folder: Path) -> dict[str, Any]:
    """Both halves of a command; a row. SystemExit with the end of what was printed if one fails."""
    clone, report = folder / "clone", folder / "report.json"
    subprocess.run(["git", "clone", "-q", "--no-local", ROOT, clone], check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    variables = environment(folder, nvcc)
    row: dict[str, Any] = {"command": name, "nvcc": nvcc}
    row["index_mb"] = index_mb(install, clone, variables, report)
    halves = {"install": install.replace("pip install", f"pip install --report {report}", 1), "run": run}
    for part, words in halves.items():
        print(f"$ {words}", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", words], cwd=clone, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        row[f"{part}_seconds"] = round(time.monotonic() - began)
        if done.returncode:
            raise SystemExit(f"{words}: status {done.returncode}\n{done.stdout[-6000:]}")
    row["download_mb"] = packages_mb(report)
    row["printed"] = "\n".join(SHOWN.findall(done.stdout))
    models = Path(variables["HOME"], ".cache", "qlora_native")
    row["model_mb"] = round(sum(file.stat().st_size for file in models.rglob("*") if file.is_file()) / 1e6)
    return row


def main() -> None:
    found = commands()
    bench = Bench("start", __doc__, commands=tuple(found), nvcc=False)
    bench.begin()
    for name in bench.options.commands:
        with tempfile.TemporaryDirectory() as folder:
            row = measured(name, *found[name], bench.options.nvcc, Path(folder))
        bench.add(row, *row)
    bench.write(key=("command", "nvcc"))


if __name__ == "__main__":
    main()
