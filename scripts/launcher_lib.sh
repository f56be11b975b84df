# shellcheck shell=bash
# Sourced by the launchers (tpu_vm.sh, gke.sh, multi_gpu.sh): usage, refusals, and commands that are shown before they run.
# With `dry_run=1` commands are written to stdout, quoted as a shell would read them, and not run.
if ((BASH_VERSINFO[0] < 5)); then
    echo "error: bash $BASH_VERSION will not do; run it with bash 5 or newer" >&2
    exit 2
fi
dry_run=

# The comment at the top of the launcher is its help.
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

# The words as one line that a shell reads as the same words: those with anything unusual in single quotes.
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

# Shows a command; with dry_run that is all that happens to it.
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
