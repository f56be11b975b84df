# shellcheck shell=bash
# Sourced by quickstart.sh, test.sh and tpu_worker.sh: changes to the repository root, creates a virtual environment if
# there is none, installs into it and puts it first in PATH.
#   $1: what pip installs, e.g. `.` or `.[test]`
# VENV is the environment's folder (default .venv), PYTHON the interpreter that creates it.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
VENV=${VENV:-.venv}
if [ ! -x "$VENV/bin/python" ]; then
    PYTHON=${PYTHON:-python3}
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
        echo "error: $("$PYTHON" --version) is not supported; set PYTHON to Python 3.11, 3.12 or 3.13" >&2
        exit 2
    }
    "$PYTHON" -m venv "$VENV"
fi
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$1"
PATH=$PWD/$VENV/bin:$PATH
export PATH
