"""The files of a workdir or a token store: each is whole under its name or not there, on a disk or in an object store.

A location is a path, or a URL of an object store (`gs://bucket/folder`, `s3://...`) that fsspec reaches with `gcsfs` or `s3fs`.
A store has no folders, no renaming and no appending, and needs none: an object appears whole, when its upload has ended.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from typing import IO

from trialgpt_jax import UserError

_STORES = {"gs": "gcsfs", "s3": "s3fs"}  # what orbax writes arrays to -> the package with which fsspec gets there


def is_remote(location: str) -> bool:
    """Whether a location is a URL."""
    return "://" in location


def resolve(location: str) -> str:
    """An absolute path, or the URL itself.

    Raises:
      UserError: a URL of a store that is not known, or whose package is not installed.
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
    """fsspec's client. It lists anew each time: orbax writes past it, so what it remembers would be stale."""
    import fsspec  # here, because a run on a disk needs none

    return fsspec.filesystem(scheme, use_listings_cache=False)


def _fs(location: str):
    return _store(location.split("://")[0])


def exists(path: str) -> bool:
    return _fs(path).exists(path) if is_remote(path) else os.path.exists(path)


def open_file(path: str, mode: str = "rb") -> IO:
    """Opens for reading."""
    return _fs(path).open(path, mode) if is_remote(path) else open(path, mode)


def read_json(path: str) -> object:
    """Raises OSError, and ValueError for what is not JSON, is nested too deeply or not UTF-8."""
    with open_file(path) as file:
        data = file.read()
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write(path: str, data: bytes | str) -> None:
    """Writes a small file durably, whole or not at all.

    Raises:
      OSError: nothing is left behind, and what stood there before still stands.
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
    """`write` of JSON."""
    write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sync_folder(folder: str) -> None:
    """Makes renames in a folder durable."""
    handle = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: str) -> None:
    """Makes a folder and those above it; a store needs none."""
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)


def names(folder: str) -> list[str]:
    """What lies in a folder, sorted; nothing when it is not there."""
    try:
        if is_remote(folder):
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in _fs(folder).ls(folder, detail=False))
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def sizes(folder: str) -> dict[str, int]:
    """Relative path -> bytes, of every file below a folder, sorted."""
    if is_remote(folder):
        start = len(_fs(folder)._strip_protocol(folder)) + 1
        found = {path[start:]: info["size"] for path, info in _fs(folder).find(folder, detail=True).items()}
    else:
        paths = [os.path.join(root, name) for root, _, files in os.walk(folder) for name in files]
        found = {os.path.relpath(path, folder): os.path.getsize(path) for path in paths}
    return dict(sorted(found.items()))


def remove(path: str) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        _fs(path).rm_file(path) if is_remote(path) else os.remove(path)


def remove_tree(folder: str) -> None:
    """Removes a folder and what is in it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        _fs(folder).rm(folder, recursive=True) if is_remote(folder) else shutil.rmtree(folder)


def rename_folder(folder: str, to: str) -> None:
    """Renames a folder; in a store, object by object."""
    if is_remote(folder):
        _fs(folder).copy(folder, to, recursive=True)
        remove_tree(folder)
    else:
        os.rename(folder, to)


def sha256(path: str) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: str) -> int | None:
    """Bytes that may still be written where `path` is or will be made; None for a store, which does not say."""
    if is_remote(path):
        return None
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def is_plain_name(name: object) -> bool:
    """Whether a name read from a file is one of a file inside its folder, and not a way out of it."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII))
