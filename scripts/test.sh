#!/usr/bin/env bash
# Runs the linter and the tests on a fresh machine: creates a virtual environment if there is none and installs the test
# extra.
#   bash scripts/test.sh [--slow] [pytest arguments]
# --slow also runs the tests that are marked slow.
set -euo pipefail
selection=(-m "not slow")
if [[ ${1:-} == --slow ]]; then
  selection=()
  shift
fi
source "$(dirname "$0")/setup_venv.sh" '.[test]'
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
ruff check .
ruff format --check .
# Two processes, each with one file at a time, in the order of tests/conftest.py: most of the time is compilation, which
# uses one core.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
