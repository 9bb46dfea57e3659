"""What the build chooses by itself: GPU architectures, and which code the linker may take from which object."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import program
from laws import ROOT

MINIMUM = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8").partition("\n")[0]
CUDA_12_0 = "50 60 70 75 80 86 87 89 90"
CUDA_13_0 = "75 80 86 87 88 89 90 100 110 103 120 121"


def write_program(file: Path, lines: str) -> None:
    """A shell script that runs these lines."""
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(f"#!/bin/sh\n{lines}\n")
    file.chmod(0o755)


def script_prints(lines: str, folder: Path, environment: dict[str, str]) -> str:
    """What these lines of CMake print as messages, in this folder, with this environment beside CMake's own needs."""
    script = folder / "script.cmake"
    script.write_text(f"{MINIMUM}\n{lines}")  # without it the policies of the oldest cmake hold, which lack IN_LIST
    command = [program("cmake"), "-P", str(script)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return done.stderr


@pytest.mark.parametrize(
    ("known", "cards", "wanted", "expected"),
    [
        (CUDA_13_0, None, "", "75;80;86;89;90;100;120"),
        (CUDA_12_0, None, "", "75;80;86;89;90"),
        ("35 50 70", None, "", ""),
        (CUDA_13_0, "", "", "75;80;86;89;90;100;120"),  # a driver that fails, or sees no card
        (CUDA_13_0, "9.0 8.9 9.0", "", "89;90"),
        (CUDA_13_0, "12.1", "", "121"),
        (CUDA_13_0, "10.0 9.0", "", "90;100"),
        (CUDA_12_0, "12.0", "", "75;80;86;89;90"),  # newer than nvcc: PTX serves it
        (CUDA_12_0, "7.0 8.0", "", "80"),
        (CUDA_12_0, "6.1", "", "75;80;86;89;90"),
        (CUDA_13_0, "9.0", "all", "75;80;86;89;90;100;120"),
        (CUDA_13_0, "9.0", "86;80", "80;86"),
        (CUDA_13_0, "9.0", "sm_80", "sm_80"),  # refused later, in words
    ],
)
def test_architectures(known: str, cards: str | None, wanted: str, expected: str, tmp_path: Path) -> None:
    """For an nvcc that supports ``known``, beside cards of these capabilities; None: no driver."""
    programs = {"nvcc": " ".join(f"sm_{arch}" for arch in known.split())}
    if cards is not None:
        programs["nvidia-smi"] = cards
    for name, words in programs.items():
        write_program(tmp_path / name, f"printf '%s\\n' {words}\n[ -n '{words}' ]")
    printed = script_prints(
        f'include("{ROOT}/cmake/cuda_archs.cmake")\n'
        f'choose_cuda_archs(chosen "{tmp_path}/nvcc" "{wanted}")\nmessage("${{chosen}}")\n',
        tmp_path,
        {"PATH": f"{tmp_path}:{os.defpath}"},
    )
    assert printed.strip() == expected


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("75 80 86 89 90 100 120", "80;120"),
        ("75 80 86 89 90", "90"),
        ("80 90", "90"),
        ("80 110", "110"),
        ("80 110 120", "120"),
        ("120", "120"),  # somebody's card
        ("75", "75"),
    ],
)
def test_ptx_serves_the_cards_without_machine_code(archs: str, expected: str, tmp_path: Path) -> None:
    lines = f'include("{ROOT}/cmake/cuda_archs.cmake")\nchoose_cuda_ptx(chosen {archs})\nmessage("${{chosen}}")\n'
    assert script_prints(lines, tmp_path, {"PATH": os.defpath}).strip() == expected


# What nvcc 12.4 says beside GCC 14, and an nvcc that works.
TOO_NEW = """\
In file included from <command-line>:
/usr/include/crt/host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 13 are not \\
supported!"""
REFUSES = f"cat <<'END'\n{TOO_NEW}\nEND\nexit 1"
WORKS = "exit 0"


@pytest.mark.parametrize(
    ("nvcc", "cards", "environment", "found", "lacking", "warning"),
    [
        ({}, None, {}, "", "no nvcc was found", ""),
        ({}, "exit 1", {}, "", "no nvcc was found", ""),  # a driver that fails, or sees no card
        ({}, "echo 8.9", {}, "", "no nvcc was found", "a GPU, but no nvcc"),
        ({"path": REFUSES}, None, {}, "path", "fails: /usr/include/crt/host_config.h:143:2: error", "later than 13"),
        ({"path": "exit 3"}, None, {}, "path", "fails: ", "(3)"),
        ({"path": WORKS}, None, {}, "path", "", ""),
        ({"cuda/bin": WORKS, "cuda-13.0/bin": WORKS}, None, {}, "cuda/bin", "", ""),
        ({"cuda-9.2/bin": WORKS, "cuda-12.9/bin": WORKS}, None, {}, "cuda-12.9/bin", "", ""),
        ({"home/bin": WORKS, "path": WORKS}, None, {"CUDA_HOME": "home"}, "home/bin", "", ""),
        ({"home/bin": WORKS, "path": WORKS}, None, {"CUDA_PATH": "home"}, "home/bin", "", ""),
        ({"own": WORKS, "home/bin": WORKS}, None, {"CUDA_HOME": "home", "CUDACXX": "own/nvcc"}, "own", "", ""),
        ({"own": '[ "$1" = -v ]'}, None, {"CUDACXX": "own/nvcc -v"}, "own", "", ""),
        ({"path": WORKS}, None, {"CUDACXX": ""}, "path", "", ""),
        (
            {"path": '[ "$1 $2" = "-v -ccbin=g++-13" ]'},
            None,
            {"CUDAFLAGS": "-v", "CUDAHOSTCXX": "g++-13"},
            "path",
            "",
            "",
        ),
    ],
)
def test_an_nvcc_is_found_or_the_build_says_why_not(
    nvcc: dict[str, str],
    cards: str | None,
    environment: dict[str, str],
    found: str,
    lacking: str,
    warning: str,
    tmp_path: Path,
) -> None:
    """Folder of each nvcc, and the shell lines that it and nvidia-smi run; names of folders in the environment."""
    for folder, lines in nvcc.items():
        write_program(tmp_path / folder / "nvcc", lines)
    if cards is not None:
        write_program(tmp_path / "path" / "nvidia-smi", cards)
    names = {
        name: value if name in ("CUDAFLAGS", "CUDAHOSTCXX") or not value else f"{tmp_path}/{value}"
        for name, value in environment.items()
    }
    printed = script_prints(
        f'include("{ROOT}/cmake/find_nvcc.cmake")\nfind_nvcc(nvcc lacking "{tmp_path}")\n'
        f'message("found: ${{nvcc}}\nlacking: ${{lacking}}")\n',
        tmp_path,
        {"PATH": f"{tmp_path}/path:/usr/bin:/bin", **names},
    )
    before, lines = printed.split("found: ")
    path, why = lines.split("\nlacking: ")
    assert path.partition(";")[0] == (f"{tmp_path}/{found}/nvcc" if found else "")
    assert lacking in why if lacking else not why.strip()
    assert warning in " ".join(before.split()) if warning else not before


# An nvcc that has the architectures of CUDA 12.0, over the real one.
NVCC_12_0 = """#!/bin/sh
case "$*" in
--list-gpu-code) printf 'sm_%s\\n' {known} ;;
--version) echo 'Cuda compilation tools, release 12.0, V12.0.140' ;;
*_1[0-9][0-9]*) echo "nvcc fatal   : Unsupported gpu architecture in '$*'" >&2; exit 1 ;;
*) exec {nvcc} "$@" ;;
esac
"""


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """CMake over an nvcc as of CUDA 12.0, for the CUDA library alone, in the folder ``build`` of its result."""
    cmake, nvcc, _ = map(program, ("cmake", "nvcc", "ninja"))
    folder = tmp_path_factory.mktemp("cuda_12_0")
    wrapper = folder / "nvcc"
    wrapper.write_text(NVCC_12_0.format(known=CUDA_12_0, nvcc=nvcc))
    wrapper.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QLORA_NATIVE_")}

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        command = [cmake, "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja", "-DQLORA_NATIVE_PYTHON=OFF"]
        command += ["-DQLORA_NATIVE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={wrapper}", *options]
        return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)

    return call


def cuda_commands(configured: subprocess.CompletedProcess[str]) -> list[str]:
    """How the files of kernels are compiled."""
    assert configured.returncode == 0, configured.stderr[-3000:]
    build = Path(re.findall(r"Build files have been written to: (.*)", configured.stdout)[0])
    commands = json.loads((build / "compile_commands.json").read_text())
    return [entry["command"] for entry in commands if entry["file"].endswith(".cu")]


@pytest.mark.long
def test_an_nvcc_without_the_newest_architectures_builds_those_it_has(
    configure: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    configured = configure("-DQLORA_NATIVE_CUDA_ARCHS=all", "-DQLORA_NATIVE_WERROR=OFF")
    for command in cuda_commands(configured):
        codes = {code for group in re.findall(r",code=\[([^\]]*)\]", command) for code in group.split(",")}
        assert codes == {"compute_90", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90"}
    build = re.findall(r"Build files have been written to: (.*)", configured.stdout)[0]
    ninja = ["ninja", "-C", build, "CMakeFiles/qlora_native_cuda.dir/cuda/tables.cu.o"]
    built = subprocess.run(ninja, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:]


def test_an_architecture_that_nvcc_lacks_is_refused_in_words(
    configure: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    configured = configure("-DQLORA_NATIVE_CUDA_ARCHS=90;120")
    assert configured.returncode != 0
    words = "QLORA_NATIVE_CUDA_ARCHS asks for 120, which the nvcc of CUDA 12.0 does not compile for"
    assert words in " ".join(configured.stderr.split())


def test_warnings_stop_only_the_builds_of_ci(configure: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for option, expected in (("OFF", False), ("ON", True)):
        for command in cuda_commands(configure("-DQLORA_NATIVE_CUDA_ARCHS=80", f"-DQLORA_NATIVE_WERROR={option}")):
            assert ("-Werror" in command) == ("-warn-spills" in command) == expected, command


def weak_functions(listing: str) -> set[str]:
    """Object and name of each weak function that an instruction set's flags made, in what `nm` prints of an archive."""
    found, name = set(), ""
    for line in listing.splitlines():
        if line.endswith(":"):
            name = line
        elif re.match(r"isa_(?!scalar)", name) and re.match(r"[0-9a-f]+ W ", line):  # V and u are data
            found.add(name + line.split(" W ")[1])
    return found


def test_no_kernel_object_offers_code_for_all() -> None:
    """Of equal weak functions the linker keeps any one: one with AVX-512 in it would end other CPUs with SIGILL."""
    nm = program("nm")
    archives = sorted(ROOT.glob("build/cp3*/libqlora_native_cpu.a"))
    if not archives:
        pytest.skip("no build folder, so the library was built elsewhere")
    for archive in archives:
        listing = subprocess.run([nm, "-C", "--defined-only", str(archive)], capture_output=True, text=True, check=True)
        assert "isa_scalar" in listing.stdout and not weak_functions(listing.stdout), archive


@pytest.mark.parametrize("kind", ["Debug", "MinSizeRel"])
def test_kernels_are_optimized_in_every_kind_of_build(kind: str, tmp_path: Path) -> None:
    """Without inlining their objects would offer weak functions with AVX-512 in them."""
    cmake, _ = map(program, ("cmake", "ninja"))
    options = [f"-DCMAKE_BUILD_TYPE={kind}", "-DQLORA_NATIVE_PYTHON=OFF", "-DQLORA_NATIVE_CUDA=OFF"]
    subprocess.run([cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options], capture_output=True, check=True)
    commands = {
        Path(entry["file"]).stem: entry["command"]
        for entry in json.loads((tmp_path / "compile_commands.json").read_text())
    }
    kernels = [command for name, command in commands.items() if re.match(r"isa_(?!scalar)", name)]
    assert kernels and all(re.findall(r" -O\w*", command)[-1] == " -O3" for command in kernels)


def test_a_weak_function_is_seen() -> None:
    line = "0000000000000000 W float std::max<float>(float const&, float const&)"
    assert weak_functions(f"isa_avx512.cc.o:\n{line}\n") and not weak_functions(f"isa_scalar.cc.o:\n{line}\n")
    assert not weak_functions("isa_avx512.cc.o:\n0000000000000000 V qlora_native::kNestedCode\n")
