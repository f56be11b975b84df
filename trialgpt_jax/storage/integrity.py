"""Whether the files of a folder are the ones that were written: sizes and sha256, and the record that holds them.

The record is `<folder>/checksums.json`: {..., "files": {path: [bytes, sha256]}, "sha256": digest of the rest}. It is
written last, so a folder without a record is unfinished or damaged.
"""

import hashlib
import json
import os
from collections.abc import Callable
from typing import TypedDict

from trialgpt_jax.storage import files, json_files

RECORD = "checksums.json"


class _Record(TypedDict):
    files: dict[str, tuple[json_files.Count, str]]
    sha256: str


def list_files(folder: str) -> dict[str, list]:
    """Reads every file below a folder; relative path -> [bytes, sha256 (hex)], sorted."""
    return {name: [size, files.sha256(os.path.join(folder, name))] for name, size in files.sizes(folder).items()}


def first_difference(folder: str, listed: dict[str, list], read: Callable[[int], None] = lambda n: None) -> str | None:
    """Compares a folder with what `list_files` returned earlier, byte by byte; `read` gets each number of bytes read.

    Returns:
      The first file that is missing or has changed, and how; None if there is none. Files that are not listed are
      ignored.

    Raises:
      OSError: a file cannot be read.
    """
    found = files.sizes(folder)
    for name, (size, digest) in listed.items():
        path = os.path.join(folder, name)
        if name not in found:  # also true for a name that leads out of the folder, which is never opened
            return f"{path} is missing"
        if found[name] != size:
            return f"{path} has {found[name]} bytes instead of {size}"
        if files.sha256(path, read) != digest:
            return f"{path} has changed since it was written (checksum)"
    return None


def write_record(folder: str, about: dict) -> None:
    """Writes the record of a finished folder.

    Args:
      folder: all its files are read.
      about: JSON values to keep with the checksums, under other names than `files` and `sha256`.
    """
    record = about | {"files": list_files(folder)}
    json_files.write(record_path(folder), record | {"sha256": _digest(record)})


def read_record(folder: str) -> dict:
    """The record of a folder, without its own digest, which is checked.

    Raises:
      ValueError: there is none, it cannot be read, or it is not what `write_record` wrote; names the file.
    """
    path = record_path(folder)
    try:
        record = json_files.read(path, _Record)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    digest = record.pop("sha256")
    if digest != _digest(record):
        raise ValueError(f"{path} has changed since it was written (checksum)")
    return record


def record_path(folder: str) -> str:
    """Where the record of a folder is."""
    return os.path.join(folder, RECORD)


def _digest(record: dict) -> str:
    """sha256 (hex) of a record that does not contain its own digest."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
