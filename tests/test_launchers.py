"""The launchers against stand-ins for gcloud, kubectl, srun and scontrol: what they call, in which order, and what they make of it."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, metrics, overrides, refused, run, small_config

SCRIPTS = ROOT / "scripts"
TPU = [
    "--name=node",
    "--zone=zone",
    "--type=v5litepod-16",
    "--config=config.py",
    "--workdir=gs://bucket/my run",
    "--wait=0",
]
GKE = ["--name=node", "--image=image:1", "--claim=claim"]
SPACES = """--config.data.source_options.path=a b's "c" $(d) \\ & *"""


class Fakes:
    """A folder with the stand-ins first in PATH, a git work tree with the code, and the calls that were made."""

    def __init__(self, folder):
        self.folder, self.root = folder, folder / "work tree"
        (folder / "bin").mkdir()
        for name in ("gcloud", "kubectl", "srun", "scontrol", "curl", "python3", "python", "nvidia-smi"):
            path = folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/fakes/fake.py" {name} "$@"\n')
            path.chmod(0o755)
        self.env = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CUDA_", "VENV"))
        }
        self.env |= {"FAKE": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
        self.env |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CEILING_DIRECTORIES": str(folder)}
        self.env.setdefault("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))  # what is compiled outlives a worker
        self.script()
        (folder / "calls.jsonl").touch()
        skip = shutil.ignore_patterns("__pycache__", "bench")
        for name in ("trialgpt_jax", "scripts"):
            shutil.copytree(ROOT / name, self.root / name, ignore=skip)
        (self.root / "config.py").write_text("from trialgpt_jax.config import default_config as get_config\n")
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=all")

    def git(self, *arguments):
        subprocess.run(["git", *arguments], cwd=self.root, env=self.env, check=True)

    def script(self, **scenario):
        (self.folder / "scenario.json").write_text(json.dumps({k.replace("_", " "): v for k, v in scenario.items()}))

    def start(self, script, *arguments, **env):
        return subprocess.Popen(["bash", f"scripts/{script}", *arguments], cwd=self.root, env=self.env | env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def __call__(self, script, *arguments, **env):
        process = self.start(script, *arguments, **env)
        stdout, stderr = process.communicate(timeout=280)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def calls(self, name=None):
        calls = [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
        return [call for call in calls if name in (None, call[0])]

    def verbs(self):
        """What gcloud was asked for, in order; an ssh by what it ran; `describe`, which changes nothing, left out."""
        verbs = [call[4] if call[4] != "ssh" else call[-1].split("tpu_worker.sh ")[1].split()[0] for call in self.calls("gcloud")
                 if call[1] == "compute"]  # fmt: skip
        return [verb for verb in verbs if verb != "describe"]

    def until(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


ONCE = ["scp", "install", "train"]


def test_shellcheck_finds_nothing_in_the_scripts():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck comes with the `test` extra, and is not installed")
    scripts = [str(path) for pattern in ("*.sh", "*.sbatch") for path in SCRIPTS.glob(pattern)]
    assert len(scripts) >= 9
    command = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", *scripts, str(ROOT / ".ci" / "run")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("tpu_vm.sh", [*TPU, "--data=gs://bucket/tokens", "--spot", "--delete_when_done", "--dry_run", "--", SPACES]),
        ("slurm.sbatch", ["--dry_run", "--config=config.py", SPACES]),
        ("gke.sh", [*GKE, "--gpu=nvidia-h100-80gb:8", "--dry_run", "--", "--config=config.py", SPACES]),
        (
            "multi_gpu.sh",
            ["--dry_run", "--processes=2", "--gpus=0,1,2,3", "--port=9", "--", "--config=config.py", SPACES],
        ),
    ],
)
def test_dry_run_shows_the_commands_as_a_shell_reads_them_and_calls_nothing(fakes, script, arguments):
    result = fakes(script, *arguments)
    assert result.returncode == 0, result.stderr
    assert fakes.calls() == []
    words = (
        [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]
        if script != "gke.sh"
        else []
    )
    if script == "tpu_vm.sh":
        assert [line[4] if line[0] == "gcloud" else line[1] for line in words] == [
            "archive",
            "create",
            "scp",
            "ssh",
            "ssh",
            "delete",
        ]
        assert {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"} < set(words[1])
        remote = shlex.split(words[4][-1].removeprefix("--command="))  # the worker's shell reads it once more
        assert remote[-5:] == [
            "train",
            "--config=config.py",
            "--workdir=gs://bucket/my run",
            "--config.data.dir=data/tokens",
            SPACES,
        ]
    elif script == "slurm.sbatch":
        assert words[0][0] == "srun" and words[0][-4:] == ["-m", "trialgpt_jax.train", "--config=config.py", SPACES]
        assert words[1] == ["scontrol", "requeue", "JOB"]
    elif script == "multi_gpu.sh":
        for i, (line, gpus) in enumerate(zip(words, ("0,1", "2,3"), strict=True)):
            assert line == ["env", f"CUDA_VISIBLE_DEVICES={gpus}", "python", "-m", "trialgpt_jax.train", "--config=config.py", SPACES,
                            "--coordinator_address=127.0.0.1:9", "--num_processes=2", f"--process_id={i}"]  # fmt: skip
    else:
        assert result.stdout.startswith("kubectl apply -f -\n")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sbatch", "gke.sh", "multi_gpu.sh"])
def test_help_is_the_comment_at_the_top(fakes, script):
    result = fakes(script, "--help")
    assert result.returncode == 0 and f"scripts/{script} " in result.stdout and "--dry_run" in result.stdout
    assert "#SBATCH" not in result.stdout and "set -euo" not in result.stdout and fakes.calls() == []


# tpu_vm.sh


def test_a_preempted_slice_is_made_anew_and_the_run_continues_at_the_saved_step(fakes, store):
    """The real train, on CPU: killed with its machine at step 25, whose disk is gone; the bucket stays."""
    config = small_config("data/tokens")  # where the launcher puts it
    config.train.update({"steps": 100, "batch_size": 32})
    config.checkpoint.every_steps = 10
    shutil.copytree(store, fakes.folder / "bucket" / "tokens")
    workdir = fakes.folder / "bucket" / "my run"
    stockout = "There is no more capacity in the zone"
    log = "gs://bucket/my run/metrics.jsonl"
    fakes.script(create=[stockout, 0, stockout], train=[{"preempted at": 25, "log": log}, "run"])
    result = fakes(
        "tpu_vm.sh", *TPU, "--spot", "--data=gs://bucket/tokens", "--delete_when_done", "--", *overrides(config)
    )
    assert result.returncode == 0, result.stderr
    # the stock-outs are waited for, the dead node is deleted, and the new one gets everything again
    assert fakes.verbs() == ["create", "create", *ONCE, "delete", "create", "create", *ONCE, "delete"]
    first, second = [call for call in fakes.calls("gcloud") if "worker.sh train" in call[-1]]
    assert first == second
    assert len([call for call in fakes.calls("venv-python") if "pip" in call and call[-1] == ".[tpu,gs]"]) == 2
    (step,) = re.findall("^resumed from checkpoint (.*)$", result.stderr, re.MULTILINE)
    assert step in ("10", "20")  # the save of step 20 may have been under way
    said = result.stderr[result.stderr.index("resumed from") :]
    assert f"step  {int(step) + 1}/100" in said and f"step  {step}/100" not in said and "done: step 100" in said
    assert not (fakes.folder / "vm").exists() and not (fakes.folder / "node").exists()
    # and it is the run that nothing interrupted
    config.data.dir = str(store)
    alone = fakes.folder / "alone"
    assert run("train", f"--config={fakes.root}/config.py", *overrides(config), f"--workdir={alone}").returncode == 0
    assert metrics(workdir) == metrics(alone)


@pytest.mark.parametrize(
    ("scenario", "options", "status", "verbs"),
    [
        ({}, [], 0, ["create", *ONCE]),
        ({"train": [75]}, [], 0, ["create", *ONCE, *ONCE]),  # stopped after saving: goes on, on the node that is there
        ({"train": [75, 75, 75]}, ["--max_restarts=2"], 1, ["create", *ONCE * 3]),
        ({"train": [2]}, [], 2, ["create", *ONCE]),
        ({"train": [1, 134]}, [], 0, ["create", *ONCE * 3]),
        ({"train": [1, 255, 1, 1]}, [], 1, ["create", *ONCE * 3]),
        ({"train": [1, 1, 75, 1, 1]}, [], 0, ["create", *ONCE * 6]),  # three in a row are too many, not three in all
        ({"train": ["preempted"] * 4}, [], 0, ["create", *(ONCE + ["delete", "create"]) * 4, *ONCE]),
        ({"train": ["preempted"] * 2}, ["--max_restarts=1"], 1, ["create", *ONCE, "delete", "create", *ONCE]),
        ({"install": [1]}, [], 0, ["create", "scp", "install", *ONCE]),
        ({"install": [2]}, [], 2, ["create", "scp", "install"]),
        ({"create": ["There is no more capacity"] * 9}, ["--max_creates=3"], 1, ["create"] * 3),
        ({"create": ["ERROR: PERMISSION_DENIED: no"]}, [], 2, ["create"]),
        ({"describe": ["READY\tv5litepod-16"]}, [], 0, ONCE),  # there already
        ({"describe": ["CREATING\tv5litepod-16", "READY\tv5litepod-16"]}, [], 0, ONCE),
        ({"describe": ["TERMINATED\tv5litepod-16"]}, [], 0, ["delete", "create", *ONCE]),
        ({"describe": ["READY\tv5p-8"]}, [], 2, []),
        ({"describe": ["STOPPED\tv5litepod-16"]}, [], 2, []),
    ],
)
def test_what_tpu_vm_makes_of_each_ending(fakes, scenario, options, status, verbs):
    if "describe" in scenario:
        (fakes.folder / "vm").mkdir()
    fakes.script(**scenario)
    result = fakes("tpu_vm.sh", *TPU, *options)
    assert (result.returncode, fakes.verbs()) == (status, verbs), result.stderr
    there = (fakes.folder / "node").exists()
    assert ("node is still there, and paid for" in result.stderr) == (there and "STOPPED" not in str(scenario))


def test_sigterm_to_tpu_vm_stops_train_which_saves(fakes):
    fakes.script(train=["until stopped"])
    launcher = fakes.start("tpu_vm.sh", *TPU)
    fakes.until(lambda: "train" in fakes.verbs())
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 75 and fakes.verbs() == ["create", *ONCE, "stop"], said


def test_what_tpu_vm_copies_is_what_git_tracks_with_its_changes(fakes):
    (fakes.root / "config.py").write_text("changed = True\n")
    (fakes.root / "junk").write_text("junk")
    result = fakes("tpu_vm.sh", *TPU)
    assert result.returncode == 0, result.stderr
    copy = fakes.folder / "vm" / "trialgpt_jax_run"
    assert (copy / "config.py").read_text() == "changed = True\n" and not (copy / "junk").exists()
    assert (copy / "trialgpt_jax" / "train.py").exists()
    (fakes.root / "config.py").write_text("changed = 'again'\n")
    (copy / "old.py").touch()  # of an older version of the code
    fakes("tpu_vm.sh", *TPU)
    assert (copy / "config.py").read_text() == "changed = 'again'\n" and not (copy / "old.py").exists()
    assert (copy / ".venv").exists() and len([call for call in fakes.calls("python3") if "venv" in call]) == 1


def test_tpu_vm_refuses_what_would_lose_work(fakes):
    def refusal(*words, replace=None, more=()):
        arguments = [a for a in TPU if not replace or not a.startswith(replace.split("=")[0] + "=")]
        refused(fakes("tpu_vm.sh", *arguments, *([replace] if replace else []), *more), *words)

    refusal("--workdir=runs/a", "gs://", replace="--workdir=runs/a", more=["--spot"])
    refusal("--workdir=runs/a", "gs://", replace="--workdir=runs/a", more=["--delete_when_done"])
    (fakes.root / "mine.py").touch()
    refusal("--config=mine.py", "git add", replace="--config=mine.py")
    refusal("--type", "missing", replace="--type=")
    refusal("--version", "v99", replace="--type=v99-8")
    refusal("--config.seed=1", "after `--`", more=["--config.seed=1"])
    refusal("--data=here", "gs://", more=["--data=here"])
    assert fakes.calls() == []


def test_a_worker_of_a_slice_knows_its_number_and_ends_the_train_it_finds(fakes):
    python = fakes.root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    old = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", "trialgpt_jax.train"])
    (fakes.root / "train.pid").write_text(f"{old.pid}\n")
    result = fakes("tpu_worker.sh", "train", "--config=a b", FAKE_WORKERS="n:0:10.0.0.1,n:1:10.0.0.2,n:2:10.0.0.3")
    assert old.wait(timeout=60) == -signal.SIGTERM, result.stderr
    expected = [
        "-m",
        "trialgpt_jax.train",
        "--config=a b",
        "--coordinator_address=10.0.0.1:8476",
        "--num_processes=3",
        "--process_id=1",
    ]
    assert result.stdout.splitlines() == expected, result.stderr
    # a number that is another program's by now is left alone; one worker needs no flags; newer runtimes give plain names
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    (fakes.root / "train.pid").write_text(f"{other.pid}\n")
    assert fakes("tpu_worker.sh", "train", FAKE_WORKERS="host-0").stdout.splitlines() == expected[:2]
    assert other.poll() is None
    other.kill()
    other.wait()
    result = fakes("tpu_worker.sh", "train", FAKE_WORKERS="host-0,host-1")
    assert "--coordinator_address=host-0:8476" in result.stdout.splitlines()
    python.write_text("#!/bin/sh\nexit 75\n")
    assert fakes("tpu_worker.sh", "train").returncode == 75
    python.write_text("#!/bin/sh\nkill -KILL $$\n")  # not 255, with which ssh would report it
    assert fakes("tpu_worker.sh", "train").returncode == 137


# slurm.sbatch


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (1, False), (137, False), (75, True)])
def test_slurm_requeues_what_stopped_after_saving_and_nothing_else(fakes, status, requeued):
    (fakes.root / ".venv" / "bin").mkdir(parents=True)
    (fakes.root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    fakes.script(srun=[status] * 2)
    env = {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(fakes.root), "SLURM_CPUS_PER_TASK": "6"}
    result = fakes("slurm.sbatch", "--config=config.py", SPACES, **env)
    assert result.returncode == status, result.stderr
    assert fakes.calls("scontrol") == ([["scontrol", "requeue", "77"]] if requeued else [])
    (call,) = fakes.calls("srun")
    assert call[-4:] == ["-m", "trialgpt_jax.train", "--config=config.py", SPACES]
    assert {f"--chdir={fakes.root}", "--cpus-per-task=6"} < set(call)
    env |= {"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3"}
    assert fakes("slurm.sbatch", "--config=config.py", **env).returncode == status
    assert len(fakes.calls("scontrol")) == requeued


def test_slurm_signals_the_processes_in_time_and_gives_each_gpu_a_task():
    lines = [
        line.split()[1] for line in (SCRIPTS / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")
    ]
    options = dict(line[2:].partition("=")[::2] for line in lines)
    assert options["signal"] == "TERM@120" and "requeue" in options and options["open-mode"] == "append"
    assert options["gpus-per-node"] == options["ntasks-per-node"]


# gke.sh

# The fields of the Kubernetes API (Job of batch/v1, Service of v1) that the manifest may use, with their types.
NAMED = {"name": str}
MATCH = {"action": str, "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
         "onPodConditions": [{"type": str, "status": str}]}  # fmt: skip
CONTAINER = {"name": str, "image": str, "command": [str], "args": [str], "resources": {"limits": dict},
             "volumeMounts": [{"name": str, "mountPath": str}]}  # fmt: skip
VOLUME = {"name": str, "persistentVolumeClaim": {"claimName": str}, "emptyDir": {"medium": str}}
POD = {"subdomain": str, "restartPolicy": str, "terminationGracePeriodSeconds": int, "nodeSelector": dict,
       "tolerations": [{"key": str, "operator": str, "effect": str}], "containers": [CONTAINER], "volumes": [VOLUME]}  # fmt: skip
JOB = {"completionMode": str, "completions": int, "parallelism": int, "backoffLimit": int, "podReplacementPolicy": str,
       "podFailurePolicy": {"rules": [MATCH]}, "template": {"spec": POD}}  # fmt: skip
SERVICE = {"clusterIP": str, "publishNotReadyAddresses": bool, "selector": dict}


def conforms(value, schema, path=""):
    if isinstance(schema, dict):
        assert isinstance(value, dict) and value.keys() <= schema.keys(), (path, value)
        for name in value:
            conforms(value[name], schema[name], f"{path}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for i, item in enumerate(value):
            conforms(item, schema[0], f"{path}[{i}]")
    else:
        assert type(value) is schema, (path, value)


@pytest.mark.parametrize(
    ("hardware", "nodes", "limits", "selector"),
    [
        ("--tpu=tpu-v5-lite-podslice:4x4:4", 4, {"google.com/tpu": 4},
         {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "4x4", "gke-spot": "true"}),
        ("--gpu=nvidia-h200-141gb:8", 1, {"nvidia.com/gpu": 8}, {"gke-accelerator": "nvidia-h200-141gb", "gke-spot": "true"}),
    ],
)  # fmt: skip
def test_the_manifest_that_kubectl_gets(fakes, hardware, nodes, limits, selector):
    arguments = [*GKE, hardware, f"--nodes={nodes}", "--spot", "--namespace=mine"]
    train = ["--config=config.py", "--workdir=gs://bucket/${NAME}", SPACES]
    result = fakes("gke.sh", *arguments, "--", *train)
    assert result.returncode == 0, result.stderr
    assert fakes.calls() == [["kubectl", "apply", "--namespace=mine", "-f", "-"]]
    text = (fakes.folder / "stdin").read_text()
    dry = fakes("gke.sh", *arguments, "--dry_run", "--", *train).stdout
    assert dry == "kubectl apply --namespace=mine -f -\n" + text
    service, job = yaml.safe_load_all(text)
    top = {"apiVersion": str, "kind": str, "metadata": NAMED}
    conforms(service, top | {"spec": SERVICE})
    conforms(job, top | {"spec": JOB})
    assert (service["apiVersion"], service["kind"], job["apiVersion"], job["kind"]) == (
        "v1",
        "Service",
        "batch/v1",
        "Job",
    )
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {
        "job-name": job["metadata"]["name"]
    }
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == nodes
    assert (
        pod["subdomain"] == service["metadata"]["name"] and pod["restartPolicy"] == "Never"
    )  # as the failure policy needs
    actions = {
        rule["onExitCodes"]["values"][0]: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert actions == {2: "FailJob", 75: "Ignore"} and spec["podReplacementPolicy"] == "Failed"
    assert pod["nodeSelector"] == {f"cloud.google.com/{name}": value for name, value in selector.items()}
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == limits
    names = {
        rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    }
    assert names == {container["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    several = [
        "--coordinator_address=node-0.node:8476",
        f"--num_processes={nodes}",
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]
    kept = [argument.replace("$(", "$$(") for argument in train]  # Kubernetes reads `$$(` as `$(`
    assert container["args"] == kept + (several if nodes > 1 else [])


def test_gke_refuses_names_and_hardware_that_kubernetes_has_not(fakes):
    refused(fakes("gke.sh", *GKE, "--name=My_Run", "--gpu=a:1", "--", "--config=c"), "--name=My_Run", "lower-case")
    refused(fakes("gke.sh", *GKE, "--gpu=a", "--", "--config=c"), "--gpu=TYPE:GPUS", "--gpu=a")
    refused(fakes("gke.sh", *GKE, "--gpu=a:1", "--tpu=a:2x2:4", "--", "--config=c"), "one of")
    refused(fakes("gke.sh", *GKE[:-1], "--gpu=a:1", "--", "--config=c"), "--claim", "missing")
    refused(fakes("gke.sh", *GKE, "--gpu=a:1"), "--config=FILE")
    assert fakes.calls() == []


# multi_gpu.sh


def test_one_process_gets_all_gpus_and_several_get_a_share_each(fakes):
    fakes.script()
    assert fakes("multi_gpu.sh", "--gpus=0,1", "--config=a b").returncode == 0
    assert fakes.calls("python") == [["python", "-m", "trialgpt_jax.train", "--config=a b"]]
    assert (fakes.folder / "gpus").read_text() == "0,1"
    assert (
        fakes("multi_gpu.sh", "--processes=2", "--port=9", "--config=a b", CUDA_VISIBLE_DEVICES="4,5,6,7").returncode
        == 0
    )
    assert sorted(call[-1] for call in fakes.calls("python")[1:]) == ["--process_id=0", "--process_id=1"]
    assert [(fakes.folder / f"gpus{i}").read_text() for i in range(2)] == ["4,5", "6,7"]
    refused(fakes("multi_gpu.sh", "--processes=3", "--gpus=0,1,2,3", "--config=a"), "--processes=3", "4 GPUs")
    refused(fakes("multi_gpu.sh", "--processes=2", "--config=a"), "nvidia-smi", "--gpus")


def test_when_one_process_fails_the_others_are_ended_and_its_status_is_kept(fakes):
    fakes.script(process_0=["deaf"], process_1=[3], process_2=["until stopped"])
    result = fakes(
        "multi_gpu.sh", "--processes=3", "--gpus=none", "--port=9", "--grace=1", "--config=a", FAKE_WAIT_FOR="0 2"
    )
    assert result.returncode == 3 and "status 3; ending the others" in result.stderr, result.stderr


def test_sigterm_reaches_every_process_and_the_status_is_theirs(fakes):
    fakes.script(process_0=["until stopped"], process_1=["until stopped"])
    launcher = fakes.start("multi_gpu.sh", "--processes=2", "--gpus=none", "--port=9", "--config=a")
    fakes.until(lambda: all((fakes.folder / f"started{i}").exists() for i in range(2)))
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 75 and "ending the others" not in said, said
