"""The state of a preprocess job in its folder: its locks, the settings that made it, its progress files, its input.

Every share holds a lock of its own, `lock_<i>_of_<n>`, and the merge holds `lock`. A process first takes its lock and
then refuses the folder if a lock that must not be held beside it is; so of two processes at least one sees the other.

Progress is kept in `progress_<i>_of_<n>.json`, one file per machine: the config fields that decide the bytes, the list
of input files, and the records of the finished units. It is rewritten after every unit and removed with the last.
"""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Iterator

from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data import corpora, input_record, progress, token_store
from trialgpt_jax.data.progress import Progress
from trialgpt_jax.storage import files, lock

_UNIT_SHARD = re.compile(r"(?:train|val)_(\d+)_\d+\.bin")  # the number is that of the group
_TOKENIZER = ("tokenizer.tiktoken", "tokenizer.library.json", "characters.json")
_LOCK = re.compile(r"lock(?:_\d+_of_(\d+))?")
# The fields of `config.data` that decide the bytes of the store. num_workers and encoder do not.
_DECIDING = ("source", "source_options", "tokenizer", "split", "split_seed", "val_fraction", "shard_tokens")
_LATER = {  # not in earlier manifests
    "source_options.extensions": "",
    "source_options.max_document_bytes": 64 << 20,
    "source_options.max_files": 0,
}


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


def progress_paths(folder: str) -> list[str]:
    """The progress files in a folder, sorted."""
    return [os.path.join(folder, name) for name in files.names(folder) if progress.NAME.fullmatch(name)]


def finished(data: ConfigDict) -> dict | None:
    """The manifest in `data.dir`, if any; UserError if damaged or of another config. Removes the job's leftovers."""
    if not os.path.exists(os.path.join(data.dir, token_store.MANIFEST)):
        return None
    manifest = token_store.open_store(data.dir).manifest
    _check_settings(data, manifest | {"tokenizer": manifest["tokenizer"]["name"]})
    remove_leftovers(data.dir)
    return manifest


def load_progress(data: ConfigDict, index: int, count: int) -> Progress:
    """The progress of share `index` of `count`; a new record if there is none yet.

    If no share has finished training documents, and the config, the number of shares or the input has changed, what is
    in the folder is removed and a new record returned.

    Raises UserError if the folder is of another job, or the input or the number of shares has changed since the start.
    """
    paths = progress_paths(data.dir)
    records = {path: progress.read(path) for path in paths}
    units = [unit for record in records.values() for unit in record["units"]]
    begun = any(shard["split"] == "train" for unit in units for shard in unit["shards"])
    try:
        return _continued(data, index, count, records)
    except UserError:
        if begun or not records:
            raise
    for name in files.names(data.dir):
        if _LOCK.fullmatch(name) and name != f"lock_{index}_of_{count}":
            lock.check_free(data.dir, name=name, flag="data.dir")
    say(f"{data.dir} has no finished work yet and is started again")
    for name in files.names(data.dir):
        if progress.NAME.fullmatch(name) or _UNIT_SHARD.fullmatch(name) or name in _TOKENIZER:
            files.remove(os.path.join(data.dir, name))
    remove_leftovers(data.dir)
    return progress.new(index, count, job_settings(data))


def _continued(data: ConfigDict, index: int, count: int, records: dict[str, Progress]) -> Progress:
    folder, own = data.dir, records.get(progress.path_of(data.dir, index, count))
    others = [os.path.basename(path) for path, record in records.items() if record["worker"][1] != count]
    if others:
        raise UserError(f"{folder} was begun with another number of workers ({others[0]}); continue with that number")
    for record in records.values():
        _check_settings(data, record["settings"])
    if own is None:
        if not records and (shards := glob.glob("*.bin", root_dir=glob.escape(folder))):
            raise UserError(f"{folder} holds {shards[0]}, which is not of this job; choose another data.dir")
        return progress.new(index, count, job_settings(data))
    own["settings"] = job_settings(data)
    if own["files"] and data.source in corpora.LOCAL_SOURCES:
        then = input_record.Input([(name, size) for name, size, _ in own["files"]], own.get("contents", []))
        now = corpora.survey(data.source, data.source_options, folder)
        changed, touched = input_record.changes(then, now.record, now.unreadable)
        if changed:
            raise UserError(
                f"{_first(changed)}, so the input has changed since {folder} was begun; restore it, or remove {folder} "
                "to start over"
            )
        _warn_of_times(folder, touched)
    return own


def read_progress(data: ConfigDict, path: str) -> Progress:
    """Loads a progress file in `data.dir`. Raises UserError if it is damaged or was written with another config."""
    found = progress.read(path)
    _check_settings(data, found["settings"])
    return found


def warn_of_changes(data: ConfigDict, manifest: dict) -> None:
    """Logs a warning if the local input of a finished store has changed. Input that was deleted is fine."""
    if data.source not in corpora.LOCAL_SOURCES:
        return  # the revision of a remote one is pinned
    options = data.source_options.to_dict() | {"on_error": "skip"}
    with contextlib.suppress(UserError):
        now = corpora.survey(data.source, options, data.dir)
        try:
            then = input_record.read(data.dir)
        except ValueError as error:
            path = os.path.join(data.dir, input_record.NAME)
            say(f"warning: {path} is damaged ({error}), so it is unknown whether the input has changed")
            return
        if then is not None:
            changed, touched = input_record.changes(then, now.record, now.unreadable)
            _warn_of_times(data.dir, [] if changed else touched)
        else:
            differs = input_record.digest(now.record.files) != manifest.get("input", {}).get("sha256")
            changed = ["a name or size"] * differs
        if changed:
            say(
                f"warning: the input has changed since {data.dir} was made ({_first(changed)}); remove {data.dir} to "
                "rebuild it"
            )


def _first(changed: list[str]) -> str:
    return changed[0] + (f" (and {len(changed) - 1:,} more)" if len(changed) > 1 else "")


def _warn_of_times(folder: str, names: list[str]) -> None:
    if names:
        say(
            f"warning: {_first(names)} has another modification time than when {folder} was begun, but the same size, "
            "beginning and end; it is taken to be the same"
        )


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
    progress_name = os.path.basename(progress.path_of(folder, index, count))

    def own(name: str) -> bool:
        shard = _UNIT_SHARD.fullmatch(name)
        return count == 1 or name == progress_name or bool(shard and int(shard[1]) % count == index)

    files.remove_parts(folder, own)


def _check_settings(data: ConfigDict, saved: dict) -> None:
    """Raises UserError if another config made the folder; `saved` is what `job_settings` returned then."""
    old, new = _LATER | _flat(saved), _flat(job_settings(data))
    for field, value in new.items():
        if field == "source_options.on_error" and (old.get(field), value) == ("stop", "skip"):
            continue  # whatever was finished with `stop` had no unusable documents
        if old.get(field) != value:
            raise UserError(
                f"{data.dir} was made with data.{field}={old.get(field)!r}, but this config has {value!r}; "
                "choose another data.dir or remove the folder"
            )


def _flat(settings: dict) -> dict:
    options = settings.get("source_options") or {}
    plain = {name: value for name, value in settings.items() if name != "source_options"}
    return plain | {f"source_options.{name}": value for name, value in options.items()}
