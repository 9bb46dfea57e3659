"""The laws of the tree, each a function from the files to its breaches; test_laws.py holds them against the tree.

A breach names its file and what to do. Loosen no law to get a change in: move the code instead.
"""

from __future__ import annotations

import ast
import graphlib
import json
import os
import posixpath
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from tokens import sizes

ROOT = Path(__file__).resolve().parents[1]
CODE = (".py", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".sh")
TEXT = (*CODE, ".pyi", ".md", ".toml", ".ini", ".cmake", ".txt", ".yaml", ".yml", ".json", ".jsonl", ".ipynb")
PACKAGE = "python/qlora_native/"

Tree = dict[str, str]  # path from the root, with forward slashes -> text
Law = Callable[[Tree], list[str]]


@lru_cache(maxsize=1)
def tree() -> Tree:
    """Every text file of ours: what git would commit, or in a copy without git all but builds and caches."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and (ROOT / ".git").exists():
        paths = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        paths = []
        for folder, subfolders, names in os.walk(ROOT):
            subfolders[:] = [name for name in subfolders if not name.startswith((".", "__")) and name != "build"]
            paths += [Path(folder, name) for name in names]
        paths += (ROOT / ".ci").glob("*")
    ours = [path for path in paths if path.is_file() and (path.suffix in TEXT or path.parent.name == ".ci")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(ours)}


def lines_with(files: Tree, pattern: str, where: Callable[[str], bool], advice: str) -> list[str]:
    """`path:line: advice` for each line that matches in the files that `where` selects."""
    found = re.compile(pattern)
    return [
        f"{path}:{number}: {advice}: {line.strip()[:80]}"
        for path, text in files.items()
        if where(path)
        for number, line in enumerate(text.splitlines(), 1)
        if found.search(line)
    ]


def forbids(pattern: str, advice: str, where: Callable[[str], bool] = lambda path: True) -> Law:
    """The law that no line of these files matches."""
    return lambda files: lines_with(files, pattern, where, advice)


def is_native(path: str, *others: str) -> bool:
    """Whether it is C++ or CUDA, and none of the others."""
    return path.startswith(("cpp/", "cuda/")) and path.endswith(CODE) and not path.startswith(others)


# ---------------------------------------------------------------------------------------------------------------------
# C++ and CUDA


MAY_INCLUDE = {
    "cpp/core": {"cpp/core"},
    "cpp/cpu": {"cpp/core", "cpp/cpu"},
    "cuda": {"cpp/core", "cuda"},
    "cpp/python": {"cpp/core", "cpp/cpu", "cpp/python"},
    "cuda/python": {"cpp/core", "cuda", "cpp/python", "cuda/python"},
}


def native_folder(path: str) -> str:
    return next((folder for folder in sorted(MAY_INCLUDE, key=len, reverse=True) if path.startswith(folder + "/")), "")


def includes_point_one_way(files: Tree) -> list[str]:
    breaches = []
    for path in filter(is_native, files):
        folder = native_folder(path)
        for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', files[path], re.MULTILINE):
            if bracket == "<":
                core_breach = folder == "cpp/core" and ("." in name or "/" in name)
                python_breach = re.match(r"pybind11/|Python\.h", name) and not folder.endswith("/python")
                if core_breach or python_breach:
                    breaches.append(f"{path}: {folder} must not include <{name}>")
                continue
            beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
            target = next((full for full in (beside, "cpp/" + name, name) if full in files), "")
            if native_folder(target) not in MAY_INCLUDE.get(folder, set()):
                breaches.append(
                    f'{path}: {folder or "no folder"} must not include "{name}" ({target or "no such file"})'
                )
    return breaches


no_torch_header = forbids(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)/', "torch header", is_native)
cuda_calls_only_in_cuda = forbids(
    r"\bcuda[A-Z]\w*\s*\(|<<<|#\s*include\s*[<\"]cuda", "CUDA belongs in cuda/", lambda p: is_native(p, "cuda/")
)
inline_assembly_only_in_wp = forbids(
    r"\b(__)?asm(__)?\b\s*(volatile|__volatile__)?\s*\(",
    "assembly outside wp.cuh",
    lambda p: is_native(p, "cuda/wp.cuh", "cpp/cpu/isa/isa."),
)
openmp_only_in_parallel = forbids(
    r"\bomp_\w+\s*\(|#\s*pragma\s+omp\b|#\s*include\s*<omp\.h>",
    "OpenMP outside cpu/parallel.h",
    lambda p: is_native(p, "cpp/cpu/parallel.h"),
)
no_abort_on_user_input = forbids(r"(?<![\w:])(std::)?(abort|assert|exit)\s*\(", "throw a sentence instead", is_native)
launchers_never_synchronize = forbids(
    r"cuda(Device|Stream|Event)Synchronize|cudaMalloc\b",
    "no wait, no allocation here",
    lambda p: is_native(p, "cpp/", "cuda/python/") and not p.endswith(("_store.h", "_store.cc")),
)


def architecture_branches_only_in_wp(files: Tree) -> list[str]:
    # core/ may ask whether it is device code, never which device.
    others = {path: text for path, text in files.items() if is_native(path, "cuda/wp.cuh")}
    pattern, conditional = r"__CUDA_ARCH__", r"^\s*#\s*(if|ifdef|ifndef)\b"
    return [
        *lines_with(others, pattern, lambda p: not p.startswith("cpp/core/"), f"{pattern} outside cuda/wp.cuh"),
        *lines_with(others, rf"{pattern}\s*[<>=]", lambda p: p.startswith("cpp/core/"), "architecture version in core"),
        *lines_with(others, conditional, lambda p: p.endswith(".cuh"), "conditional in a kernel template"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Python


LAYERS: tuple[set[str], ...] = (
    {"errors", "_version", "_C", "_cuda", "_import_hooks", "_interrupt", "_moved"},
    {"_native", "_buffers", "_io", "_flags", "_mistakes", "_threads"},
    {"reference", "gguf_blocks"},
    {"ops"},
    {"weight", "_memory"},
    {"functional"},
    {"nn", "optim"},
    {"lora"},
    {"__init__"},
    {"data", "bitsandbytes"},
    {"calibration"},
    {"weights"},
    {"models"},
    {"interop", "distributed"},
    {"tool"},
    {"tool.sections"},
    {"tool.config"},
    {"tool.estimate", "tool.export", "tool.evaluate"},
    {"tool.train"},
    {"tool.cli"},
    {"__main__"},
)
USES_THE_ECOSYSTEM = {"data", "calibration", "weights", "models", "interop", "distributed", "tool"}
CORE_PACKAGES = {"torch", "numpy", "safetensors", "qlora_native"}


def package_files(files: Tree) -> Iterator[tuple[str, str]]:
    return ((path, text) for path, text in files.items() if path.startswith(PACKAGE) and path.endswith(".py"))


def unit_of(path: str) -> str:
    """The unit of a file of the package: `ops` for ops.py and ops/linear_4bit.py, `tool.cli` for tool/cli/main.py."""
    parts = path.removeprefix(PACKAGE).removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts[: 1 + (parts[0] == "tool")])


def lazy_attributes(files: Tree) -> dict[str, str]:
    """The attributes that the package imports when they are first used, with the module of each."""
    match = re.search(r"^_LAZY = (\{.*?\})", files.get(PACKAGE + "__init__.py", ""), re.MULTILINE | re.DOTALL)
    return dict(ast.literal_eval(match[1])) if match else {}


def imported_modules(path: str, text: str, lazy: dict[str, str] | None = None, typing: bool = False) -> Iterator[str]:
    """Absolute dotted names of everything that a file of the package imports, lazily or not; with `lazy` of
    :func:`lazy_attributes`, `qn.load_model` counts as an import of its module; with `typing` also what only type
    checkers import.

    Only the package's own `__init__.py` may offer units above it, lazily: there the top level counts alone.
    """
    parsed, lazy = ast.parse(text), lazy or {}
    for node in ast.walk(parsed):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("qn", "qlora_native") and node.attr in lazy:
            yield f"qlora_native.{lazy[node.attr]}"
    skipped = {
        node
        for branch in ast.walk(parsed)
        if not typing and isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    package = ["qlora_native", *path.removeprefix(PACKAGE).split("/")[:-1]]
    for node in parsed.body if path == PACKAGE + "__init__.py" else ast.walk(parsed):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{lazy.get(alias.name, alias.name) if module == 'qlora_native' else alias.name}"


def package_imports(files: Tree) -> Iterator[tuple[str, str, str]]:
    """(path, importing unit, imported unit) for each import of one unit of the package by another."""
    units, lazy = {*(unit_of(path) for path, _ in package_files(files)), "_C", "_cuda"}, lazy_attributes(files)
    for path, text in package_files(files):
        for name in imported_modules(path, text, lazy):
            parts = name.split(".")
            if parts[0] == "qlora_native":
                named = (".".join(parts[1:length]) for length in (3, 2))
                target = next((unit for unit in named if unit in units), "__init__")
                if target != unit_of(path):
                    yield path, unit_of(path), target


def imports_point_one_way(files: Tree) -> list[str]:
    rank = {unit: number for number, layer in enumerate(LAYERS) for unit in layer}
    return [
        *(
            f"{path}: give {unit_of(path)} a layer in LAYERS of tests/laws.py"
            for path, _ in package_files(files)
            if unit_of(path) not in rank
        ),
        *(
            f"{path}: {unit} must not import {target}, which stands above it"
            for path, unit, target in package_imports(files)
            if target in rank and rank.get(unit, len(LAYERS)) < rank[target]
        ),
    ]


def circle_in(graph: Mapping[str, set[str]], said: str) -> list[str]:
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return [f"{said}: " + " -> ".join(error.args[1])]
    return []


def units_do_not_import_each_other(files: Tree) -> list[str]:
    graph = defaultdict[str, set[str]](set)
    for _, unit, target in package_imports(files):
        graph[unit].add(target)
    return circle_in(graph, "imported in a circle")


def files_do_not_import_each_other(files: Tree) -> list[str]:
    """No circle of files, however an import is written: such files can be read, moved and tested together only."""
    modules = {path.removeprefix(PACKAGE): text for path, text in package_files(files)}
    names = {
        ".".join(("qlora_native", *path.removesuffix(".py").split("/"))).removesuffix(".__init__"): path
        for path in modules
    }
    lazy, graph = lazy_attributes(files), defaultdict[str, set[str]](set)
    for path, text in modules.items():
        for name in imported_modules(PACKAGE + path, text, lazy, typing=path != "__init__.py"):
            target = names.get(name) or names.get(name.rpartition(".")[0], path)
            if target != path and name not in ("qlora_native._C", "qlora_native._cuda"):
                graph[path].add(target)
    return circle_in(graph, "files import each other")


def train_is_imported_by_its_commands(files: Tree) -> list[str]:
    """The training loop is no library for the other units; what they share with it lies below it."""
    commands = tuple(f"{PACKAGE}tool/cli/{name}.py" for name in ("train", "demo"))
    return [
        f"{path}: only `qlora train` and `qlora demo` may import train; move what is shared below it"
        for path, _, target in package_imports(files)
        if target == "tool.train" and path not in commands
    ]


def core_needs_only_the_core_packages(files: Tree) -> list[str]:
    breaches = []
    for path, text in package_files(files):
        allowed = CORE_PACKAGES | sys.stdlib_module_names
        may_use_others = unit_of(path).split(".")[0] in USES_THE_ECOSYSTEM
        for top in (name.split(".")[0] for name in imported_modules(path, text)):
            if top == "bitsandbytes" or (top not in allowed and not may_use_others):
                breaches.append(f"{path}: {unit_of(path)} must not import {top}")
    return breaches


# ---------------------------------------------------------------------------------------------------------------------
# One stem, one home, and words


NOT_AN_OP = re.compile(
    r"parallel|mapped_file|vec|wp|matmul_plan"
    r"|elementwise|tables"  # a frame of CUDA kernels, and the levels
    r"|paging|managed_store|pinned_store|page_store|paged_table|tensor_list|step_frame|grid"
    # Parts of a CUDA op that fill files of their own.
    r"|linear_4bit_(bf16|fp16|decode|fragment|gguf|small|split_k|tile)|dequantize_4bit_gguf"
)
# The folders of kernels, and what a file there needs beside it and in the folder of its bindings.
KERNEL_FOLDERS = {"cpp/cpu": (".h", ".cc"), "cuda": (".h", ".cuh", ".cu")}


def op_stems(files: Tree) -> set[str]:
    """The ops of the schema table; `linear_4bit_grad_input` and `dequantize_4bit.out` belong to their op's stem."""
    for node in ast.parse(files.get(PACKAGE + "ops/_library.py", "")).body:
        table = getattr(node, "value", None)
        if isinstance(table, ast.Dict) and re.match(r"SCHEMAS\b", ast.unparse(node)):
            keys = [str(key.value) for key in table.keys if isinstance(key, ast.Constant)]
            return {re.sub(r"(\.\w+|_grad_\w+|_backward)$", "", key) for key in keys}
    return set()


def one_stem_per_op(files: Tree) -> list[str]:
    stems = op_stems(files)
    wanted = [(stem, path) for stem in sorted(stems) for path in (f"{PACKAGE}ops/{stem}.py", f"tests/test_{stem}.py")]
    breaches = []
    for path in files:
        folder, _, name = path.rpartition("/")
        stem = posixpath.splitext(name)[0]
        bench = re.fullmatch(r"bench/bench_(\w+_4bit)\.py", path)
        bound = re.fullmatch(r"(?:cpp|cuda)/python/bind_(\w+)\.cc", path)
        kernel = folder in KERNEL_FOLDERS and not NOT_AN_OP.fullmatch(stem)
        if kernel:
            others = [f"{folder}/{stem}{suffix}" for suffix in KERNEL_FOLDERS[folder]]
            wanted += [(path, other) for other in (*others, f"{folder.split('/')[0]}/python/bind_{stem}.cc")]
        named = bench[1] if bench else bound[1] if bound else stem if kernel else None
        if named and named not in stems and not NOT_AN_OP.fullmatch(named):
            breaches.append(f"{path}: no op of this name in SCHEMAS")
    return breaches + [f"{path}: {other} is missing" for path, other in wanted if other not in files]


# Of the package: raised only by the change that needs it, with why. Of the last 9,300, 1,900 answer by CUDA graphs, 950
# end captures that fail and runs without room for one, 700 time products on a card, 550 write adapters that PEFT reads
# right, 300 say why a card has no kernels, 750 read MXFP4 and turn experts round that are stored as [E, in, out],
# 2,100 multiply all experts of a layer by one op, 1,750 find what a pass does with each linear layer.
MOST_TOKENS, MOST_TOKENS_A_LINE = 212_600, 9.0


def package_keeps_its_budget(files: Tree) -> list[str]:
    """What has to be parsed (tests/tokens.py), however it is wrapped, and how dense it is."""
    found = sizes((unit_of(path), text) for path, text in package_files(files))
    tokens, lines = (sum(each) for each in zip(*found.values(), strict=True)) if found else (0, 0)
    by_unit = ", ".join(f"{unit} {count:,}" for unit, (count, _) in found.items())
    breaches = []
    if tokens > MOST_TOKENS:
        breaches.append(f"{tokens:,} tokens, at most {MOST_TOKENS:,}: {by_unit}")
    if tokens > MOST_TOKENS_A_LINE * lines:
        breaches.append(f"{tokens / lines:.2f} tokens a line, at most {MOST_TOKENS_A_LINE}")
    return breaches


def no_file_over_500_lines(files: Tree) -> list[str]:
    lengths = {path: text.count("\n") for path, text in files.items() if path.endswith(CODE)}
    return [f"{path}: {length} lines, at most 500: split it" for path, length in lengths.items() if length > 500]


def nf4_levels_only_in_core(files: Tree) -> list[str]:
    # Three of the inner levels in one file, rounded or not, are a copy of the table.
    levels = re.compile(
        r"0\.(696[12]|525[01]|394[89]|395|284[45]|184[78]|0910|0911|0795|0796|1609|2461|3379|4407|562[67]|7229|7230)"
    )
    homes = {path: set(levels.findall(text)) for path, text in files.items() if path.endswith(CODE)}
    return [
        f"{path}: NF4 levels stand in cpp/core/codebook.h only"
        for path, seen in homes.items()
        if len(seen) >= 3 and not path.startswith("cpp/core/")
    ]


no_machine_paths = forbids(
    r"/(work|farm|tmp/[a-z]+|root|home/\w+)/"
    r"|(pypi|pythonhosted|debian|npmjs|pytorch)\.org(?!/whl/cpu)",  # but for the address of torch's own CPU builds
    "a path or host of one machine",
)
no_unfinished_marks = forbids(
    r"\bTO[D]O\b|FIX[M]E|XX[X]|not implemented ye[t]|placehol[d]er",
    "unfinished",
    lambda p: p.endswith((*CODE, ".md", ".pyi")),
)


def plain_words(files: Tree) -> list[str]:
    """Things do not speak: name what returns, prints, stores or shows it. Pages have the field's words, not our own."""
    breaches = lines_with(files, r"(?i)(?<![a-z])((un)?tol[d]|behel[d])(?![a-z])", lambda p: True, "say it plainly")
    own = r"(?i)(?<![a-z_])(rooms?|short of memory|(mistake|bug) of (ours|yours)|a breach)(?![a-z_])"
    pages = re.compile(r"(README|CONTRIBUTING|SECURITY)\.md|docs/.*\.md")
    return breaches + lines_with(files, own, lambda p: bool(pages.fullmatch(p)), "the field has a word for it")


def sentences_belong_to_tests(files: Tree) -> list[str]:
    """Each key of sentences.json is a test: file::function, with the id of its parameters in brackets."""
    name = "tests/sentences.json"
    breaches = []
    for key in json.loads(files.get(name, "{}")):
        path, _, function = key.partition("[")[0].partition("::")
        if f"def {function}(" not in files.get(f"tests/{path}", ""):
            breaches.append(f"{name}: {key} is not a test: remove it")
    return breaches


def compared_places(node: ast.AST) -> list[ast.AST]:
    """What the node compares with: an assertion without its message, `match=`, a pattern, parameters given inline."""
    if isinstance(node, ast.Assert):
        return [node.test]
    if not isinstance(node, ast.Call):
        return [node] if isinstance(node, ast.Compare) else []
    name = ast.unparse(node.func)
    first = 1 if name.endswith("mark.parametrize") else 0 if re.fullmatch(r"re\.(search|(full)?match)", name) else 9
    return [*node.args[first : first + 1], *(keyword.value for keyword in node.keywords if keyword.arg == "match")]


def sentences_stand_in_one_file(files: Tree) -> list[str]:
    """A test compares at most five words a line in place. A word is "a" or at least two letters without other signs."""

    def words(line: str) -> list[str]:
        bare = (token.lstrip("\\('\"`").rstrip("\\.,:;!?)'\"`") for token in line.split())
        return [token for token in bare if re.fullmatch(r"a|[A-Za-z]{2,}('[a-z]+)?", token)]

    found = {}
    for path, text in files.items():
        if path.startswith("tests/") and path.endswith(".py"):
            places = [place for node in ast.walk(ast.parse(text)) for place in compared_places(node)]
            for node in (node for place in places for node in ast.walk(place)):
                if isinstance(node, (ast.Constant, ast.JoinedStr)):
                    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                    string = "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in parts)
                    if any(len(words(line)) > 5 for line in string.splitlines()):
                        found[f"{path}:{node.lineno}"] = string[:80]
    return [f"{place}: shorten it or call the fixture `sentence`: {string}" for place, string in found.items()]


def pages_have_short_lines(files: Tree) -> list[str]:
    """At most 120 columns outside tables, code blocks and lines that are one URL."""
    breaches = []
    for path, text in files.items():
        if not re.fullmatch(r"(README|CHANGELOG|CONTRIBUTING)\.md|docs/([\w-]+/)*[\w-]+\.md", path):
            continue
        fence = ""
        for number, line in enumerate(text.splitlines(), 1):
            mark = re.match(r"\s*(```|~~~)", line)
            if mark and fence in ("", mark[1]):
                fence = "" if fence else mark[1]
            elif not fence and len(line) > 120 and not re.match(r"\||    |\s*<?https?://\S+$", line):
                breaches.append(f"{path}:{number}: {len(line)} columns, at most 120: one sentence a line, or break it")
    return breaches


def environment_is_on_one_page(files: Tree) -> list[str]:
    reads = re.compile(r"(?:getenv\(|environ(?:\.get)?[\[(]|ENV\{|option\(|\benv\s*=)\s*[\"']?(QLORA_\w+)")
    page = files.get("docs/environment.md", "")
    return [
        f"{path}: {name} is read here and is not in docs/environment.md"
        for path, text in files.items()
        if not path.startswith("tests/")
        for name in sorted(set(reads.findall(text)))
        if f"`{name}`" not in page
    ]
