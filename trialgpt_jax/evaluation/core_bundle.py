"""A bundle of CORE tasks, a folder or a zip: read in place and checked before a model is loaded.

core.yaml            icl_tasks: label, icl_task_type, dataset_uri, num_fewshot: [n], continuation_delimiter
eval_meta_data.csv   columns `Eval Task` and `Random baseline`, the accuracy of guessing in per cent
eval_data/...        the items of each task, JSON lines
"""

import contextlib
import csv
import hashlib
import io
import math
import os
import random
import re
import stat
import zipfile
from typing import Annotated, NamedTuple, NotRequired, TypedDict

import yaml
from msgspec import Meta

from trialgpt_jax import UserError
from trialgpt_jax.console import one_line
from trialgpt_jax.data import streams
from trialgpt_jax.evaluation import task_data
from trialgpt_jax.evaluation.task_data import Row
from trialgpt_jax.storage import json_files

ADDRESS = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
CONFIG, BASELINES, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
_WANTED = f"a bundle is a folder or zip with {CONFIG}, {BASELINES} and {DATA}/; nanochat's is {ADDRESS}"
_TOP = "eval_bundle"  # the folder in nanochat's zip
_SMALL = 1 << 20  # bytes of core.yaml and eval_meta_data.csv
_LONGEST, _ALL = 1 << 29, 1 << 31  # of a file of items, and of all files, unpacked
_SHUFFLE_SEED = 1337  # nanochat's, so that the first items of a task are a sample
_Text = Annotated[str, Meta(min_length=1)]


class _IclTask(TypedDict):
    label: _Text
    icl_task_type: str
    dataset_uri: _Text
    num_fewshot: Annotated[list[json_files.Count], Meta(min_length=1)]  # nanochat uses the first one
    continuation_delimiter: NotRequired[str]


class _Config(TypedDict):
    icl_tasks: Annotated[list[_IclTask], Meta(min_length=1)]


class Item(NamedTuple):
    """A question.

    Attributes:
      options: what can be said, each as two strings with the delimiter of the task between them.
      gold: index of the right one.
    """

    options: list[tuple[str, str]]
    gold: int


class CoreTask(NamedTuple):
    """One of the tasks of a bundle.

    Attributes:
      label: its name.
      kind: one of `KINDS`.
      shots: number of solved items before each item.
      delimiter: between the two parts of an option.
      baseline: accuracy of guessing, 0 <= baseline < 1.
      items: shuffled and limited.
    """

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    items: list[Item]


class Bundle(NamedTuple):
    """The tasks of a bundle, and the sha256 (hex) of its files that were read, the same for a folder and its zip."""

    tasks: list[CoreTask]
    digest: str


def _multiple_choice(row: Row) -> Item:
    query, choices = row.text("query"), row.texts("choices")
    return Item([(query, choice) for choice in choices], row.index("gold", len(choices)))


def _schema(row: Row) -> Item:
    contexts, continuation = row.texts("context_options"), row.text("continuation", empty=False)
    return Item([(context, continuation) for context in contexts], row.index("gold", len(contexts)))


def _language_modeling(row: Row) -> Item:
    return Item([(row.text("context").strip(), row.text("continuation", empty=False))], 0)


KINDS = {"multiple_choice": _multiple_choice, "schema": _schema, "language_modeling": _language_modeling}


def read(path: str, limit: int | None) -> Bundle:
    """Reads the tasks of a bundle.

    Args:
      path: a folder or a zip, with or without one folder around the files.
      limit: the first items of each task, after they are shuffled; None = all.

    Raises:
      UserError: not a bundle, a zip that is damaged or has names that lead out of it, or a file, line or field that is
        wrong; an OSError of a file that cannot be read passes.
    """
    with contextlib.closing(_Folder(path) if os.path.isdir(path) else _Zip(path)) as files:
        config = _config(files)
        baselines = _baselines(files)
        tasks, rows = [], {}
        for task in config["icl_tasks"]:
            label, kind, shots = task["label"], task["icl_task_type"], task["num_fewshot"][0]
            where = f"{files.where(CONFIG)}, task {one_line(label)}"
            if kind not in KINDS:
                raise UserError(
                    f"{where}: icl_task_type is {one_line(kind)!r}, but should be one of {', '.join(KINDS)}"
                )
            if any(label == other.label for other in tasks):
                raise UserError(f"{where}: there are two tasks of this name")
            uri = task["dataset_uri"]
            if _leads_out(uri):
                raise UserError(f"{where}: dataset_uri {one_line(uri)} leads out of {DATA}/")
            name = "/".join([DATA, *(part for part in uri.split("/") if part not in ("", "."))])
            if uri not in rows:
                rows[uri] = task_data.rows(files.read(name, _LONGEST), files.where(name))
            items = [KINDS[kind](row) for row in rows[uri]]
            random.Random(_SHUFFLE_SEED).shuffle(items)
            baseline = _baseline(files, baselines, label)
            found = CoreTask(label, kind, shots, task.get("continuation_delimiter", " "), baseline, items[:limit])
            _check_shots(found, len(items), files.where(name))
            tasks.append(found)
        return Bundle(tasks, files.digest())


def _config(files: "_Files") -> _Config:
    where = files.where(CONFIG)
    text = _decoded(files.read(CONFIG, _SMALL), where)
    try:
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: malformed YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # What the constructors of its scalars raise for `!!int ""`, `!!bool x` and a date of month 13, for example
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: malformed YAML ({why})") from None
    try:
        return json_files.check(value, _Config)
    except ValueError as error:
        raise UserError(f"{where}: {one_line(str(error))}") from None


def _baselines(files: "_Files") -> dict[str, tuple[int, str]]:
    """Label -> line and text of its baseline; the last one of a label, as nanochat has it."""
    where = files.where(BASELINES)
    reader = csv.DictReader(io.StringIO(_decoded(files.read(BASELINES, _SMALL), where), newline=""))
    found = {}
    try:
        for column in ("Eval Task", "Random baseline"):
            if column not in (reader.fieldnames or []):
                raise UserError(f"{where}: the column `{column}` is missing")
        for row in reader:
            found[row["Eval Task"]] = (reader.line_num, row["Random baseline"] or "")
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}: malformed CSV ({error})") from None
    return found


def _baseline(files: "_Files", found: dict[str, tuple[int, str]], label: str) -> float:
    where = files.where(BASELINES)
    if label not in found:
        raise UserError(f"{where} has no row for the task {one_line(label)} of {CONFIG}")
    line, text = found[label]
    try:
        percent = float(text)
    except ValueError:
        percent = math.nan
    if not 0 <= percent < 100:
        raise UserError(
            f"{where}, line {line}: `Random baseline` of {one_line(label)} is {text[:40]!r}, but should be a number of "
            "per cent, at least 0 and below 100"
        )
    return percent / 100


def _check_shots(task: CoreTask, n: int, where: str) -> None:
    if len(task.items) > task.shots:
        return
    need = f"{one_line(task.label)} shows {task.shots} items before each item and needs {task.shots + 1}"
    if n > task.shots:
        raise UserError(f"core: a limit of {len(task.items)} items is too low: {need}")
    raise UserError(f"{where} has {n} items, but {need}")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: invalid UTF-8 at byte {error.start}") from None


def _leads_out(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return not parts[0] or ".." in parts or bool(re.match("[A-Za-z]:", name))


class _Files:
    """The files of a bundle by name; remembers their hashes."""

    def __init__(self, path: str):
        self._path, self._hashes, self._left = path, {}, _ALL

    def read(self, name: str, longest: int) -> bytes:
        """The bytes of a file. Raises UserError if it is missing or longer than `longest`."""
        length = self._length(name)
        self._left -= length
        if length > longest or self._left < 0:
            raise UserError(
                f"{self.where(name)} has {length:,} bytes unpacked, which is too long: this file may have {longest:,}, "
                f"and a bundle {_ALL:,}"
            )
        data = self._read(name)
        self._hashes[name] = hashlib.sha256(data).hexdigest()
        return data

    def digest(self) -> str:
        """sha256 (hex) of the names and hashes of what was read."""
        return hashlib.sha256(repr(sorted(self._hashes.items())).encode("utf-8", "surrogatepass")).hexdigest()

    def close(self) -> None:
        """Closes what is open."""

    def where(self, name: str) -> str:
        """The name of a file for messages."""
        raise NotImplementedError

    def _length(self, name: str) -> int:
        raise NotImplementedError

    def _read(self, name: str) -> bytes:
        raise NotImplementedError

    def _missing(self, name: str) -> UserError:
        return UserError(f"{one_line(self._path)} is not a CORE bundle: {one_line(name)} is missing; {_WANTED}")


class _Folder(_Files):
    def __init__(self, path: str):
        super().__init__(path)
        inside = os.path.join(path, _TOP)
        nested = not os.path.exists(os.path.join(path, CONFIG)) and os.path.isdir(inside)
        self._folder = inside if nested else path

    def where(self, name: str) -> str:
        return one_line(os.path.join(self._folder, name))

    def _length(self, name: str) -> int:
        try:
            found = os.stat(os.path.join(self._folder, name))
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in a name
            raise self._missing(name) from None
        if not stat.S_ISREG(found.st_mode):
            raise self._missing(f"the file {name}")
        return found.st_size

    def _read(self, name: str) -> bytes:
        with open(os.path.join(self._folder, name), "rb") as file:
            return file.read(_LONGEST)


class _Zip(_Files):
    def __init__(self, path: str):
        super().__init__(path)
        if not os.path.isfile(path):
            what = "not a file or folder" if os.path.exists(path) else "no file or folder on this machine"
            raise UserError(f"CORE bundle: {one_line(path)} is {what}; {_WANTED}")
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
            raise UserError(f"{one_line(path)} is not a CORE bundle: no zip, or damaged ({error}); {_WANTED}") from None
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in self._archive.infolist():
            self._check_member(member)
            self._members[_plain(member.filename)] = member
        folders = sorted(name.removesuffix(CONFIG) for name in self._members if _is_config(name))
        if len(folders) > 1 and folders[0]:
            names = " and ".join(one_line(folder) for folder in folders[:2])
            raise UserError(f"{one_line(path)} has two bundles, {names}, but should have one")
        self._top = folders[0] if folders else ""

    def close(self) -> None:
        self._archive.close()

    def where(self, name: str) -> str:
        return one_line(f"{self._path}, {self._top}{name}")

    def _check_member(self, member: zipfile.ZipInfo) -> None:
        where, name = one_line(self._path), one_line(member.filename)
        if _leads_out(member.filename):
            raise UserError(f"{where}: the name of member {name} leads out of the folder")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{where}: member {name} is a symbolic link, which can lead out of the folder")
        if not member.is_dir() and _plain(member.filename) in self._members:
            raise UserError(f"{where}: there are two members {name}")

    def _length(self, name: str) -> int:
        member = self._members.get(self._top + name)
        if member is None:
            raise self._missing(name)
        return member.file_size  # no more than this is unpacked

    def _read(self, name: str) -> bytes:
        try:
            return self._archive.read(self._members[self._top + name])
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, ValueError, *streams.DAMAGE) as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__  # RuntimeError: encrypted
            raise UserError(f"{self.where(name)} cannot be read: {why}") from None


def _plain(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _is_config(name: str) -> bool:
    folder, _, last = name.rpartition("/")
    return last == CONFIG and "/" not in folder and folder != "__MACOSX"
