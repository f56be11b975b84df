#!/usr/bin/env bash
# Preprocesses, trains, evaluates and generates text on a fresh machine, on CPU.
#   bash scripts/quickstart.sh [workdir] [--config.x.y=v ...]
set -euo pipefail
workdir=runs/quickstart
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    workdir=$1
    shift
fi
source "$(dirname "$0")/setup_venv.sh" .
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Huge pages for the buffers that XLA allocates at each step: a sixth less time per step on CPU, with glibc.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

run() {
    echo "+ $*" >&2
    "$@"
}
run python -m trialgpt_jax.preprocess --config=configs/quickstart.py "$@"
run python -m trialgpt_jax.train --config=configs/quickstart.py --workdir="$workdir" "$@"
run python -m trialgpt_jax.evaluate --workdir="$workdir"
run python -m trialgpt_jax.infer --workdir="$workdir" --prompt="The people of the United States" --top_p=0.9
