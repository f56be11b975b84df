#!/usr/bin/env bash
# Runs the linter and the tests on a fresh machine: creates a virtual environment if there is none and installs the test
# extra.
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/setup_venv.sh" '.[test]'
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
ruff check .
ruff format --check .
# Two processes, each with one file at a time, in the order of tests/conftest.py: most of the time is compilation, which
# uses one core.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
