# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: enters the repository root and a virtual environment with what $1 names.
#   $1: what pip installs, e.g. `.` or `.[test]`
# VENV is the environment's folder (default .venv, made if it is not there), PYTHON the interpreter that makes it.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
VENV=${VENV:-.venv}
if [ ! -x "$VENV/bin/python" ]; then
    PYTHON=${PYTHON:-python3}
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
        echo "error: $("$PYTHON" --version) will not do; set PYTHON to Python 3.11, 3.12 or 3.13" >&2
        exit 2
    }
    "$PYTHON" -m venv "$VENV"
fi
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$1"
PATH=$PWD/$VENV/bin:$PATH
export PATH
