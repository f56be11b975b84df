#!/usr/bin/env bash
# Trains on a GKE cluster: fills in scripts/gke_job.yaml and applies it with kubectl.
#
#   bash scripts/gke.sh --name=NAME --image=IMAGE --claim=CLAIM --tpu=TYPE:TOPOLOGY:CHIPS|--gpu=TYPE:GPUS [options]
#        -- --config=FILE --workdir=FOLDER [flags of trialgpt_jax.train]
#
#   --name=NAME        name of the Job and its Service: lower-case letters, digits and `-`
#   --image=IMAGE      a container image with the package installed (extra `tpu` or `cuda`) and the repository root as its
#                      working directory
#   --claim=CLAIM      a PersistentVolumeClaim that several nodes may write, mounted at /mnt/shared, with the token store,
#                      and with the workdir unless that is gs://...
#   --tpu=TYPE:TOPOLOGY:CHIPS  e.g. tpu-v5-lite-podslice:4x4:4, the node pool's labels and the chips per host
#   --gpu=TYPE:GPUS    e.g. nvidia-h100-80gb:8, the node pool's label and the GPUs per machine
#   --nodes=N          hosts of the slice, or GPU machines (default 1)
#   --spot             use spot nodes
#   --max_failures=N   pod failures before the Job fails (default 3 per node); exits with 75 and lost nodes do not count
#   --namespace=NAMESPACE  (default: kubectl's)
#   --dry_run          prints the manifest and the command without running it
set -euo pipefail
source "$(dirname "$0")/launcher_lib.sh"
name='' image='' claim='' tpu='' gpu='' nodes=1 spot='' max_failures='' namespace=''
while (($#)); do
    case $1 in
        --help) usage; exit 0 ;;
        --dry_run) dry_run=1 ;;
        --name=*) name=${1#*=} ;;
        --image=*) image=${1#*=} ;;
        --claim=*) claim=${1#*=} ;;
        --tpu=*) tpu=${1#*=} ;;
        --gpu=*) gpu=${1#*=} ;;
        --nodes=*) nodes=${1#*=} ;;
        --spot) spot=1 ;;
        --max_failures=*) max_failures=${1#*=} ;;
        --namespace=*) namespace=${1#*=} ;;
        --) shift; break ;;
        *) die "$1 is not an option; flags of train come after \`--\`, and --help lists the options" ;;
    esac
    shift
done
for option in name image claim; do
    [ -n "${!option}" ] || die "--$option=... is missing; see --help"
done
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name=$name must consist of lower-case letters, digits and \`-\`"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes=$nodes must be a positive integer"
(($#)) || die "nothing to run: give --config=FILE and --workdir=FOLDER after \`--\`"

if [[ -z $gpu && $tpu =~ ^([a-z0-9-]+):([0-9]+(x[0-9]+)+):([0-9]+)$ ]]; then
    selector="\"cloud.google.com/gke-tpu-accelerator\": \"${BASH_REMATCH[1]}\""
    selector+=", \"cloud.google.com/gke-tpu-topology\": \"${BASH_REMATCH[2]}\""
    limits="{\"google.com/tpu\": ${BASH_REMATCH[4]}}"
elif [[ -z $tpu && $gpu =~ ^([a-z0-9-]+):([0-9]+)$ ]]; then
    selector="\"cloud.google.com/gke-accelerator\": \"${BASH_REMATCH[1]}\""
    limits="{\"nvidia.com/gpu\": ${BASH_REMATCH[2]}}"
else
    die "give one of --tpu=TYPE:TOPOLOGY:CHIPS and --gpu=TYPE:GPUS, not --tpu=$tpu --gpu=$gpu"
fi
[ -z "$spot" ] || selector+=', "cloud.google.com/gke-spot": "true"'

# The flags as a JSON list. Kubernetes expands $(NAME) in it; in the user's flags `$(` is escaped as `$$(`.
arguments=
append() {
    local argument=${1//\\/\\\\}
    arguments+="${arguments:+, }\"${argument//\"/\\\"}\""
}
for argument in "$@"; do
    [[ $argument != *[[:cntrl:]]* ]] || die "a flag contains a line break or control character"
    append "${argument//\$\(/\$\$\(}"
done
if ((nodes > 1)); then
    append "--coordinator_address=$name-0.$name:8476"
    append "--num_processes=$nodes"
    append "--process_id=\$(JOB_COMPLETION_INDEX)"
fi

manifest=$(<"$(dirname "$0")/gke_job.yaml")
fill() {
    manifest=${manifest//"\${$1}"/"$2"}
}
fill NAME "$name"
fill NODES "$nodes"
fill BACKOFF_LIMIT "${max_failures:-$((3 * nodes))}"
fill NODE_SELECTOR "{$selector}"
fill IMAGE "$image"
fill LIMITS "$limits"
fill CLAIM "$claim"
fill TRAIN_ARGS "[$arguments]" # last, because it may contain placeholders

apply=(kubectl apply ${namespace:+"--namespace=$namespace"} -f -)
show "${apply[@]}"
if [ -n "$dry_run" ]; then
    printf '%s\n' "$manifest"
    exit 0
fi
printf '%s\n' "$manifest" | "${apply[@]}"
say "to follow the log: kubectl logs ${namespace:+--namespace=$namespace }--follow --selector=job-name=$name,batch.kubernetes.io/job-completion-index=0"
say "to save and stop: kubectl delete ${namespace:+--namespace=$namespace }job/$name service/$name"
