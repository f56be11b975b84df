"""Real schedulers on this machine: Slurm with two nodes, and Open MPI. The other launcher tests use fakes."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import slurm_cluster
from conftest import ROOT, command, metrics, overrides, small_config
from test_distributed import job
from test_train import assert_same_bits, final_state


@pytest.fixture(scope="module")
def config(store):
    c = small_config(store)
    c.train.update({"steps": 360, "batch_size": 8})
    c.mesh.update({"data": 2})
    c.checkpoint.update({"every_steps": 20, "keep_last": 2, "keep_best": 0})
    c.eval.every_steps = 0
    return c


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The workdir of a run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "default.py").write_text("from trialgpt_jax.config import default_config as get_config\n")
    arguments = [f"--config={folder}/default.py", *overrides(config), f"--workdir={folder}/run"]
    results = job(2, "train", *arguments, devices=2)
    assert [result.returncode for result in results] == [0, 0], results
    return folder / "run"


@pytest.mark.slow
def test_a_job_on_a_real_slurm_is_preempted_killed_requeued_and_out_of_time_and_ends_with_the_same_bits(
    config, default_file, tmp_path, monkeypatch, request
):
    """Preempted by another partition, killed in one task, requeued by an administrator, stopped by its time limit."""
    monkeypatch.chdir(ROOT)  # from where sbatch is called
    workdir, log = tmp_path / "run", tmp_path / "log"
    train = [f"--config={default_file}", *overrides(config), f"--workdir={workdir}"]
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}"]

    def step():
        file = workdir / "metrics.jsonl"
        steps = re.findall(r'"step": ?(\d+)', file.read_text()) if file.exists() else []
        return int(steps[-1]) if steps else 0

    with slurm_cluster.running(tmp_path) as slurm:
        slurm.env |= {"JAX_PLATFORMS": "cpu"} | {"XLA_FLAGS": command("train")[1]["XLA_FLAGS"]}

        def submit(*more):
            return slurm("sbatch", "--parsable", *options, *more, "scripts/slurm.sbatch", *train).strip()

        def requeued(number, times):
            """Whether the job runs again; Slurm delays it by two minutes unless it is told not to."""
            now = slurm.job(number)
            if now["JobState"] == "PENDING" and now["Restarts"] == str(times):
                subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], env=slurm.env, check=False)
            return now["JobState"] == "RUNNING" and now["Restarts"] == str(times)

        # preemption: SIGTERM at once, and GraceTime of the partition to save
        number = submit()
        slurm.until(lambda: step() > 30)
        other = slurm("sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true")
        slurm.until(lambda: requeued(number, 1))
        assert slurm.job(other.strip())["JobState"] == "COMPLETED"
        saved = int(re.search(r"stopped after step (\d+), which is saved", log.read_text())[1])
        assert saved >= 30 and "stopped after saving; requeueing the job (requeue 1)" in log.read_text()

        # a task is killed: the others say so with 76; srun's status is that of the killed one, and the job fails
        slurm.until(lambda: step() > saved + 30)
        assert f"resumed from checkpoint {saved}" in log.read_text()
        tasks = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_task(pid, workdir, "1")]
        os.kill(tasks[0], 9)
        slurm.until(lambda: slurm.job(number)["JobState"] == "FAILED")
        assert slurm.job(number)["ExitCode"] == "137:0"
        text = log.read_text()
        assert "has lost the connection to another process of this job" in text or "died" in text
        assert re.search(r"task 0: (Exited with exit code 76|Aborted)", text), text[-3000:]

        # an administrator requeues the job that was submitted again
        number, begun = submit("--open-mode=append"), step()
        slurm.until(lambda: step() > begun + 30)
        slurm("scontrol", "requeue", number)
        slurm.until(lambda: requeued(number, 1))
        slurm.until(lambda: step() > begun + 50)
        slurm("scancel", number)

        # the time limit: SIGTERM before it, 75, requeued until it is done
        number = submit("--time=1", "--signal=TERM@45")
        slurm.until(lambda: requeued(number, 1))  # SIGTERM may have come before the first step
        slurm("scontrol", "update", f"JobId={number}", "TimeLimit=10")
        slurm.until(lambda: slurm.job(number)["JobState"] == "COMPLETED")
    alone = request.getfixturevalue("alone")
    assert metrics(workdir) == metrics(alone)
    assert_same_bits(final_state(workdir), final_state(alone))


def _is_task(pid, workdir, index):
    """Whether a process is task `index` of the job that trains in `workdir`."""
    try:
        argv = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        env = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    mine = f"--workdir={workdir}".encode() in argv and b"trialgpt_jax.train" in argv and b"srun" not in argv[0]
    return mine and f"SLURM_PROCID={index}".encode() in env


@pytest.mark.slow
def test_two_processes_of_a_real_open_mpi_train_as_one_job(config, alone, default_file, tmp_path):
    mpirun = shutil.which("mpirun")
    if not mpirun:
        pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
    _, env = command("train")
    argv = [mpirun, "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable, "-m", "trialgpt_jax.train"]
    argv += [f"--config={default_file}", *overrides(config), f"--workdir={tmp_path}/run"]
    result = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0 and "2 process(es)" in result.stderr, result.stderr
    assert metrics(tmp_path / "run") == metrics(alone)
    assert_same_bits(final_state(tmp_path / "run"), final_state(alone))
