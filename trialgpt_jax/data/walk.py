"""A folder or glob -> its documents' files, each once, and the number of all others by reason.

Names are relative to the folder, or to the fixed part of the glob, with `/`. The tree without its symbolic links is
read first, then what the links lead to, so a file has its own name where it has one. A folder is read once, so a link
to a folder above it ends there.
"""

import bisect
import collections
import errno
import fnmatch
import itertools
import os
import re
import stat
from collections.abc import Callable
from typing import NamedTuple

from trialgpt_jax import UserError
from trialgpt_jax.data import formats

# Why a file is not among the documents; the manifest counts these.
HIDDEN, ENDING, OTHER_NAME, UNREADABLE = "hidden", "other ending", "another name of a file", "unreadable"
OTHER_FOLDER, NOT_REGULAR, DANGLING = "another name of a folder", "not a regular file", "dangling link"
CARD, STORE, MODEL, FOLDER = "dataset card", "in a token store", "in a model's folder", "folder"
BEYOND = "beyond max_files"

_CARD = "readme.md"  # in any case
_DATASET_JSON = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json")  # of the library `datasets`
_OF_STORE = re.compile(
    r"manifest(_input)?\.json|progress_\d+_of_\d+\.json|lock(_\d+_of_\d+)?|(train|val)_\d+(_\d+)?\.bin"
    r"|tokenizer\.(tiktoken|json|library\.json)|characters\.json|downloads|.+\.part"
)
_MAGIC = re.compile(r"[*?[]")
_PROGRESS = re.compile(r"progress_\d+_of_\d+\.json")
_LOST = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)  # what a link without a target raises


class Found(NamedTuple):
    """A file that can be a document: its name in the corpus, its local path, whether a link leads to it."""

    name: str
    path: str
    linked: bool


class Walk:
    """The files below a folder.

    Attributes:
      found: the documents' files, in the order of their names.
      left_out: reason -> number of files; a folder that cannot be read counts as one, and so does all of `store`.
      unreadable: their names, and those of the folders; empty unless `skip`.
    """

    def __init__(self, root: str, takes: Callable[[str, str], bool], store: str, skip: bool, pattern: str = ""):
        """Walks the folder.

        Args:
          root: the folder.
          takes: says for name and path whether a file can be read as documents.
          store: the token store that is being written, which may be inside; "" = none.
          skip: count what cannot be read instead of raising.
          pattern: with `*`, `?`, `[...]` and `**`, relative to `root`: only the files that match are meant.

        Raises:
          UserError: a file or folder cannot be read, and `skip` is false.
        """
        self.left_out: collections.Counter[str] = collections.Counter()
        self.unreadable: list[str] = []
        self._takes, self._skip = takes, skip
        self._pattern = [part for part in pattern.split("/") if part] if pattern else None
        self._store = _identity(store, os.stat(store)) if store and os.path.isdir(store) else None
        self._saw_store = False
        self._folders: set[object] = set()
        self._candidates: list[tuple[Found, object]] = []
        self._matched_folders: list[str] = []
        links = self._tree(root, "", linked=False)
        while links:
            later = []
            for name, path in sorted(links):
                later += self._link(name, path)
            links = later
        self.found = self._without_cards(self._each_once())
        used = [file.name for file in self.found]
        self.left_out[FOLDER] += sum(not any(u.startswith(f"{f}/") for u in used) for f in self._matched_folders)
        self.left_out[STORE] += self._saw_store
        self.left_out = +self.left_out

    def fail(self, name: str, path: str, error: OSError) -> None:
        """Counts a file or folder that cannot be read, or raises UserError."""
        if not self._skip:
            raise unreadable(path, error)
        self.left_out[UNREADABLE] += 1
        self.unreadable.append(name)

    def _tree(self, root: str, prefix: str, linked: bool) -> list[tuple[str, str]]:
        """Reads a folder and the folders in it; returns name and path of the symbolic links."""
        links, folders = [], [(root, prefix)]
        while folders:
            path, prefix = folders.pop()
            try:
                identity = _identity(path, os.stat(path))
                if self._pattern is not None:  # what is meant in a folder depends on the name that leads to it
                    key = (identity, _positions(self._pattern, prefix.split("/")[:-1]))
                else:
                    key = identity
                if key in self._folders:
                    self.left_out[OTHER_FOLDER] += bool(prefix)
                    continue
                with os.scandir(path) as entries:
                    entries = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self.fail(prefix.rstrip("/") or ".", path, error)
                continue
            self._folders.add(key)
            names = {entry.name for entry in entries}
            is_model, is_store = _is_model_folder(names), identity == self._store or _is_store(names)
            self._saw_store |= identity == self._store
            for entry in entries:
                name = prefix + entry.name
                try:
                    if self._pattern is None and entry.name.startswith("."):
                        self._count_all(entry, name, HIDDEN)
                    elif is_model:
                        self._count_all(entry, name, MODEL)
                    elif is_store and _OF_STORE.fullmatch(entry.name):
                        if identity != self._store:  # that one grows meanwhile, so its files are not counted
                            self._count_all(entry, name, STORE)
                    elif entry.is_symlink():
                        links.append((name, entry.path))
                    elif entry.is_dir(follow_symlinks=False):
                        self._folder(name, entry.path, folders)
                    else:
                        self._file(name, entry.path, linked, lambda entry=entry: entry.stat(follow_symlinks=False))
                except OSError as error:
                    self.fail(name, entry.path, error)
        return links

    def _folder(self, name: str, path: str, folders: list[tuple[str, str]]) -> None:
        """Adds a folder to those that are to be read, if the pattern leads into it."""
        if self._matches(name, inside=True):
            folders.append((path, f"{name}/"))
        elif self._matches(name):
            self._matched_folders.append(name)

    def _link(self, name: str, path: str) -> list[tuple[str, str]]:
        """Follows a symbolic link; returns the links in the folder that it leads to."""
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
        except OSError as error:
            if self._matches(name):
                if self._takes(name, path) or error.errno not in _LOST:
                    self.fail(name, path, error)
                else:
                    self.left_out[DANGLING] += 1
            return []
        if not is_folder:
            self._file(name, path, True, lambda: os.stat(path))
            return []
        folders: list[tuple[str, str]] = []
        self._folder(name, path, folders)
        return self._tree(path, f"{name}/", linked=True) if folders else []

    def _file(self, name: str, path: str, linked: bool, status: Callable[[], os.stat_result]) -> None:
        if not self._matches(name):
            return
        try:
            found = status()
        except OSError as error:
            if self._takes(name, path):
                self.fail(name, path, error)
            else:
                self.left_out[ENDING] += 1
            return
        if not stat.S_ISREG(found.st_mode):
            self.left_out[NOT_REGULAR] += 1
        elif not self._takes(name, path):
            self.left_out[ENDING] += 1
        else:
            self._candidates.append((Found(name, path, linked), _identity(path, found)))

    def _matches(self, name: str, inside: bool = False) -> bool:
        """Whether the pattern means this file, or with `inside` can mean files in this folder."""
        if self._pattern is None:
            return True
        positions, end = _positions(self._pattern, name.split("/")), len(self._pattern)
        return bool(positions - {end}) if inside else end in positions

    def _count_all(self, entry: os.DirEntry, name: str, reason: str) -> None:
        """Counts a file, or every file below a folder; follows no links, and a folder that cannot be read is one."""
        if not entry.is_dir(follow_symlinks=False):
            self.left_out[reason] += self._matches(name)
            return

        def count_folder(error: OSError) -> None:
            self.left_out[reason] += self._pattern is None

        for folder, folders, files in os.walk(entry.path, onerror=count_folder):
            files += [each for each in folders if os.path.islink(os.path.join(folder, each))]
            below = name + folder[len(entry.path) :]
            self.left_out[reason] += sum(self._matches(f"{below}/{each}") for each in files)

    def _each_once(self) -> list[Found]:
        taken, files = set(), []
        for file, identity in sorted(self._candidates, key=lambda each: (each[0].linked, each[0].name)):
            if identity in taken:
                self.left_out[OTHER_NAME] += 1
            else:
                taken.add(identity)
                files.append(file)
        return sorted(files)

    def _without_cards(self, files: list[Found]) -> list[Found]:
        def is_card(file: Found) -> bool:
            folder, _, name = file.name.rpartition("/")
            beside = os.path.dirname(file.path)
            if name == "state.json":
                return os.path.exists(os.path.join(beside, "dataset_info.json"))
            if name in _DATASET_JSON:
                return True
            if name.lower() != _CARD:
                return False
            if _begins_with_yaml(file.name, file.path) or _keeps_lfs_files(beside):
                return True
            below = f"{folder}/" if folder else ""  # the names below are neighbours, because they are sorted
            inside = itertools.takewhile(
                lambda each: each.startswith(below), itertools.islice(names, bisect.bisect_left(names, below), None)
            )
            others = [each for each in inside if os.path.basename(each).lower() not in (_CARD, *_DATASET_JSON)]
            return bool(others) and all(formats.of(each).kind in ("json", "parquet") for each in others)

        names = [file.name for file in files]

        kept = [file for file in files if not is_card(file)]
        self.left_out[CARD] += len(files) - len(kept)
        return kept


def unreadable(path: str, error: OSError) -> UserError:
    """The error for a file or folder of a corpus that cannot be read."""
    return UserError(
        f"{path} cannot be read: {error.strerror or error}; data.source_options.on_error=skip leaves such files out"
    )


def split_glob(pattern: str) -> tuple[str, str]:
    """The folder in which a glob begins, and the rest; for a path without `*`, `?` and `[` its folder and name."""
    fixed = _MAGIC.split(pattern, maxsplit=1)[0]
    root = fixed[: fixed.rfind("/") + 1]
    rest = pattern[len(root) :]
    return root.rstrip("/") or ("/" if root else "."), rest


def is_glob(path: str) -> bool:
    return bool(_MAGIC.search(path))


def _positions(pattern: list[str], names: list[str]) -> frozenset[int]:
    """How many parts of the pattern these names can match, `**` being any number of names."""
    found = _past_stars(pattern, {0})
    for name in names:
        following, hidden = set(), name.startswith(".")
        for position in found - {len(pattern)}:
            part = pattern[position]
            if part == "**" and not hidden:
                following.add(position)
            elif part != "**" and (not hidden or part.startswith(".")) and _is_meant(part, name):
                following.add(position + 1)
        found = _past_stars(pattern, following)
    return found


def _is_meant(part: str, name: str) -> bool:
    return name == part or fnmatch.fnmatchcase(name, part)  # a folder may really be called `[1]`


def _past_stars(pattern: list[str], positions: set[int]) -> frozenset[int]:
    """The positions, and those after each `**`, which also matches no name."""
    found = set(positions)
    for position, part in enumerate(pattern):
        if position in found and part == "**":
            found.add(position + 1)
    return frozenset(found)


def _identity(path: str, found: os.stat_result) -> object:
    """What all names of one file or folder have in common."""
    # Some network and FUSE file systems have no inode numbers
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def _is_store(names: set[str]) -> bool:
    finished = "manifest.json" in names and any(re.fullmatch(r"(train|val)_\d+\.bin", name) for name in names)
    return finished or any(_PROGRESS.fullmatch(name) for name in names)


def _is_model_folder(names: set[str]) -> bool:
    """A workdir, or a model in Hugging Face's format: their JSON files are no documents."""
    if "config.json" not in names:
        return False
    return not names.isdisjoint(("checkpoints", "metrics.jsonl")) or any(
        re.fullmatch(r"(model|pytorch_model).*\.(safetensors|bin)", name) for name in names
    )


def _begins_with_yaml(name: str, path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return formats.is_card(name, file.readline(100))
    except OSError:
        return False  # reading it as a document finds that


def _keeps_lfs_files(folder: str) -> bool:
    try:
        with open(os.path.join(folder, ".gitattributes"), "rb") as file:
            return b"filter=lfs" in file.read(1 << 20)
    except OSError:
        return False
