#!/usr/bin/env bash
# Trains on all GPUs of one machine.
#
#   bash scripts/multi_gpu.sh [options] [--] --config=FILE --workdir=FOLDER [flags of trialgpt_jax.train]
#
#   --processes=N  processes to start (default 1: JAX drives all GPUs of a machine from one process)
#   --gpus=LIST    the GPUs, e.g. 0,1,2,3, divided evenly among the processes; `none` leaves CUDA_VISIBLE_DEVICES unchanged
#                  (default: CUDA_VISIBLE_DEVICES, or else all that nvidia-smi lists)
#   --port=N       port of process 0 on this machine (default: a free one)
#   --grace=S      seconds from SIGTERM to SIGKILL for the remaining processes after one died (default 30)
#   --dry_run      prints the commands without running them
#
# VENV is the folder of the virtual environment (default: the `python` of PATH). SIGTERM, SIGHUP and Ctrl-C reach all
# processes, which save and exit with 75. When one process fails, the others are terminated, because they would wait for
# it. The exit status is the first nonzero one; 76 means that a process lost another one, also where it was aborted (134).
set -euo pipefail
source "$(dirname "$0")/launcher_lib.sh"
processes=1 gpus=${CUDA_VISIBLE_DEVICES:-} port='' grace=30 python=${VENV:+$VENV/bin/}python
while (($#)); do
    case $1 in
        --help) usage; exit 0 ;;
        --dry_run) dry_run=1 ;;
        --processes=*) processes=${1#*=} ;;
        --gpus=*) gpus=${1#*=} ;;
        --port=*) port=${1#*=} ;;
        --grace=*) grace=${1#*=} ;;
        --) shift; break ;;
        *) break ;;
    esac
    shift
done
(($#)) || die "nothing to run: give --config=FILE and --workdir=FOLDER; see --help"
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "--processes=$processes must be a positive integer"
train=("$python" -m trialgpt_jax.train "$@")

if ((processes == 1)); then
    if [ -n "$gpus" ] && [ "$gpus" != none ]; then
        train=(env "CUDA_VISIBLE_DEVICES=$gpus" "${train[@]}")
    fi
    show "${train[@]}"
    [ -n "$dry_run" ] || exec "${train[@]}"
    exit 0
fi

if [ -z "$gpus" ]; then
    n=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || die "nvidia-smi finds no GPU; give --gpus=0,1,... or --gpus=none"
    gpus=$(seq -s, 0 $((n - 1)))
fi
IFS=, read -ra ids <<<"$gpus"
if [ "$gpus" != none ] && ((${#ids[@]} % processes)); then
    die "--processes=$processes does not divide the ${#ids[@]} GPUs $gpus"
fi
if [ -z "$port" ]; then
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT HUP # bash leaves HUP ignored under nohup
for ((i = 0; i < processes; i++)); do
    command=(env)
    if [ "$gpus" != none ]; then
        per=$((${#ids[@]} / processes))
        command+=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${ids[*]:i*per:per}")")
    fi
    command+=("${train[@]}" "--coordinator_address=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$i")
    show "${command[@]}"
    if [ -z "$dry_run" ]; then
        "${command[@]}" &
        pids+=($!)
    fi
done

status=0
while ((${#pids[@]})); do
    one=0 pid=
    wait -n -p pid "${pids[@]}" || one=$?
    [ -n "${pid:-}" ] || continue # interrupted by a signal, which the trap has forwarded
    left=()
    for each in "${pids[@]}"; do
        [ "$each" = "$pid" ] || left+=("$each")
    done
    pids=("${left[@]}")
    ((one != 134)) || one=76 # JAX's C++ threads abort a process that lost another one
    ((status)) || status=$one
    if ((one != 0 && one != 75 && ${#pids[@]})); then
        echo "process $pid exited with status $one; terminating the others" >&2 || true # the terminal may be closed
        kill -TERM "${pids[@]}" 2>/dev/null || true
        # A process that waits for the dead one in a collective never reaches the step at which it would stop.
        for ((tenths = 0; tenths < 10 * grace; tenths++)); do
            [ -n "$(jobs -rp)" ] || break
            sleep 0.1
        done
        kill -KILL "${pids[@]}" 2>/dev/null || true
        wait "${pids[@]}" 2>/dev/null || true
        break
    fi
done
exit "$status"
