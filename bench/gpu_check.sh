#!/usr/bin/env bash
# Builds for the card that is there, unless that was done since the sources changed, then runs bench/gpu_check.py with the
# same arguments; the first minute is the word on whether the basics hold. OUT=folder bash bench/gpu_check.sh [GROUP...]
#
# Needs nvcc, a C++ compiler and a Python with torch, numpy, safetensors, cmake, ninja, scikit-build-core and pybind11;
# training steps need the extra `train` too. Uses no network, sets no clocks, resets nothing. Writes
# $OUT/gpu_check.json and $OUT/gpu_check.log; works in build/gpu_check.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
started=$SECONDS
work=${GPU_CHECK_WORK:-$PWD/build/gpu_check}
mkdir -p "$work" "${OUT:=$work}" && OUT=$(cd "$OUT" && pwd) && export OUT || exit 1
exec > >(tee "$OUT/gpu_check.log") 2>&1
python=${PYTHON:-python3}
export PYTHONPATH=${PYTHONPATH:-}

nvidia-smi || { echo 'There is no NVIDIA GPU here; tests/test_gpu_check.py rehearses it without one.'; exit 1; }
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
export CUDA_MODULE_LOADING=LAZY CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}

PYTHONPATH=${PYTHONPATH//"$PWD/python"/}  # the sources, without what is built
# An environment of its own, over what is installed: a system's Python may refuse installs (PEP 668).
if [ ! -x "$work/venv/bin/python" ]; then
    "$python" -m venv --system-site-packages --without-pip "$work/venv" ||
        { echo 'This Python makes no virtual environment: install python3-venv.'; exit 1; }
    # The packages of an environment that is active already are not the system's.
    "$python" -c 'import site, sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' \
        >"$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
fi
built() { (cd "$work" && "$work/venv/bin/python" -c 'import qlora_native as qn, sys
sys.exit(sys.argv[1] not in str(qn.build_info()["cuda_archs"]))' "$arch") 2>/dev/null; }
newer=$(find cpp cuda python cmake CMakeLists.txt pyproject.toml -newer "$work/built" -print -quit 2>/dev/null || echo none)
if [ ! -e "$work/built" ] || [ -n "$newer" ] || ! built; then
    echo "===== build for sm_$arch ====="
    QLORA_NATIVE_CUDA=ON QLORA_NATIVE_CUDA_ARCHS=$arch timeout --kill-after=10 "${GPU_CHECK_BUILD_SECONDS:-300}" \
        "$python" -m pip --python "$work/venv/bin/python" install --no-build-isolation --no-deps --force-reinstall . &&
        touch "$work/built" && rm -f "$work"/*.jsonl && echo "----- build: ok after $SECONDS s"
    built || { echo "The build failed and no qlora_native for sm_$arch can be imported: there is nothing to check."; exit 1; }
fi
nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active \
    --format=csv,noheader,nounits -lms 500 -i 0 >"$work/sensors.csv" 2>/dev/null &
trap "kill $! 2>/dev/null" EXIT
export GPU_CHECK_SECONDS=$((${GPU_CHECK_SECONDS:-540} - (SECONDS - started)))
"$work/venv/bin/python" bench/gpu_check.py "$@"
