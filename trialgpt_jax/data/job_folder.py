"""The state of a preprocess job in its folder: its locks, the settings that made it, its progress files, its input.

Every share holds a lock of its own, `lock_<i>_of_<n>`, and the merge holds `lock`. A process first takes its lock and
then refuses the folder if a lock that must not be held beside it is; so of two processes at least one sees the other.

Progress is kept in `progress_<i>_of_<n>.json`, one file per machine: the config fields that decide the bytes, the list
of input files, and the records of the finished units. It is rewritten after every unit and removed with the last.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator

from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data import corpora, token_store
from trialgpt_jax.storage import files, json_files, lock

_PROGRESS = "progress_*_of_*.json"
_UNIT_SHARD = re.compile(r"[a-z]+_(\d+)_\d+\.bin")  # the number is that of the group
_LOCK = re.compile(r"lock(?:_\d+_of_(\d+))?")
# The fields of `config.data` that decide the bytes of the store. num_workers and encoder do not.
_DECIDING = ("source", "source_options", "tokenizer", "split", "split_seed", "val_fraction", "shard_tokens")


@contextlib.contextmanager
def locked(folder: str, index: int | None = None, count: int | None = None) -> Iterator[None]:
    """Holds the folder for share `index` of `count`, beside the other shares of that count; alone without arguments.

    Raises UserError if another process has the share, or uses the folder for the merge or another number of shares.
    """
    name = "lock" if count is None else f"lock_{index}_of_{count}"
    with lock.hold(folder, name=name, flag="data.dir", keep_file=False):
        for other in files.names(folder):
            match = _LOCK.fullmatch(other)
            if match and other != name and (count is None or match[1] != str(count)):
                lock.check_free(folder, name=other, flag="data.dir")
                files.remove(os.path.join(folder, other))  # of a killed process
        yield


def job_settings(data: ConfigDict) -> dict:
    """The fields of `config.data` that decide the bytes of the store."""
    values = data.to_dict()
    return {name: values[name] for name in _DECIDING}


def progress_path(folder: str, index: int, count: int) -> str:
    """The progress file of share `index` of `count`."""
    return os.path.join(folder, f"progress_{index}_of_{count}.json")


def progress_paths(folder: str) -> list[str]:
    """The progress files in a folder, sorted."""
    return [os.path.join(folder, name) for name in sorted(glob.glob(_PROGRESS, root_dir=folder))]


def finished(data: ConfigDict) -> dict | None:
    """The manifest in `data.dir`, if any; UserError if damaged or of another config. Removes the job's leftovers."""
    if not os.path.exists(os.path.join(data.dir, token_store.MANIFEST)):
        return None
    manifest = token_store.open_store(data.dir).manifest
    _check_settings(data, manifest | {"tokenizer": manifest["tokenizer"]["name"]})
    remove_leftovers(data.dir)
    return manifest


def load_progress(data: ConfigDict, index: int, count: int) -> dict:
    """The progress of share `index` of `count`; a new record if there is none yet.

    Raises UserError if the folder is of another job, or the input or the number of shares has changed since the start.
    """
    folder, path = data.dir, progress_path(data.dir, index, count)
    if os.path.exists(path):
        progress = read_progress(data, path)
        now, then = _local_input(data), {tuple(file[:2]) for file in progress["files"]}
        if now is not None and (changed := set(now) ^ then):
            raise UserError(
                f"{min(changed)[0]} has changed since {folder} was begun; restore it, or remove {folder} to start over"
            )
        return progress
    others = [os.path.basename(other) for other in progress_paths(folder)]
    if not all(name.endswith(f"_of_{count}.json") for name in others):
        raise UserError(f"{folder} was begun with another number of workers ({others[0]}); continue with that number")
    if not others and (shards := glob.glob("*.bin", root_dir=folder)):
        raise UserError(f"{folder} holds {shards[0]}, which is not of this job; choose another data.dir")
    return {"worker": [index, count], "settings": job_settings(data), "files": [], "tokenizer": {}, "units": []}


def read_progress(data: ConfigDict, path: str) -> dict:
    """Loads a progress file in `data.dir`. Raises UserError if it is damaged or was written with another config."""
    try:
        progress = json_files.read(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove {data.dir} and run preprocess again") from None
    _check_settings(data, progress["settings"])
    return progress


def warn_of_changes(data: ConfigDict, manifest: dict) -> None:
    """Logs a warning if the local input of a finished store has changed. Input that was deleted is fine."""
    with contextlib.suppress(UserError):
        listed = _local_input(data)
        if listed is not None and digest(listed) != manifest["input"]["sha256"]:
            say(f"warning: the input has changed since {data.dir} was made; remove {data.dir} to rebuild it")


def digest(listed: list[tuple[str, int]]) -> str:
    """sha256 (hex) of the names and bytes of the input files."""
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def remove_leftovers(folder: str) -> None:
    """Removes what only an unfinished job needs."""
    for path in progress_paths(folder):
        files.remove(path)
    files.remove_parts(folder)
    shutil.rmtree(os.path.join(folder, "downloads"), ignore_errors=True)


def remove_parts(folder: str, index: int, count: int) -> None:
    """Removes the unfinished files that a killed run of share `index` of `count` left, and none of another share.

    All shares write the same tokenizer; what is left of that is removed when there is one share, or by the merge.
    """
    progress = os.path.basename(progress_path(folder, index, count))

    def own(name: str) -> bool:
        shard = _UNIT_SHARD.fullmatch(name)
        return count == 1 or name == progress or bool(shard and int(shard[1]) % count == index)

    files.remove_parts(folder, own)


def _check_settings(data: ConfigDict, saved: dict) -> None:
    old, new = _flat(saved), _flat(job_settings(data))
    for field, value in new.items():
        if old.get(field) != value:
            raise UserError(
                f"{data.dir} was made with data.{field}={old.get(field)!r}, but this config has {value!r}; "
                "choose another data.dir or remove the folder"
            )


def _flat(settings: dict) -> dict:
    options = settings.get("source_options") or {}
    plain = {name: value for name, value in settings.items() if name != "source_options"}
    return plain | {f"source_options.{name}": value for name, value in options.items()}


def _local_input(data: ConfigDict) -> list[tuple[str, int]] | None:
    """Name and bytes of every local input file; None for a remote corpus, whose revision is pinned."""
    if data.source not in corpora.LOCAL_SOURCES:
        return None
    return [(file.name, file.size) for file in corpora.list_files(data.source, data.source_options)]
