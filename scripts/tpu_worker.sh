#!/usr/bin/env bash
# Run by tpu_vm.sh on every worker of a TPU VM or slice, in the folder with the code:
#
#   bash scripts/tpu_worker.sh install [gs://STORE data/NAME]   # Python, packages, the token store
#   bash scripts/tpu_worker.sh train [flags of trialgpt_jax.train]
#   bash scripts/tpu_worker.sh stop                             # SIGTERM: train saves and exits with 75
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pid_file=$PWD/train.pid

# The pid may belong to another process by now, so the command line must match too.
signal_train() {
    pkill "-$1" -F "$pid_file" -f trialgpt_jax.train 2>/dev/null
}

stop_train() {
    signal_train TERM || return 0
    for ((seconds = 0; seconds < 300; seconds++)); do
        signal_train 0 || return 0
        sleep 1
    done
    signal_train KILL || true
}

# Reads an attribute of this worker from the metadata server, as JAX's own detection does.
attribute() {
    curl --fail --silent --show-error --retry 5 -H Metadata-Flavor:Google \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

command=$1
shift
case $command in
    install)
        if [ ! -x .venv/bin/python ]; then # Python of the TPU images is older than 3.11
            PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
            python3 -m uv venv --quiet --seed --python=3.12 .venv
        fi
        source scripts/setup_venv.sh '.[tpu,gs]'
        # JAX on v5e and newer starts slowly without huge pages, and warns
        sudo sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' || true
        if (($#)); then
            mkdir -p "$2"
            gcloud storage rsync "$1" "$2" --recursive
        fi
        ;;
    train)
        stop_train # a train left by a lost connection still holds the chips
        endpoints=$(attribute worker-network-endpoints) # `host,host,...`, or `name:id:address,...` on older runtimes
        IFS=, read -ra workers <<<"$endpoints"
        if ((${#workers[@]} > 1)); then
            set -- "$@" "--coordinator_address=${workers[0]##*:}:8476" "--num_processes=${#workers[@]}" \
                "--process_id=$(attribute agent-worker-number)"
        fi
        .venv/bin/python -m trialgpt_jax.train "$@" &
        echo $! >"$pid_file"
        # Not `exec`: ssh returns 255 for a command killed by a signal, the same as for a lost connection.
        wait $!
        ;;
    stop) stop_train ;;
    *) echo "error: tpu_worker.sh $command: only install, train and stop are known" >&2; exit 2 ;;
esac
