"""What a disk may hold after a process is killed or the power fails, from a log of `fakes/record_io.c`.

POSIX promises less than a running system shows. The data of a file are durable after fsync of the file; its name is
durable after fsync of the folder that holds it, and not before; the name of a new folder is durable after fsync of its
parent. What is not durable may be lost or kept, each part on its own: names without data, data without names, a size
without its data, which then read as zeros. Within one folder a rename is atomic, as on every journaling file system.

    events = read_log(log)
    for number, variant, state in states(events):
        write_state(state, folder)      # then start from `folder`
"""

import itertools
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from conftest import ROOT

_RECORD = struct.Struct("<c7xQQQIIQ")  # of record_io.c
State = tuple[tuple[str, bytes | None], ...]  # sorted (path, contents); None for a folder


def build_recorder(folder) -> str | None:
    """Compiles the library for LD_PRELOAD; None if there is no C compiler or this is not Linux."""
    try:
        subprocess.run(["cc", "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    if not sys.platform.startswith("linux"):
        return None
    library = os.path.join(folder, "record_io.so")
    source = ROOT / "tests" / "fakes" / "record_io.c"
    argv = ["cc", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"]
    subprocess.run(argv, check=True)
    return library


class Event(NamedTuple):
    """One recorded call; see `Disk.apply` for the operations."""

    op: str
    inode: int
    offset: int
    size: int
    path: str
    to: str
    data: bytes


def read_log(path) -> list[Event]:
    """The events of a log, in the order of the calls.

    Raises:
      NotImplementedError: the recorded program did what the model cannot replay.
    """
    raw, at, events = memoryview(path.read_bytes()), 0, []
    while at < len(raw):
        op, inode, offset, size, *lengths = _RECORD.unpack_from(raw, at)
        at += _RECORD.size
        ends = list(itertools.accumulate(lengths, initial=at))
        name, to, data = (bytes(raw[a:b]) for a, b in itertools.pairwise(ends))
        at = ends[-1]
        events.append(Event(op.decode(), inode, offset, size, os.fsdecode(name), os.fsdecode(to), data))
        if events[-1].op == "X":
            raise NotImplementedError(f"the recorder cannot follow {events[-1].to} of {events[-1].path}")
    return events


class File:
    """The contents of a file: `stable` is durable, `unsynced` are the writes (offset, data) and sizes since then."""

    def __init__(self):
        self.stable, self.unsynced = b"", []
        self._cache = {}

    def change(self, offset: int, data: bytes | None) -> None:
        """Writes `data` at `offset`; None sets the size to `offset`."""
        self.unsynced.append((offset, data))
        self._cache = {}

    def sync(self) -> None:
        self.stable, self.unsynced, self._cache = self.visible, [], {}

    @property
    def visible(self) -> bytes:
        """What a process reads."""
        return self._replay("visible", lambda i: True)

    @property
    def zeroed(self) -> bytes:
        """The size reached the disk, unsynced data did not."""
        return self._replay("zeroed", lambda i: False)

    def partly(self, rng: random.Random) -> bytes:
        """Any mixture: as durable, as visible, zeros, the first writes alone, or zeros for some of the writes."""
        n = len(self.unsynced)
        kind = rng.choice(("stable", "visible", "zeroed", "first", "some")) if n else "stable"
        if kind == "stable":
            return self.stable
        if kind == "first":
            return self._replay("", lambda i: True, rng.randrange(n + 1))
        if kind == "some":
            return self._replay("", lambda i: rng.random() < 0.5)
        return getattr(self, kind)

    def _replay(self, name: str, kept: Callable[[int], bool], n: int | None = None) -> bytes:
        if name in self._cache:
            return self._cache[name]
        out = bytearray(self.stable)
        for i, (offset, data) in enumerate(self.unsynced[:n]):
            end = offset + len(data or b"")
            out.extend(bytes(max(0, end - len(out))))
            if data is None:
                del out[offset:]
            else:
                out[offset:end] = data if kept(i) else bytes(len(data))
        result = bytes(out)
        if name:
            self._cache[name] = result
        return result


class Change(NamedTuple):
    """An unsynced change of a folder: the event's number, a name that goes, a name that comes and what it names."""

    number: int
    gone: str | None
    new: str | None
    node: "File | Folder | None"


class Folder:
    """The names in a folder: `stable` is durable, `unsynced` are the changes since then."""

    def __init__(self):
        self.stable, self.visible, self.unsynced = {}, {}, []

    def change(self, number: int, gone: str | None, new: str | None = None, node=None) -> None:
        self.unsynced.append(Change(number, gone, new, node))
        self.visible = self._with(self.unsynced[-1:], self.visible)

    def sync(self) -> None:
        self.stable, self.unsynced = self.visible, []

    @property
    def unlinked(self) -> dict:
        """Names that were removed are gone, and no other change reached the disk."""
        return self._with([change for change in self.unsynced if change.new is None], self.stable)

    def partly(self, rng: random.Random, last: float) -> dict:
        """Changes up to event `last`, as a journal commits them; any of them, in order, if `last` is 0."""
        return self._with([c for c in self.unsynced if (c.number <= last if last else rng.random() < 0.5)], self.stable)

    @staticmethod
    def _with(changes: list[Change], names: dict) -> dict:
        names = dict(names)
        for _, gone, new, node in changes:
            if gone is not None:
                names.pop(gone, None)
            if new is not None:
                names[new] = node
        return names


class Disk:
    """A folder, empty at first, to which recorded events are applied."""

    def __init__(self):
        self.root = Folder()
        self._nodes, self._number = {}, 0

    def apply(self, event: Event) -> None:
        """Applies the next event.

        C creates a file, M a folder, W writes, T sets a size, R renames, L links, U removes a file, D a folder, F is
        fsync or fdatasync of a file or folder, S syncs everything.
        """
        self._number += 1
        op, node = event.op, self._nodes.get(event.inode)
        if op in "CM":
            node = self._nodes[event.inode] = File() if op == "C" else Folder()
            folder, name = self._find(event.path)
            folder.change(self._number, None, name, node)
        elif op in "WT":
            node.change(event.offset if op == "W" else event.size, event.data if op == "W" else None)
        elif op in "RL":
            self._rename(event.path, event.to, keep=op == "L")
        elif op in "UD":
            folder, name = self._find(event.path)
            folder.change(self._number, name)
        elif op == "F":
            (self.root if event.path == "." else node).sync()
        elif op == "S":
            for node in [self.root, *self._nodes.values()]:
                node.sync()

    def _rename(self, path: str, to: str, keep: bool) -> None:
        (source, old), (target, new) = self._find(path), self._find(to)
        node = source.visible[old]
        if source is target:
            source.change(self._number, None if keep else old, new, node)
        else:  # POSIX does not say that both folders become durable together
            target.change(self._number, None, new, node)
            if not keep:
                source.change(self._number, old)

    def _find(self, path: str) -> tuple[Folder, str]:
        *parents, name = path.split("/")
        folder = self.root
        for parent in parents:
            folder = folder.visible[parent]
        return folder, name

    def state(self, names: Callable[[Folder], dict], data: Callable[[File], bytes]) -> State:
        """The tree with the names and contents that the two functions choose."""
        found = []

        def walk(folder: Folder, prefix: str) -> None:
            for name, node in names(folder).items():
                if isinstance(node, Folder):
                    found.append((prefix + name, None))
                    walk(node, f"{prefix}{name}/")
                else:
                    found.append((prefix + name, data(node)))

        walk(self.root, "")
        return tuple(sorted(found, key=lambda item: item[0]))

    def killed(self) -> State:
        """After SIGKILL: the page cache survives."""
        return self.state(lambda folder: folder.visible, lambda file: file.visible)

    def power_lost(self) -> Iterator[tuple[str, State]]:
        """States after a loss of power, with the name of what was lost; the last one is drawn at random."""

        def stable_data(file):
            return file.stable

        def visible(node):
            return node.visible

        yield "all that is not synced", self.state(lambda folder: folder.stable, stable_data)
        yield "data", self.state(visible, stable_data)
        yield "data, but not sizes", self.state(visible, lambda file: file.zeroed)
        yield "names", self.state(lambda folder: folder.stable, visible)
        yield "all but removals", self.state(lambda folder: folder.unlinked, stable_data)
        rng = random.Random(self._number)
        in_order = self._number % 2
        last = self._number * (1 - rng.random() ** 3) if in_order else 0
        name = "at random, names in order" if in_order else "at random"
        yield name, self.state(lambda folder: folder.partly(rng, last), lambda file: file.partly(rng))


def states(events: list[Event], first: int = 0) -> Iterator[tuple[int, str, State]]:
    """After each number of events from `first` on: the number, "killed" or what was lost, and the state.

    The same state comes up many times.
    """
    disk = Disk()
    for number, event in enumerate([None, *events]):
        if event:
            disk.apply(event)
        if number < first:
            continue
        yield number, "killed", disk.killed()
        for variant, state in disk.power_lost():
            yield number, variant, state


def read_state(folder) -> State:
    """A real folder as a state."""
    found = []
    for root, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(root, name)
            data = None
            if name in names:
                with open(path, "rb") as file:
                    data = file.read()
            found.append((os.path.relpath(path, folder), data))
    return tuple(sorted(found, key=lambda item: item[0]))


def write_state(state: State, folder) -> None:
    """Creates a folder with the contents of a state."""
    os.makedirs(folder)
    for path, data in state:  # sorted: a folder comes before what is in it
        if data is None:
            os.mkdir(os.path.join(folder, path))
        else:
            with open(os.path.join(folder, path), "wb", buffering=0) as file:
                file.write(data)
