"""What a token store keeps of its input files, and how the input of today differs from it.

Of a local file: name, bytes, sha256 of its first and last 64 KiB, and for a longer file the time of its modification,
which differs between copies and alone is only a reason to warn.
"""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from trialgpt_jax.storage import json_files
from trialgpt_jax.storage.json_files import Count

NAME = "manifest_input.json"  # in a token store
_END_BYTES = 64 << 10


class Content(NamedTuple):
    """What a file holds: sha256 of its two ends (32 hex digits), and mtime (ns), 0 if they are the whole file."""

    ends: str
    mtime: int


class _Shape(TypedDict):
    files: list[tuple[str, Count, str, int]]  # name, bytes, Content


class Input(NamedTuple):
    """The local input files: names and bytes, and their contents in the same order; no contents = not recorded."""

    files: list[tuple[str, int]]
    contents: Sequence[Sequence]


def measure(path: str) -> tuple[int, Content]:
    """Bytes and content of a file. Raises OSError; opens nothing that is not a regular file, such as a pipe."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb", buffering=0) as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "not a regular file", path)
        digest = hashlib.sha256(file.read(_END_BYTES))
        if found.st_size > _END_BYTES:
            file.seek(max(_END_BYTES, found.st_size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
        mtime = found.st_mtime_ns if found.st_size > 2 * _END_BYTES else 0
        return found.st_size, Content(digest.hexdigest()[:32], mtime)


def digest(listed: list[tuple[str, int]]) -> str:
    """sha256 (hex) of the names and bytes of the input files."""
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def write(folder: str, recorded: Input) -> None:
    """Writes the record of a finished store, durably; none for a remote input. Raises OSError."""
    if recorded.contents:
        lines = [[*file, *content] for file, content in zip(recorded.files, recorded.contents, strict=True)]
        json_files.write(os.path.join(folder, NAME), {"files": lines})


def read(folder: str) -> Input | None:
    """The record of a finished store; None if it has none, as in stores of earlier versions. Raises ValueError."""
    try:
        lines = json_files.read(os.path.join(folder, NAME), _Shape)["files"]
    except FileNotFoundError:
        return None
    return Input([(name, size) for name, size, *_ in lines], [content for _, _, *content in lines])


def changes(then: Input, now: Input, unreadable: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Compares the input of a store with the input of today.

    Args:
      then, now: the records.
      unreadable: names of files and folders that cannot be read today, and so not compared.

    Returns:
      For each file that has changed its name and how; then the names of those of which only the mtime differs.
    """
    old = {name: (size, content) for (name, size), content in _pairs(then)}
    new = {name: (size, content) for (name, size), content in _pairs(now)}
    changed, touched = [], []
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            if not any(name == each or each == "." or name.startswith(f"{each}/") for each in unreadable):
                changed.append(f"{name}: it is gone")
        elif name not in old:
            changed.append(f"{name}: it is new")
        elif old[name][0] != new[name][0]:
            changed.append(f"{name}: it had {old[name][0]:,} bytes and has {new[name][0]:,}")
        elif old[name][1] and new[name][1]:
            if old[name][1][0] != new[name][1][0]:
                changed.append(f"{name}: its contents differ, though its size is the same")
            elif old[name][1][1] != new[name][1][1]:
                touched.append(name)
    return changed, touched


def _pairs(recorded: Input) -> list[tuple]:
    return list(zip(recorded.files, recorded.contents or [None] * len(recorded.files), strict=True))
