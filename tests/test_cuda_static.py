"""Proofs about the compiled GPU code that need no GPU: budgets of registers and memory, and the opcodes that are meant.

The build itself refuses warnings, spills and local memory (cmake/cuda_library.cmake).
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from operator import gt
from pathlib import Path
from typing import NamedTuple

import cuda_static
import pytest
from cuda_static import Budget, Instruction, Key, Loop, Usage
from helpers import program
from laws import ROOT

import qlora_native as qn

MOST_BYTES = 40_000_000  # of the module with all architectures
STATIC_SHARED = 48 << 10  # bytes a block may declare; more is asked for at the launch


class Rule(NamedTuple):
    """How often an instruction stands in the kernels whose name matches, on the architectures in between."""

    kernels: str  # a regular expression for the whole short name
    opcode: str  # a regular expression for the whole opcode
    least: int = 1
    most: int | None = None
    since: int = 75
    until: int = 999
    required: bool = True  # some kernel of this name must be there


TILE, FRAGMENT, SMALL = "linear_4bit_tile_kernel", "linear_4bit_fragment_kernel", "linear_4bit_small_kernel"
BLOCKS, BLOCK_TILE = "linear_4bit_gguf_kernel", "linear_4bit_gguf_tile_kernel"
# Of m16n8k16 at least; sm_75 has some of half the depth.
PRODUCTS = {TILE: 10, SMALL: 8, FRAGMENT: 16, BLOCKS: 16, BLOCK_TILE: 32}
RULES = (
    Rule(r".*", r"(LDL|STL)(\..*)?", least=0, most=0),
    # Products on the tensor cores, with the shapes that each architecture has; sm_75 has none in bf16, and its kernel
    # in that type is a trap that the plan never chooses.
    *(Rule(kernel + "<Bf16, .*>", r"HMMA\.16816\.F32\.BF16", least=n, since=80) for kernel, n in PRODUCTS.items()),
    *(Rule(kernel + "<Fp16, .*>", r"HMMA\.16816\.F32", least=n, since=80) for kernel, n in PRODUCTS.items()),
    *(Rule(kernel + "<Fp16, .*>", r"HMMA\.1688\.F32", least=2 * n, until=75) for kernel, n in PRODUCTS.items()),
    Rule("linear_4bit_(tile|fragment|small|gguf|gguf_tile)_kernel<Bf16, .*>", r"HMMA.*", least=0, most=0, until=75),
    # Tiles come by asynchronous copies of 16 bytes and go to the tensor cores by ldmatrix, transposed for W backward.
    Rule(TILE + "<.*>", r"LDGSTS\.E\.BYPASS\.LTC128B\.128(\.ZFILL)?", least=8, since=80),
    Rule(TILE + "<.*>", r"LDGSTS.*", least=0, most=0, until=75),
    Rule(TILE + "<.*>", r"LDSM\.16\.M88\.4", least=5, since=80),
    Rule(TILE + "<.*, true>", r"LDSM\.16\.MT88.*", least=0, most=0),
    Rule(TILE + "<.*, false>", r"LDSM\.16\.MT88\.4", least=5, since=80),
    # Up to 64 tokens W goes from memory into fragments; x comes by asynchronous copies and loads of 16 bytes.
    Rule(FRAGMENT + "<.*>", r"LDG\.E\.EF\.128", least=4, since=80),
    Rule(FRAGMENT + "<.*>", r"LDGSTS\.E\.BYPASS\.LTC128B\.128(\.ZFILL)?", least=2, since=80),
    Rule(FRAGMENT + "<.*>", r"LDS(\.U)?\.128", least=12, since=80),
    Rule(FRAGMENT + "<.*>", r"STS\.128", least=0, most=5, since=80),  # levels and the low-rank term: 8 with W
    # Few tokens: packed weights in loads of 16 bytes that leave the cache first, tokens in loads that stay.
    Rule(SMALL + "<.*>", r"LDG\.E\.EF\.128", least=4, since=80),
    Rule(SMALL + "<.*>", r"LDG\.E\.128", least=4, since=80),
    Rule(SMALL + "<.*>", r"LDS", least=32, since=80),  # two weights a load from the table of pairs
    # Blocks of GGUF come by asynchronous copies of 16 bytes, tokens as above; a weight takes one FFMA, one of
    # MXFP4 (11) an FMUL.
    Rule(BLOCKS + "<.*>", r"LDGSTS\.E\.BYPASS\.LTC128B\.128(\.ZFILL)?", least=6, since=80),
    Rule(BLOCKS + "<.*>", r"LDG\.E\.128", least=8, since=80),
    Rule(BLOCK_TILE + "<.*>", r"LDGSTS\.E\.BYPASS\.LTC128B\.128(\.ZFILL)?", least=8, since=80),
    Rule(BLOCK_TILE + "<.*>", r"LDS(\.U)?\.128", least=16, since=80),
    Rule("linear_4bit_gguf(_tile)?_kernel<(?!.* 11>).*>", r"FFMA(\..*)?", least=64, since=80),
    Rule("linear_4bit_gguf(_tile)?_kernel<.* 11>.*", r"FMUL(\..*)?", least=64, since=80),
    Rule("linear_4bit_gguf(_tile)?_kernel<.*>", r"I2F.*", least=0, most=16),  # of scales and epilogues' divisions
    Rule("linear_4bit_reduce_kernel<.*>", r"LDG\.E\.128.*"),
    Rule("linear_4bit_reduce_kernel<.*>", r"STG\.E\.128.*"),
    # Passes over memory: 16 bytes at a time, 8 of 16-bit gradients and parameters. The optimizers' pointers come from a
    # table, so their loads are generic.
    Rule(r"dequantize_4bit_kernel<(Bf16|Fp16)>", r"STG\.E\.128.*", least=3),
    Rule(r"dequantize_4bit_kernel<float>", r"STG\.E\.128.*", least=8),
    Rule(r"dequantize_gguf_kernel<.*>", r"STG\.E\.128.*", least=1),
    Rule(r"dequantize_gguf_kernel<.*>", r"LDG\.E\.EF(\.SYS)?", least=1),  # words, of blocks at multiples of 4 bytes
    Rule(r"quantize_4bit_kernel<.*>", r"LDG\.E\.EF\.128.*", least=2),
    Rule(r"(adamw|lion)_step_kernel<.*>", r"LDG\.E\.EF\.128.*", least=3),
    Rule(r"(adamw|lion)_step_kernel<.*>", r"LDG\.E\.EF\.64.*", least=6),
    Rule(r"adamw_step_kernel<.*>", r"(LD|ST)G?\.E\.128.*", least=18),
    Rule(r"lion_step_kernel<.*>", r"(LD|ST)G?\.E\.128.*", least=12),
    Rule(r"softmax_loss_kernel<.*>", r"LDG\.E\.128.*", least=4),
    Rule(r"softmax_loss_kernel<.*>", r"STG\.E\.128.*"),
    Rule(r"elementwise_kernel<.*>", r"LDG\.E\.EF\.128.*", least=2),
    Rule(r"elementwise_kernel<.*>", r"STG\.E\.128.*"),
    Rule(r"rotary_kernel<.*, [48]>", r"LDG\.E\.EF\.128.*", least=2),
    Rule(r"rotary_kernel<.*, [48]>", r"STG\.E\.128.*", least=2),
    # Rows to shared memory by asynchronous copies, from there 16 bytes at a time.
    Rule(r"row_kernel<.*, true, .*>", r"LDGSTS\.E\.BYPASS\.LTC128B\.128", least=2, since=80),
    Rule(r"row_kernel<.*, true, .*>", r"LDS\.(U\.)?128", least=2),
    Rule(r"row_kernel<.*, true, .*>", r"STG\.E\.128.*"),
    # A scalar store would be a vector's that the compiler took apart.
    Rule(r"rotary_kernel<.*, [48]>", r"STG\.E(\.SYS)?", least=0, most=0),
    Rule(r"row_kernel<.*, true, RmsNormGrad>", r"STG\.E(\.SYS)?", least=0, most=0),
)


@pytest.fixture(scope="module")
def module(request: pytest.FixtureRequest) -> Path:
    """The file that is read: that of --cuda-binary, or the installed module."""
    reason = cuda_static.missing_tools()
    if reason:
        pytest.skip(reason)
    given = request.config.getoption("--cuda-binary")
    if given:
        return Path(given)
    if not qn.build_info()["cuda"]:
        pytest.skip("no nvcc on PATH when this was built")
    from qlora_native import _cuda

    return Path(_cuda.__file__)


@pytest.fixture(scope="module")
def usages(module: Path) -> dict[Key, Usage]:
    return cuda_static.usages([module])


@pytest.fixture(scope="module")
def listings(module: Path) -> dict[Key, list[Instruction]]:
    return cuda_static.listings([module])


def test_every_architecture_has_every_kernel(module: Path, usages: dict[Key, Usage]) -> None:
    kernels: dict[int, set[str]] = {}
    for kernel, arch in usages:
        kernels.setdefault(arch, set()).add(kernel)
    budgeted = {kernel for kernel, _ in cuda_static.read_budgets()}
    assert kernels and all(names == budgeted for names in kernels.values())
    if module.name.startswith("_cuda"):
        assert sorted(kernels) == qn.build_info()["cuda_archs"]


def breaches(usages: dict[Key, Usage], budgets: dict[Key, Budget], exact: bool) -> list[str]:
    """What no kernel may do; with ``exact``, the table's figures hold, else the hardware's limits alone."""
    found = []
    for (kernel, arch), usage in sorted(usages.items()):
        where = f"{kernel} for sm_{arch}"
        if usage.local:
            found.append(f"{where} takes {usage.local} bytes of local memory a thread: expected none")
        if usage.shared > STATIC_SHARED + 1024:
            found.append(f"{where} declares {usage.shared} bytes of shared memory: at most {STATIC_SHARED} may be")
        if (kernel, arch) not in budgets:
            found.append(f"{where} has no budget: run tests/cuda_static.py --write on a build and look at the row")
        elif exact:
            rows = zip(("registers", "bytes of shared memory"), usage[:2], budgets[kernel, arch][:2], strict=True)
            found += [f"{where} takes {used} {what}, its budget is {most}" for what, used, most in rows if used > most]
    return found


def is_exact() -> bool:
    """Whether the table's compiler made the module: another one may need a few registers or instructions more."""
    if not qn.build_info()["cuda"]:  # a file was given
        return True
    from qlora_native import _cuda

    version = _cuda.runtime_version()  # of the nvcc behind the module, e.g. 13000
    return f"{version // 1000}.{version % 1000 // 10}" == cuda_static.COMPILER


def test_kernels_keep_to_their_budgets(usages: dict[Key, Usage]) -> None:
    found = breaches(usages, cuda_static.read_budgets(), is_exact())
    assert not found, "\n" + "\n".join(found)


SMALL_MMA = 8  # of m16n8k16 in a warp-step of 2,048 weights and up to four tokens; sm_75 has products of half the depth
MOST_ALU = 150  # in such a step, of up to four tokens: 26 weights a clock and SM, what the memory of an A100 delivers
MOST_GAP = 48  # between two products of a 128-row tile: more, and the tensor cores wait for the decoder


def loop_breaches(loops: Mapping[Key, Loop | None], budgets: dict[Key, Budget], exact: bool) -> list[str]:
    """What main loops may not do; with ``exact``, the table's figures hold, else the bars alone."""
    found = []
    for (kernel, arch), loop in sorted(loops.items()):
        if loop is None:
            continue
        where = f"the main loop of {kernel} for sm_{arch}"
        steps = loop.mma / SMALL_MMA / (2 if arch == 75 else 1)
        if re.fullmatch(r"linear_4bit_small_kernel<\w+, 1>", kernel) and loop.alu > MOST_ALU * steps:
            found.append(f"{where} has {loop.alu / steps:.0f} ALU instructions a step: at most {MOST_ALU} may be")
        if re.fullmatch(r"linear_4bit_tile_kernel<\w+, TileShape<3,.*", kernel) and loop.gap > MOST_GAP:
            found.append(f"{where} has {loop.gap} instructions between two products: at most {MOST_GAP} may be")
        budget = budgets[kernel, arch].loop if (kernel, arch) in budgets else None
        if exact and (budget is None or loop.mma != budget.mma or any(map(gt, loop, budget))):
            found.append(f"{where} has {loop}, its budget is {budget}")
    return found


def test_main_loops_keep_to_their_budgets(listings: dict[Key, list[Instruction]]) -> None:
    loops = {key: cuda_static.main_loop(listing) for key, listing in listings.items()}
    assert any(loops.values())
    found = loop_breaches(loops, cuda_static.read_budgets(), is_exact())
    assert not found, "\n" + "\n".join(found)


def unmet(counts: dict[Key, Counter[str]], rules: tuple[Rule, ...]) -> list[str]:
    """The rules that do not hold, in words."""
    found = []
    for rule in rules:
        here = {key: counter for key, counter in sorted(counts.items()) if rule.since <= key[1] <= rule.until}
        meant = {key: counter for key, counter in here.items() if re.fullmatch(rule.kernels, key[0])}
        for (kernel, arch), counter in meant.items():
            count = sum(n for opcode, n in counter.items() if re.fullmatch(rule.opcode, opcode))
            if count < rule.least or (rule.most is not None and count > rule.most):
                bounds = f"at least {rule.least}" if rule.most is None else f"{rule.least} to {rule.most}"
                found.append(f"{kernel} for sm_{arch} has {count} of {rule.opcode}: expected {bounds}")
        if rule.required and here and not meant:
            found.append(f"no kernel is called {rule.kernels}: correct the rule")
    return found


def test_kernels_have_the_instructions_that_are_meant(listings: dict[Key, list[Instruction]]) -> None:
    opcodes = {key: Counter(each.opcode for each in listing) for key, listing in listings.items()}
    found = unmet(opcodes, RULES)
    assert not found, "\n" + "\n".join(found)


def test_the_module_is_small(module: Path) -> None:
    assert module.stat().st_size < MOST_BYTES


@pytest.mark.parametrize(
    ("kernel", "usage", "exact", "said"),
    [
        ("a", Usage(32, 64, 0), True, None),
        ("a", Usage(33, 64, 0), True, "takes 33 registers, its budget is 32"),
        ("a", Usage(32, 65, 0), True, "takes 65 bytes of shared memory"),
        ("a", Usage(33, 65, 0), False, None),
        ("a", Usage(32, 64, 8), False, "8 bytes of local memory"),
        ("a", Usage(32, 50_177, 0), False, "declares 50177 bytes"),
        ("b", Usage(32, 64, 0), False, "has no budget"),
    ],
)
def test_a_breach_of_a_budget_is_seen(kernel: str, usage: Usage, exact: bool, said: str | None) -> None:
    found = breaches({(kernel, 80): usage}, {("a", 80): Budget(32, 64)}, exact)
    assert len(found) == (said is not None) and (said or "") in "".join(found)


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a0000017a02 */
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;   /* 0x0000000c0804723c */
                                                                           /* 0x000fe20000041804 */
        /*0020*/                   LOP3.LUT R2, R2, 0x7f80, R3, 0xf8, !PT ;
        /*0030*/                   IMAD.SHL.U32 R2, R2, 0x80, RZ ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/                   LDS R5, [R2+0x400] ;
        /*0060*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0080*/              @P1  BRA 0x10 ;
        /*0090*/                   BRA 0x90;
"""


def test_the_main_loop_is_found_and_counted() -> None:
    matches = [cuda_static.INSTRUCTION.match(line) for line in LISTING.splitlines()]
    listing = [Instruction(int(found[1], 16), found[2], found[3]) for found in matches if found]
    assert len(listing) == 10 and listing[1].opcode == "HMMA.16816.F32.BF16"
    assert cuda_static.main_loop(listing) == Loop(mma=2, instructions=8, alu=1, shared=2, gap=5)
    assert cuda_static.main_loop(listing[2:5]) is None and cuda_static.main_loop([]) is None


def test_a_breach_of_a_loop_is_seen() -> None:
    small, tile = "linear_4bit_small_kernel<Bf16, 1>", "linear_4bit_tile_kernel<Bf16, TileShape<3, 2, 4>, true>"
    good = {(small, 80): Loop(16, 500, 300, 64, 90), (small, 75): Loop(16, 250, 150, 32, 90), ("other", 80): None}
    budgets = {key: Budget(1, 1, loop) for key, loop in good.items()}
    assert loop_breaches(good, budgets, exact=True) == []
    today = {(small, 80): Loop(8, 372, 273, 0, 124), (tile, 90): Loop(64, 391, 250, 35, 300)}
    said = [breach.split(" has ")[1] for breach in loop_breaches(today, budgets, exact=False)]
    assert [re.findall(r"\b\d+\b", words) for words in said] == [["273", "150"], ["300", "48"]]
    assert len(loop_breaches({(small, 80): Loop(16, 501, 300, 64, 90)}, budgets, exact=True)) == 1
    assert len(loop_breaches({(tile, 80): Loop(64, 300, 200, 35, 10)}, budgets, exact=True)) == 1


def test_a_missing_instruction_is_seen() -> None:
    counts = {("mma<T>", 75): Counter({"HMMA.1688.F32": 2}), ("mma<T>", 80): Counter({"LDSM.16.M88.4": 1, "STL": 1})}
    met = (Rule("mma<.*>", r"LDSM\..*", since=80), Rule("mma<.*>", r"HMMA\.1688\.F32", least=2, most=2, until=75))
    assert unmet(counts, met) == []
    assert unmet(counts, (Rule("gemv", "LDG", required=False), Rule("gemv", "LDG", since=90))) == []
    assert "has 0 of LDGSTS.*: expected at least 1" in unmet(counts, (Rule("mma<.*>", "LDGSTS.*", since=80),))[0]
    assert "mma<T> for sm_80 has 1 of (LDL|STL)" in unmet(counts, RULES[:1])[0]
    assert "no kernel is called gemv" in unmet(counts, (Rule("gemv", "LDG"),))[0]


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("void a::b::kernel<a::T, false>(a::View, int, a::T*)", "kernel<T, false>"),
        ("void a::kernel<(int)4, (bool)1>(float*)", "kernel<4, 1>"),
        ("void a::(anonymous namespace)::kernel<a::X<(a::Kind)2>, 3>(a::X<(a::Kind)2>)", "kernel<X<2>, 3>"),
        ("spills(float*)", "spills"),
    ],
)
def test_names_are_short(demangled: str, short: str) -> None:
    assert cuda_static.short_name(demangled) == short


SPILLS = """
__global__ void __launch_bounds__(1024, 2) spills(float* p) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = a[63 - i] * a[i];
}
"""


def test_the_build_refuses_a_kernel_that_spills(tmp_path: Path) -> None:
    nvcc = cuda_static.find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    program("c++")
    library = (ROOT / "cmake" / "cuda_library.cmake").read_text(encoding="utf-8")
    flags = [word for line in re.findall(r'SHELL:([^">]+)', library) for word in line.split()]
    assert "all-warnings" in flags and "-warn-spills,-warn-lmem-usage" in flags
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS, encoding="utf-8")
    command = [nvcc, "-arch=sm_80", "-cubin", "-o", str(tmp_path / "out"), str(source)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    refused = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert refused.returncode != 0 and "spilled to local memory" in refused.stderr + refused.stdout
