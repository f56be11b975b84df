"""Locks on local folders: one holder, released by the kernel when it dies. Leases in object stores: test_storage.py."""

import contextlib
import fcntl
import os
import subprocess
import sys

import pytest
from conftest import ROOT, tree

from trialgpt_jax import UserError
from trialgpt_jax.storage import lock


def test_a_second_holder_is_refused_with_the_flag_the_folder_and_the_first_holder(tmp_path):
    folder, options = str(tmp_path / "new" / "store"), {"name": "lock_0_of_2", "flag": "data.dir"}
    message = f"data.dir={folder} is in use by host .*, pid {os.getpid()}; stop it or choose another folder"
    with lock.hold(folder, **options):
        with pytest.raises(UserError, match=message), lock.hold(folder, **options):
            pass
        with pytest.raises(UserError, match=message):
            lock.probe(folder, **options)
        with lock.hold(folder, **options, take=False), lock.hold(folder, name="lock_1_of_2"):
            pass
    with lock.hold(folder, **options, keep_file=False):
        pass
    assert os.listdir(folder) == ["lock_1_of_2"]


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    script = "import sys, time; from trialgpt_jax.storage import lock\n"
    script += "with lock.hold(sys.argv[1]): print(flush=True); time.sleep(60)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], env=env, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match=f"--workdir={tmp_path} is in use by host .*, pid {process.pid};"):
            lock.probe(str(tmp_path))
        process.kill()
    with lock.hold(str(tmp_path)):
        pass


def test_probe_refuses_what_hold_refuses_and_leaves_the_folder_unchanged(tmp_path):
    with lock.hold(str(tmp_path / "run")):
        pass
    before = tree(tmp_path / "run").keys()
    lock.probe(str(tmp_path / "run"))
    lock.probe(str(tmp_path / "not" / "there"))
    assert tree(tmp_path / "run").keys() == before and os.listdir(tmp_path) == ["run"]
    for check in (lock.probe, lambda folder: lock.hold(folder).__enter__()):
        with pytest.raises(UserError, match="--workdir=/proc/nowhere cannot be written.*choose another folder"):
            check("/proc/nowhere")


def test_a_lock_file_that_is_removed_between_open_and_flock_is_created_again(tmp_path, monkeypatch):
    """With keep_file=False the first holder removes the file: a lock on that file would not exclude a third process."""
    folder, options = str(tmp_path), {"name": "lock_0_of_1", "keep_file": False}
    path, flock, first = tmp_path / "lock_0_of_1", fcntl.flock, contextlib.ExitStack()
    first.enter_context(lock.hold(folder, **options))

    def flock_after_the_first_holder_has_left(file, operation):
        first.close()
        flock(file, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock_after_the_first_holder_has_left)
        second = contextlib.ExitStack()
        second.enter_context(lock.hold(folder, **options))
    with second:
        assert path.read_text() == f"{lock._me()}\n"
        with pytest.raises(UserError, match="is in use by"), lock.hold(folder, **options):
            pass
    assert not path.exists()
