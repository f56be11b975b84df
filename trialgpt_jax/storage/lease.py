"""A lock as a file that its holder keeps rewriting, for object stores and file systems without `flock`; see `lock`.

The holder rewrites the file every HEARTBEAT seconds. A process that finds it watches it for PATIENCE seconds. If it
changes, its holder is alive and the folder is refused; otherwise the lease has expired and is taken over. A lease of
this host whose process has exited is taken over without waiting. Clocks of different hosts are never compared. A holder
that finds the file of another one ends its process.

Every lock file, also one on a local disk, has three lines: `host H, pid P`, then `<identity> <number of the heartbeat>`
and `boot B, pid namespace N, start S`. The identity is random, because hosts and containers share names and pids.
Earlier versions wrote no third line, or only the first.
"""

import contextlib
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.storage import files

HEARTBEAT = 20.0  # seconds between two writes of a lease
PATIENCE = 3 * HEARTBEAT  # a lease that has not changed for this long has expired
_TAKEN_OVER = 2  # exit status


@contextlib.contextmanager
def hold(folder: str, path: str, flag: str) -> Iterator[None]:
    """Holds the lease and renews it in a thread, which ends the process if another one has taken the lease over.

    Args:
      folder: a local path or a URL that exists.
      path: of the lease.
      flag: the flag or config field that gave `folder`, for messages.

    Raises:
      UserError: another process holds the lease, or the folder cannot be written.
    """
    owner, released = uuid.uuid4().hex, threading.Event()
    expired = wait_until_expired(folder, path, flag)

    def renew() -> None:
        beat = 1
        while not released.wait(HEARTBEAT):
            with contextlib.suppress(Exception):  # the store cannot be reached: the next heartbeat tries again
                if owner_in(text := _read(path)) not in (owner, None):
                    exit_taken_over(folder, text)
                files.write(path, describe(owner, beat))
                beat += 1

    with writable(folder, flag):
        if (text := _read(path)) != expired:
            raise in_use(folder, text, flag)
        files.write(path, describe(owner, 0))
        time.sleep(PATIENCE / 60)  # when two processes take it at the same moment, the later write wins
        if owner_in(text := _read(path)) != owner:
            raise in_use(folder, text, flag)
    thread = threading.Thread(target=renew, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        with contextlib.suppress(Exception):
            if owner_in(_read(path)) == owner:
                files.remove(path)


def wait_until_expired(folder: str, path: str, flag: str) -> str:
    """The text of a lease that no living process holds, "" if there is none. Raises UserError as `hold` does."""
    with writable(folder, flag):
        first = text = _read(path)
        if not first or has_exited(first):
            return first
        say(f"{folder} is locked by {holder_in(first)}; watching its heartbeat for {PATIENCE:.0f} s")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and text == first:
            time.sleep(min(1.0, PATIENCE / 10))
            text = _read(path)
    if text not in (first, ""):
        raise in_use(folder, text, flag)
    return text


def _read(path: str) -> str:
    try:
        with files.open_file(path) as file:
            return file.read(1000).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


# ---- the text of a lock file


def describe(owner: str, beat: int) -> str:
    """The text for this process, with its random identity and the number of the heartbeat."""
    system, start = _system() or "unknown", _start(os.getpid()) or "unknown"
    return f"host {socket.gethostname()}, pid {os.getpid()}\n{owner} {beat}\n{system}, start {start}\n"


def holder_in(text: str) -> str:
    """Host and pid in a text, or words for an unknown holder."""
    return text.split("\n")[0].strip() or "another process"


def owner_in(text: str) -> str | None:
    """The random identity in a text, if any."""
    lines = text.split("\n")
    return (lines[1].split(" ")[0] or None) if len(lines) > 1 else None


def has_exited(text: str) -> bool:
    """Whether the holder was a process of this pid namespace and boot that no longer exists; False where unknown."""
    lines = text.split("\n")
    host, _, pid = lines[0].partition(", pid ")
    system, _, start = lines[2].partition(", start ") if len(lines) > 2 else ("", "", "")
    if host != f"host {socket.gethostname()}" or system != _system() or not re.fullmatch(r"[1-9][0-9]{0,8}", pid):
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it exists, and is another user's
        pass
    now = _start(int(pid))
    return start.isdigit() and now is not None and now != start  # the pid may have been given again


def _system() -> str | None:
    """The kernel since its start, and the pid namespace, in which a pid names one process; None where unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"boot {file.read().strip()}, pid namespace {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; `exited` for a zombie, None where unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before it may contain spaces
        return "exited" if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        return None


# ---- errors


def in_use(folder: str, text: str, flag: str) -> UserError:
    """The error for a folder whose lock file has a living holder and this text."""
    return UserError(f"{flag}={folder} is in use by {holder_in(text)}; stop it or choose another {flag}")


@contextlib.contextmanager
def writable(folder: str, flag: str) -> Iterator[None]:
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
            room = "free some space, or " if files.is_disk_full(error) else ""
            why = f"{error.strerror}; {room}choose another folder"
        else:
            raise
        raise UserError(f"{flag}={folder} cannot be written: {why}") from None


def exit_taken_over(folder: str, text: str) -> None:
    """Ends this process, also from another thread, because it must write nothing more into the folder."""
    say(f"error: {folder} was taken over by {holder_in(text)}; this process ends, and what it has saved is kept")
    os._exit(_TAKEN_OVER)
