#!/usr/bin/env bash
# Preprocesses, trains, evaluates and generates text on a fresh machine, on CPU.
#   bash scripts/quickstart.sh [workdir] [--config.x.y=v ...]
set -euo pipefail
workdir=runs/quickstart
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    workdir=$1
    shift
fi
from=$PWD
source "$(dirname "$0")/setup_venv.sh" '.[plot]'
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Huge pages for the buffers that XLA allocates at each step: a sixth less time per step on CPU, with glibc.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# Prints a command of words that are quoted already, folded before column 80 so that it can be copied.
#   $1: what its first line begins with
show() {
    local line=$1$2 word
    shift 2
    for word in "$@"; do
        if [ $((${#line} + ${#word})) -gt 76 ]; then
            printf '%s \\\n' "$line"
            line="      $word"
        else
            line+=" $word"
        fi
    done
    printf '%s\n' "$line"
}

run() {
    printf '\n%s\n' "$1" >&2
    shift
    local words=() word
    for word in "$@"; do words+=("$(quoted "$word")"); done
    show '+ ' "${words[@]}" >&2
    "$@"
}
quoted() { printf '%q' "$1"; }
run "1 of 4: the text becomes token ids" trialgpt preprocess --config=quickstart "$@"
run "2 of 4: training; Ctrl-C saves, and the same command continues" \
    trialgpt train --config=quickstart --workdir="$workdir" "$@"
run "3 of 4: the loss on text that was not trained on" trialgpt evaluate --workdir="$workdir"
run "4 of 4: new text" trialgpt infer --workdir="$workdir" --prompt="The people of the United States" --top_p=0.9

# What was made, and what to try next.
new_folder=out/$(basename "$workdir")
while [ -e "$new_folder" ]; do new_folder+=-2; done
cd_root='' flags=() store=data/quickstart
[ "$from" = "$PWD" ] || cd_root="cd $(quoted "$PWD") && "
for flag in "$@"; do
    case $flag in
        --config.train.steps=*) continue ;; # the longer run has its own
        --config.data.dir=*) store=${flag#*=} ;;
    esac
    flags+=("$(quoted "$flag")")
done
printf '\nMade in %s:\n' "$PWD"
printf '  %-15s  %s\n' "$VENV" "Python packages and the program \`trialgpt\`" "$store" "the text as token ids" \
    "$workdir" "checkpoints, curves.png, summary.md, metrics.jsonl"
printf 'Next, one after the other:\n'
show '  ' "${cd_root}source" "$(quoted "$VENV")/bin/activate"
show '  ' trialgpt infer --workdir="$(quoted "$workdir")" '--prompt="My fellow citizens"' --num_samples=3
show '  ' trialgpt train --config=quickstart ${flags[@]+"${flags[@]}"} --config.train.steps=1080 \
    --workdir="$(quoted "$workdir")_longer"
show '  ' trialgpt convert --workdir="$(quoted "$workdir")" --to_hf="$(quoted "$new_folder")"
cat <<END
\`trialgpt --help\` lists the commands. README.md has training on your own text,
on GPUs and on TPUs.
END
