"""What the compiled GPU code says of itself: registers, shared memory and instructions of each kernel and architecture.

    python tests/cuda_static.py FILE.so|FILE.o...   the table, as tests/cuda_budgets.json holds it
    python tests/cuda_static.py --write FILE...     and writes it there, for the architectures that the files have

Reads what NVIDIA's cuobjdump prints, and names kernels with binutils' c++filt. No GPU is needed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

BUDGETS = Path(__file__).parent / "cuda_budgets.json"
COMPILER = "13.0"  # the release of nvcc whose figures the table holds

# What the integer pipe executes: half an instruction a clock and scheduler up to Hopper. IMAD and the fp32 instructions
# go to another pipe.
ALU = re.compile(
    r"(BMSK|F2FP|FMNMX|FSEL|FSETP|I2FP|IABS|IADD|IADD3|IMNMX|ISETP|LEA|LOP3|MOV|P2R|PLOP3|PRMT|R2P|SEL|SGXT|SHF|VIADD"
    r"|VIADDMNMX|VIMNMX)\b"
)
SHARED = re.compile(r"(LDS|STS|LDSM)\b")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")

Key = tuple[str, int]  # a kernel's short name and an architecture such as 80


class Usage(NamedTuple):
    """What a block or a thread of a kernel takes."""

    registers: int  # a thread
    shared: int  # bytes a block, without what is given at the launch
    local: int  # bytes a thread: stack and spills


class Instruction(NamedTuple):
    """A line of a listing."""

    address: int
    opcode: str  # e.g. LDG.E.128
    operands: str


class Loop(NamedTuple):
    """Instructions of one turn of a kernel's main loop: the innermost one with the most tensor-core products."""

    mma: int
    instructions: int
    alu: int  # of ALU
    shared: int  # loads and stores of shared memory
    gap: int  # the most without a product between them, across the loop's end, too


class Budget(NamedTuple):
    """A row of the table for one kernel and architecture."""

    registers: int
    shared: int
    loop: Loop | None = None  # of kernels with tensor-core products


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on PATH, or from NVIDIA's wheels in this environment."""
    wheels = importlib.util.find_spec("nvidia")
    folders = wheels.submodule_search_locations or [] if wheels else []
    candidates = (str(file) for folder in folders for file in sorted(Path(folder).glob(f"*/bin/{name}")))
    return shutil.which(name) or next(candidates, None)


def missing_tools() -> str:
    """Why nothing can be read here, in words; empty if all is there."""
    pip = "pip install -r .ci/requirements-cubin.txt"
    wanted = {"cuobjdump": pip, "nvdisasm": pip, "c++filt": "install binutils"}
    absent = [f"no {name} reads GPU code here: {advice}" for name, advice in wanted.items() if find_tool(name) is None]
    return next(iter(absent), "")


def short_name(demangled: str) -> str:
    """`void a::b::kernel<a::T, (int)4, true>(a::X, int)` as `kernel<T, 4, true>`."""
    depth = 0
    for end, letter in enumerate(demangled):  # up to the parameters; template arguments may hold brackets, too
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and not demangled.startswith("(anonymous namespace)", end):
            demangled = demangled[:end]
            break
    name = re.sub(r"\((?!anonymous)[\w:]+\)", "", demangled.removeprefix("void "))
    return re.sub(r"(?:\w+|\(anonymous namespace\))::", "", name)


def _printed(option: str, file: Path) -> list[str]:
    # cuobjdump looks for nvdisasm on PATH.
    folders = {str(Path(found).parent) for found in map(find_tool, ("cuobjdump", "nvdisasm")) if found}
    path = ":".join([*sorted(folders), "/usr/bin", "/bin"])
    command = [str(find_tool("cuobjdump")), option, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": path})
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} {file} failed: {done.stderr.strip()}")
    return done.stdout.splitlines()


@cache
def _name_of(mangled: str) -> str:
    done = subprocess.run([str(find_tool("c++filt")), mangled], capture_output=True, text=True, check=True)
    return short_name(done.stdout.strip())


def _functions(lines: Sequence[str]) -> Iterator[tuple[Key, str]]:
    """The lines that belong to a kernel, with its key."""
    arch, kernel = 0, ""
    for line in lines:
        found = re.match(r"arch = sm_(\d+)", line)
        if found:
            arch, kernel = int(found[1]), ""
            continue
        found = re.match(r"\s*Function : (.+)$|\s*Function (.+):$", line) if "Function" in line else None
        if found:
            kernel = _name_of(found[1] or found[2])
        elif kernel:
            yield (kernel, arch), line


def usages(files: Sequence[Path]) -> dict[Key, Usage]:
    """Of every kernel in the files, as the compiler recorded it."""
    found = {}
    for file in files:
        for key, line in _functions(_printed("-res-usage", file)):
            number = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}
            if "REG" in number:
                # From sm_90 on, `shared` counts the 1 KiB of each block that the system keeps to itself.
                found[key] = Usage(number["REG"], number["SHARED"], number["LOCAL"] + number["STACK"])
    return found


def listings(files: Sequence[Path]) -> dict[Key, list[Instruction]]:
    """The instructions of every kernel, in the order of their addresses."""
    found: dict[Key, list[Instruction]] = {}
    for file in files:
        for key, line in _functions(_printed("-sass", file)):
            match = INSTRUCTION.match(line)
            if match:
                found.setdefault(key, []).append(Instruction(int(match[1], 16), match[2], match[3]))
    return found


def main_loop(listing: Sequence[Instruction]) -> Loop | None:
    """Figures of the main loop, or None if the kernel has no products in a loop."""
    bodies = []
    for last in listing:
        target = re.search(r"0x([0-9a-f]+)\s*$", last.operands) if last.opcode.startswith("BRA") else None
        if target and int(target[1], 16) < last.address:
            body = [each.opcode for each in listing if int(target[1], 16) <= each.address <= last.address]
            bodies.append((sum(opcode.startswith("HMMA") for opcode in body), -len(body), body))
    mma, _, body = max(bodies, default=(0, 0, []))
    if mma == 0:
        return None
    products = [i for i, opcode in enumerate(body) if opcode.startswith("HMMA")]
    following = [*products[1:], products[0] + len(body)]
    gap = max(after - before - 1 for before, after in zip(products, following, strict=True))
    alu, shared = (sum(map(bool, map(kind.match, body))) for kind in (ALU, SHARED))
    return Loop(mma, len(body), alu, shared, gap)


def read_budgets() -> dict[Key, Budget]:
    """What a kernel may take: registers a thread, bytes of shared memory a block, instructions of its main loop."""
    table = json.loads(BUDGETS.read_text(encoding="utf-8"))
    return {
        (kernel, int(arch)): Budget(registers, shared, Loop(**loop[0]) if loop else None)
        for kernel, row in table.items()
        for arch, (registers, shared, *loop) in row.items()
    }


def main(arguments: Sequence[str]) -> None:
    files = [Path(argument) for argument in arguments if argument != "--write"]
    if missing_tools() or not files:
        raise SystemExit(missing_tools() or __doc__)
    found, code = usages(files), listings(files)
    kernels = {kernel for kernel, _ in found}
    old = read_budgets() if "--write" in arguments and BUDGETS.exists() else {}
    every = {key: budget for key, budget in old.items() if key[0] in kernels}  # without kernels that are gone
    every |= {key: Budget(used.registers, used.shared, main_loop(code.get(key, []))) for key, used in found.items()}
    table: dict[str, dict[str, list[object]]] = {}
    for (kernel, arch), budget in sorted(every.items()):
        loop = [budget.loop._asdict()] if budget.loop else []
        table.setdefault(kernel, {})[str(arch)] = [budget.registers, budget.shared, *loop]
    rows = [f"{json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in table.items()]
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    if "--write" in arguments:
        BUDGETS.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
