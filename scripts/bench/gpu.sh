#!/usr/bin/env bash
# All that is measured on a machine with one GPU, in one call: the tests marked `gpu`, the train step against compiled
# nanoGPT, the training loop with a stop and a resume, decoding against Hugging Face, a profile.
#   bash scripts/bench/gpu.sh --peer=path/to/nanoGPT [--minutes=8] [--output=FOLDER]
# Writes gpu.json, gpu.md and logs to scripts/bench/results/gpu. PYTHON is an interpreter with the extras `test` and
# `cuda` (or `cuda12`); default: python. gpu.py has the parts.
set -euo pipefail
cd "$(dirname "$0")/../.."
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # the CPU is what the GPU's results are compared with
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export XLA_FLAGS=${XLA_FLAGS:-} # set, so that the tests do not turn LLVM's optimizer off
exec "${PYTHON:-python}" scripts/bench/gpu.py "$@"
