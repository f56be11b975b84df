"""The launchers against fakes of gcloud, kubectl, srun and scontrol: their calls, the order, and the exit status."""

import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, metrics, overrides, refused, run, small_config
from launcher_fakes import Fakes

SCRIPTS = ROOT / "scripts"
TPU = [
    "--name=node",
    "--zone=zone",
    "--type=v5litepod-16",
    "--config=config.py",
    "--workdir=gs://bucket/my run",
    "--wait=0",
]
SPACES = """--config.data.source_options.path=a b's "c" $(d) \\ & *"""


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


ONCE = ["scp", "install", "train"]
READY, MAINTENANCE = "READY,HEALTHY,v5litepod-16", "READY,UNHEALTHY_MAINTENANCE,v5litepod-16"


def test_shellcheck_finds_nothing_in_the_scripts():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed; it is part of the `test` extra")
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
        (
            "multi_gpu.sh",
            ["--dry_run", "--processes=2", "--gpus=0,1,2,3", "--port=9", "--", "--config=config.py", SPACES],
        ),
    ],
)
def test_dry_run_prints_quoted_commands_and_runs_none(fakes, script, arguments):
    result = fakes(script, *arguments)
    assert result.returncode == 0, result.stderr
    assert fakes.calls() == []
    words = [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]
    if script == "tpu_vm.sh":
        verbs = [line[4] if line[0] == "gcloud" else line[1] for line in words]
        assert verbs == ["archive", "create", "scp", "ssh", "ssh", "delete"]
        assert {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"} < set(words[1])
        remote = shlex.split(words[4][-1].removeprefix("--command="))  # parsed again by the worker's shell
        flags = ["--config=config.py", "--workdir=gs://bucket/my run", "--config.data.dir=data/tokens", SPACES]
        assert remote[-5:] == ["train", *flags]
    elif script == "slurm.sbatch":
        assert words[0][0] == "srun" and words[0][-4:] == ["-m", "trialgpt_jax.train", "--config=config.py", SPACES]
        assert words[1] == ["scontrol", "requeue", "JOB"]
    else:
        train = ["python", "-m", "trialgpt_jax.train", "--config=config.py", SPACES]
        for i, (line, gpus) in enumerate(zip(words, ("0,1", "2,3"), strict=True)):
            processes = ["--coordinator_address=127.0.0.1:9", "--num_processes=2", f"--process_id={i}"]
            assert line == ["env", f"CUDA_VISIBLE_DEVICES={gpus}", *train, *processes]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sbatch", "gke.sh", "multi_gpu.sh"])
def test_help_is_the_comment_at_the_top(fakes, script):
    result = fakes(script, "--help")
    assert result.returncode == 0 and f"scripts/{script} " in result.stdout and "--dry_run" in result.stdout
    assert "#SBATCH" not in result.stdout and "set -euo" not in result.stdout and fakes.calls() == []


# tpu_vm.sh


@pytest.mark.slow
def test_a_preempted_slice_is_recreated_and_the_run_resumes_at_the_saved_step(fakes, store):
    """The real train on CPU, killed with its machine at step 25; the machine's disk is lost, the bucket is kept."""
    config = small_config("data/tokens")  # where the launcher copies it
    config.train.update({"steps": 100, "batch_size": 32})
    config.checkpoint.every_steps = 10
    shutil.copytree(store, fakes.folder / "bucket" / "tokens")
    workdir = fakes.folder / "bucket" / "my run"
    stockout = "There is no more capacity in the zone"
    preempted = {"preempted at": 25, "log": "gs://bucket/my run/metrics.jsonl"}
    fakes.script(create=[stockout, 0, stockout], train=[preempted, "run"])
    result = fakes(
        "tpu_vm.sh", *TPU, "--spot", "--data=gs://bucket/tokens", "--delete_when_done", "--", *overrides(config)
    )
    assert result.returncode == 0, result.stderr
    # stock-outs are retried, the preempted node is deleted, and the new one is set up from the start
    assert fakes.verbs() == ["create", "create", *ONCE, "delete", "create", "create", *ONCE, "delete"]
    first, second = [call for call in fakes.calls("gcloud") if "worker.sh train" in call[-1]]
    assert first == second
    assert len([call for call in fakes.calls("venv-python") if "pip" in call and call[-1] == ".[tpu,gs]"]) == 2
    (step,) = re.findall("^resumed from checkpoint (.*)$", result.stderr, re.MULTILINE)
    assert step in ("10", "20")  # the save of step 20 may have been in progress
    log = result.stderr[result.stderr.index("resumed from") :]
    assert f"step  {int(step) + 1}/100" in log and f"step  {step}/100" not in log and "done: step 100" in log
    assert not (fakes.folder / "vm").exists() and not (fakes.folder / "node").exists()
    # the metrics equal those of an uninterrupted run
    config.data.dir = str(store)
    alone = fakes.folder / "alone"
    assert run("train", f"--config={fakes.root}/config.py", *overrides(config), f"--workdir={alone}").returncode == 0
    assert metrics(workdir) == metrics(alone)


@pytest.mark.parametrize(
    ("scenario", "options", "status", "verbs"),
    [
        ({}, [], 0, ["create", *ONCE]),
        ({"train": [75]}, [], 0, ["create", *ONCE, *ONCE]),  # stopped after saving: resumes on the same node
        ({"train": [75, 75, 75]}, ["--max_restarts=2"], 1, ["create", *ONCE * 3]),
        ({"train": [2]}, [], 2, ["create", *ONCE]),
        ({"train": [1, 139]}, [], 0, ["create", *ONCE * 3]),
        ({"train": [1, 255, 1, 1]}, [], 1, ["create", *ONCE * 3]),
        ({"train": [1, 1, 75, 1, 1]}, [], 0, ["create", *ONCE * 6]),  # the limit is on consecutive failures
        ({"train": ["preempted"] * 4}, [], 0, ["create", *(ONCE + ["delete", "create"]) * 4, *ONCE]),
        ({"train": ["preempted"] * 2}, ["--max_restarts=1"], 1, ["create", *ONCE, "delete", "create", *ONCE]),
        ({"install": [1]}, [], 0, ["create", "scp", "install", *ONCE]),
        ({"install": [2]}, [], 2, ["create", "scp", "install"]),
        ({"create": ["There is no more capacity"] * 9}, ["--max_creates=3"], 1, ["create"] * 3),
        ({"create": ["ERROR: PERMISSION_DENIED: no"]}, [], 2, ["create"]),
        ({"create": ["ERROR: (gcloud.compute.tpus) Failed to find attribute [project]."]}, [], 2, ["create"]),
        ({"create": ["ERROR: You do not currently have an active account selected."]}, [], 2, ["create"]),
        ({"describe": ["READY,,v5litepod-16"]}, [], 0, ONCE),  # exists already
        ({"describe": ["CREATING,,v5litepod-16", "READY,,v5litepod-16"]}, [], 0, ONCE),
        ({"describe": ["TERMINATED,,v5litepod-16"]}, [], 0, ["delete", "create", *ONCE]),
        ({"describe": ["READY,HEALTHY,v5p-8"]}, [], 2, []),
        ({"describe": ["STOPPED,,v5litepod-16"]}, [], 2, []),
        # a process lost another one, as Python or as JAX's C++ threads saw it: like 75
        ({"train": [76, 134, 76, 134]}, [], 0, ["create", *ONCE * 5]),
        ({"train": [76, 134]}, ["--max_restarts=1"], 1, ["create", *ONCE * 2]),
        # in maintenance the node is READY, and its health says it; gcloud may refuse to connect (1)
        (
            {
                "train": [1] * 4,
                "describe": [0, *[MAINTENANCE, MAINTENANCE, READY] * 4],
            },
            [],
            0,
            ["create", *ONCE * 5],
        ),
        ({"describe": ["UNKNOWN,,v5litepod-16"]}, [], 0, ["delete", "create", *ONCE]),  # a repair has failed
        ({"describe": ["REPAIRING,,v5litepod-16", READY]}, [], 0, ONCE),
        # the state lags behind: the node is gone while it is said to be READY
        ({"train": [255, 255]}, ["--spot"], 0, ["create", *ONCE * 2, "delete", "create", *ONCE]),
        ({"train": [255, 255, 255]}, [], 1, ["create", *ONCE * 3]),
        ({"train": [255, 1, 255]}, ["--spot"], 1, ["create", *ONCE * 3]),  # it was reached in between
    ],
)
def test_tpu_vm_handles_each_exit_status_and_node_state(fakes, scenario, options, status, verbs):
    if "describe" in scenario:
        (fakes.folder / "vm").mkdir()
    fakes.script(**scenario)
    result = fakes("tpu_vm.sh", *TPU, *options)
    assert (result.returncode, fakes.verbs()) == (status, verbs), result.stderr
    exists = (fakes.folder / "node").exists()
    assert ("node still exists and is billed" in result.stderr) == (exists and "STOPPED" not in str(scenario))


@pytest.mark.parametrize(
    ("scenario", "status", "verbs"),
    [
        ({}, 0, ["create", *ONCE]),
        ({"queue": [["ACCEPTED", "FAILED"]]}, 0, ["create", "delete", "create", *ONCE]),
        ({"train": ["preempted"]}, 0, ["create", *ONCE, "delete", "create", *ONCE]),
        ({"queue": [["WAITING_FOR_RESOURCES"] * 9 + ["ACTIVE"]]}, 0, ["create", *ONCE]),  # waits without limit
    ],
)
def test_a_queued_resource_is_waited_for_and_owns_its_node(fakes, scenario, status, verbs):
    fakes.script(**scenario)
    flags = ["--queued", "--gcloud_track=alpha", "--create_flag=--provisioning-model=flex-start", "--max_creates=3"]
    flags += ["--ssh_flag=--internal-ip"]
    result = fakes("tpu_vm.sh", *TPU, *flags)
    assert (result.returncode, fakes.verbs()) == (status, verbs), result.stderr
    for call in fakes.calls("gcloud"):
        assert call[1:4] == ["alpha", "compute", "tpus"]
        assert call[5] in ("ssh", "scp") or "--internal-ip" not in call
        assert call[5] not in ("ssh", "scp") or "--internal-ip" in call
        if call[5] in ("create", "delete"):
            assert call[4] == "queued-resources"
            own = ["--node-id=node", "--runtime-version=v2-alpha-tpuv5-lite", "--provisioning-model=flex-start"]
            assert set(own if call[5] == "create" else ["--force"]) < set(call)
    assert "node is WAITING_FOR_RESOURCES; waiting" in result.stderr or "queue" in scenario
    assert "to delete it: gcloud alpha compute tpus queued-resources delete node" in result.stderr


def test_a_node_in_maintenance_is_waited_for(fakes):
    """It is READY all the same; gcloud refuses to connect, or the connection ends."""
    (fakes.folder / "vm").mkdir()
    fakes.script(describe=[MAINTENANCE, MAINTENANCE, READY])
    result = fakes("tpu_vm.sh", *TPU)
    assert result.returncode == 0 and result.stderr.count("node is in maintenance; waiting") == 2, result.stderr
    assert [call[4] for call in fakes.calls("gcloud")] == ["describe"] * 3 + ["scp", "ssh", "ssh"]


@pytest.mark.parametrize("sudo", [0, 1])  # 1: huge pages cannot be turned on
def test_all_workers_have_stopped_what_is_left_before_one_trains(fakes, sudo):
    """gcloud's ssh returns when the command has ended on all workers."""
    fakes.script(sudo=[sudo])
    assert fakes("tpu_vm.sh", *TPU).returncode == 0
    before, train = [call[-1] for call in fakes.calls("gcloud") if call[4] == "ssh"]
    assert re.search("scripts/tpu_worker.sh stop && .*scripts/tpu_worker.sh install", before)
    assert "tpu_worker.sh train" in train and "stop" not in train
    assert any("transparent_hugepage" in word for call in fakes.calls("sudo") for word in call)


def test_sigterm_to_tpu_vm_stops_train_after_saving(fakes):
    fakes.script(train=["until stopped"])
    launcher = fakes.start("tpu_vm.sh", *TPU)
    fakes.until(lambda: "train" in fakes.verbs())
    launcher.send_signal(signal.SIGTERM)
    _, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode == 75 and fakes.verbs() == ["create", *ONCE, "stop"], stderr


def test_tpu_vm_copies_tracked_files_with_uncommitted_changes(fakes):
    (fakes.root / "config.py").write_text("changed = True\n")
    (fakes.root / "junk").write_text("junk")
    result = fakes("tpu_vm.sh", *TPU)
    assert result.returncode == 0, result.stderr
    copy = fakes.folder / "vm" / "trialgpt_jax_run"
    assert (copy / "config.py").read_text() == "changed = True\n" and not (copy / "junk").exists()
    assert (copy / "trialgpt_jax" / "train.py").exists()
    (fakes.root / "config.py").write_text("changed = 'again'\n")
    (copy / "old.py").touch()  # from an older version of the code
    fakes("tpu_vm.sh", *TPU)
    assert (copy / "config.py").read_text() == "changed = 'again'\n" and not (copy / "old.py").exists()
    assert (copy / ".venv").exists() and len([call for call in fakes.calls("python3") if "venv" in call]) == 1


def test_tpu_vm_refuses_flags_that_would_lose_work(fakes):
    def refusal(*words, replace=None, more=()):
        arguments = [a for a in TPU if not replace or not a.startswith(replace.split("=")[0] + "=")]
        refused(fakes("tpu_vm.sh", *arguments, *([replace] if replace else []), *more), *words)

    refusal("--workdir=runs/a", "gs://", replace="--workdir=runs/a", more=["--spot"])
    refusal("--workdir=runs/a", "gs://", replace="--workdir=runs/a", more=["--delete_when_done"])
    (fakes.root / "mine.py").touch()
    refusal("--config=mine.py", "git add", replace="--config=mine.py")
    refusal("--type", "missing", replace="--type=")
    refusal("--version", "v99", replace="--type=v99-8")
    refusal("--type=tpu7x-16", "scripts/gke.sh", replace="--type=tpu7x-16")
    refusal("--gcloud_track=gamma", more=["--gcloud_track=gamma"])
    refusal("--config.seed=1", "after `--`", more=["--config.seed=1"])
    refusal("--data=here", "gs://", more=["--data=here"])
    assert fakes.calls() == []


def test_a_worker_passes_its_index_and_stops_a_running_train(fakes):
    python = fakes.root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    old = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", "trialgpt_jax.train"])
    (fakes.root / "train.pid").write_text(f"{old.pid}\n")
    result = fakes("tpu_worker.sh", "train", "--config=a b", FAKE_WORKERS="n:0:10.0.0.1,n:1:10.0.0.2,n:2:10.0.0.3")
    assert old.wait(timeout=60) == -signal.SIGTERM, result.stderr
    module = ["-m", "trialgpt_jax.train"]
    processes = ["--coordinator_address=10.0.0.1:8476", "--num_processes=3", "--process_id=1"]
    assert result.stdout.splitlines() == [*module, "--config=a b", *processes], result.stderr
    # a pid that now belongs to another program is not signalled; one worker needs no flags; newer runtimes give host
    # names
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    (fakes.root / "train.pid").write_text(f"{other.pid}\n")
    assert fakes("tpu_worker.sh", "train", FAKE_WORKERS="host-0").stdout.splitlines() == module
    assert other.poll() is None
    other.kill()
    other.wait()
    result = fakes("tpu_worker.sh", "train", FAKE_WORKERS="host-0,host-1")
    assert "--coordinator_address=host-0:8476" in result.stdout.splitlines()
    python.write_text("#!/bin/sh\nexit 75\n")
    assert fakes("tpu_worker.sh", "train").returncode == 75
    python.write_text("#!/bin/sh\nkill -KILL $$\n")  # not 255, as ssh reports it
    assert fakes("tpu_worker.sh", "train").returncode == 137


# slurm.sbatch


@pytest.mark.parametrize(
    ("status", "requeued"),
    [(0, False), (2, False), (1, False), (137, False), (143, True), (75, True), (76, True), (134, True)],
)
def test_slurm_requeues_what_was_saved_or_lost_a_peer(fakes, status, requeued):
    """srun's status is the highest of its tasks', a signal's is 128 more; JAX's C++ threads abort: 134, given as 76."""
    (fakes.root / ".venv" / "bin").mkdir(parents=True)
    (fakes.root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    fakes.script(srun=[status] * 2)
    env = {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(fakes.root), "SLURM_CPUS_PER_TASK": "6"}
    result = fakes("slurm.sbatch", "--config=config.py", SPACES, **env)
    expected = 76 if status == 134 else status
    assert result.returncode == expected, result.stderr
    assert fakes.calls("scontrol") == ([["scontrol", "requeue", "77"]] if requeued else [])
    (call,) = fakes.calls("srun")
    assert call[-4:] == ["-m", "trialgpt_jax.train", "--config=config.py", SPACES]
    assert {f"--chdir={fakes.root}", "--cpus-per-task=6"} < set(call)
    env |= {"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3"}
    fakes.script(srun=[status])
    assert fakes("slurm.sbatch", "--config=config.py", **env).returncode == expected
    assert len(fakes.calls("scontrol")) == requeued
    # JobRequeue=0 on the cluster
    refusal = "slurm_requeue error: Requested operation is presently disabled"
    fakes.script(srun=[status], scontrol=[refusal])
    result = fakes("slurm.sbatch", "--config=config.py", **env | {"SLURM_RESTART_COUNT": "0"})
    assert result.returncode == expected and (refusal in result.stderr) == requeued
    assert ("Slurm refuses to requeue the job; submit it again to continue" in result.stderr) == requeued


def test_slurm_signals_before_the_time_limit_and_starts_a_task_per_gpu():
    lines = [line for line in (SCRIPTS / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    options = dict(line.split()[1][2:].partition("=")[::2] for line in lines)
    assert options["signal"] == "TERM@120" and "requeue" in options and options["open-mode"] == "append"
    assert options["gpus-per-node"] == options["ntasks-per-node"]


# multi_gpu.sh


def test_the_environment_of_venv_is_used_and_python_is_not(fakes):
    """PYTHON chooses the interpreter of which setup_venv.sh makes an environment."""
    (fakes.root / "env" / "bin").mkdir(parents=True)
    (fakes.root / "env" / "bin" / "python").symlink_to(fakes.folder / "bin" / "python")
    for processes in (1, 2):
        command = ["--dry_run", f"--processes={processes}", "--gpus=0,1", "--port=9", "--config=a"]
        for env, python in (({}, "python"), ({"VENV": "env"}, "env/bin/python")):
            result = fakes("multi_gpu.sh", *command, PYTHON="/nowhere/python", **env)
            assert result.returncode == 0 and result.stdout.count(f" {python} -m trialgpt_jax.train") == processes


def test_these_tests_do_not_inherit_the_interpreter_and_the_environment_of_the_suite(tmp_path, monkeypatch):
    for name in ("PYTHON", "VENV", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "/nowhere")
    fakes = Fakes(tmp_path)
    result = fakes("multi_gpu.sh", "--dry_run", "--gpus=none", "--config=a")
    assert (result.returncode, result.stdout) == (0, "python -m trialgpt_jax.train --config=a\n"), result.stderr
    assert not {"PYTHON", "VENV", "VIRTUAL_ENV"} & fakes.env.keys()


def test_gpus_are_divided_among_the_processes(fakes):
    fakes.script()
    assert fakes("multi_gpu.sh", "--gpus=0,1", "--config=a b").returncode == 0
    assert fakes.calls("python") == [["python", "-m", "trialgpt_jax.train", "--config=a b"]]
    assert (fakes.folder / "gpus").read_text() == "0,1"
    result = fakes("multi_gpu.sh", "--processes=2", "--port=9", "--config=a b", CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert result.returncode == 0
    assert sorted(call[-1] for call in fakes.calls("python")[1:]) == ["--process_id=0", "--process_id=1"]
    assert [(fakes.folder / f"gpus{i}").read_text() for i in range(2)] == ["4,5", "6,7"]
    refused(fakes("multi_gpu.sh", "--processes=3", "--gpus=0,1,2,3", "--config=a"), "--processes=3", "4 GPUs")
    refused(fakes("multi_gpu.sh", "--processes=2", "--config=a"), "nvidia-smi", "--gpus")


def test_when_one_process_fails_the_others_are_terminated_and_its_status_is_returned(fakes):
    fakes.script(process_0=["ignore sigterm"], process_1=[3], process_2=["until stopped"])
    result = fakes(
        "multi_gpu.sh", "--processes=3", "--gpus=none", "--port=9", "--grace=1", "--config=a", FAKE_WAIT_FOR="0 2"
    )
    assert result.returncode == 3 and "status 3; terminating the others" in result.stderr, result.stderr


@pytest.mark.parametrize("status", [76, 134])
def test_a_process_that_lost_another_one_or_was_aborted_for_it_has_status_76(fakes, status):
    fakes.script(process_0=["until stopped"], process_1=[status])
    result = fakes("multi_gpu.sh", "--processes=2", "--gpus=none", "--port=9", "--config=a", FAKE_WAIT_FOR="0")
    assert result.returncode == 76, result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_reaches_every_process_and_their_status_is_returned(fakes, number):
    fakes.script(process_0=["until stopped"], process_1=["until stopped"])
    launcher = fakes.start("multi_gpu.sh", "--processes=2", "--gpus=none", "--port=9", "--config=a")
    fakes.until(lambda: all((fakes.folder / f"started{i}").exists() for i in range(2)))
    launcher.send_signal(number)
    _, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode == 75 and "terminating the others" not in stderr, stderr
