#!/usr/bin/env bash
# Trains on a GKE cluster: a Job for one machine (gke_job.yaml), a JobSet for several (gke_jobset.yaml).
#
#   bash scripts/gke.sh --name=NAME --image=IMAGE --claim=CLAIM --tpu=TYPE:TOPOLOGY:CHIPS|--gpu=TYPE:GPUS [options]
#        -- --config=FILE --workdir=FOLDER [flags of trialgpt_jax.train]
#
#   --name=NAME        name of the Job or JobSet: lower-case letters, digits and `-`, at most 40
#   --image=IMAGE      a container image with the package installed (extra `tpu` or `cuda`) and the repository root as its
#                      working directory
#   --claim=CLAIM      a PersistentVolumeClaim that several nodes may write, mounted at /mnt/shared, with the token store,
#                      and with the workdir unless that is gs://...
#   --tpu=TYPE:TOPOLOGY:CHIPS  e.g. tpu-v5-lite-podslice:4x4:4, the node pool's labels and the chips per host
#   --gpu=TYPE:GPUS    e.g. nvidia-h100-80gb:8, the node pool's label and the GPUs per machine
#   --nodes=N          hosts of the slice, or GPU machines (default 1); several need the JobSet controller in the cluster
#   --spot             use spot nodes; a preempted one gives 15 s, too few for most saves: see checkpoint.every_minutes
#   --max_failures=N   restarts after a failure before the run fails (default 3); exits with 75, lost processes and lost
#                      nodes do not count
#   --max_restarts=N   restarts for any reason before the run fails, with several nodes (default 100)
#   --cpu=N, --memory=SIZE     what a pod requests, e.g. 100 and 800Gi (default: nothing; such pods are evicted first)
#   --service_account=NAME     the Kubernetes service account, which Workload Identity maps to one for gs:// (`default`)
#   --namespace=NAMESPACE      (default: kubectl's)
#   --dry_run          prints the manifest and the command without running it
#
# A finished run of that name is deleted first, and the new one resumes from its workdir. A run that is going on is left
# alone: exit status 2.
set -euo pipefail
source "$(dirname "$0")/launcher_lib.sh"
name='' image='' claim='' tpu='' gpu='' nodes=1 spot='' max_failures=3 max_restarts=100 cpu='' memory='' service_account=default
namespace=()
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
        --max_restarts=*) max_restarts=${1#*=} ;;
        --cpu=*) cpu=${1#*=} ;;
        --memory=*) memory=${1#*=} ;;
        --service_account=*) service_account=${1#*=} ;;
        --namespace=*) namespace=("--namespace=${1#*=}") ;;
        --) shift; break ;;
        *) die "$1 is not an option; flags of train come after \`--\`, and --help lists the options" ;;
    esac
    shift
done
for option in name image claim; do
    [ -n "${!option}" ] || die "--$option=... is missing; see --help"
done
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name=$name must consist of lower-case letters, digits and \`-\`"
((${#name} <= 40)) || die "--name=$name has more than 40 characters"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes=$nodes must be a positive integer"
for option in max_failures max_restarts; do
    [[ ${!option} =~ ^[0-9]+$ ]] || die "--$option=${!option} must be an integer"
done
(($#)) || die "nothing to run: give --config=FILE and --workdir=FOLDER after \`--\`"

annotations='{}'
if [[ -z $gpu && $tpu =~ ^([a-z0-9-]+):([0-9]+(x[0-9]+)+):([0-9]+)$ ]]; then
    selector="\"cloud.google.com/gke-tpu-accelerator\": \"${BASH_REMATCH[1]}\""
    selector+=", \"cloud.google.com/gke-tpu-topology\": \"${BASH_REMATCH[2]}\""
    limits="{\"google.com/tpu\": ${BASH_REMATCH[4]}}"
    # A node pool is a slice: without this the pods could be spread over two of them.
    annotations='{"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}'
elif [[ -z $tpu && $gpu =~ ^([a-z0-9-]+):([0-9]+)$ ]]; then
    selector="\"cloud.google.com/gke-accelerator\": \"${BASH_REMATCH[1]}\""
    limits="{\"nvidia.com/gpu\": ${BASH_REMATCH[2]}}"
else
    die "give one of --tpu=TYPE:TOPOLOGY:CHIPS and --gpu=TYPE:GPUS, not --tpu=$tpu --gpu=$gpu"
fi
[ -z "$spot" ] || selector+=', "cloud.google.com/gke-spot": "true"'
requests="${cpu:+\"cpu\": \"$cpu\"}${cpu:+${memory:+, }}${memory:+\"memory\": \"$memory\"}"

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
kind=job
if ((nodes > 1)); then
    kind=jobset
    append "--coordinator_address=$name-train-0-0.$name:8476"
    append "--num_processes=$nodes"
    append "--process_id=\$(JOB_COMPLETION_INDEX)"
fi

# The manifest; the line `${POD}` is replaced by the lines of gke_pod.yaml, indented as it is.
folder=$(dirname "$0")
manifest=$(awk -v pod="$folder/gke_pod.yaml" '
    /^ *\$\{POD\}$/ { sub(/\$.*/, ""); while ((getline line < pod) > 0) print $0 line; next }
    { print }' "$folder/gke_$kind.yaml")
fill() {
    manifest=${manifest//"\${$1}"/"$2"}
}
fill NAME "$name"
fill NODES "$nodes"
fill MAX_FAILURES "$max_failures"
fill ANNOTATIONS "$annotations"
fill SERVICE_ACCOUNT "$service_account"
fill NODE_SELECTOR "{$selector}"
fill IMAGE "$image"
fill MAX_RESTARTS "$max_restarts"
fill REQUESTS "{$requests}"
fill LIMITS "$limits"
fill CLAIM "$claim"
fill TRAIN_ARGS "[$arguments]" # last, because it may contain placeholders

apply=(kubectl apply "${namespace[@]}" -f -)
delete=(kubectl delete "${namespace[@]}" --cascade=foreground "$kind/$name")
log=(kubectl logs "${namespace[@]}" --follow)
if ((nodes > 1)); then
    log+=("--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0")
else
    log+=("--selector=batch.kubernetes.io/job-name=$name")
fi
if [ -n "$dry_run" ]; then
    show "${apply[@]}"
    printf '%s\n' "$manifest"
    exit 0
fi

# `kubectl apply` leaves a finished Job finished, and refuses to change the pods of one that exists.
conditions=$(kubectl get "${namespace[@]}" "$kind/$name" --ignore-not-found \
    -o 'jsonpath={.kind} {.status.conditions[?(@.status=="True")].type}') || {
    ((nodes == 1)) || say "several machines need the JobSet controller: see docs/clusters.md#gke-gkesh"
    exit 1
}
case " $conditions " in
    '  ') ;;
    *' Complete '* | *' Completed '* | *' Failed '*)
        say "$kind/$name is finished (${conditions#* }); replacing it"
        run "${delete[@]}"
        ;;
    *)
        say "to follow the log: $(quoted "${log[@]}")"
        die "$kind/$name exists and is not finished; to save and stop it: $(quoted "${delete[@]}")"
        ;;
esac
show "${apply[@]}"
printf '%s\n' "$manifest" | "${apply[@]}"
say "to follow the log: $(quoted "${log[@]}")"
say "to save and stop: $(quoted "${delete[@]}")"
