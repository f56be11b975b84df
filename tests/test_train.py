"""`train` as a user runs it: its files and log, exact resume after kills, stopping, and refusals."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import call, command, metrics, overrides, refused, run, small_config

from trialgpt_jax.parallel import accelerators
from trialgpt_jax.training.stop import StopRequest


def train(config, workdir, *arguments, file, devices=1, here=False):
    """Runs the command in a child process with `devices` CPU devices, or in this process (`here`), which is faster."""
    flags = [f"--config={file}", *overrides(config), f"--workdir={workdir}", *arguments]
    return call("train", *flags) if here else run("train", *flags, devices=devices)


def final_state(workdir):
    """The state of the newest checkpoint, on one device."""
    from trialgpt_jax.config import load_snapshot
    from trialgpt_jax.parallel.sharding import single_device
    from trialgpt_jax.training.checkpoint import Checkpoints
    from trialgpt_jax.training.program import Program

    program = Program(load_snapshot(str(workdir)), mesh=single_device())
    checkpoints = Checkpoints(str(workdir), say=print)
    return checkpoints.restore(checkpoints.newest_whole(), program.layout)


def assert_same_bits(a, b):
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves_a) == len(leaves_b) > 30
    for x, y in zip(leaves_a, leaves_b, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def long_config(store):
    """A run long enough to be killed several times."""
    c = small_config(store)
    c.model.dropout = 0.1
    c.train.update({"steps": 120, "batch_size": 16})
    c.checkpoint.every_steps = 10
    c.eval.every_steps = 20
    return c


@pytest.fixture(scope="module")
def reference(long_config, tmp_path_factory):
    """The workdir and the log of an uninterrupted run of `long_config`."""
    folder = tmp_path_factory.mktemp("reference")
    file = folder / "default.py"
    file.write_text("from trialgpt_jax.config import default_config as get_config\n")
    result = train(long_config, folder / "run", file=file)
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stderr


def test_the_log_and_the_files_of_a_run(reference, long_config):
    workdir, log = reference
    model = ("parameters", "tokens per step", "FLOPs per token", "memory per device", "GiB", "attention kernel xla")
    for words in (*model, "compiled in", "bits per byte", "held training up", "done: step 120"):
        assert words in log, (words, log)
    lines = metrics(workdir)
    evaluations = [line for line in lines if "val_loss" in line]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 121))
    rates = [3e-3 * min((n + 1) / 6, 0.55 + 0.45 * np.cos(np.pi * max(n - 5, 0) / 115)) for n in range(120)]
    np.testing.assert_allclose([line["lr"] for line in steps], rates, rtol=1e-5)
    assert [line["step"] for line in evaluations] == [0, 20, 40, 60, 80, 100, 120]
    assert all(line["tokens"] == line["step"] * 16 * 32 for line in lines)
    assert abs(evaluations[0]["val_loss"] - np.log(512)) < 0.1  # random weights predict all ids equally
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 1
    seconds = [json.loads(line)["seconds"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 120
    best = min(evaluations, key=lambda line: line["val_loss"])["step"]
    kept = sorted(int(name) for name in os.listdir(workdir / "checkpoints"))
    assert kept == sorted({110, 120, best})


@pytest.mark.slow
def test_metrics_are_the_same_with_asynchronous_dispatch(config, tmp_path, default_file, monkeypatch):
    """As on an accelerator, where metrics are fetched one step late."""
    for ahead in (True, False):
        monkeypatch.setattr(accelerators, "dispatches_ahead", lambda platform, ahead=ahead: ahead)
        result = call("train", f"--config={default_file}", *overrides(config), f"--workdir={tmp_path / str(ahead)}")
        assert result.returncode == 0, result.stderr
    assert [line["step"] for line in metrics(tmp_path / "True") if "loss" in line] == list(range(1, 21))
    assert metrics(tmp_path / "True") == metrics(tmp_path / "False")


def test_a_run_compiles_four_programs(config, tmp_path, default_file, caplog):
    """The fourth checks the state at the first save. Any other, such as an operation on metrics in the loop, would run
    between two steps."""
    jax.clear_caches()
    with jax.log_compiles():
        result = call("train", f"--config={default_file}", *overrides(config), f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    programs = re.findall(r"Finished XLA compilation of jit\((.*?)\)", caplog.text)
    assert programs == ["train_step", "eval_step", "init_state", "all_finite"]


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_with_the_same_bits(reference, long_config, tmp_path, default_file):
    """Six SIGKILLs, some of them during a save."""
    workdir, rng = tmp_path / "run", random.Random(0)
    argv, env = command("train", f"--config={default_file}", *overrides(long_config), f"--workdir={workdir}")
    log = workdir / "metrics.jsonl"
    for kill in range(6):
        process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120

        def last_step():
            lines = log.read_text().splitlines() if log.exists() else []
            try:
                return json.loads(lines[-1])["step"] if lines else -1
            except ValueError:
                return -1

        goal = 15 * (kill + 1) + rng.randrange(5)
        while process.poll() is None and last_step() < goal and time.monotonic() < deadline:
            if kill % 2 and (workdir / "saving").exists() and last_step() > goal - 12:
                break  # during a save
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before it was killed"
        process.kill()
        process.wait()
    result = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "resumed from checkpoint" in result.stderr
    assert metrics(workdir) == metrics(reference[0])
    assert_same_bits(final_state(workdir), final_state(reference[0]))


def test_a_signal_during_a_write_to_stderr_requests_a_stop(monkeypatch, capfd):
    class Interrupted(io.RawIOBase):
        """Stderr while a signal arrives: a write of a line holds the lock of its buffer."""

        def writable(self):
            return True

        def write(self, text):
            if not stop._asked:  # a second signal would end the test process
                os.kill(os.getpid(), signal.SIGTERM)
            return len(text)

    with StopRequest() as stop:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Interrupted())))
        print("step 1", file=sys.stderr, flush=True)
        assert stop.requested(1)
    assert "stopping after this step; once more to leave at once\n" in capfd.readouterr().err


def test_sigterm_saves_exits_75_and_the_same_command_continues_exactly(reference, long_config, tmp_path, default_file):
    # follows: stopped {}; run the same command to continue
    workdir = tmp_path / "run"
    argv, env = command("train", f"--config={default_file}", *overrides(long_config), f"--workdir={workdir}")
    process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)
    log = ""
    while "step  33/" not in log:
        line = process.stderr.readline()
        assert line, log
        log += line
    process.send_signal(signal.SIGTERM)
    log += process.communicate(timeout=120)[1]
    assert process.returncode == 75, log
    assert "run the same command to continue" in log
    result = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0 and "resumed from checkpoint" in result.stderr, result.stderr
    assert metrics(workdir) == metrics(reference[0])
    assert_same_bits(final_state(workdir), final_state(reference[0]))


@pytest.mark.slow
def test_eight_devices_give_the_same_losses(config, tmp_path, default_file):
    assert train(config, tmp_path / "one", file=default_file).returncode == 0
    config.mesh.update({"data": 1, "fsdp": 4, "tensor": 2})
    result = train(config, tmp_path / "eight", devices=8, file=default_file)
    assert result.returncode == 0, result.stderr
    one, eight = metrics(tmp_path / "one"), metrics(tmp_path / "eight")
    for a, b in zip(one, eight, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)
    # the checkpoint of eight devices is evaluated on one
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    one_device = ["--config.mesh.data=-1", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"]
    result = run("evaluate", f"--workdir={tmp_path}/eight", "--json", *one_device)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["step"] == 20


def test_max_seconds_saves_and_exits_75(config, tmp_path, default_file):
    config.train.update({"steps": 100_000, "max_seconds": 1.0})
    result = train(config, tmp_path / "run", file=default_file)
    assert result.returncode == 75 and "is saved" in result.stderr, result.stderr


def test_too_many_bad_steps_stop_the_run_with_the_last_good_state_on_disk(config, tmp_path, default_file):
    config.train.max_skipped = 3
    config.optim.update({"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": 0.0})
    config.checkpoint.every_steps = 1
    result = train(config, tmp_path / "run", file=default_file)
    assert result.returncode == 1 and "not finite" in result.stderr, result.stderr
    assert "train.max_skipped" in result.stderr
    last = int(re.search(r"the last good checkpoint is (\d+)", result.stderr)[1])
    for step in sorted(os.listdir(tmp_path / "run" / "checkpoints")):
        assert int(step) <= last
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(final_state(tmp_path / "run")))


def test_unusable_data_models_and_workdirs_are_refused(config, store, tmp_path, default_file):
    def refusal(*words, workdir=tmp_path / "run", **changes):
        c = small_config(config.data.dir)
        for name, value in changes.items():
            section, field = name.split("__")
            c[section][field] = value
        refused(train(c, workdir, file=default_file, here=True), *words)

    refusal("data.dir", "preprocess", data__dir=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    refusal("empty", "preprocess", data__dir=str(tmp_path / "empty"))
    refusal("model.vocab_size=300", "512", model__vocab_size=300)
    refusal("training split", "model.block_size", model__block_size=2**22)
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    shard = copy / "train_00000.bin"
    os.truncate(shard, shard.stat().st_size - 2)
    refusal("train_00000.bin", "truncated", data__dir=str(copy))
    refusal("--workdir", "cannot be written", workdir="/proc/nowhere")


def test_a_workdir_in_use_is_refused_and_another_model_too(reference, long_config, tmp_path, default_file):
    import fcntl

    workdir = tmp_path / "run"
    shutil.copytree(reference[0], workdir)
    with open(workdir / "lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("host somewhere, pid 123\n")
        lock.flush()
        refused(train(long_config, workdir, file=default_file, here=True), "in use", "host somewhere, pid 123")
    # follows: use that or another --workdir, because --allow_config_change={} changes no checkpoint
    changed = long_config.copy_and_resolve_references()
    changed.model.n_layer = 3
    refused(
        train(changed, workdir, file=default_file, here=True), "model.n_layer", "--allow_config_change=model.n_layer"
    )
    changed.train.steps = 130
    result = train(changed, workdir, "--allow_config_change=model.n_layer,train.steps", file=default_file, here=True)
    refused(result, "another model", "params/blocks")
    refused(call("evaluate", f"--workdir={workdir}", "--config.model.n_embd=64"), "another model")
    assert not os.path.exists(workdir / "checkpoints" / "130")
    (workdir / "tokenizer.json").write_text('{"name": "bpe:512", "hash": "0"}')
    refused(train(long_config, workdir, file=default_file, here=True), "tokenizer", "trained with")


def test_a_finished_run_is_not_changed(reference, long_config, default_file):
    before = (reference[0] / "metrics.jsonl").read_bytes()
    result = train(long_config, reference[0], file=default_file)
    assert result.returncode == 0 and "nothing to do" in result.stderr
    assert (reference[0] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["nanogpt", pytest.param("llm.c", marks=pytest.mark.slow), "mixture"])
def test_token_files_of_nanogpt_and_llm_c_and_mixtures_are_trained_on(kind, config, store, tmp_path, default_file):
    folder = tmp_path / "tokens"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        ids = rng.integers(0, 50257, 5000).astype("<u2")
        if kind == "nanogpt":
            ids.tofile(folder / f"{split}.bin")
        else:
            header = np.zeros(256, "<i4")
            header[:3] = 20240520, 1, len(ids)
            (folder / f"fineweb_{split}_000000.bin").write_bytes(header.tobytes() + ids.tobytes())
    config.data.dir = f"{store}:0.75,{store}:0.25" if kind == "mixture" else str(folder)
    config.model.vocab_size = 512 if kind == "mixture" else 50257
    config.train.update({"steps": 6, "batch_size": 2})
    config.eval.every_steps = 3
    result = train(config, tmp_path / "run", file=default_file, here=True)
    assert result.returncode == 0, result.stderr
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 6]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    text = call("infer", f"--workdir={tmp_path}/run", "--prompt=The people", "--max_new_tokens=3")
    assert text.returncode == 0 and text.stdout.startswith("The people"), text.stderr
