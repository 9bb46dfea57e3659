"""The pages: their scripts run in a folder with a small model; figures are the estimator's and the benches'; messages
and names are in the source."""

from __future__ import annotations

import ast
import io
import pkgutil
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from laws import ROOT
from pages import results_of
from safetensors import safe_open
from tiny import write_model, write_rows

import qlora_native as qn
import qlora_native.bitsandbytes as bnb
from qlora_native.ops._library import SCHEMAS
from qlora_native.tool.cli.main import COMMANDS, main

Capture = pytest.CaptureFixture[str]
TWO_COMMANDS = {"demo": ["qlora", "demo"], "test": ["pytest"]}  # extra -> what it runs
STEPS = "4"  # of a run of the tutorial, for which a reader has more time


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Scripts


# What a page needs beside the library, and some of what its scripts leave behind. Others with scripts need and leave
# nothing.
PAGES = {
    "transformers": (
        "",
        "four-bit/model.safetensors dense/model.safetensors trainer-adapter/adapter_model.safetensors",
    ),
    "peft": ("peft", "adapter/adapter_model.safetensors merged-four-bit/model.safetensors"),
    "trl": (
        "peft trl datasets",
        " ".join(f"{kind}adapter/adapter_model.safetensors" for kind in ("", "dpo-", "kto-", "orpo-", "grpo-")),
    ),
    "bitsandbytes": ("", "base-model-nf4/model.safetensors base-model-16bit/model.safetensors"),
    "any-file": ("gguf peft", "model.gguf gguf-run/adapter/README.md adapter.gguf"),
    "tutorial": (
        "",
        "run/adapter/README.md run/report.html run-more/adapter run-2/adapter merged/merge_report.md tuned.gguf "
        "for-peft base.gguf run-gguf/adapter",
    ),
    "README": ("", "adapter/adapter_model.safetensors"),
    "reference/training": ("", "qlora-out/adapter/adapter_model.safetensors"),
}
ELSEWHERE = {"serving": "test_serving.py"}  # pages whose scripts another file runs
WALKED = ("README",)  # whose commands .ci/walk.py runs: they install, and train for minutes
NOT_RUN = {  # how a command begins that no test runs, and why
    "pip install": "needs a network; test_packaging.py and .ci/full install",
    "hf download": "needs a network",
    "git clone": "needs a network and an address; .ci/walk.py clones",
    "cd": "enters the clone",
    "python3 -m venv": "makes an environment; .ci/walk.py makes one",
    ".": "activates it",
    "qlora demo": "downloads a model; .ci/full runs it",
    "python -m llama_cpp.server": "test_serving.py --llama-cpp starts it",
    "llama-cli": "needs llama.cpp's own programs",
    "llama-server": "needs llama.cpp's own programs",
    "curl": "asks llama-server",
    "ollama": "is no Python package",
    "vllm": "test_serving.py --vllm starts it",
    "cmake": "compiles for minutes; .ci/run and .ci/full have such lines",
    "ctest": "runs what they compile",
    "build/": "a program that they compile",
    "pytest": "runs this suite",
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(path: Path) -> list[tuple[str, str, str]]:
    """Tag, title and text of every fenced block."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return "README" if path.parent == ROOT else path.relative_to(ROOT / "docs").with_suffix("").as_posix()


def runs_in_test(path: Path) -> bool:
    """Whether the page has scripts: blocks that are tagged python, py (which goes on with the names before) or sh."""
    return any(tag in ("python", "py", "sh") for tag, *_ in blocks_of(path))


SCRIPTED = [name for path in pages() if runs_in_test(path) and (name := name_of(path)) not in ELSEWHERE]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SCRIPTED)
def test_every_script_of_the_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs, leaves = PAGES.get(name, ("", ""))
    for package in needs.split():
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    names = run_page(name)
    assert name != "transformers" or names["losses"][-1] < names["losses"][0]
    assert all(Path(file).exists() for file in leaves.split())
    if name == "bitsandbytes":
        ours, again = (safe_open(f"base-model-{end}/model.safetensors", "pt") for end in ("nf4", "nf4-again"))
        assert set(ours.keys()) == set(again.keys())


def run_page(name: str) -> dict[str, Any]:
    """Run the blocks of a page in this folder; the names of its last script."""
    write_model(Path("base-model"), num_attention_heads=2, num_key_value_heads=1)
    Path("SmolLM2-135M").symlink_to("base-model")
    write_rows(Path("train.jsonl"), 12 if name == "reference/training" else 500)  # GPTQ asks for 8,192 tokens
    path = ROOT / "README.md" if name == "README" else ROOT / "docs" / f"{name}.md"
    names: dict[str, Any] = {}
    for language, title, text in blocks_of(path):
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif language == "python" and "register_ops" in text:  # which holds for a whole process
            subprocess.run([sys.executable, "-c", text], check=True)
        elif language in ("python", "py"):
            names = {"__name__": "__main__", "qn": qn, **(names if language == "py" else {})}
            exec(compile(text, path.name, "exec"), names)
        elif language == "sh" and name not in WALKED:
            for command in text.splitlines():
                run_command(command)
    return names


def run_command(command: str) -> None:
    if command.startswith(tuple(NOT_RUN)):
        return
    command = command.replace("step-000060", f"step-{int(STEPS):06}").replace("--steps 60", f"--steps {STEPS}")
    program, *words = shlex.split(command)
    steps = ["--steps", STEPS] if words[0] == "train" and "--steps" not in words else []
    with redirect_stdout(io.StringIO()) as printed:
        assert program == "qlora" and main([*words, *steps]) == 0, command
    text = printed.getvalue()
    assert "\x1b" not in text and "\r" not in text, command  # no terminal: plain lines


def test_the_tutorial_has_every_step() -> None:
    found = set(re.findall(r"^qlora (\w+)", page("tutorial"), re.MULTILINE))
    assert {"doctor", "chat", "config", "train", "merge", "export"} <= found


# ---------------------------------------------------------------------------------------------------------------------
# Figures, names and messages


def test_the_page_of_trl_has_the_memory_that_was_measured() -> None:
    (result,) = results_of("preference").values()
    rows = {(row["head"], row["checkpointing"], row["trainer"]): row for row in result["rows"]}
    table = re.findall(r"^\| with.*?\|(.*)\|$", page("trl"), re.MULTILINE)
    for line, (head, checkpointing) in zip(table, [("ours", True), ("ours", False), ("trl", True)], strict=True):
        peaks = [rows[head, checkpointing, trainer]["peak_mib"] for trainer in ("sft", "dpo", "kto")]
        assert [int(cell.replace(",", "")) for cell in line.split("|")] == peaks
    bars = [bar for row in result["rows"] for bar in row["bars"]]
    assert len(bars) == 2 and all(bar["met"] and bar["value"] <= bar["bar"] for bar in bars)
    assert f"at most {max(bar['value'] for bar in bars):.2f} times" in page("trl")


def test_the_page_of_other_tools_is_dated_and_has_no_figure_of_its_own() -> None:
    text = page("compare")
    assert re.search(r"\b[A-Z][a-z]+ 20\d\d\b", text)
    assert not re.search(r"\d ?(x|%|times|tokens|nats|[KMG]i?B)\b", text)


def test_the_page_on_bitsandbytes_names_what_is_offered() -> None:
    for name in (*bnb.nn.__all__, *bnb.functional.__all__):
        stem = re.sub(r"_(nf4|fp4)$", "", name)
        assert f"`{name}`" in page("bitsandbytes") or f"`{stem}_4bit`" in page("bitsandbytes"), name


def test_the_reference_has_every_public_name_and_no_other() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    entries = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(entries) == len(set(entries))
    for entry in entries:
        pkgutil.resolve_name(entry)
    namespaces = {"__version__", "distributed", "nn", "ops", "optim"}
    assert {f"qlora_native.{name}" for name in set(qn.__all__) - namespaces} <= set(entries)


def test_the_page_of_operators_has_every_schema() -> None:
    assert set(re.findall(r"`(\w+(?:\.out)?)`", page("reference/ops"))) >= set(SCHEMAS)


def test_the_page_of_commands_has_every_command_with_options_that_exist(capsys: Capture) -> None:
    rows = re.findall(r"^\| `qlora (\w+)[^|]*\|[^|]*\|([^|]*)\|$", page("reference/command-line"), re.MULTILINE)
    assert {name for name, _ in rows} == set(COMMANDS)
    for name, options in rows:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert set(re.findall(r"`(--[\w-]+)`", options)) <= set(re.findall(r"--[\w-]+", capsys.readouterr().out)), name


def test_contributing_names_every_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "python" / "qlora_native"
    units = {path.stem for path in package.iterdir() if path.suffix in ("", ".py") and not path.name.startswith("__")}
    listed = set(re.findall(r"\w+", text.partition("from the bottom up")[2].partition("`tests/laws.py`")[0]))
    assert units <= listed


STATIONS = (8, 9, 7)  # files of Python that a journey needs, at most


def test_what_contributing_names_for_journeys_and_additions_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    chapters = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    named = r"`((?:[\w-]+/)*[\w-]+\.(?:py|h|cuh|cc))(?:: ([\w.]+))?`"
    for path, name in re.findall(named, chapters["Three journeys"] + chapters["Where to add"]):
        folder = ROOT if path.startswith(("cpp/", "cuda/", "bench/", "tests/")) else ROOT / "python" / "qlora_native"
        source = (folder / path).read_text(encoding="utf-8")
        assert name in (names_in(ast.parse(source)) if path.endswith(".py") else source), (path, name)
    for journey, most in zip(chapters["Three journeys"].split("\n### ")[1:], STATIONS, strict=True):
        files = {path for path, name in re.findall(named, journey) if name and path.endswith(".py")}
        assert len(files) <= most, (journey.splitlines()[0], files)


def names_in(node: ast.AST) -> set[str]:
    """What a module or a class defines, members with the class before a dot; and "", for no name."""
    found = {""}
    for child in ast.iter_child_nodes(node):
        targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            found.add(child.name)
        if isinstance(child, ast.ClassDef):
            found |= {f"{child.name}.{name}" for name in names_in(child)}
    return found


def literals() -> list[str]:
    """Every text in the package's source; what an f-string fills in stands as a NUL."""
    found = []
    for path in (ROOT / "python" / "qlora_native").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_what_the_reliability_page_names_is_there() -> None:
    text = page("reliability")
    for file, name in re.findall(r"`(test_\w+\.py)::(\w+)`", text):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name
    assert all((ROOT / path).is_file() for path in re.findall(r"`(tests/[\w/.]+)`", text))


def test_every_message_of_the_troubleshooting_page_is_in_the_source() -> None:
    text, source = page("troubleshooting"), literals()
    messages = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert len(messages) >= 20 and len(set(messages)) == len(messages)
    for message in messages:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("...") if part), re.DOTALL)
        assert any(pattern.search(literal) for literal in source), message
    assert all(len(body.strip()) > 40 for body in re.split(r"^### .*$", text, flags=re.MULTILINE)[1:])


def test_the_readme_is_short_and_begins_with_what_it_needs_and_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, _, _ = text.partition("```sh")
    assert all(words in begin for words in ("git clone", "C++20 compiler", "Python 3.10", "AVX2", "CUDA"))
    assert text.count("\n") <= 130 and begin.count("![") == 1
    blocks = [text for tag, _, text in blocks_of(ROOT / "README.md") if tag == "sh"]
    commands = [shlex.split(line, comments=True) for line in blocks[0].splitlines()]
    assert commands == [["pip", "install", f".[{name}]", "&&", *run] for name, run in TWO_COMMANDS.items()]
    benches = text.partition("<!-- bench/readme.py begins -->")[2].partition("<!-- bench/readme.py ends -->")[0]
    assert 0 < len(benches) < len(text) / 4  # it is no table of benches


def test_what_is_kept_of_an_adapter_and_gained_by_calibration_was_measured() -> None:
    readme, shipped, cost = (
        " ".join(path.read_text(encoding="utf-8").split())
        for path in (ROOT / "README.md", ROOT / "docs/shipping.md", ROOT / "docs/quality.md")
    )
    (shipping,) = results_of("shipping").values()
    usual = {row["form"]: row["texts"].values() for row in shipping["rows"] if row["setting"] == "usual"}
    for form in ("rtn-base", "gptq-base", "rtn-original"):
        kept = span([text["retention"][0] for text in usual[form]])
        assert kept in readme and kept in shipped, (form, kept)
    (quality,) = results_of("quality").values()
    ends = {row["base"]: row["texts"] for row in quality["rows"] if row["kind"] == "lora"}
    shares = [1 - ends[base][text]["gap"] / ends["rtn"][text]["gap"] for base in ("wmse", "gptq") for text in "AB"]
    assert span(shares) in readme and span(shares) in cost


def span(shares: list[float]) -> str:
    return f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"


def test_no_page_installs_from_an_index_that_does_not_have_it() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "python").rglob("*.py")):
        assert "qlora_native[" not in path.read_text(encoding="utf-8"), path
