"""Files of workdirs and token stores, local or in an object store; each appears under its name only when complete.

A location is a path, or a URL of an object store (`gs://bucket/folder`, `s3://...`) that fsspec reaches with `gcsfs` or
`s3fs`. An object store has no folders, no rename and no append; an object becomes visible when its upload has finished.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import IO

from trialgpt_jax import UserError

_STORES = {"gs": "gcsfs", "s3": "s3fs"}  # object stores that orbax supports -> fsspec's package for them
_FULL = (errno.ENOSPC, errno.EDQUOT)


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

    return fsspec.filesystem(scheme, use_listings_cache=False)


def _fs(location: str):
    return _store(location.split("://")[0])


def exists(path: str) -> bool:
    return _fs(path).exists(path) if is_remote(path) else os.path.exists(path)


def open_file(path: str, mode: str = "rb") -> IO:
    """Opens a file for reading; `mode` is "rb" or "r"."""
    return _fs(path).open(path, mode) if is_remote(path) else open(path, mode)


def read_json(path: str) -> object:
    """The contents of a JSON file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not JSON, is nested too deeply, or is not UTF-8.
    """
    with open_file(path) as file:
        data = file.read()
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write(path: str, data: bytes | str) -> None:
    """Writes a small file and syncs it to the disk, whole or not at all.

    Raises:
      OSError: no partial file is left, and an existing file is unchanged.
    """
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        _fs(path).pipe_file(path, data)
        return
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise
    sync_folder(os.path.dirname(path))


def write_json(path: str, value: object) -> None:
    """Writes JSON as `write` does."""
    write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sync_folder(folder: str) -> None:
    """Syncs a local folder, which makes the renames in it durable."""
    handle = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: str) -> None:
    """Creates a folder and its parents; does nothing in an object store."""
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)


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
    """Removes a file, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        _fs(path).rm_file(path) if is_remote(path) else os.remove(path)


def remove_tree(folder: str) -> None:
    """Removes a folder and its contents, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        _fs(folder).rm(folder, recursive=True) if is_remote(folder) else shutil.rmtree(folder)


def rename_folder(folder: str, to: str) -> None:
    """Renames a folder; in an object store by copying every object."""
    if is_remote(folder):
        _fs(folder).copy(folder, to, recursive=True)
        remove_tree(folder)
    else:
        os.rename(folder, to)


def sha256(path: str) -> str:
    """sha256 of a file, hex."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
def full_disk_is_user_error(folder: str) -> Iterator[None]:
    """Turns the OSError of a full disk into a UserError that names the file, or `folder` if the error has none."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"{error.filename or folder} cannot be written because the disk is full; free some space, and run the same "
            "command to go on from the newest checkpoint"
        ) from None
