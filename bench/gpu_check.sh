#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can show, in one command:
#
#   OUT=folder bash bench/gpu_check.sh            needs nvcc, and a Python with torch, scikit-build-core and pybind11
#   bash bench/gpu_check.sh --dry-run             on any machine: tiny shapes on the CPU, with what is installed
#
# Builds for the card that is there, runs the op tests, compares the primitives with the emulator's words, runs
# compute-sanitizer, then measures. Writes $OUT/gpu_check.json and $OUT/gpu_check.log. Uses no network, sets no clocks,
# resets nothing. What cannot be done here is said and left out; the exit status is 1 if something failed.
#
# Its time limit, 525 s in all, is made of those of the sections, each cut to what is left: 170 s for the build, 100 for
# the tests, 60 for the primitives, 40 for each of the three sanitizer tools, the rest (480 at most) for measuring. A
# section that does not end on SIGTERM is killed 10 s later.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-build/gpu_check}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
exec > >(tee "$OUT/gpu_check.log") 2>&1
python=${PYTHON:-python3}
dry=
[ "${1:-}" = --dry-run ] && dry=1
end=$((SECONDS + 525))
failed=()

# section NAME SECONDS COMMAND...: at most so many seconds, and none if they are not left
section() {
    local name=$1 most=$2 status=0 start=$SECONDS
    shift 2
    [ "$most" -gt $((end - SECONDS)) ] && most=$((end - SECONDS))
    printf '\n===== %s =====\n' "$name"
    if [ "$most" -lt 5 ]; then
        echo "left out: no time left"
        return 0
    fi
    timeout --kill-after=10 "$most" "$@" </dev/null || status=$?
    case $status in
        0) echo "----- $name: ok after $((SECONDS - start)) s" ;;
        77) echo "----- $name: left out" ;;
        124 | 137) echo "----- $name: cut off after $most s"; failed+=("$name") ;;
        *) echo "----- $name: FAILED (status $status)"; failed+=("$name") ;;
    esac
    return 0
}

leave_out() {
    echo "left out: $1"
    exit 77
}
export -f leave_out

if [ -n "$dry" ]; then
    section 'measurements, dry' 300 "$python" bench/gpu_check.py --dry-run --json "$OUT/gpu_check.json"
    section 'each op once' 120 "$python" bench/gpu_check.py --once
    echo "${#failed[@]} sections failed"
    [ "${#failed[@]}" -eq 0 ]
    exit
fi

nvidia-smi || { echo 'There is no NVIDIA GPU here: --dry-run tries the script out without one.'; exit 1; }
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
command -v nvcc || { echo 'There is no nvcc on PATH: the CUDA part cannot be built.'; exit 1; }
export CUDA_MODULE_LOADING=LAZY CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}

section "build for sm_$arch" 170 env QLORA_NATIVE_CUDA=ON QLORA_NATIVE_CUDA_ARCHS="$arch" \
    "$python" -m pip install --no-build-isolation --no-deps .
[ "${#failed[@]}" -eq 0 ] || exit 1

section 'op tests on the GPU' 100 bash -c '
    "$0" -c "import pytest" 2>/dev/null || leave_out "there is no pytest in this Python"
    "$0" -m pytest tests/test_*4bit.py tests/test_*_step.py tests/test_gradient_norm.py \
        tests/test_linear_cross_entropy.py tests/test_rms_norm.py tests/test_rotary.py tests/test_swiglu.py \
        tests/test_causal_attention.py tests/test_cuda_build.py tests/test_paging_cuda.py \
        -k "cuda or on_device or the_device" --continue-on-collection-errors -q' "$python"

section 'primitives against the emulator' 60 bash -c '
    nvcc -std=c++20 -arch="sm_$1" --fmad=false --expt-relaxed-constexpr -Icpp -I. -Itests \
        -o "$2/primitives" tests/conformance/main.cu && "$2/primitives" >"$2/primitives.txt" &&
        "$0" bench/gpu_primitives.py tests/golden/cuda_primitives.txt "$2/primitives.txt"' "$python" "$arch" "$OUT"

for tool in memcheck racecheck synccheck; do  # of our kernels alone, where the tool can choose
    section "compute-sanitizer, $tool" 40 bash -c '
        sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) ||
            leave_out "there is no compute-sanitizer here"
        ours=()
        "$sanitizer" --help | grep -q -- --kernel-regex && ours=(--kernel-regex kns=qlora_native)
        "$sanitizer" --tool "$1" --error-exitcode 3 "$2/primitives" >/dev/null &&
            "$sanitizer" --tool "$1" --error-exitcode 3 "${ours[@]}" "$0" bench/gpu_check.py --once' \
        "$python" "$tool" "$OUT"
done

section 'measurements' 480 "$python" bench/gpu_check.py --json "$OUT/gpu_check.json" --seconds $((end - SECONDS - 15))

echo "after $SECONDS s: ${#failed[@]} sections failed${failed[*]:+ (${failed[*]})}; see $OUT/gpu_check.json"
[ "${#failed[@]}" -eq 0 ]
