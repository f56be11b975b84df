#!/usr/bin/env bash
# The tests, on a fresh machine: makes a virtual environment if there is none, installs the test extra, runs the linter
# and pytest.
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/setup_venv.sh" '.[test]'
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
ruff check .
ruff format --check .
# Two processes, a file at a time each, in the order of tests/conftest.py: most of the time is compilation, which uses one core.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
