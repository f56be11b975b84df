"""Files of workdirs and token stores, local or in an object store; each appears under its name only when complete.

A location is a path, or a URL of an object store (`gs://bucket/folder`, `s3://...`) that fsspec reaches with `gcsfs` or
`s3fs`. An object store has no folders, no rename and no append; an object becomes visible when its upload has finished.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from typing import IO

from trialgpt_jax import UserError

_STORES = {"gs": "gcsfs", "s3": "s3fs"}  # object stores that orbax supports -> fsspec's package for them
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a disk, its mount, or the network below it reports; no mistake of the program leads to these.
_FAULTS = frozenset(
    ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "ENODEV", "ENXIO", "EUCLEAN", "EBADMSG", "ENOLCK")
    + ("ESTALE", "ENOTCONN", "EREMOTEIO", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ESHUTDOWN")
    + ("ETIMEDOUT", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET")
)
# Packages that reach object stores.
_CLIENTS = ("aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3")
_PART = re.compile(r"(.+)\.(?:[0-9a-f]{16}|\d+)\.part")  # earlier versions used the pid
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES)


def is_remote(location: str) -> bool:
    """Whether a location is a URL."""
    return "://" in location


def resolve(location: str) -> str:
    """An absolute path, or the URL itself.

    Raises:
      UserError: a URL of an unknown object store, or of one whose package is not installed.
    """
    if not is_remote(location):
        return os.path.abspath(location)
    scheme = location.split("://")[0]
    if scheme not in _STORES:
        raise UserError(f"{location}: checkpoints are written to a disk, gs:// or s3://, not to {scheme}://")
    try:
        _store(scheme)
    except ImportError:
        raise UserError(f"{location} needs `pip install {_STORES[scheme]}`") from None
    return location.rstrip("/")


@functools.cache
def _store(scheme: str):
    """fsspec's client. No listings cache: orbax writes through another client, so cached listings would be stale."""
    import fsspec  # here, because local runs do not need it

    logging.getLogger(_STORES[scheme]).setLevel(logging.CRITICAL)  # gcsfs logs the traceback of every failed request
    return fsspec.filesystem(scheme, use_listings_cache=False)


def _fs(location: str):
    return _store(location.split("://")[0])


def exists(path: str) -> bool:
    return _fs(path).exists(path) if is_remote(path) else os.path.exists(path)


def open_file(path: str, mode: str = "rb") -> IO:
    """Opens a file for reading; `mode` is "rb" or "r". Raises OSError; a pipe, which would wait for a writer, too."""
    if is_remote(path):
        return _fs(path).open(path, mode)
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "a pipe, not a file", path)
    return open(path, mode)


def write(path: str, data: bytes | str) -> None:
    """Writes a small file and syncs it to the disk, whole or not at all.

    Raises:
      OSError: no partial file is left, and an existing file is unchanged.
    """
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        _fs(path).pipe_file(path, data)
        return
    with replacing(path) as part, open(part, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yields a temporary name; the local file that the block writes there becomes `path`, durably, if nothing raises.

    Raises:
      OSError: no partial file is left, and an existing file is unchanged.
    """
    part = part_name(path)
    try:
        yield part
        sync_file(part)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise
    sync_folder(os.path.dirname(path))


def part_name(path: str) -> str:
    """A name for the unfinished contents of `path`. It is random, because processes in containers share pids."""
    return f"{path}.{uuid.uuid4().hex[:16]}.part"


def remove_parts(folder: str, which: Callable[[str], object] = lambda name: True) -> None:
    """Removes the unfinished files that killed processes left directly in a local folder; nothing for a URL.

    Args:
      folder: locked, so that no other process writes the files in question.
      which: says for the name of a finished file whether its unfinished ones are to be removed.
    """
    for name in [] if is_remote(folder) else names(folder):
        if (match := _PART.fullmatch(name)) and which(match[1]):
            remove(os.path.join(folder, name))


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a pointer that Git LFS left in place of the file."""
    return bool(re.match(rb"version https://(git-lfs|hawser)\.github\.com/spec/v[0-9]+\s*(\n|\Z)", head))


def sync_folder(folder: str) -> None:
    """Syncs a local folder, which makes the names in it durable: new, renamed and removed files.

    A file system that cannot sync folders (some network and FUSE ones) and a folder that may not be read are passed.
    """
    try:
        _sync(folder or ".", os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def sync_tree(folder: str) -> None:
    """Syncs every file and folder below a local folder, the folder, and the folder above it; nothing for a URL.

    Raises:
      OSError: a file or folder cannot be read or synced, or vanishes meanwhile.
    """
    if is_remote(folder):
        return
    folder = os.path.abspath(folder)
    for root, _, names_in_it in os.walk(folder, topdown=False, onerror=_raise):
        for name in names_in_it:
            path = os.path.join(root, name)
            if stat.S_ISREG(os.lstat(path).st_mode):  # a fifo would block, and a link's target is not in the tree
                sync_file(path)
        sync_folder(root)
    sync_folder(os.path.dirname(folder))


def sync_file(path: str) -> None:
    """Makes the contents of a local file durable; its name is durable when its folder is synced."""
    _sync(path)


def _sync(path: str, flags: int = 0) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(handle)
    except OSError as error:  # has no name of its own
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(handle)


def _raise(error: OSError) -> None:
    raise error


def make_folder(path: str) -> None:
    """Creates a folder and its parents, durably; does nothing in an object store.

    Raises:
      OSError: it cannot be created, or the name is a file's.
    """
    if is_remote(path):
        return
    path, new = os.path.abspath(path), []
    while not os.path.isdir(path):
        new.append(path)
        path = os.path.dirname(path)
    with contextlib.suppress(OSError):
        sync_folder(os.path.dirname(path))  # a process that was killed may have made `path` without a sync
    for folder in reversed(new):
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not os.path.isdir(folder):  # otherwise another process has made it
                raise
        sync_folder(os.path.dirname(folder))


def names(folder: str) -> list[str]:
    """Names of the files and folders in a folder, sorted; empty if it does not exist."""
    try:
        if is_remote(folder):
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in _fs(folder).ls(folder, detail=False))
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def sizes(folder: str) -> dict[str, int]:
    """Relative path -> bytes for every file below a folder, sorted."""
    if is_remote(folder):
        start = len(_fs(folder)._strip_protocol(folder)) + 1
        found = {path[start:]: info["size"] for path, info in _fs(folder).find(folder, detail=True).items()}
    else:
        paths = [os.path.join(root, name) for root, _, files in os.walk(folder) for name in files]
        found = {os.path.relpath(path, folder): os.path.getsize(path) for path in paths}
    return dict(sorted(found.items()))


def remove(path: str) -> None:
    """Removes a file, if it exists; durable when its folder is synced."""
    with contextlib.suppress(FileNotFoundError):
        _fs(path).rm_file(path) if is_remote(path) else os.remove(path)


def remove_tree(folder: str) -> None:
    """Removes a folder and its contents, if it exists, durably."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(folder):
            _fs(folder).rm(folder, recursive=True)
        else:
            shutil.rmtree(folder)
            sync_folder(os.path.dirname(os.path.abspath(folder)))


def rename_folder(folder: str, to: str) -> None:
    """Renames a folder, durably; in an object store by copying every object."""
    if is_remote(folder):
        _fs(folder).copy(folder, to, recursive=True)
        remove_tree(folder)
    else:
        os.rename(folder, to)
        for parent in {os.path.dirname(os.path.abspath(path)) for path in (folder, to)}:
            sync_folder(parent)


def sha256(path: str, read: Callable[[int], None] = lambda n: None) -> str:
    """sha256 of a file, hex; `read` gets the number of bytes of each piece."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open_file(path) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            read(n)
    return digest.hexdigest()


def free_bytes(path: str) -> int | None:
    """Free bytes on the file system where `path` is or will be created; None for an object store."""
    if is_remote(path):
        return None
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def is_plain_name(name: object) -> bool:
    """Whether a name that was read from a file is a plain file name, which cannot lead out of its folder."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII))


def is_storage_error(error: BaseException) -> bool:
    """Whether an error comes from the disk or the object store and not from a mistake in the program.

    TensorStore reports errors of the system as a ValueError with the errno in its text.
    """
    return isinstance(error, OSError) or "os_error_code=" in str(error) or "RESOURCE_EXHAUSTED" in str(error)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's quota on it, is full."""
    return getattr(error, "errno", None) in _FULL or any(f"os_error_code='{code}'" in str(error) for code in _FULL)


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Gives an OSError of the block the name of the file: errors of `write` and `fsync` have none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


@contextlib.contextmanager
def storage_faults(
    folder: str, then: str = "run the same command to go on from the newest checkpoint"
) -> Iterator[None]:
    """Turns an error of the disk, its mount or the object store into a UserError: the file, the reason and `then`.

    A missing file is such an error inside `folder` only, where somebody has removed it; elsewhere it is a mistake in
    the program. Other errors pass unchanged.

    Args:
      folder: what the block works in; named where the error does not name a file.
      then: what to do when the fault is repaired.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_outside(error, folder):
            raise
        file = getattr(error, "filename", None) or folder
        if is_disk_full(error):
            raise UserError(f"{file} cannot be written because the disk is full; free some space, and {then}") from None
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{file}: {why}; when it can be read and written again, {then}") from None


def _is_outside(error: Exception, folder: str) -> bool:
    """Whether an error comes from the storage that holds `folder`, and not from this program."""
    if is_remote(folder) and (isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS):
        return True
    if isinstance(error, FileNotFoundError):
        inside = os.path.join(os.path.abspath(folder), "")
        return isinstance(error.filename, str) and os.path.abspath(error.filename).startswith(inside)
    return isinstance(error, OSError) and errno.errorcode.get(error.errno) in _FAULTS
