"""gke.sh: its manifests against the schemas and rules of Kubernetes and JobSet, its calls against a fake kubectl."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess

import pytest
import yaml
from conftest import refused
from launcher_fakes import Fakes

from trialgpt_jax.parallel import clusters, processes

GKE = ["--name=node", "--image=image:1", "--claim=claim"]
TPU, GPU = "--tpu=tpu-v5-lite-podslice:4x4:4", "--gpu=nvidia-h100-80gb:8"
SPACES = """--config.data.source_options.path=a b's "c" $(d) \\ & *"""
TRAIN = ["--config=config.py", "--workdir=gs://bucket/${NAME}", SPACES]


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    return Fakes(tmp_path_factory.mktemp("gke"))


@pytest.fixture(autouse=True)
def cluster(fakes):
    """An empty cluster."""
    fakes.script()
    (fakes.folder / "calls.jsonl").write_text("")
    (fakes.folder / "objects.json").unlink(missing_ok=True)


def manifest(fakes, hardware, nodes, *options):
    """The only document of a manifest, its child Job's spec and its pod's."""
    result = fakes("gke.sh", *GKE, hardware, f"--nodes={nodes}", *options, "--dry_run", "--", *TRAIN)
    assert result.returncode == 0, result.stderr
    command, text = result.stdout.split("\n", 1)
    assert command == "kubectl apply -f -" and fakes.calls() == []
    (whole,) = yaml.safe_load_all(text)
    job = whole["spec"] if nodes == 1 else whole["spec"]["replicatedJobs"][0]["template"]["spec"]
    return whole, job, job["template"]["spec"]


@pytest.mark.parametrize(("hardware", "nodes"), [*itertools.product([TPU, GPU], [1, 4])])
def test_manifests_have_the_fields_and_types_of_the_schemas(fakes, hardware, nodes):
    """The models of kubeflow-trainer-api are generated from the OpenAPI schemas of Kubernetes and JobSet."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api: the `test` extra")
    options = ["--spot", "--cpu=100", "--memory=800Gi", "--service_account=me"]
    whole, _, _ = manifest(fakes, hardware, nodes, *options)
    top = {"apiVersion": "batch/v1", "kind": "Job"}
    model = models.IoK8sApiBatchV1JobSpec
    if nodes > 1:
        top = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
        model = models.JobsetV1alpha2JobSetSpec
    assert {name: whole[name] for name in whole if name not in ("metadata", "spec")} == top
    # unknown fields would be left out of what the model gives back
    assert model.from_dict(whole["spec"]).to_dict() == whole["spec"]
    metadata = models.IoK8sApimachineryPkgApisMetaV1ObjectMeta
    assert metadata.from_dict(whole["metadata"]).to_dict() == whole["metadata"]


@pytest.mark.parametrize(
    ("hardware", "nodes", "limits", "selector", "annotations"),
    [
        (
            TPU,
            4,
            {"google.com/tpu": 4},
            {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "4x4", "gke-spot": "true"},
            {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},  # all pods on one slice
        ),
        (GPU, 4, {"nvidia.com/gpu": 8}, {"gke-accelerator": "nvidia-h100-80gb", "gke-spot": "true"}, {}),
        (GPU, 1, {"nvidia.com/gpu": 8}, {"gke-accelerator": "nvidia-h100-80gb", "gke-spot": "true"}, None),
    ],
)
def test_a_manifest_asks_for_the_hardware_and_runs_the_flags(fakes, hardware, nodes, limits, selector, annotations):
    options = ["--spot", "--cpu=100", "--memory=800Gi", "--service_account=me"]
    whole, job, pod = manifest(fakes, hardware, nodes, *options)
    assert whole["metadata"].get("annotations") == annotations
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": limits, "requests": {"cpu": "100", "memory": "800Gi"}}
    assert pod["nodeSelector"] == {f"cloud.google.com/{name}": value for name, value in selector.items()}
    assert pod["serviceAccountName"] == "me" and pod["shareProcessNamespace"] is True
    assert pod["terminationGracePeriodSeconds"] == 120
    assert {"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"} in container["env"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    escaped = [argument.replace("$(", "$$(") for argument in TRAIN]  # Kubernetes reads `$$(` as `$(`
    assert container["args"][:3] == escaped and len(container["args"]) == (6 if nodes > 1 else 3)
    assert job.get("completions", 1) == job.get("parallelism", 1) == nodes
    plain = manifest(fakes, hardware, nodes)[2]
    assert plain["containers"][0]["resources"]["requests"] == {} and plain["serviceAccountName"] == "default"


@pytest.mark.parametrize(("hardware", "nodes"), [*itertools.product([TPU, GPU], [1, 4])])
def test_the_pods_of_a_manifest_find_each_other_by_the_variables_and_names_that_kubernetes_gives_them(
    fakes, hardware, nodes, monkeypatch
):
    """An Indexed Job sets JOB_COMPLETION_INDEX in each pod, also if it has only one."""
    whole, job, pod = manifest(fakes, hardware, nodes)
    (container,) = pod["containers"]
    indexed = job.get("completionMode") == "Indexed"
    places = []
    for i in range(nodes):
        env = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", **({"JOB_COMPLETION_INDEX": str(i)} if indexed else {})}
        for name in ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        words = [
            re.sub(r"(?<!\$)\$\((\w+)\)", lambda found, env=env: env[found[1]], word) for word in container["args"]
        ]
        given = dict(word[2:].split("=", 1) for word in words)

        class Flags:
            coordinator_address = given.get("coordinator_address")
            num_processes, process_id = int(given.get("num_processes", 0)), int(given.get("process_id", -1))
            peer_timeout_seconds = start_timeout_seconds = 60

        places.append(processes._given(Flags) or clusters.find(env, 60))
    if nodes == 1:
        assert places == [None]  # a job of one process
        return
    name = whole["metadata"]["name"]
    host = f"{name}-{whole['spec']['replicatedJobs'][0]['name']}-0-0.{name}"  # JOBSET-REPLICATEDJOB-JOB-INDEX.JOBSET
    assert places == [(f"{host}:8476", nodes, i, None) for i in range(nodes)]
    assert whole["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}


def job_action(job, exit_code, disrupted=False):
    """What the Job controller does with a failed pod: action and the index of the rule that was met."""
    for i, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]
            assert codes["operator"] == "In"
            met = exit_code in codes["values"]
        else:
            (condition,) = rule["onPodConditions"]
            assert condition == {"type": "DisruptionTarget", "status": "True"}
            met = disrupted
        if met:
            return rule["action"], i
    return "Count", None


def jobset_action(whole, job, exit_code, disrupted=False):
    """What the JobSet controller does, by the reason and the message that the child Job's condition then has."""
    action, i = job_action(job, exit_code, disrupted)
    pod, reason, message = (
        "mine/node-train-0-1-x7k2p",
        "BackoffLimitExceeded",
        "Job has reached the specified backoff limit",
    )
    if action == "FailJob":
        why = f"Container train for pod {pod} failed with exit code {exit_code}"
        why = f"Pod {pod} has condition DisruptionTarget" if "onPodConditions" in _rules(job)[i] else why
        reason, message = "PodFailurePolicy", f"{why} matching FailJob rule at index {i}"
    else:
        assert action == "Count" and job["backoffLimit"] == 0
    for rule in whole["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def _rules(job):
    return job["podFailurePolicy"]["rules"]


@pytest.mark.parametrize(
    ("exit_code", "disrupted", "action"),
    [
        (2, False, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),  # saved
        (76, False, "RestartJobSetAndIgnoreMaxRestarts"),  # lost a peer, whose node was preempted
        (134, False, "RestartJobSetAndIgnoreMaxRestarts"),  # the same, seen by JAX's C++ threads
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),  # on the preempted node itself
        (137, False, "RestartJobSet"),  # out of memory
        (1, False, "RestartJobSet"),
        (22, False, "RestartJobSet"),
    ],
)
def test_several_pods_restart_together_and_a_preemption_is_not_counted_for_its_peers(
    fakes, exit_code, disrupted, action
):
    whole, job, _ = manifest(fakes, TPU, 4, "--max_failures=7")
    assert jobset_action(whole, job, exit_code, disrupted) == action
    assert whole["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # required by the policy


@pytest.mark.parametrize(
    ("exit_code", "disrupted", "action"),
    [(2, False, "FailJob"), (75, False, "Ignore"), (137, True, "Ignore"), (137, False, "Count"), (1, False, "Count")],
)
def test_one_pod_is_replaced_by_the_job_itself(fakes, exit_code, disrupted, action):
    _, job, pod = manifest(fakes, GPU, 1, "--max_failures=7")
    assert job_action(job, exit_code, disrupted)[0] == action
    assert job["backoffLimit"] == 7 and job["podReplacementPolicy"] == "Failed" and pod["restartPolicy"] == "Never"


@pytest.mark.parametrize(("restarts", "status"), [("", 0), ("5", 0), ("6", 2)])
def test_the_number_of_all_restarts_is_limited_too(fakes, restarts, status):
    """JobSet does not count some of them, so each pod looks at the number of its attempt."""
    (container,) = manifest(fakes, GPU, 4, "--max_restarts=5")[2]["containers"]
    command = [*container["command"], *container["args"]]
    result = subprocess.run(
        command, env=fakes.env | {"RESTARTS": restarts}, capture_output=True, text=True, check=False
    )
    assert result.returncode == status, result.stderr
    calls = [["python", "-m", "trialgpt_jax.train", *container["args"]]]
    assert fakes.calls("python") == (calls if status == 0 else [])
    assert status == 0 or result.stderr == "error: restarted 6 times, more than --max_restarts=5\n"


def test_sigterm_to_the_container_reaches_train_and_its_status_is_that_of_the_container(fakes):
    """Kubernetes signals the first process of a container, a shell, which would not pass it on."""
    (container,) = manifest(fakes, GPU, 1)[2]["containers"]
    fakes.script(process_=["until stopped"])
    command = [*container["command"], *container["args"]]
    started = subprocess.Popen(command, env=fakes.env, start_new_session=True)
    fakes.until(lambda: (fakes.folder / "started").exists())
    started.terminate()
    try:
        assert started.wait(timeout=60) == 75
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def test_the_help_says_how_long_a_spot_node_leaves_for_a_save(fakes):
    """15 s for Pods without priority on GKE's Spot nodes, whatever terminationGracePeriodSeconds says."""
    text = " ".join(fakes("gke.sh", "--help").stdout.split())
    assert "a preempted one gives 15 s" in text and "checkpoint.every_minutes" in text


@pytest.mark.parametrize(("nodes", "kind"), [(1, "job"), (4, "jobset")])
def test_a_finished_run_is_replaced_and_one_that_goes_on_is_left_alone(fakes, nodes, kind):
    command = ["gke.sh", *GKE, GPU, f"--nodes={nodes}", "--namespace=mine"]

    def verbs():
        return [call[1] for call in fakes.calls("kubectl")]

    result = fakes(*command, "--", "--config=a")
    assert result.returncode == 0 and verbs() == ["get", "apply"], result.stderr
    assert all("--namespace=mine" in call for call in fakes.calls("kubectl"))
    assert "to follow the log: kubectl logs" in result.stderr
    result = fakes(*command, "--", "--config=a")
    refused(result, f"{kind}/node exists", f"kubectl delete --namespace=mine --cascade=foreground {kind}/node")
    objects = fakes.folder / "objects.json"
    for conditions in (
        ("SuccessCriteriaMet Complete", "FailureTarget Failed") if nodes == 1 else ("Completed", "Failed")
    ):
        (text, _) = json.loads(objects.read_text())[f"{kind}/node"]
        objects.write_text(json.dumps({f"{kind}/node": [text, conditions]}))
        (fakes.folder / "calls.jsonl").write_text("")
        result = fakes(*command, "--", f"--config={conditions}")  # other flags: the field is immutable
        assert result.returncode == 0 and verbs() == ["get", "delete", "apply"], result.stderr
        assert f"{kind}/node is finished ({conditions}); replacing it" in result.stderr


def test_a_cluster_without_jobset_is_named(fakes):
    missing = 'error: the server doesn\'t have a resource type "jobset"'
    fakes.script(kubectl_get=[missing])
    result = fakes("gke.sh", *GKE, GPU, "--nodes=2", "--", "--config=a")
    assert result.returncode == 1 and missing in result.stderr and "docs/clusters.md#gke" in result.stderr
    assert [call[1] for call in fakes.calls("kubectl")] == ["get"]


def test_wrong_names_and_hardware_are_refused(fakes):
    refused(fakes("gke.sh", *GKE, "--name=My_Run", "--gpu=a:1", "--", "--config=c"), "--name=My_Run", "lower-case")
    refused(fakes("gke.sh", *GKE, f"--name={'a' * 41}", "--gpu=a:1", "--", "--config=c"), "more than 40")
    refused(fakes("gke.sh", *GKE, "--gpu=a", "--", "--config=c"), "--gpu=TYPE:GPUS", "--gpu=a")
    refused(fakes("gke.sh", *GKE, "--gpu=a:1", "--tpu=a:2x2:4", "--", "--config=c"), "one of")
    refused(fakes("gke.sh", *GKE[:-1], "--gpu=a:1", "--", "--config=c"), "--claim", "missing")
    refused(fakes("gke.sh", *GKE, "--gpu=a:1"), "--config=FILE")
    refused(fakes("gke.sh", *GKE, "--gpu=a:1", "--max_failures=x", "--", "--config=c"), "--max_failures=x")
    assert fakes.calls() == []
