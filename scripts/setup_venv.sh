# shellcheck shell=bash
# Changes to the repository root, creates a virtual environment if there is none, installs this folder and what it needs
# into it unless that is there already (which needs no network), and puts the environment first in PATH.
#   bash scripts/setup_venv.sh '.[cuda]'     # then: source .venv/bin/activate
#   $1: what pip installs, e.g. `.` or `.[test]`
# Sourced by quickstart.sh, test.sh and tpu_worker.sh. VENV is the environment's folder (default .venv), PYTHON the
# interpreter that creates it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}

# Shortens pip's output: a line per large download, in a terminal a line that changes; all of it is in the file $1.
follow_pip() {
    local line name doing='' status began=$SECONDS
    while :; do
        status=0
        IFS= read -r -t 1 line || status=$?
        if [ "$status" -gt 128 ]; then # nothing for a second
            [ ! -t 2 ] || [ -z "$doing" ] || printf '\r\033[K  %s, %ss' "$doing" $((SECONDS - began)) >&2
            continue
        fi
        [ "$status" = 0 ] || break
        printf '%s\n' "$line" >>"$1"
        line=${line#"${line%%[! ]*}"}
        name=${line#* }
        name=${name%% *}
        case $line in
            "Collecting "*)
                doing=$(printf 'looking for %.60s' "$name")
                [ -t 2 ] && printf '\r\033[K  %s' "$doing" >&2
                ;;
            "Downloading "*" MB)" | "Downloading "*" GB)")
                name=$(cut -d- -f1,2 <<<"$name")
                [ -t 2 ] && printf '\r\033[K' >&2
                printf '  downloading %s (%s\n' "$name" "${line##*(}" >&2
                doing="downloading $name"
                ;;
            "Installing collected packages"*)
                [ -t 2 ] && printf '\r\033[K' >&2
                printf '  installing %s packages; this takes a minute or more\n' "$(wc -w <<<"${line#*:}")" >&2
                doing=installing
                ;;
        esac
    done
    [ ! -t 2 ] || printf '\r\033[K' >&2
    return 0
}

if [ ! -x "$VENV/bin/python" ]; then
    PYTHON=${PYTHON:-python3}
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
        echo "error: $("$PYTHON" --version) is not supported; set PYTHON to Python 3.11, 3.12 or 3.13" >&2
        exit 2
    }
    echo "creating the virtual environment $VENV with $("$PYTHON" --version)" >&2
    "$PYTHON" -m venv "$VENV"
fi
if ! missing=$("$VENV/bin/python" scripts/check_venv.py "$1"); then
    echo "installing $1 into $VENV, because $missing" >&2
    : >"$VENV/pip.log"
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar=off --editable "$1" 2>&1 |
        follow_pip "$VENV/pip.log" || {
        echo "error: pip cannot install $1; $VENV/pip.log ends with" >&2
        tail -n 12 "$VENV/pip.log" >&2
        exit 1
    }
fi
PATH=$(cd "$VENV/bin" && pwd):$PATH
export PATH
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    echo "ready: source $VENV/bin/activate"
fi
