# Shared by .ci/run and .ci/full: sections that are timed and counted, and what pip cannot install.
# Sourced, with the root of the repository as the working directory.
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
export QLORA_NATIVE_WERROR=ON
no_hang=(-o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true)  # a test that hangs says where and fails
export QLORA_NATIVE_CACHE=$scratch/cache
unset QLORA_NATIVE_ISA PYTHONPATH
summary=()
failures=0
optional=()  # names of sections that may be left out, where neither pip nor apt brings what they need

left_out() {  # left_out REASON: at the end of a section that cannot run here; a failure, unless it is optional
    reason=$*
    echo "$reason"
    return 77
}

cpu_seconds() {  # of all processes that ended and were waited for, from `times`, which knows those of its own shell
    awk -F '[ms ]+' 'END {print int(60 * ($1 + $3) + $2 + $4)}' "$scratch/times"
}

section() {  # section NAME COMMAND...: runs it in this shell, prints its seconds, counts a failure and goes on
    local name=$1 start=$SECONDS cpu status=0 verdict=ok
    shift
    printf '\n===== %s =====\n' "$name"
    times >"$scratch/times"
    cpu=$(cpu_seconds)
    "$@" </dev/null || status=$?
    times >"$scratch/times"
    cpu=$(($(cpu_seconds) - cpu))
    if [ "$status" -eq 77 ]; then
        verdict="left out: ${reason:-for no reason}"
        [[ " ${optional[*]/#/|} " == *"|$name "* ]] && status=0 || verdict="FAILED: $verdict"
        [ "$status" -eq 0 ] || failures=$((failures + 1))
    elif [ "$status" -ne 0 ]; then
        verdict="FAILED (status $status)"
        failures=$((failures + 1))
    fi
    summary+=("$(printf '%-34s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")")
    echo "----- $name: $verdict after $((SECONDS - start)) s, $cpu s of CPU"
    return "$status"
}

print_summary() {
    printf '\n===== summary =====\n'
    printf '%s\n' "${summary[@]}"
}

is_usable_python() {  # 3.10 or newer, able to make a virtual environment and to compile an extension module
    "$1" - 2>/dev/null <<'PY'
import ensurepip, pathlib, sys, sysconfig, venv
sys.exit(not (sys.version_info >= (3, 10) and pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()))
PY
}

find_python() {  # prints the first usable one
    local candidate
    for candidate in python3 /usr/bin/python3 python3.13 python3.12 python3.11 python3.10; do
        is_usable_python "$candidate" && echo "$candidate" && return 0
    done
    return 1
}

python_of() {  # python_of 3.13: prints a usable interpreter of that version: on PATH, or of pyenv
    local candidate
    for candidate in $(type -ap "python$1") "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        is_usable_python "$candidate" && echo "$candidate" && return 0
    done
    return 1
}

find_compiler() {
    command -v "${CXX:-c++}" || command -v g++ || command -v clang++
}

# A CUDA compiler of NVIDIA's wheels: nvcc_wheels RELEASE. Sets nvcc_folder, where it and its readers lie.
nvcc_wheels() {
    local environment=$scratch/nvcc-$1 name wanted=() toolkit
    for name in cuda-nvcc cuda-crt nvvm cuda-runtime; do wanted+=("nvidia-$name==$1.*"); done
    wanted+=("nvidia-cuda-cccl<${1%.*}.$((${1#*.} + 1))")  # which is not in every release
    "$(find_python)" -m venv "$environment" && "$environment/bin/python" -m pip install -q "${wanted[@]}" \
        -r .ci/requirements-cubin.txt || return
    toolkit=$(echo "$environment"/lib/python3*/site-packages/nvidia/cu13)
    # The names under which CMake and nvcc look for the runtime, which wheels leave out.
    ln -sfn lib "$toolkit/lib64" && ln -sfn libcudart.so.13 "$toolkit/lib/libcudart.so" && nvcc_folder=$toolkit/bin
}

# nvcc from this machine's toolkit or else from wheels, and what reads compiled GPU code: on PATH afterwards.
cuda_tools() {
    local nvcc_folder
    if ! { command -v nvcc && command -v cuobjdump && command -v nvdisasm; } >/dev/null; then
        if ! nvcc_wheels 13.0; then
            "$(find_python)" -m pip index versions nvidia-cuda-nvcc && return 1  # they are there: it must not fail
            command -v nvcc >/dev/null && left_out 'the index has nothing that reads GPU code' ||
                left_out 'no nvcc, and the index has no wheel of it'
            return
        fi
        export PATH=$PATH:$nvcc_folder
    fi
    nvcc --version | tail -n 2 && cuobjdump --version | tail -n 2
}

sanitized_build() {  # sanitized_build [OPTION...]: the native tests, those beyond AVX2 emulated; needs cmake and ninja
    cmake -S . -B "$scratch/asan-tests" -G Ninja -DQLORA_NATIVE_TESTS=ON -DQLORA_NATIVE_SANITIZE=ON \
        -DQLORA_NATIVE_EMULATE_ISAS=ON -DQLORA_NATIVE_PYTHON=OFF -DQLORA_NATIVE_CUDA=OFF "$@" &&
        cmake --build "$scratch/asan-tests"
}

arm64_tools() {
    command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null && return 0
    if [ "$(id -u)" -eq 0 ] && apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
        --no-install-recommends g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user; then
        return 0
    fi
    [ "$(id -u)" -ne 0 ] || ! apt-cache show g++-aarch64-linux-gnu qemu-user >/dev/null || return 1
    left_out 'no g++-aarch64-linux-gnu or qemu-user, and they cannot be installed here'
}

# on_each_isa ISAS COMMAND...: tests on instruction sets side by side, since most take one thread.
on_each_isa() {
    local isa pids=() status=0 log=$scratch/$BASHPID
    for isa in $1; do
        QLORA_NATIVE_ISA=$isa "${@:2}" >"$log-$isa" 2>&1 &
        pids+=($!)
    done
    for isa in $1; do
        wait "${pids[0]}" || status=1  # 77, too: one that this machine lacks was not run
        pids=("${pids[@]:1}")
        echo "QLORA_NATIVE_ISA=$isa"
        cat "$log-$isa"
    done
    return "$status"
}

# every_ctest FOLDER [OPTION...]: those of this machine's architecture, none of which may be skipped.
every_ctest() {
    ctest --test-dir "$1" -j "$(nproc)" --output-on-failure --no-tests=error -E neon "${@:2}" >"$1/ctest.log" 2>&1
    local status=$?
    cat "$1/ctest.log"
    ! grep -qF '***Skipped' "$1/ctest.log" && return "$status"
}

arm64_build() {  # arm64_build [OPTION...]: the native tests, cross-compiled; needs cmake and ninja
    arm64_tools || return
    cmake -S . -B "$scratch/arm64-build" -G Ninja -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake \
        -DQLORA_NATIVE_TESTS=ON -DQLORA_NATIVE_PYTHON=OFF -DQLORA_NATIVE_CUDA=OFF "$@" &&
        cmake --build "$scratch/arm64-build"
}

# What runs them: an emulator of an arm64 CPU that has every extension.
arm64_tests=(qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu max "$scratch/arm64-build/tests/cpp/qlora_native_cpp_tests")

system_packages() {  # the two things that pip cannot bring: a Python with its headers, a C++ compiler
    local missing=()
    find_python >/dev/null || missing+=(python3 python3-venv python3-dev)
    find_compiler >/dev/null || missing+=(g++)
    if [ "${#missing[@]}" -gt 0 ] && [ "$(id -u)" -ne 0 ]; then
        echo "Missing: ${missing[*]}. This is not root, so they cannot be installed here: ask for them."
        return 1
    elif [ "${#missing[@]}" -gt 0 ]; then
        apt-get update -q &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" || return 1
    fi
    "$(find_python)" --version && "$(find_compiler)" --version | head -n 1
}

# Prints the option that shows CMake where CUDA's headers are; nothing if a toolkit of CUDA 13 has them. The wheels of
# the headers go into the active environment.
cuda_headers_option() {
    nvcc --version 2>/dev/null | grep -q 'release 13' && return 0
    python -m pip install -q 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*' >&2 &&
        python -c 'import sysconfig
print("-DQLORA_NATIVE_CUDA_HEADERS=" + sysconfig.get_path("purelib") + "/nvidia/cu13/include")'
}

# Builds what runs the CUDA kernels on the CPU in build/emulated: the targets named, or all of it, with the modules that
# run the op tests over them. Needs an environment with cmake, ninja and pybind11; $cpu_library is linked, if it is set.
emulated_build() {
    local headers
    headers=$(cuda_headers_option) || return 1
    # -O1 for the CPU ops, which the kernels are compared with on small sizes; the kernels' own level is set with them.
    cmake -S . -B build/emulated -G Ninja -DQLORA_NATIVE_CUDA_ON_CPU=ON -DQLORA_NATIVE_CUDA=OFF $headers \
        -DQLORA_NATIVE_CPU_LIBRARY="${cpu_library:-}" \
        -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG' -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
        -DPython_EXECUTABLE="$(command -v python)" &&
        cmake --build build/emulated ${@:+--target "$@"}
}

# emulated_cuda BUILD...: the programs of plain, race or asan, under every schedule. Builds the modules on which
# the suite runs the op tests too.
emulated_cuda() {
    emulated_build _cuda_emulated _cuda_emulated_checked "${@/#/cuda_on_cpu_programs_}" &&
        ctest --test-dir build/emulated -j "$(nproc)" --output-on-failure --no-tests=error -R "_($(IFS='|'; echo "$*"))\$"
}
