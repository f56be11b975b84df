"""One process at a time in a folder: `hold` takes it, `probe` and `check_free` ask whether it is taken.

On a local disk the lock is `flock` on `<folder>/<name>`; the kernel releases it when the process dies. A lock on a file
that was removed or replaced excludes nobody, so the holder looks every HEARTBEAT seconds whether the name is still that
file. It takes the lock again if nobody else did, and ends its process otherwise. An object store and some network file
systems have no `flock`; there the file is a lease, see `lease`, which also describes its text.
"""

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.storage import files, lease

_ATTEMPTS = 4  # `check_free` holds a lock for a moment, and a holder may remove the file after it was opened here
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def hold(
    folder: str,
    *,
    name: str = "lock",
    flag: str = "--workdir",
    value: str = "",
    take: bool = True,
    keep_file: bool = True,
) -> Iterator[None]:
    """Holds `<folder>/<name>` for this process; a local folder is created if it does not exist.

    The process ends with status 2 if the file is taken from it.

    Args:
      folder: a local path or a URL.
      name: of the lock file.
      flag: the flag or config field that gave `folder`, for messages.
      value: of `flag`, if it is not `folder`.
      take: False only checks that a local folder can be written: for all but the first process of a job.
      keep_file: whether a local lock file stays when the lock is released; a lease is always removed.

    Raises:
      UserError: another process holds the lock, the folder cannot be written, or the name is not that of a file.
    """
    path, value, handle = os.path.join(folder, name), value or folder, None
    if not files.is_remote(folder):
        with lease.writable(value, flag):
            files.make_folder(folder)
            if take:
                handle = _take(value, path, flag)
            else:
                os.close(_open(path, os.O_RDWR | os.O_CREAT))
    if not take:
        yield
    elif handle is None:
        with lease.hold(value, path, flag):
            yield
    else:
        with _guarded(handle, value, path, flag, keep_file):
            yield


def probe(folder: str, *, name: str = "lock", flag: str = "--workdir") -> None:
    """Checks that `hold` would succeed, and leaves the folder as it was. Raises UserError as `hold` does."""
    if files.is_remote(folder):
        check_free(folder, name=name, flag=flag)
        with lease.writable(folder, flag):
            probe_path = os.path.join(folder, f"probe_{uuid.uuid4().hex}")
            files.write(probe_path, b"")
            files.remove(probe_path)
        return
    missing, parent = [], os.path.abspath(folder)
    while not os.path.isdir(parent) and parent != os.path.dirname(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    with lease.writable(folder, flag):
        try:
            for each in reversed(missing):
                os.mkdir(each)
            with tempfile.NamedTemporaryFile(dir=folder, prefix="probe"):
                pass
        finally:
            for each in missing:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(each)
    check_free(folder, name=name, flag=flag)


def check_free(folder: str, *, name: str = "lock", flag: str = "--workdir") -> None:
    """Raises UserError, as `hold` does, if a process holds `<folder>/<name>`; writes nothing."""
    path = os.path.join(folder, name)
    if files.is_remote(folder):
        lease.wait_until_expired(folder, path, flag)
        return
    with lease.writable(folder, flag), contextlib.suppress(FileNotFoundError):
        for _ in range(_ATTEMPTS):
            handle = _open(path, os.O_RDONLY)
            try:
                locked = not _flock(handle, fcntl.LOCK_SH)  # shared, so that two of these do not see each other
                if not _is_at(handle, path):
                    continue
                if locked:
                    raise lease.in_use(folder, _text(handle), flag)
                return
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                lease.wait_until_expired(folder, path, flag)
                return
            finally:
                os.close(handle)
        raise lease.in_use(folder, "", flag)


# ---- locks on local disks


def _open(path: str, flags: int) -> int:
    """Opens a lock file: never what a link points to, and without waiting for the other end of a fifo."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if os.path.islink(path) or error.errno in (errno.EISDIR, errno.ENXIO):  # ENXIO: a socket
            raise _not_a_file(path) from None
        if isinstance(error, PermissionError) and os.path.lexists(path):
            raise UserError(
                f"{path} cannot be opened: {error.strerror}; allow to read and write it, or choose another folder"
            ) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _not_a_file(path)
    return handle


def _not_a_file(path: str) -> UserError:
    mode = os.lstat(path).st_mode
    kind = "a symbolic link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a special file"
    return UserError(f"{path} is {kind}, but the lock must be a regular file; remove it")


def _take(folder: str, path: str, flag: str) -> int | None:
    """The handle of the locked file, which `path` names; None where the file system has no locks."""
    text = ""
    for attempt in range(_ATTEMPTS):
        time.sleep(0.05 * bool(attempt))
        with contextlib.ExitStack() as stack:
            handle = _open(path, os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, handle)
            try:
                locked = _flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                say(
                    f"warning: the file system of {folder} has no locks ({error.strerror}); {path} is kept as a lease, "
                    f"renewed every {lease.HEARTBEAT:.0f} s"
                )
                return None
            if locked and _is_at(handle, path):
                stack.pop_all()
                return handle
            text = _text(handle)
    raise lease.in_use(folder, text, flag)


def _flock(handle: int, kind: int) -> bool:
    """Whether the file is locked now. Raises OSError where there are no locks."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(handle: int, path: str) -> bool:
    """Whether `path` names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _text(handle: int) -> str:
    return os.pread(handle, 1000, 0).decode("utf-8", "replace")


@contextlib.contextmanager
def _guarded(handle: int, folder: str, path: str, flag: str, keep_file: bool) -> Iterator[None]:
    """Releases the lock at exit. A thread takes it again if the file was removed, and ends the process if another
    process has been there."""
    owner, released = uuid.uuid4().hex, threading.Event()

    def write(handle: int) -> None:
        data = lease.describe(owner, 0).encode()
        os.pwrite(handle, data, 0)  # before the file is cut, because a full disk may have no block for a new one
        os.ftruncate(handle, len(data))

    def look() -> None:
        nonlocal handle
        if _is_at(handle, path):
            return
        new = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            locked = _flock(new, fcntl.LOCK_EX)
            if (text := _text(new)) and lease.owner_in(text) != owner:
                lease.exit_taken_over(folder, text)
            if not locked:  # by `check_free`, or by a process that has not written its text yet
                raise BlockingIOError(errno.EWOULDBLOCK, "locked", path)
            write(new)
        except OSError:
            os.close(new)
            raise
        os.close(handle)
        handle = new

    def watch() -> None:
        while not released.wait(lease.HEARTBEAT):
            with contextlib.suppress(OSError, UserError):  # no such folder, for example: the next heartbeat tries again
                look()

    thread = threading.Thread(target=watch, name="heartbeat", daemon=True)
    try:
        with lease.writable(folder, flag):
            write(handle)
        thread.start()
        yield
    finally:
        released.set()
        if thread.ident:
            thread.join()
        with contextlib.suppress(OSError):
            if not keep_file and _is_at(handle, path):
                files.remove(path)  # while it is locked: who has opened it meanwhile finds another file or none
        os.close(handle)


# ---- readers of a file that its owner may remove


@contextlib.contextmanager
def shared(path: str) -> Iterator[bool]:
    """Keeps a local file from being removed by a process that asks `unshared`, while the block reads it.

    Yields:
      False if that process is removing it. True otherwise, also where nothing can be locked: a file that does not
      exist, an object store, a file system without locks.
    """
    with _lock_existing(path, fcntl.LOCK_SH) as free:
        yield free


@contextlib.contextmanager
def unshared(path: str) -> Iterator[bool]:
    """Keeps new readers from a local file while the block removes it.

    Yields:
      False if a process reads it, see `shared`; True otherwise, also where nothing can be locked.
    """
    with _lock_existing(path, fcntl.LOCK_EX) as free:
        yield free


@contextlib.contextmanager
def _lock_existing(path: str, kind: int) -> Iterator[bool]:
    with contextlib.ExitStack() as stack:
        free = True
        if not files.is_remote(path):
            try:
                file = stack.enter_context(open(path, "rb"))
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
            except OSError:  # no such file, or a file system without locks
                pass
        yield free
