"""One process at a time in a workdir or a token store: `hold` takes a folder, `probe` checks that it could be taken.

On a local disk the lock is `flock` on `<folder>/<name>`; the kernel releases it when the process dies. An object store
has no such lock, so there it is a lease: the holder rewrites the object `<folder>/<name>` every HEARTBEAT seconds. A
process that finds the object watches it for PATIENCE seconds. If it changes, its holder is alive and the folder is
refused; otherwise the lease has expired and is taken over. A lease of this host whose process has exited is taken over
without waiting. Clocks of different hosts are never compared.
"""

import contextlib
import fcntl
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import IO

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.storage import files

HEARTBEAT = 20.0  # seconds between two writes of a lease
PATIENCE = 3 * HEARTBEAT  # a lease that has not changed for this long has expired


@contextlib.contextmanager
def hold(
    folder: str, *, name: str = "lock", flag: str = "--workdir", take: bool = True, keep_file: bool = True
) -> Iterator[None]:
    """Holds `<folder>/<name>` for this process; a local folder is created if it does not exist.

    Args:
      folder: a local path or a URL.
      name: of the lock file.
      flag: the flag or config field that gave `folder`, for messages.
      take: False only checks that a local folder can be written: for all but the first process of a job.
      keep_file: whether a local lock file stays when the lock is released; the object of a lease is always removed.

    Raises:
      UserError: another process holds the lock, or the folder cannot be written.
    """
    path = os.path.join(folder, name)
    if files.is_remote(folder):
        with _lease(folder, path, flag) if take else contextlib.nullcontext():
            yield
        return
    with contextlib.ExitStack() as stack:
        with _writable(folder, flag):
            os.makedirs(folder, exist_ok=True)
            file = stack.enter_context(open(path, "a+"))
            while take and not _flock(file, folder, path, flag):
                file = stack.enter_context(open(path, "a+"))
        if take:
            file.truncate(0)
            file.write(f"{_me()}\n")
            file.flush()
        try:
            yield
        finally:
            if take and not keep_file:
                files.remove(path)  # before the file is closed, so still under the lock


def probe(folder: str, *, name: str = "lock", flag: str = "--workdir") -> None:
    """Checks that `hold` would succeed, and leaves the folder as it was. Raises UserError as `hold` does."""
    path = os.path.join(folder, name)
    if files.is_remote(folder):
        _wait_until_expired(folder, path, flag)
        with _writable(folder, flag):
            probe_path = os.path.join(folder, f"probe_{uuid.uuid4().hex}")
            files.write(probe_path, b"")
            files.remove(probe_path)
        return
    missing, parent = [], os.path.abspath(folder)
    while not os.path.isdir(parent) and parent != os.path.dirname(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    with _writable(folder, flag):
        try:
            for each in reversed(missing):
                os.mkdir(each)
            with tempfile.NamedTemporaryFile(dir=folder, prefix="probe"):
                pass
        finally:
            for each in missing:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(each)
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        _flock(file, folder, path, flag)


def _me() -> str:
    return f"host {socket.gethostname()}, pid {os.getpid()}"


def _in_use(folder: str, holder: str, flag: str) -> UserError:
    return UserError(f"{flag}={folder} is in use by {holder}; stop it or choose another folder")


@contextlib.contextmanager
def _writable(folder: str, flag: str) -> Iterator[None]:
    """Turns an error of the disk or of the store's client into a UserError."""
    # Each client has its own exceptions for a missing bucket, missing credentials or a broken network.
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if files.is_remote(folder):
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        elif isinstance(error, OSError):
            why = f"{error.strerror}; choose another folder"
        else:
            raise
        raise UserError(f"{flag}={folder} cannot be written: {why}") from None


def _flock(file: IO, folder: str, path: str, flag: str) -> bool:
    """Locks an open file. False if `path` is no longer that file: a previous holder removed it after it was opened here
    (`keep_file=False`), and a lock on a removed file excludes nobody."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise _in_use(folder, file.read().strip() or "another process", flag) from None
    try:
        return os.path.samefile(file.fileno(), path)
    except FileNotFoundError:
        return False


# ---- leases in object stores; the object has two lines: "host H, pid P" and "<owner> <number of the heartbeat>"


@contextlib.contextmanager
def _lease(folder: str, path: str, flag: str) -> Iterator[None]:
    """Holds the lease and renews it in a thread, which ends the process if another one has taken the lease over."""
    owner, released = uuid.uuid4().hex, threading.Event()
    _wait_until_expired(folder, path, flag)

    def write(beat: int) -> None:
        files.write(path, f"{_me()}\n{owner} {beat}\n")

    def renew() -> None:
        beat = 1
        while not released.wait(HEARTBEAT):
            with contextlib.suppress(Exception):  # the store cannot be reached: the next heartbeat tries again
                if _owner(text := _read(path)) not in (owner, None):
                    say(f"{folder} was taken over by {_holder(text)} after {PATIENCE:.0f} s without heartbeat; exiting")
                    os._exit(1)
                write(beat)
                beat += 1

    with _writable(folder, flag):
        write(0)
        time.sleep(PATIENCE / 60)  # when two processes take it at the same moment, the later write wins
        if _owner(text := _read(path)) != owner:
            raise _in_use(folder, _holder(text), flag)
    thread = threading.Thread(target=renew, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        with contextlib.suppress(Exception):
            if _owner(_read(path)) == owner:
                files.remove(path)


def _wait_until_expired(folder: str, path: str, flag: str) -> None:
    """Returns when no living process holds the lease. Raises UserError as `hold` does."""
    with _writable(folder, flag):
        first = text = _read(path)
        if not first or _exited_here(first):
            return
        say(f"{folder} is locked by {_holder(first)}; watching its heartbeat for {PATIENCE:.0f} s")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and text == first:
            time.sleep(min(1.0, PATIENCE / 10))
            text = _read(path)
    if text not in (first, ""):
        raise _in_use(folder, _holder(text), flag)


def _read(path: str) -> str:
    try:
        with files.open_file(path) as file:
            return file.read(1000).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _holder(text: str) -> str:
    return text.split("\n")[0] or "another run"


def _owner(text: str) -> str | None:
    lines = text.split("\n")
    return lines[1].split(" ")[0] if len(lines) > 1 else None


def _exited_here(text: str) -> bool:
    """Whether the holder was a process of this host that no longer exists."""
    host, _, pid = _holder(text).partition(", pid ")
    if host != f"host {socket.gethostname()}" or not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
