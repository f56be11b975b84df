"""A workdir in an object store: the clients of gs:// against a bucket in memory, with the same results as on disk."""

import json
import os
import socket
import subprocess
import threading
import time

import pytest
from conftest import call, command, metrics, overrides, refused, run
from gcs_server import serve

from trialgpt_jax import UserError
from trialgpt_jax.evaluation import report
from trialgpt_jax.evaluation.suite import Outcome
from trialgpt_jax.evaluation.task import Result, Task
from trialgpt_jax.storage import files, json_files, lease, lock

pytest.importorskip("gcsfs", reason="the extra `gs`")


@pytest.fixture(scope="module")
def bucket():
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


def objects(bucket, prefix):
    return {name: data for (_, name), data in bucket.objects.items() if name.startswith(prefix)}


def download(bucket, prefix, folder):
    for name, data in objects(bucket, prefix).items():
        path = folder / name.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_files_are_written_listed_and_removed_as_on_disk(bucket, tmp_path):
    for root in (str(tmp_path / "a"), "gs://bucket/a"):
        files.make_folder(root)
        path = os.path.join(root, "x.json")
        assert not files.exists(path) and files.names(os.path.join(root, "nothing")) == []
        json_files.write(path, {"a": 1})
        assert json_files.read(path) == {"a": 1} and files.exists(path)
        files.make_folder(os.path.join(root, "sub"))
        files.write(os.path.join(root, "sub", "y"), b"123")
        files.write(path, b"again")
        assert files.names(root) == ["sub", "x.json"] and files.sizes(root) == {"sub/y": 3, "x.json": 5}
        assert files.sha256(os.path.join(root, "sub", "y")).startswith("a665a459")
        files.rename_folder(os.path.join(root, "sub"), os.path.join(root, "moved"))
        assert files.sizes(root) == {"moved/y": 3, "x.json": 5}
        files.remove(path)
        files.remove(path)
        files.remove_tree(os.path.join(root, "moved"))
        files.remove_tree(os.path.join(root, "moved"))
        assert files.sizes(root) == {}


def test_the_scores_of_a_run_in_a_bucket_are_written_and_merged_as_on_disk(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lease, "PATIENCE", 0.3)
    task = Task("a", "llm.c", "", "0", 0, None)
    for workdir in ("gs://bucket/scored", str(tmp_path)):
        for name, score in (("a", 0.5), ("b", 0.25), ("a", 0.75)):
            outcome = Outcome(task._replace(name=name), {name: Result({"acc": score}, 8)})
            report.save(workdir, report.add(report.empty(5), outcome, None, "float32"))
        assert f"the scores are in {workdir}/evaluations/5.json" in capsys.readouterr().err
    written = objects(bucket, "scored/")
    assert {name.removeprefix("scored/evaluations/"): data for name, data in written.items()} == {
        path.name: path.read_bytes() for path in (tmp_path / "evaluations").iterdir()
    }
    whole = json.loads(written["scored/evaluations/5.json"])
    assert {name: scores["acc"] for name, scores in whole["tasks"].items()} == {"a": 0.75, "b": 0.25}


def test_urls_of_unsupported_stores_are_refused(tmp_path):
    for url in ("memory://x", "ftp://host/x", "az://x/y"):
        refused(call("infer", f"--workdir={url}"), url, "not to " + url.split(":")[0])
    assert not os.path.exists("memory:")


@pytest.mark.slow
def test_a_killed_and_resumed_run_in_a_bucket_equals_a_run_on_disk(bucket, config, tmp_path, default_file):
    config.train.steps = 40
    flags = [f"--config={default_file}", *overrides(config)]
    assert call("train", *flags, f"--workdir={tmp_path}/disk").returncode == 0

    argv, env = command("train", *flags, "--workdir=gs://bucket/run")
    with subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if any(name.endswith("/checksums.json") for name in objects(bucket, "run/")):
                process.kill()
    assert process.returncode == -9
    result = run("train", *flags, "--workdir=gs://bucket/run")
    assert result.returncode == 0, result.stderr
    assert "resumed from checkpoint" in result.stderr, result.stderr
    kept = {name.split("/")[2] for name in objects(bucket, "run/checkpoints/")}
    assert kept == set(os.listdir(tmp_path / "disk" / "checkpoints")) and "run/lock" not in objects(bucket, "run/")
    download(bucket, "run/", tmp_path / "copy")
    assert metrics(tmp_path / "copy") == metrics(tmp_path / "disk")
    from test_train import assert_same_bits, final_state

    assert_same_bits(final_state(tmp_path / "copy"), final_state(tmp_path / "disk"))

    # the other commands read the workdir in the bucket
    result = call("evaluate", "--workdir=gs://bucket/run", "--json")
    assert result.returncode == 0, result.stderr
    on_disk = call("evaluate", f"--workdir={tmp_path}/disk", "--json")
    assert json.loads(result.stdout) == json.loads(on_disk.stdout)
    result = call("infer", "--workdir=gs://bucket/run", "--prompt=The people", "--max_new_tokens=3")
    assert result.returncode == 0 and result.stdout.startswith("The people"), result.stderr
    assert call("convert", "--workdir=gs://bucket/run", "--verify").returncode == 0

    # damage is found as on disk
    name = next(name for name in objects(bucket, "run/checkpoints/40/") if "/d/" in name)
    data = bytearray(bucket.objects["bucket", name])
    data[len(data) // 2] ^= 1
    bucket.objects["bucket", name] = bytes(data)
    result = call("convert", "--workdir=gs://bucket/run", "--verify")
    assert result.returncode == 1 and f"gs://bucket/{name} has changed" in result.stdout


def test_a_dry_run_leaves_nothing_in_a_bucket(bucket, config, default_file):
    before = dict(bucket.objects)
    result = run("train", f"--config={default_file}", *overrides(config), "--workdir=gs://bucket/dry", "--dry_run")
    assert result.returncode == 0 and "would start at step 0" in result.stderr, result.stderr
    assert bucket.objects == before


@pytest.fixture
def short_heartbeat(monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.1)
    monkeypatch.setattr(lease, "PATIENCE", 1.0)


def test_a_live_lease_refuses_and_an_expired_one_is_taken_over(bucket, short_heartbeat):
    with lock.hold("gs://bucket/locked"):
        with pytest.raises(UserError, match=f"in use by host .*, pid {os.getpid()}"), lock.hold("gs://bucket/locked"):
            pass
        files.write("gs://bucket/elsewhere/lock", "host another, pid 1\n0123 7\n")
        begin = time.monotonic()
        with lock.hold("gs://bucket/elsewhere"):
            assert time.monotonic() - begin > 0.9
    assert not files.exists("gs://bucket/locked/lock") and threading.active_count() < 50
    files.write("gs://bucket/dead/lock", lease_of_a_dead_process())
    begin = time.monotonic()
    with lock.hold("gs://bucket/dead"):
        assert time.monotonic() - begin < 0.9


def lease_of_a_dead_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return f"host {socket.gethostname()}, pid {process.pid}\n0123 7\n{lease._system()}, start 1\n"
