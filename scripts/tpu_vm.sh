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
#   --queued            create the node by a queued resource of the same name, which waits for capacity
#   --create_flag=FLAG  an additional flag for `create`, e.g. --create_flag=--network=mine; may be repeated
#   --ssh_flag=FLAG     an additional flag for `ssh` and `scp`, e.g. --ssh_flag=--internal-ip; may be repeated
#   --gcloud_track=alpha    use `gcloud alpha`, for flags that only it has
#   --delete_when_done  delete the node after status 0
#   --max_creates=N     consecutive attempts to create a node (default 100)
#   --max_restarts=N    restarts after exit status 75 or a lost process or node (default 100)
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
queued='' track='' create_flags=() ssh_flags=() max_creates=100 max_restarts=100 max_failures=3 wait=30
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
        --queued) queued=1 ;;
        --gcloud_track=*) track=${1#*=} ;;
        --ssh_flag=*) ssh_flags+=("${1#*=}") ;;
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
[[ ! $type =~ ^(tpu|v)7x ]] || die "--type=$type is not offered by the Cloud TPU API; use scripts/gke.sh"
[[ $track =~ ^(alpha|beta)?$ ]] || die "--gcloud_track=$track is neither alpha nor beta"
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
tpus=(gcloud ${track:+"$track"} compute tpus)
tpu=("${tpus[@]}" tpu-vm)
create=("${tpu[@]}" create "${node[@]}" "--version=$version")
delete=("${tpu[@]}" delete "${node[@]}" --quiet)
if [ -n "$queued" ]; then # it owns the node, which is deleted with it
    create=("${tpus[@]}" queued-resources create "${node[@]}" "--node-id=$name" "--runtime-version=$version")
    delete=("${tpus[@]}" queued-resources delete "${node[@]}" --force --quiet)
fi
create+=("--accelerator-type=$type" ${spot:+--spot} --quiet "${create_flags[@]}")
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
    [ -z "$there" ] || say "$name still exists and is billed; to delete it: $(quoted "${delete[@]}")"
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
    run "${tpu[@]}" ssh "${node[@]}" --worker=all --quiet "${ssh_flags[@]}" --ssh-flag=-oConnectTimeout=20 \
        --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=10 "--command=$1"
}

# What gcloud says where another attempt would fail as well; the last three: no project or account is configured.
permanent='INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND'
permanent+='|attribute \[project\]|property \[core/project\]|active account'

# $1: number of failures so far.
seconds() { echo $((wait * ($1 < 4 ? 1 << $1 : 10))); }
back_off() {
    [ -n "$dry_run" ] || sleep "$(seconds "$1")"
}

# Prints "STATE,HEALTH,TYPE" of the node, or nothing if it does not exist or the query fails; `create` then reports the
# reason. A node that does not exist yet, but is queued, has the state of its queued resource, with QUEUE_ before it.
describe() {
    "${tpu[@]}" describe "${node[@]}" "--format=csv[no-heading](state,health,acceleratorType.basename())" 2>/dev/null ||
        { [ -n "$queued" ] && "${tpus[@]}" queued-resources describe "${node[@]}" \
            "--format=csv[no-heading](state.state)" 2>/dev/null | sed s/^/QUEUE_/; } || true
}

# Returns when the node exists and is ready. $1: "remake" deletes it first, even if it is said to be ready.
ensure_node() {
    local state health has attempt remake=${1:-}
    for ((attempt = 0; attempt < max_creates; attempt++)); do
        state='' health='' has=''
        [ -n "$dry_run" ] || IFS=, read -r state health has < <(describe) || true
        if [ "$state$remake" = READYremake ]; then
            state='READY, but cannot be reached'
        elif [ "$state$health" = READYUNHEALTHY_MAINTENANCE ]; then
            state='in maintenance'
        fi
        case $state in
            READY)
                there=1
                [ "${has:-$type}" = "$type" ] || die "$name exists, but its type is $has, not $type; choose another --name"
                return
                ;;
            # UNKNOWN: a repair has failed. The service sets a queued resource to SUSPENDED when its node was preempted.
            PREEMPTED | TERMINATED | UNKNOWN | 'READY, but cannot be reached' | QUEUE_SUSPENDED | QUEUE_FAILED)
                there=1
                say "$name is ${state#QUEUE_}; recreating it"
                run "${delete[@]}" || { back_off "$attempt"; continue; }
                there='' remake=''
                ;;
            STOPPED | HIDDEN) die "$name is $state; start or delete it first" ;;
            '') ;;
            *)
                say "$name is ${state#QUEUE_}; waiting"
                if [[ $state = QUEUE_* ]]; then # it may take days: not an attempt
                    there=1
                    ((attempt -= 1)) || true
                    back_off 4
                else
                    back_off "$attempt"
                fi
                continue
                ;;
        esac
        show "${create[@]}"
        [ -z "$dry_run" ] || return 0
        if "${create[@]}" 2>"$scratch/stderr"; then
            there=1
            [ -z "$queued" ] || continue
            return
        fi
        cat "$scratch/stderr" >&2
        if [[ $(<"$scratch/stderr") =~ $permanent ]]; then
            die "$name cannot be created: ${BASH_REMATCH[0]}, see above"
        fi
        say "attempt $((attempt + 1)) of $max_creates to create $name failed; the next one is in $(seconds "$attempt") s"
        back_off "$attempt"
    done
    echo "error: $name was not ready after $max_creates attempts" >&2
    exit 1
}

# Copies the code, installs it and trains. Returns the status of the step that failed, or train's.
train_on_node() {
    run "${tpu[@]}" scp "$scratch/$folder.tar.gz" "$name:$folder.tar.gz" "${node[@]:1}" --worker=all --quiet "${ssh_flags[@]}" || return
    # Stops on all workers what is left of an earlier run before one starts: a new process that meets the old coordinator
    # at the same port is refused and ends.
    on_workers "$unpack && bash scripts/tpu_worker.sh stop && $(quoted "${install[@]}")" || return
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

restarts=0 failures=0 unreached=0
while true; do
    # A spot node may be gone and READY all the same.
    if [ -n "$spot" ] && ((unreached >= 2)); then ensure_node remake; else ensure_node; fi
    started=$SECONDS status=0
    train_on_node || status=$?
    ((status != 0)) || break
    say "status $status"
    ((status != 2)) || exit 2
    [ -z "$stopping" ] || exit "$status"
    ((SECONDS - started < 1800)) || failures=0
    ((unreached = status == 255 ? unreached + 1 : 0)) || true # gcloud could not connect ten times
    back_off "$failures" # the reported state lags behind the node's
    IFS=, read -r state health _ < <(describe) || state='' health=''
    # 76, and 134 from JAX's C++ threads: a process lost another one
    if [[ $status =~ ^(75|76|134)$ || $state != READY || $health = UNHEALTHY_MAINTENANCE ]]; then
        failures=0 restarts=$((restarts + 1))
        ((restarts <= max_restarts)) || { say "giving up after $max_restarts restarts"; exit 1; }
    else
        failures=$((failures + 1))
        ((failures < max_failures)) || { say "giving up after $failures consecutive failures"; exit 1; }
    fi
done
if [ -n "$delete_when_done" ]; then
    run "${delete[@]}"
    there=''
fi
