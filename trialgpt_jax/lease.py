"""Keeps two runs out of one workdir in an object store, which has no locks that the dead let go of.

The run that holds a workdir writes `<workdir>/lock` anew every 20 seconds. One that finds a lock watches it for a minute: if it
changes, its holder lives and the newcomer is refused; if not, the holder is dead and the lock is taken over. A lock of this host
whose process is gone is taken over at once. No clocks are compared.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from trialgpt_jax import UserError, files
from trialgpt_jax.training.metrics import say

HEARTBEAT = 20.0  # seconds
PATIENCE = 3 * HEARTBEAT


@contextlib.contextmanager
def held(workdir: str) -> Iterator[None]:
    """Holds the lock, and writes it again and again in the background; leaves the process when another run has taken it.

    Raises:
      UserError: another run holds it, or the store cannot be written.
    """
    path, mine = os.path.join(workdir, "lock"), uuid.uuid4().hex
    wait_until_free(workdir)
    ended = threading.Event()

    def write(beat: int) -> None:
        files.write(path, f"host {socket.gethostname()}, pid {os.getpid()}\n{mine} {beat}\n")

    def beat() -> None:
        number = 1
        while not ended.wait(HEARTBEAT):
            with contextlib.suppress(Exception):  # a store that is away for a while: the next beat tries again
                if _owner(_read(path)) not in (mine, None):
                    say(
                        f"{workdir} was taken over by {_holder(_read(path))}, for this run was silent too long; leaving at once"
                    )
                    os._exit(1)
                write(number)
                number += 1

    with _reachable(workdir):
        write(0)
        time.sleep(PATIENCE / 60)  # of two that take it in the same moment, the later one has it
        if _owner(text := _read(path)) != mine:
            raise UserError(f"--workdir={workdir} is in use by {_holder(text)}; stop it or choose another folder")
    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):
            if _owner(_read(path)) == mine:
                files.remove(path)


def probe(workdir: str) -> None:
    """Finds out whether `held` would let a run begin, and leaves everything as it was. Raises UserError as `held`."""
    wait_until_free(workdir)
    with _reachable(workdir):
        path = os.path.join(workdir, f"probe_{uuid.uuid4().hex}")
        files.write(path, b"")
        files.remove(path)


def wait_until_free(workdir: str) -> None:
    """Returns when no living run holds the lock. Raises UserError as `held`."""
    path = os.path.join(workdir, "lock")
    with _reachable(workdir):
        first = text = _read(path)
        if not first or _died_here(first):
            return
        say(f"{workdir} is locked by {_holder(first)}; watching for {PATIENCE:.0f} s whether that run lives")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and text == first:
            time.sleep(min(1.0, PATIENCE / 10))
            text = _read(path)
    if text != first and text:
        raise UserError(f"--workdir={workdir} is in use by {_holder(text)}; stop it or choose another folder")


@contextlib.contextmanager
def _reachable(workdir: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - each store's package has its own for a missing bucket, credentials, a network
        why = " ".join(str(error).split())[:200]
        raise UserError(f"--workdir={workdir} cannot be written: {type(error).__name__}: {why}") from None


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


def _died_here(text: str) -> bool:
    host, _, pid = _holder(text).partition(", pid ")
    if host != f"host {socket.gethostname()}" or not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
