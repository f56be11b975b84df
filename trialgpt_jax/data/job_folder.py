"""The folder of a preprocess job while it is under way and after: its lock, its progress, its identity.

A job's progress is `progress_<i>_of_<n>.json`, one a machine: the config's fields that decide the bytes, the list of
input files, and the records of the finished units. It is rewritten, whole, after every unit, and removed with the last.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator

from trialgpt_jax import UserError, files
from trialgpt_jax.data import corpora, token_store

_DECIDING = ("source", "source_options", "tokenizer", "split", "split_seed", "val_fraction", "shard_tokens")


def job_settings(data: dict) -> dict:
    """The fields of the config's `data` that the store's bytes depend on; num_workers and encoder are none of them."""
    return {name: data[name] for name in _DECIDING}


def finished(folder: str, settings: dict) -> dict | None:
    """The manifest, if the folder holds one and it is of these settings.

    Raises:
      UserError: another config made it, or it is damaged.
    """
    if not os.path.exists(os.path.join(folder, token_store.MANIFEST)):
        return None
    manifest = token_store.open_store(folder).manifest
    check_settings(folder, manifest | {"tokenizer": manifest["tokenizer"]["name"]}, settings)
    return manifest


def check_settings(where: str, saved: dict, settings: dict) -> None:
    """Refuses a folder that was made with other settings, by the first field that differs."""
    old, new = _flat(saved), _flat(settings)
    for field, value in new.items():
        if old.get(field) != value:
            raise UserError(
                f"{where} was made with data.{field}={old.get(field)!r}, but this config has {value!r}; give it "
                "another data.dir or remove the folder"
            )


def _flat(settings: dict) -> dict:
    options = settings.get("source_options") or {}
    return {k: v for k, v in settings.items() if k != "source_options"} | {
        f"source_options.{k}": options[k] for k in options
    }


def load_progress(folder: str, settings: dict, index: int, count: int) -> dict:
    """The progress of part `index` of `count`, or a fresh one.

    Raises:
      UserError: the folder is another job's, the input has changed since, or the number of parts has.
    """
    path = os.path.join(folder, f"progress_{index}_of_{count}.json")
    if os.path.exists(path):
        progress = read_progress(path, settings)
        if progress["files"] and (name := _changed(settings, [tuple(file[:2]) for file in progress["files"]])):
            raise UserError(
                f"{name} has changed since {folder} was begun; restore it, or remove {folder} to begin anew"
            )
        return progress
    others = glob.glob(os.path.join(glob.escape(folder), "progress_*.json"))
    if others and not all(path.endswith(f"_of_{count}.json") for path in others):
        raise UserError(
            f"{folder} was begun with another number of workers ({os.path.basename(others[0])}); keep to it"
        )
    foreign = glob.glob(os.path.join(glob.escape(folder), "*.bin"))
    if foreign and not others:
        raise UserError(f"{folder} holds {os.path.basename(foreign[0])} of something else; give it another data.dir")
    return {"worker": [index, count], "settings": settings, "files": [], "tokenizer": {}, "units": []}


def _changed(settings: dict, known: list[tuple[str, int]]) -> str | None:
    """The first local input file that is not what it was, by name and size; remote corpora are pinned or unchanging."""
    if settings["source"] not in ("files", "sotu"):
        return None
    now = [(file.name, file.size) for file in corpora.list_files(settings["source"], settings["source_options"])]
    return min((name for name, _ in set(now) ^ set(known)), default=None)


def warn_of_changes(folder: str, settings: dict, manifest: dict) -> None:
    """Says so when a finished store's local input is another one by now; input that is gone is no matter."""
    with contextlib.suppress(UserError):
        if settings["source"] in ("files", "sotu"):
            files = corpora.list_files(settings["source"], settings["source_options"])
            if digest([[file.name, file.size] for file in files]) != manifest["input"]["sha256"]:
                print(
                    f"warning: the input has changed since {folder} was made; remove it to make it anew",
                    file=sys.stderr,
                )


def digest(files: list[list]) -> str:
    """Of the names and sizes of the input."""
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def read_progress(path: str, settings: dict) -> dict:
    """Loads a progress file. Raises UserError if it is damaged or of another config."""
    try:
        progress = files.read_json(path)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); remove {os.path.dirname(path)} and run preprocess again"
        ) from None
    check_settings(os.path.dirname(path), progress["settings"], settings)
    return progress


@contextlib.contextmanager
def locked(folder: str, index: int, count: int) -> Iterator[None]:
    """Keeps a second run out of the same part of the same folder; the system lets go of the lock when we end."""
    path = os.path.join(folder, f"lock_{index}_of_{count}")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another preprocess; wait for it or give another data.dir") from None
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def remove_leftovers(folder: str) -> None:
    """Removes what only an unfinished job needs."""
    for pattern in ("progress_*_of_*.json", "*.part"):
        for path in glob.glob(os.path.join(glob.escape(folder), pattern)):
            os.remove(path)
    shutil.rmtree(os.path.join(folder, "downloads"), ignore_errors=True)
