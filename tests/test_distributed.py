"""Several real processes on this machine: the same batches and values as one process, and they end together."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import command, metrics, overrides, refused, run, small_config
from jax._src.clusters import ClusterEnv
from test_train import assert_same_bits, final_state

from trialgpt_jax import UserError, console
from trialgpt_jax.parallel import clusters, processes
from trialgpt_jax.training.program import Program

# Trains as the command line does. Records the rows that each device was given, and sends itself a signal before a step,
# when no save is in progress.
_TRAIN = """
import os, sys, time
import numpy as np
from trialgpt_jax import cli, train
record = sys.argv.pop(1)
number, at, first_step = (int(sys.argv.pop(1)) for _ in range(3))
saving = next(a for a in sys.argv if a.startswith("--workdir=")).removeprefix("--workdir=") + "/saving"
real, seen, sent = train.put_batch, {}, False
def put_batch(rows, sharding):
    global sent
    step = first_step + len(seen) + 1
    if number and step == at:
        while os.path.exists(saving):
            time.sleep(0.01)
        sent = True
        os.kill(os.getpid(), number)
    if sent:
        time.sleep(0.2)  # JAX polls for the notice once a second
    array = real(rows, sharding)
    seen[step] = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
    return array
train.put_batch = put_batch
try:
    cli.run(train.main)
finally:
    np.savez(record, **{f"{step}/{start}": rows for step, held in seen.items() for start, rows in held.items()})
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def job(n, module, *arguments, devices=4, script=None, stopped=None):
    """Runs n processes with `devices` devices in total, and returns their CompletedProcesses.

    `script(i)` gives the first arguments of process i, in place of `-m trialgpt_jax.module`. Process number `stopped`,
    which sends itself SIGSTOP, is killed when the others have ended.
    """
    port, started, outputs = free_port(), [], {}
    for i in range(n):
        argv, env = command(module, *arguments, devices=devices // n)
        argv[1:3] = script(i) if script else argv[1:3]
        argv += [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={n}", f"--process_id={i}"] * (n > 1)
        started.append(subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        for i in sorted(range(n), key=lambda i: i == stopped):
            if i == stopped:
                started[i].kill()
            outputs[i] = started[i].communicate(timeout=150)
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(started[i].args, started[i].returncode, *outputs[i]) for i in range(n)]


@pytest.fixture(scope="module")
def config(store):
    """Four devices: batch and parameters sharded two ways each."""
    c = small_config(store)
    c.model.dropout = 0.1
    c.train.update({"steps": 24, "batch_size": 8})
    c.mesh.update({"data": 2, "fsdp": 2})
    c.checkpoint.update({"every_steps": 6, "keep_last": 3, "keep_best": 0})
    c.eval.every_steps = 12
    c.log.every_steps = 2
    return c


@pytest.fixture(scope="module")
def train(config, tmp_path_factory):
    """train(workdir, n, ...) trains in n processes; returns their results and the global batches by step."""
    folder = tmp_path_factory.mktemp("records")
    file = folder / "default.py"
    file.write_text("from trialgpt_jax.config import default_config as get_config\n")

    def train(workdir, n, *flags, send=(0, 0, 0), first_step=0, config=config):
        who, number, at = send

        def script(i):
            numbers = (number if i == who else 0, at, first_step)
            return ["-c", _TRAIN, str(folder / f"{i}.npz"), *map(str, numbers)]

        for i in range(n):
            (folder / f"{i}.npz").unlink(missing_ok=True)
        arguments = [f"--config={file}", *overrides(config), f"--workdir={workdir}", *flags]
        stopped = who if number == signal.SIGSTOP else None
        results = job(n, "train", *arguments, script=script, stopped=stopped)
        batches = {}
        for i in range(n):
            if (folder / f"{i}.npz").exists():
                for name, rows in np.load(folder / f"{i}.npz").items():
                    step, start = map(int, name.split("/"))
                    batches.setdefault(step, {})[start] = rows
        return results, {step: np.concatenate([held[k] for k in sorted(held)]) for step, held in batches.items()}

    return train


@pytest.fixture(scope="module")
def one(train, tmp_path_factory):
    """An undisturbed run of one process: workdir and batches."""
    workdir = tmp_path_factory.mktemp("one")
    (result,), batches = train(workdir, 1)
    assert result.returncode == 0, result.stderr
    return workdir, batches


@pytest.fixture(scope="module")
def two(train, tmp_path_factory):
    """The same with two processes: workdir, batches and results."""
    workdir = tmp_path_factory.mktemp("two")
    results, batches = train(workdir, 2)
    assert [r.returncode for r in results] == [0, 0], results
    return workdir, batches, results


def assert_same_batches(got, expected):
    assert got
    for step, rows in got.items():
        np.testing.assert_array_equal(rows, expected[step], err_msg=f"step {step}")


def assert_close(workdir, reference):
    lines, expected = metrics(workdir), metrics(reference)
    for a, b in zip(lines, expected, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)
    for x, y in zip(*(map(np.asarray, leaves(final_state(w))) for w in (workdir, reference)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-5)


def leaves(tree):
    return jax.tree.leaves(tree)


def test_two_processes_train_on_the_same_batches_to_the_same_values_and_only_the_first_logs(one, two):
    workdir, batches, results = two
    assert sorted(batches) == list(range(1, 25))
    assert_same_batches(batches, one[1])
    assert_close(workdir, one[0])
    first, second = results
    assert "step 24/24" in first.stderr and "2 process(es)" in first.stderr and "saving" in first.stderr
    assert not any(word in second.stderr for word in ("step", "parameters", "saving", "done")), second.stderr
    assert (first.stdout, second.stdout) == ("", "")


@pytest.mark.slow
def test_evaluation_and_generation_in_two_processes_equal_those_of_one(one):
    for module, arguments in (
        ("evaluate", ["--json", "--batches=3"]),
        ("infer", ["--json", "--prompt=The people", "--max_new_tokens=12", "--num_samples=3"]),
    ):
        arguments.append(f"--workdir={one[0]}")
        (alone,) = job(1, module, *arguments)
        assert alone.returncode == 0, alone.stderr
        first, second = job(2, module, *arguments)
        assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), (first.stderr, second.stderr)
        alone, first = json.loads(alone.stdout), json.loads(first.stdout)
        if module == "evaluate":
            assert first.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-5)
            assert first.pop("perplexity") == pytest.approx(alone.pop("perplexity"), rel=1e-4)
            assert first.pop("bits_per_byte") == pytest.approx(alone.pop("bits_per_byte"), rel=1e-5)
        assert first == alone


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(((2, signal.SIGTERM, 3), (1, 0, 0)), id="two"),
        pytest.param(((1, signal.SIGTERM, 3), (2, signal.SIGHUP, 3), (4, 0, 0)), id="four", marks=pytest.mark.slow),
    ],
)
def test_sigterm_to_one_stops_all_at_one_step_and_other_numbers_of_processes_continue(train, one, tmp_path, parts):
    """Parts of a run: how many processes, the signal to the last but one of them, and after how many steps."""
    reached = 0
    for n, number, at in parts:
        send = (max(0, n - 2), number, reached + at)
        results, batches = train(tmp_path / "run", n, send=send, first_step=reached)
        assert [r.returncode for r in results] == [75 if at else 0] * n, [r.stderr for r in results]
        assert_same_batches(batches, one[1])
        if reached:
            assert f"resumed from checkpoint {reached}" in results[0].stderr
            assert min(batches) == reached + 1
        kept = max(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints"))
        if at:
            assert f"stopped after step {kept}, which is saved" in results[0].stderr
            assert reached < kept < 24 and kept in batches and max(batches) <= kept + 1
        reached = kept
    assert reached == 24
    assert_close(tmp_path / "run", one[0])


_EARLY = """
import os, signal, time
from trialgpt_jax import cli, train
check = train.plan.check_run
def check_run(program):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.5)  # JAX polls for the notice once a second
    check(program)
train.plan.check_run = check_run
cli.run(train.main)
"""


@pytest.mark.slow
def test_sigterm_before_the_first_step_of_a_resumed_run_is_not_lost(train, config, tmp_path, default_file):
    """JAX's service then agrees on a step that has passed; a scheduler may preempt a job while it starts."""
    results, _ = train(tmp_path / "run", 2, send=(0, signal.SIGTERM, 3))
    assert [r.returncode for r in results] == [75, 75], [r.stderr for r in results]
    saved = max(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints"))
    arguments = [f"--config={default_file}", *overrides(config), f"--workdir={tmp_path}/run"]
    results = job(2, "train", *arguments, script=lambda i: ["-c", _EARLY])
    assert [r.returncode for r in results] == [75, 75], [r.stderr for r in results]
    assert f"stopped after step {saved + 1}, which is saved" in results[0].stderr


@pytest.mark.slow
def test_a_killed_process_ends_the_others_at_once_and_the_job_starts_again_without_a_damaged_checkpoint(
    train, two, tmp_path
):
    """One device per process: with more, a device may wait in a collective that never finishes."""
    results, _ = train(tmp_path / "run", 4, send=(3, signal.SIGKILL, 16))
    assert [r.returncode for r in results] == [76, 76, 76, -signal.SIGKILL], [r.stderr for r in results]
    *left, killed = results
    for r in left:  # by the broken connection; the missing heartbeat would be detected after 100 s
        assert "has lost the connection to another process of this job" in r.stderr, r.stderr
        assert "stopped sending" not in r.stderr
        assert "the same command on every host continues" in r.stderr
    assert "ended without finishing" in killed.stderr  # printed by its child process
    checkpoints = tmp_path / "run" / "checkpoints"
    assert max(int(name) for name in os.listdir(checkpoints)) == 12
    (tmp_path / "run" / "lock").stat()
    biggest = max((os.path.join(r, f) for r, _, fs in os.walk(checkpoints / "12") for f in fs), key=os.path.getsize)
    with open(biggest, "r+b") as file:
        file.seek(os.path.getsize(biggest) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    results, batches = train(tmp_path / "run", 2, first_step=6)
    assert [r.returncode for r in results] == [0, 0], [r.stderr for r in results]
    assert "checkpoint 12 is damaged" in results[0].stderr and biggest in results[0].stderr
    assert min(batches) == 7
    assert_same_batches(batches, two[1])
    assert metrics(tmp_path / "run") == metrics(two[0])
    assert_same_bits(final_state(tmp_path / "run"), final_state(two[0]))


@pytest.mark.parametrize(
    ("number", "who"), [(signal.SIGKILL, 0), pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow)]
)
def test_a_lost_coordinator_or_a_silent_host_ends_the_others_within_the_timeout(train, tmp_path, number, who):
    results, _ = train(tmp_path / "run", 2, "--peer_timeout_seconds=5", send=(who, number, 4))
    left = results[1 - who]
    assert left.returncode in (76, -signal.SIGABRT), left.stderr
    assert "died" in left.stderr and "the same command on every host continues" in left.stderr, left.stderr
    with open(tmp_path / "run" / "lock", "a") as lock:  # released when its holder died
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


_SLOW_START = (
    "UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out with key: "
    "cpu:gloo/0,2048/1 and duration: 29.9999999s [type.googleapis.com/tensorflow.CoordinationServiceError='']"
)
_SLOW_STEP = (
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/unbound_buffer.cc:78] "
    "Timed out waiting 30000ms for recv operation to complete"
)
_BROKEN = (
    "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:547] "
    "Connection closed by peer [127.0.0.1]:9886"
)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (jax.errors.JaxRuntimeError(_SLOW_START), 76, "has waited too long for another process"),
        (ValueError(_SLOW_STEP), 76, "has waited too long for another process"),
        (ValueError(_BROKEN), 76, "has lost the connection to another process"),
        (KeyboardInterrupt(), 130, "was interrupted"),
        (UserError("data.dir is wrong"), 2, "data.dir is wrong"),
        (console.OutputError(BrokenPipeError()), 141, "stdout was closed"),
    ],
    ids=["slow start", "slow step", "broken", "Ctrl-C", "mistake", "closed stdout"],
)
def test_the_message_to_other_processes_claims_no_death_that_is_not_known(error, status, words):
    """The first three with the messages of JAX and Gloo; a death and a slow start give the same one."""
    got, own, others = processes._describe(error)
    assert got == status and words in others and others.startswith("error: process 0 of 1")
    assert "died" not in own + others and "Traceback" not in own + others and others.count("\n") == 0
    if status == 76:
        assert own == others and str(error) in own and "the same command on every host continues" in own
        assert ("raise --peer_timeout_seconds" in own) == ("waited too long" in own)
    own_line = {130: "interrupted", 141: ""}
    assert status not in own_line or own == own_line[status]


def test_processes_meet_after_compilation_because_gloo_waits_only_30_seconds(monkeypatch, config):
    met = []
    monkeypatch.setattr(processes, "meet", lambda: met.append(True))
    program = Program(small_config(config.data.dir))
    program.train_step  # noqa: B018 - compiles
    program.eval_step  # noqa: B018
    assert met == [True, True]


_LATE = """
import sys, time
from trialgpt_jax import cli, train
from trialgpt_jax.training.program import Program
compile = Program._compile
def late(self, lowered):
    time.sleep(20)
    return compile(self, lowered)
if "--process_id=1" in sys.argv:
    Program._compile = late
cli.run(train.main)
"""


@pytest.mark.slow
def test_a_process_that_compiles_40_seconds_longer_is_waited_for(config, tmp_path, default_file):
    arguments = [f"--config={default_file}", *overrides(config), f"--workdir={tmp_path}/run", "--config.train.steps=6"]
    results = job(2, "train", *arguments, script=lambda i: ["-c", _LATE])
    assert [r.returncode for r in results] == [0, 0], [r.stderr for r in results]


@pytest.mark.slow
@pytest.mark.parametrize("why", ["a time limit", "Ctrl-C"])
def test_a_time_limit_and_ctrl_c_stop_all_processes_too(train, config, tmp_path, monkeypatch, why):
    """All save by the clock of process 0: here always two steps after the step at which the last save was seen."""
    config = config.copy_and_resolve_references()
    config.train.steps, config.eval.every_steps = 100_000, 0
    config.checkpoint.update({"every_steps": 0, "every_minutes": 1e-9, "keep_last": 1_000})
    config.train.max_seconds = 1.0 if why == "a time limit" else 0.0
    number = signal.SIGINT if why == "Ctrl-C" else 0
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    results, batches = train(tmp_path / "run", 2, send=(0, number, 3), config=config)
    assert [r.returncode for r in results] == [75, 75], [r.stderr for r in results]
    *by_the_clock, saved = sorted(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints"))
    assert f"stopped after step {saved}, which is saved" in results[0].stderr and saved in batches
    assert by_the_clock == list(range(3, saved, 3))
    # only the step, and what orbax, the barrier and the check before a save compile: agreeing on a step uses no device
    for r in results:
        compiled = re.findall(r"Finished XLA compilation of jit\((.*?)\)", r.stderr)
        assert compiled[:2] == ["train_step", "init_state"] and set(compiled[2:]) <= {
            "_identity_fn",
            "slice",
            "all_finite",
        }, compiled


def test_an_error_in_one_process_ends_all_with_its_message(config, tmp_path, default_file):
    own = [a for a in overrides(config) if not a.startswith("--config.data.dir=")]

    def script(i):
        folder = f"{tmp_path}/nowhere" if i == 1 else config.data.dir
        return ["-m", "trialgpt_jax.train", f"--config={default_file}", f"--config.data.dir={folder}"]

    first, second = job(2, "train", *own, f"--workdir={tmp_path}/run", script=script)
    refused(second, "nowhere", "preprocess")
    refused(first, "process 1 of 2", "nowhere", "preprocess")
    with open(tmp_path / "run" / "lock", "a+") as lock:  # only process 0 finds that the workdir is in use
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("host elsewhere, pid 7\n")
        lock.flush()
        first, second = job(2, "train", f"--config={default_file}", *overrides(config), f"--workdir={tmp_path}/run")
    refused(first, "in use by host elsewhere, pid 7")
    refused(second, "process 0 of 2", "in use by host elsewhere, pid 7")


def test_flags_that_contradict_each_other_are_refused(default_file, tmp_path):
    for flags, words in (
        (["--num_processes=2"], "give all three"),
        (["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=2"], "they count from 0"),
        (["--peer_timeout_seconds=0"], "--peer_timeout_seconds=0 must be at least 1"),
    ):
        refused(run("train", f"--config={default_file}", f"--workdir={tmp_path}", *flags), words)


def test_a_process_that_finds_no_others_says_so(default_file, tmp_path):
    port = free_port()
    flags = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", "--process_id=1"]
    flags += ["--start_timeout_seconds=1"]
    result = run("train", f"--config={default_file}", f"--workdir={tmp_path}", *flags)
    assert result.returncode == -signal.SIGABRT and "could not be reached" in result.stderr, result.stderr
    assert "raise --peer_timeout_seconds, or --start_timeout_seconds at the start" in result.stderr


def test_who_is_waited_for_is_said_by_name(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        place = clusters.Place(f"127.0.0.1:{port}", 3, 0)
        assert clusters.missing(place) == f"waiting for 2 of 3 processes at 127.0.0.1:{port}"
        # process 0 and another one have connected
        with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
            assert clusters.missing(place) == f"waiting for 1 of 3 processes at 127.0.0.1:{port}"
            with socket.create_connection(("127.0.0.1", port)):
                assert clusters.missing(place) == ""
        found = f"process 2 has found process 0 of 3 at 127.0.0.1:{port}; waiting for the others"
        assert clusters.missing(place._replace(index=2)) == found
    closed = f"process 2 is waiting for process 0 of 3 at 127.0.0.1:{port}: Connection refused"
    assert clusters.missing(place._replace(index=2)) == closed
    unknown = clusters.missing(clusters.Place("nowhere.invalid:7", 3, 2))
    assert "process 0 of 3 at nowhere.invalid:7: the name nowhere.invalid does not resolve" in unknown
    monkeypatch.setattr(clusters, "_connections", lambda port: None)  # not Linux
    assert clusters.missing(place) == f"waiting for 2 of 3 processes at 127.0.0.1:{port}"


def test_a_line_every_ten_seconds_says_so_while_jax_waits(monkeypatch, capsys):
    assert clusters._EVERY_SECONDS == 10
    monkeypatch.setattr(clusters, "_EVERY_SECONDS", 0.02)
    with clusters.Waiting(clusters.Place("nowhere.invalid:7", 2, 0)):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and set(lines) == {"waiting for 1 of 2 processes at nowhere.invalid:7 (0 s)"}


_JOINED = """
import sys
import jax
from trialgpt_jax.parallel import clusters, processes
clusters._EVERY_SECONDS = 0.2
class Flags:
    coordinator_address, (num_processes, process_id) = sys.argv[1], map(int, sys.argv[2:])
    peer_timeout_seconds = start_timeout_seconds = 60
with processes.join(Flags):
    print(jax.process_count(), jax.config.read("jax_cuda_visible_devices"))
"""


def joined(address, count, index, env):
    argv = [sys.executable, "-c", _JOINED, address, str(count), str(index)]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_given_flags_are_all_that_counts_under_slurm_open_mpi_5_and_kubernetes():
    """JAX would take the GPU of SLURM_LOCALID, fail without mpi4py, or ask the API server of Kubernetes."""
    _, env = command("train")
    env |= _SLURM | {"SLURM_LOCALID": "3", "OMPI_VERSION": "5.0.7", "OMPI_COMM_WORLD_SIZE": "4"}
    env |= {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    env |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    process = joined(f"127.0.0.1:{free_port()}", 1, 0, env)
    stdout, stderr = process.communicate(timeout=100)
    assert (process.returncode, stdout) == (0, "1 all\n"), stderr


def test_a_process_that_starts_late_is_waited_for_and_the_log_says_so():
    # follows: raise --peer_timeout_seconds, or --start_timeout_seconds at the start
    address, env = f"127.0.0.1:{free_port()}", command("train")[1]
    late = f"process 1 is waiting for process 0 of 2 at {address}: Connection refused"
    second = joined(address, 2, 1, env)
    line = second.stderr.readline()  # process 0 starts only now
    assert line.startswith(late), line
    first = joined(address, 2, 0, env)
    outputs = [process.communicate(timeout=100) for process in (first, second)]
    assert [(process.returncode, out) for process, (out, _) in zip((first, second), outputs, strict=True)] == [
        (0, "2 all\n")
    ] * 2, outputs


@pytest.fixture
def no_cluster(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "JOB_COMPLETION", "JAX_COORDINATOR", "JAX_LOCAL")):
            monkeypatch.delenv(name)


_SLURM = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
_OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({}, 1),
        (_SLURM, 16),
        (_SLURM | {"SLURM_NTASKS": "1"}, 1),
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "16"}, 1),  # in the batch script itself, outside srun
        (_OMPI, 4),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 1),  # any pod, such as that of a notebook
    ],
)
def test_clusters_are_detected(env, count, no_cluster, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert clusters.detected(os.environ) == count


def test_a_cloud_tpu_pod_is_detected(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "")
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: pytest.fail(f"asked for {key}"))
    assert clusters.detected(os.environ) == 4
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    assert clusters.detected(os.environ) == 8


def test_what_jax_detects_is_given_to_it_as_a_whole(no_cluster, monkeypatch):
    """As in `jax.distributed.initialize`, except for the GPUs of a process that has its own."""
    for name, value in _SLURM.items():
        monkeypatch.setenv(name, value)
    assert clusters.find(os.environ, 1) == ("node3:61452", 16, 9, [1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert clusters.find(os.environ, 1) == ("node3:61452", 16, 9, None)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:7")
    assert clusters.find(os.environ, 1) == ("other:7", 16, 9, None)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert clusters.find(os.environ, 1) is None


@pytest.mark.parametrize("where", ["is_env_present", "get_process_count", "get_coordinator_address"])
def test_an_error_of_jaxs_detection_is_one_line(no_cluster, monkeypatch, where):
    """Such as a service account that may not read pods, or Open MPI 5 without mpi4py."""
    cluster = next(c for c in ClusterEnv._cluster_types if c.name == "slurm")
    error = classmethod(lambda cls, **_: (_ for _ in ()).throw(RuntimeError("Kubernetes API Error:\n403 - Forbidden")))
    for name, value in _SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster, where, error)
    with pytest.raises(UserError, match="^JAX does not find .*: Kubernetes API Error: 403 - Forbidden; give --coord"):
        clusters.find(os.environ, 1)


@pytest.mark.parametrize(
    "env", [{"OMPI_COMM_WORLD_SIZE": "4"}, {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, {"JOB_COMPLETION_INDEX": "0"}]
)
def test_processes_that_jax_cannot_find_are_refused_rather_than_trained_separately(env, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="does not find the others.*--coordinator_address"):
        clusters.detected(os.environ)


@pytest.mark.parametrize(
    ("env", "own"),
    [
        (_SLURM, False),  # eight processes on a node with eight GPUs: JAX gives each one GPU
        (_SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, True),
        (_SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, False),
        (_SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, True),  # bound by Slurm
        (_SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, False),
        (_OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        (_OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
        (_SLURM | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, True),
    ],
)
def test_which_gpus_a_process_uses(env, own):
    assert clusters.has_own_gpus(env) == own


_RESTORE = """
import json, sys
import jax, numpy as np
if len(sys.argv) > 2:
    flags = dict(argument.removeprefix("--").split("=") for argument in sys.argv[2:])
    jax.distributed.initialize(flags["coordinator_address"], int(flags["num_processes"]), int(flags["process_id"]))
from jax.sharding import NamedSharding, PartitionSpec as P
from trialgpt_jax.parallel.sharding import make_mesh
from trialgpt_jax.training.checkpoint import Checkpoints
sharding = NamedSharding(make_mesh({"data": 1, "fsdp": jax.device_count(), "tensor": 1}), P(None, "fsdp"))
checkpoints, shape = Checkpoints(sys.argv[1]), (8, 4096, 256)
whole = np.random.default_rng(0).standard_normal(shape, np.float32)
if jax.process_count() == 1:
    checkpoints.save(1, {"params": {"a": jax.device_put(whole, sharding), "b": jax.device_put(-whole, sharding)}})
    checkpoints.wait()
else:
    read = lambda: int(open("/proc/self/io").read().split()[1])
    before, leaf = read(), jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    params = checkpoints.restore(1, {"params": {"a": leaf, "b": leaf}})["params"]
    with open(f"{sys.argv[1]}/share.{jax.process_index()}", "w") as file:  # Gloo writes to stdout, too
        json.dump((read() - before) / (2 * whole.nbytes), file)
    for array, expected in ((params["a"], whole), (params["b"], -whole)):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])
"""


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_each_process_reads_only_its_own_part_of_a_checkpoint(devices, tmp_path):
    """64 MB saved on one device, where each array is one shard, and on four."""
    script = ["-c", _RESTORE, str(tmp_path)]
    (saved,) = job(1, "", devices=devices, script=lambda i: script)
    assert saved.returncode == 0, saved.stderr
    for i, result in enumerate(job(2, "", devices=4, script=lambda i: script)):
        assert result.returncode == 0, result.stderr
        share = json.loads((tmp_path / f"share.{i}").read_text())
        assert 0.3 < share < 0.55, "each of the two processes needs half of the (slightly compressed) arrays"
