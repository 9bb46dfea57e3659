#!/usr/bin/env bash
# Measure again all that fits this CPU, in order of worth, and rewrite the pages: bash bench/measure.sh --minutes 60
exec "${PYTHON:-python}" "$(dirname "$0")/measure.py" "$@"
