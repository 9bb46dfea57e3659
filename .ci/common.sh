# Shared by .ci/run and .ci/full: sections that are timed and counted, and what pip cannot install.
# Sourced, with the root of the repository as the working directory.
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
unset QLORA_NATIVE_ISA PYTHONPATH
summary=()
failures=0

section() {  # section NAME COMMAND...: runs it in this shell, prints its seconds, counts a failure and goes on
    local name=$1 start=$SECONDS status=0 verdict=ok
    shift
    printf '\n===== %s =====\n' "$name"
    "$@" </dev/null || status=$?
    if [ "$status" -ne 0 ]; then
        verdict="FAILED (status $status)"
        failures=$((failures + 1))
    fi
    summary+=("$(printf '%-34s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")")
    echo "----- $name: $verdict after $((SECONDS - start)) s"
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

find_compiler() {
    command -v "${CXX:-c++}" || command -v g++ || command -v clang++
}

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
