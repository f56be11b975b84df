"""One holder per folder: locks on local disks, and leases where there are no locks. Object stores: test_storage.py."""

import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, call, refused, tree

from trialgpt_jax import UserError
from trialgpt_jax.storage import files, lease, lock


@pytest.fixture
def short_heartbeat(monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.1)
    monkeypatch.setattr(lease, "PATIENCE", 1.0)


@pytest.fixture
def no_flock(monkeypatch, short_heartbeat):
    """A file system without locks; the lease has a short heartbeat."""
    monkeypatch.setattr(fcntl, "flock", fail_with(errno.ENOLCK))


def fail_with(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def is_held(folder, **options):
    try:
        with lock.hold(str(folder), **options):
            return False
    except UserError as error:
        assert "is in use by" in str(error)
        return True


def test_a_second_holder_is_refused_with_the_flag_the_folder_and_the_first_holder(tmp_path):
    folder, options = str(tmp_path / "new" / "store"), {"name": "lock_0_of_2", "flag": "data.dir"}
    message = f"data.dir={folder} is in use by host .*, pid {os.getpid()}; stop it or choose another data.dir"
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
    with holder(tmp_path) as process:
        with pytest.raises(UserError, match=f"--workdir={tmp_path} is in use by host .*, pid {process.pid};"):
            lock.probe(str(tmp_path))
        process.kill()
        process.wait()
        assert not is_held(tmp_path)


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


def test_two_that_only_look_do_not_see_each_other_and_a_holder_outlasts_them(tmp_path, monkeypatch):
    with lock.hold(str(tmp_path)):
        pass
    with open(tmp_path / "lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        lock.check_free(str(tmp_path))
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        assert not is_held(tmp_path)


@pytest.fixture
def released_meanwhile(tmp_path, monkeypatch):
    """Holds `lock` with keep_file=False until the next flock; the holder has removed the file when that happens."""
    flock, first = fcntl.flock, contextlib.ExitStack()
    first.enter_context(lock.hold(str(tmp_path), keep_file=False))

    def flock_after_the_first_holder_has_left(file, operation):
        first.close()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_the_first_holder_has_left)


def test_a_lock_file_that_is_removed_between_open_and_flock_is_created_again(tmp_path, released_meanwhile):
    """A lock on the removed file would not exclude a third process."""
    with lock.hold(str(tmp_path), keep_file=False):
        assert (tmp_path / "lock").read_text().startswith(f"host {socket.gethostname()}, pid {os.getpid()}\n")
        assert is_held(tmp_path, keep_file=False)
    assert not (tmp_path / "lock").exists()


def test_a_lock_file_that_is_removed_while_it_is_looked_at_is_free(tmp_path, released_meanwhile):
    lock.check_free(str(tmp_path))
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("keep_file", [True, False])
def test_of_many_that_come_and_go_only_one_is_inside_at_once(tmp_path, keep_file):
    inside, most, entered, end = [0], [0], [0], time.monotonic() + 1.5

    def come_and_go():
        while time.monotonic() < end:
            with contextlib.suppress(UserError), lock.hold(str(tmp_path), keep_file=keep_file):
                inside[0] += 1
                most[0], entered[0] = max(most[0], inside[0]), entered[0] + 1
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=come_and_go) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and entered[0] > 20


def test_every_holder_has_an_identity_of_its_own(tmp_path):
    owners = set()
    for _ in range(3):
        with lock.hold(str(tmp_path)):
            owners.add(lease.owner_in((tmp_path / "lock").read_text()))
    assert len(owners) == 3 and all(re.fullmatch("[0-9a-f]{32}", owner) for owner in owners)


# ---- names that are not lock files


def make_link(path):
    (path.parent / "precious").write_text("precious")
    path.symlink_to("precious")


def make_dangling_link(path):
    path.symlink_to("created")


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


def test_a_lock_that_another_process_takes_while_its_file_is_looked_at_is_in_use(tmp_path, monkeypatch):
    first, second, flock = contextlib.ExitStack(), contextlib.ExitStack(), fcntl.flock
    first.enter_context(lock.hold(str(tmp_path), keep_file=False))

    def flock_after_another_holder(file, operation):
        monkeypatch.undo()
        first.close()
        second.enter_context(lock.hold(str(tmp_path)))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_another_holder)
    with second, pytest.raises(UserError, match=f"is in use by host .*, pid {os.getpid()}"):
        lock.check_free(str(tmp_path))


@pytest.fixture
def alarm():
    """Ends a test that hangs, for example at a fifo."""

    def hang(*_):
        raise AssertionError("it hangs")

    previous = signal.signal(signal.SIGALRM, hang)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("check", [lambda folder: lock.hold(folder).__enter__(), lock.probe], ids=["hold", "probe"])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (make_link, "a symbolic link"),
        (make_dangling_link, "a symbolic link"),
        (lambda path: path.mkdir(), "a folder"),
        (os.mkfifo, "a special file"),
        (make_socket, "a special file"),
    ],
)
def test_a_lock_that_is_no_file_is_refused_by_name_and_not_written(tmp_path, check, make, what):
    make(tmp_path / "lock")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=f"^{tmp_path}/lock is {what}, but the lock must be a regular file; remove it$"):
        check(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == before
    assert make is not make_link or (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("check", [lambda folder: lock.hold(folder).__enter__(), lock.probe], ids=["hold", "probe"])
def test_a_lock_that_may_not_be_opened_is_refused_by_name(tmp_path, check, monkeypatch):
    (tmp_path / "lock").touch(0o000)
    real = os.open

    def refuse(path, *rest, **options):  # root may open everything
        if str(path).endswith("/lock"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        UserError, match=f"^{tmp_path}/lock cannot be opened: Permission denied; allow to read and write"
    ):
        check(str(tmp_path))


# ---- file systems without flock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_there_is_no_flock_the_lock_is_a_lease_that_excludes_too(tmp_path, capsys, monkeypatch, no_flock, number):
    monkeypatch.setattr(fcntl, "flock", fail_with(number))
    with lock.hold(str(tmp_path)):
        (warning,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(
            f"warning: the file system of {tmp_path} has no locks .*; {tmp_path}/lock is .* lease.*", warning
        )
        for check in (lambda: lock.hold(str(tmp_path)).__enter__(), lambda: lock.probe(str(tmp_path))):
            with pytest.raises(UserError, match=f"--workdir={tmp_path} is in use by host .*, pid {os.getpid()};"):
                check()
    assert os.listdir(tmp_path) == []
    lock.probe(str(tmp_path))


def test_another_error_of_flock_is_reported_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fail_with(errno.EIO))
    with pytest.raises(UserError, match=f"--workdir={tmp_path} cannot be written: Input/output error; choose another"):
        lock.hold(str(tmp_path)).__enter__()


def test_commands_run_on_a_file_system_without_flock(tmp_path, no_flock, store):
    flags = [f"--config.data.dir={tmp_path}/store", "--config.data.source=files", "--config.data.num_workers=1"]
    flags += [f"--config.data.source_options.path={store.parent}/texts"]
    done = call("preprocess", *flags)
    assert done.returncode == 0 and "has no locks" in done.stderr, done.stderr
    assert not [name for name in os.listdir(tmp_path / "store") if name.startswith("lock")]
    with lock.hold(f"{tmp_path}/store", name="lock"):
        refused(call("preprocess", *flags), f"data.dir={tmp_path}/store is in use by host")


# ---- whose lease it was


def text_of(pid, system=None, start=None, host=None):
    system = lease._system() if system is None else system
    start = lease._start(pid) if start is None else start
    return f"host {host or socket.gethostname()}, pid {pid}\n0123 7\n{system}, start {start}\n"


def test_a_holder_is_dead_only_if_its_boot_and_pid_namespace_are_ours_and_the_process_is_gone():
    alive, gone, zombie = (subprocess.Popen(command) for command in (["sleep", "60"], ["true"], ["true"]))
    gone.wait()
    while lease._start(zombie.pid) != "exited":
        time.sleep(0.01)
    here = lease._system()
    assert re.fullmatch(r"boot [0-9a-f-]{36}, pid namespace \d+", here)
    other_boot, other_namespace = here.replace("boot ", "boot 0"), here + "0"
    cases = [
        (text_of(gone.pid, start="1"), True),
        (text_of(zombie.pid, start="1"), True),
        (text_of(alive.pid), False),
        (text_of(alive.pid, start="1"), True),  # the pid was given again
        (text_of(os.getpid()), False),
        (text_of(os.getpid(), start="1"), True),  # a container's pid 1 of an earlier start
        (text_of(gone.pid, start="1", system=other_boot), False),
        (text_of(gone.pid, start="1", system=other_namespace), False),
        (text_of(gone.pid, start="1", host="other"), False),
        (text_of(alive.pid, start="unknown"), False),
        (f"host {socket.gethostname()}, pid {gone.pid}\n0123 7\n", False),  # of an earlier version: not known
        (f"host {socket.gethostname()}, pid {gone.pid}\n", False),
        (text_of("0", start="1"), False),
        (text_of("9" * 30, start="1"), False),
        ("", False),
    ]
    found = [lease.has_exited(text) for text, _ in cases]
    alive.kill()
    alive.wait(), zombie.wait()
    assert found == [dead for _, dead in cases]


def test_a_dead_lease_is_taken_over_at_once_and_an_unknown_one_after_the_patience(tmp_path, no_flock, monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    old_format = f"host {socket.gethostname()}, pid {gone.pid}\n0123 7\n"
    for text, waits in ((text_of(gone.pid, start="1"), False), (old_format, True), ("host elsewhere, pid 1\n", True)):
        (tmp_path / "lock").write_text(text)
        begin = time.monotonic()
        with lock.hold(str(tmp_path)):
            assert (time.monotonic() - begin > 0.9) == waits, text
    monkeypatch.setattr(lease, "_system", lambda: None)  # no /proc
    with lock.hold(str(tmp_path)):
        assert is_held(tmp_path)


# ---- takeovers


def test_of_two_that_take_an_expired_lease_over_at_once_exactly_one_stays(tmp_path, no_flock, monkeypatch):
    (tmp_path / "lock").write_text("host elsewhere, pid 1\n0123 7\n")
    describe, together = lease.describe, threading.Barrier(2)

    def describe_together(owner, beat):  # both have found the lease expired, and write next
        if beat == 0:
            together.wait(30)
        return describe(owner, beat)

    monkeypatch.setattr(lease, "describe", describe_together)
    inside, refusals, decided = [], [], threading.Event()

    def run():
        try:
            with lock.hold(str(tmp_path)):
                inside.append(lease.owner_in((tmp_path / "lock").read_text()))
                decided.wait(30)
        except UserError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(inside) + len(refusals) < 2:
        time.sleep(0.01)
    decided.set()
    for thread in threads:
        thread.join()
    assert len(inside) == 1 and "is in use by host" in refusals[0]


def test_a_lease_that_another_took_after_it_was_found_expired_is_left_to_it(tmp_path, no_flock, monkeypatch):
    wait, theirs = lease.wait_until_expired, text_of(1, host="faster", start="1")

    def wait_and_lose(folder, path, flag):
        expired = wait(folder, path, flag)
        files.write(path, theirs)
        return expired

    monkeypatch.setattr(lease, "wait_until_expired", wait_and_lose)
    with pytest.raises(UserError, match="in use by host faster, pid 1"):
        lock.hold(str(tmp_path)).__enter__()
    assert (tmp_path / "lock").read_text() == theirs


@contextlib.contextmanager
def holder(folder, no_flock=False):
    """A process that holds the folder for 20 s and then writes `went on`, with a heartbeat of 0.1 s."""
    script = (
        "import fcntl, sys, time\n"
        "from trialgpt_jax.storage import lease, lock\n"
        "def fail(*_): raise OSError(37, 'No locks available')\n"
        "lease.HEARTBEAT, lease.PATIENCE = 0.1, 1.0\n"
        f"fcntl.flock = fail if {no_flock} else fcntl.flock\n"
        "with lock.hold(sys.argv[1]):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(20)\n"
        "    print('went on')\n"
    )
    env, pipe = os.environ | {"PYTHONPATH": str(ROOT)}, subprocess.PIPE
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def assert_ends(process, folder, by):
    out, err = process.communicate(timeout=15)
    assert process.returncode == 2 and out == "", (process.returncode, out, err)
    line = err.splitlines()[-1]
    assert line == f"error: {folder} was taken over by {by}; this process ends, and what it has saved is kept"


def test_a_run_whose_lease_was_taken_over_ends(tmp_path):
    with holder(tmp_path, no_flock=True) as process:
        files.write(str(tmp_path / "lock"), text_of(7, host="another", start="1"))
        assert_ends(process, tmp_path, "host another, pid 7")


def test_a_run_whose_lock_file_was_removed_and_taken_by_another_ends(tmp_path):
    with holder(tmp_path) as process:
        os.remove(tmp_path / "lock")
        with lock.hold(str(tmp_path)):
            assert_ends(process, tmp_path, f"host {socket.gethostname()}, pid {os.getpid()}")


def test_a_run_beside_which_another_has_come_and_gone_ends(tmp_path):
    with holder(tmp_path) as process:
        files.write(str(tmp_path / "lock"), text_of(7, host="another", start="1"))
        assert_ends(process, tmp_path, "host another, pid 7")


def test_a_lock_file_that_was_only_removed_is_written_and_locked_again(tmp_path):
    with holder(tmp_path) as process:
        os.remove(tmp_path / "lock")
        deadline = time.monotonic() + 15
        while not (tmp_path / "lock").exists() or not (tmp_path / "lock").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert is_held(tmp_path) and process.poll() is None
    assert not is_held(tmp_path)
