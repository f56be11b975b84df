# shellcheck shell=bash
# Sourced by tpu_vm.sh, gke.sh and multi_gpu.sh: usage, errors, and commands that are printed before they run.
# With `dry_run=1` commands are printed to stdout, quoted for a shell, and not run.
if ((BASH_VERSINFO[0] < 5)); then
    echo "error: bash $BASH_VERSION is too old; bash 5 or newer is required" >&2
    exit 2
fi
dry_run=

# Prints the comment at the top of the launcher.
usage() {
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

die() {
    echo "error: $*" >&2
    exit 2
}

say() {
    echo "$(date +%H:%M:%S) $*" >&2
}

# Prints the words as one line of shell input; words with special characters are in single quotes.
quoted() {
    local word line=
    for word in "$@"; do
        if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
            word=\'${word//\'/"'\\''"}\'
        fi
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

# Prints a command: to stdout for a dry run, otherwise to stderr.
show() {
    if [ -n "$dry_run" ]; then
        quoted "$@"
    else
        echo "+ $(quoted "$@")" >&2
    fi
}

run() {
    show "$@"
    [ -n "$dry_run" ] || "$@"
}
