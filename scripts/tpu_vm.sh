#!/usr/bin/env bash
# Trains on a Cloud TPU VM or slice: creates the node or uses an existing one, copies the code of this git work tree to all
# workers, installs it, fetches the token store, runs train on all workers, and restarts after a preemption.
#
#   bash scripts/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-16 --workdir=gs://BUCKET/runs/NAME --config=FILE
#        [options] [-- flags of trialgpt_jax.train]
#
#   --name=NAME, --zone=ZONE, --type=TYPE   the node; TYPE is gcloud's --accelerator-type: v5litepod-16, v5p-8, v6e-8 ...
#   --config=FILE       a config tracked by git; uncommitted changes are copied too
#   --workdir=FOLDER    gs://..., so that checkpoints survive the node; a path on the workers is refused with --spot and
#                       --delete_when_done, and must be on a disk that all workers see
#   --data=gs://...     a token store: copied to data/ on every worker and used for training (sets --config.data.dir)
#   --version=VERSION   runtime version (default: the one for TYPE)
#   --project=PROJECT   (default: gcloud's)
#   --spot              a spot node: cheaper, can be preempted at any time
#   --create_flag=FLAG  an additional flag for `tpu-vm create`, e.g. --create_flag=--network=mine; may be repeated
#   --delete_when_done  delete the node after status 0
#   --max_creates=N     consecutive attempts to create a node (default 100)
#   --max_restarts=N    restarts after exit status 75 or a lost node (default 100)
#   --max_failures=N    other consecutive failures (default 3)
#   --wait=S            seconds before a retry, doubled each time up to tenfold (default 30)
#   --dry_run           prints the commands for a node that does not exist yet, without running them
#
# Exit status: 0 done, 2 a user error, 1 given up, 75 stopped by Ctrl-C or SIGTERM after train has saved; the node stays.
# The same command continues in every case: it uses the existing node, and train resumes.
set -euo pipefail
source "$(dirname "$0")/launcher_lib.sh"
cd "$(dirname "$0")/.."
name='' zone='' type='' version='' project='' config='' workdir='' data='' spot='' delete_when_done=''
create_flags=() max_creates=100 max_restarts=100 max_failures=3 wait=30
while (($#)); do
    case $1 in
        --help) usage; exit 0 ;;
        --dry_run) dry_run=1 ;;
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --config=*) config=${1#*=} ;;
        --workdir=*) workdir=${1#*=} ;;
        --data=*) data=${1#*=} ;;
        --spot) spot=1 ;;
        --create_flag=*) create_flags+=("${1#*=}") ;;
        --delete_when_done) delete_when_done=1 ;;
        --max_creates=*) max_creates=${1#*=} ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --max_failures=*) max_failures=${1#*=} ;;
        --wait=*) wait=${1#*=} ;;
        --) shift; break ;;
        *) die "$1 is not an option; flags of train come after \`--\`, and --help lists the options" ;;
    esac
    shift
done
for option in name zone type config workdir; do
    [ -n "${!option}" ] || die "--$option=... is missing; see --help"
done
if [ "${workdir#gs://}" = "$workdir" ] && [ -n "$spot$delete_when_done" ]; then
    die "--workdir=$workdir would be lost with the node; give a gs:// one, or leave out --spot and --delete_when_done"
fi
[ -z "$data" ] || [ "${data#gs://}" != "$data" ] || die "--data=$data must be a gs:// folder"
git ls-files --error-unmatch -- "${config%%:*}" >/dev/null 2>&1 ||
    die "--config=$config is not tracked by git here and would not be copied; \`git add\` it"
case ${version:+given}$type in
    given*) ;;
    v5litepod*) version=v2-alpha-tpuv5-lite ;;
    v5p*) version=v2-alpha-tpuv5 ;;
    v6e*) version=v2-alpha-tpuv6e ;;
    v[234]-*) version='tpu-ubuntu2204-base' ;;
    *) die "--version=... is missing: no default runtime is known for --type=$type" ;;
esac

folder=trialgpt_jax_run # in the home directory of the workers
node=("$name" "--zone=$zone" ${project:+"--project=$project"})
tpu=(gcloud compute tpus tpu-vm)
train=(bash scripts/tpu_worker.sh train "--config=$config" "--workdir=$workdir")
install=(bash scripts/tpu_worker.sh install)
if [ -n "$data" ]; then
    data=${data%/}
    install+=("$data" "data/${data##*/}")
    train+=("--config.data.dir=data/${data##*/}")
fi
train+=("$@")
# Keeps from an earlier run what is expensive to recreate and the pid of a train that may still be running.
unpack="mkdir -p $folder && cd $folder && find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name data ! -name runs"
unpack+=" ! -name train.pid -exec rm -rf {} + && tar -xzf ../$folder.tar.gz"

scratch=$(mktemp -d) there='' child='' stopping=''
at_exit() {
    rm -rf "$scratch"
    [ -z "$there" ] || say "$name still exists and is billed; to delete it: $(quoted "${tpu[@]}" delete "${node[@]}")"
}
on_signal() {
    stopping=1
    [ -n "$child" ] || exit 1
    say "stopping train, which saves; $name is kept"
    on_workers "bash $folder/scripts/tpu_worker.sh stop" || say "train could not be stopped"
}
trap at_exit EXIT
trap on_signal INT TERM

# Runs a command on all workers. A dead connection is detected after 5 minutes. gcloud then retries the same command up to
# ten times, which is why tpu_worker.sh stops a running train before it starts another.
on_workers() {
    run "${tpu[@]}" ssh "${node[@]}" --worker=all --quiet --ssh-flag=-oConnectTimeout=20 \
        --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=10 "--command=$1"
}

# $1: number of failures so far.
back_off() {
    [ -n "$dry_run" ] || sleep $((wait * ($1 < 4 ? 1 << $1 : 10)))
}

# Prints "STATE TYPE" of the node, or nothing if it does not exist or the query fails; `create` then reports the reason.
describe() {
    "${tpu[@]}" describe "${node[@]}" "--format=value(state,acceleratorType.basename())" 2>/dev/null || true
}

# Returns when the node exists and is ready.
ensure_node() {
    local state has attempt
    local create=("${tpu[@]}" create "${node[@]}" "--accelerator-type=$type" "--version=$version" ${spot:+--spot} --quiet)
    create+=("${create_flags[@]}")
    for ((attempt = 0; attempt < max_creates; attempt++)); do
        state='' has=''
        [ -n "$dry_run" ] || read -r state has < <(describe) || true
        case $state in
            READY)
                there=1
                [ "${has:-$type}" = "$type" ] || die "$name exists, but its type is $has, not $type; choose another --name"
                return
                ;;
            PREEMPTED | TERMINATED)
                there=1
                say "$name is $state; recreating it"
                run "${tpu[@]}" delete "${node[@]}" --quiet || { back_off "$attempt"; continue; }
                there=''
                ;;
            STOPPED | HIDDEN) die "$name is $state; start or delete it first" ;;
            '') ;;
            *)
                say "$name is $state; waiting"
                back_off "$attempt"
                continue
                ;;
        esac
        show "${create[@]}"
        [ -z "$dry_run" ] || return 0
        if "${create[@]}" 2>"$scratch/stderr"; then
            there=1
            return
        fi
        cat "$scratch/stderr" >&2
        if [[ $(<"$scratch/stderr") =~ INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND ]]; then
            die "$name cannot be created: ${BASH_REMATCH[0]}, see above"
        fi
        say "attempt $((attempt + 1)) of $max_creates to create $name failed"
        back_off "$attempt"
    done
    echo "error: $name was not ready after $max_creates attempts" >&2
    exit 1
}

# Copies the code, installs it and trains. Returns the status of the step that failed, or train's.
train_on_node() {
    run "${tpu[@]}" scp "$scratch/$folder.tar.gz" "$name:$folder.tar.gz" "${node[@]:1}" --worker=all --quiet || return
    on_workers "$unpack && $(quoted "${install[@]}")" || return
    on_workers "cd $folder && $(quoted "${train[@]}")" & # in the background, so that signals are handled at once
    child=$!
    local status
    while true; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break # otherwise a signal interrupted `wait`
    done
    if [ -n "$stopping" ]; then # it may have exited in the signal handler; `wait` still returns its status
        status=0
        wait "$child" || status=$?
    fi
    child=''
    return "$status"
}

changes=$(git stash create) # a commit of the work tree; empty if it is clean
run git archive --format=tar.gz "--output=$scratch/$folder.tar.gz" "${changes:-HEAD}"

restarts=0 failures=0
while true; do
    ensure_node
    started=$SECONDS status=0
    train_on_node || status=$?
    ((status != 0)) || break
    say "status $status"
    ((status != 2)) || exit 2
    [ -z "$stopping" ] || exit "$status"
    ((SECONDS - started < 1800)) || failures=0
    back_off "$failures" # the reported state lags behind the node's
    read -r state _ < <(describe) || state=''
    if ((status == 75)) || [ "$state" != READY ]; then
        failures=0 restarts=$((restarts + 1))
        ((restarts <= max_restarts)) || { say "giving up after $max_restarts restarts"; exit 1; }
    else
        failures=$((failures + 1))
        ((failures < max_failures)) || { say "giving up after $failures consecutive failures"; exit 1; }
    fi
done
if [ -n "$delete_when_done" ]; then
    run "${tpu[@]}" delete "${node[@]}" --quiet
    there=''
fi
