#!/usr/bin/env bash
# Style and types: bash .ci/lint.sh [ruff|format|mypy|clang-format|workflows]..., all five without an argument.
# The tools come from .ci/requirements.txt; nothing is rewritten. To mend: ruff check --fix, ruff format, clang-format -i.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

native_sources() {
    find . -type d \( -name '.?*' -o -name build \) -prune -o -type f \
        \( -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.hpp' \) -print0
}

lint() {
    case "$1" in
        ruff) ruff check . ;;
        format) ruff format --check . ;;
        mypy) mypy ;;
        clang-format) native_sources | xargs -0 -r clang-format --dry-run -Werror ;;
        workflows) check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml ;;
        *) echo "'$1' is none of ruff, format, mypy, clang-format, workflows." && return 2 ;;
    esac
}

[ "$#" -gt 0 ] || set -- ruff format mypy clang-format workflows
failed=0
for name; do
    lint "$name" || { echo "lint: $name failed"; failed=1; }
done
exit "$failed"
