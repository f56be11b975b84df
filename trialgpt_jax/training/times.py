"""Where the time of a run goes, over all processes that have worked on it: `<workdir>/processes.json`. No JAX."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from typing import NamedTuple, NotRequired, TypedDict

from trialgpt_jax.storage import json_files
from trialgpt_jax.training.workdir import times_path

COMPILING, EVALUATING, SAVING, RESTORING = "compiling", "evaluating", "saving", "restoring"


class _Process(TypedDict):
    """A process: begin and end (Unix time, s), first and last step, training time of its steps, other times by kind;
    training time since step 0 at its last step."""

    begin: float
    end: float
    first_step: int
    last_step: int
    training: float
    seconds: dict[str, float]
    total: NotRequired[float]


class Account(NamedTuple):
    """The time of a run, s.

    Attributes:
      processes: that have worked on it.
      wall: from begin to end, summed over the processes.
      between: from the end of a process to the begin of the next one.
      training: of the steps that the run consists of.
      again: of steps that were lost in a process that ended before they were saved, and ran again.
      seconds: other times by kind.
    """

    processes: int
    wall: float
    between: float
    training: float
    again: float
    seconds: dict[str, float]

    @property
    def other(self) -> float:
        """What is left: start, reading and checking of data, the summary."""
        return max(0.0, self.wall - self.training - self.again - sum(self.seconds.values()))

    @property
    def goodput(self) -> float:
        """The share of the processes' time in which steps were trained that the run consists of."""
        return self.training / self.wall if self.wall else 0.0


class Times:
    """The times of this process, beside those of earlier ones.

    Args:
      workdir: of the run.
      first_step: the step it continues from.
      kept: whether this process keeps the file.
    """

    def __init__(self, workdir: str, first_step: int, kept: bool = True):
        self._path, self._kept, self._earlier = times_path(workdir), kept, []
        now = time.time()
        with contextlib.suppress(OSError, ValueError):  # none, or not ours: the account begins here
            self._earlier = json_files.read(self._path, list[_Process])
        self._now = _Process(begin=now, end=now, first_step=first_step, last_step=first_step, training=0.0, seconds={})
        self._before = None

    def trained(self, step: int) -> float | None:
        """Training time of an earlier process since step 0, if `step` is the last one that it has noted."""
        return next((each.get("total") for each in reversed(self._earlier) if each["last_step"] == step), None)

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Adds the time of the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = self._now["seconds"]
            seconds[kind] = seconds.get(kind, 0.0) + time.monotonic() - began

    def note(self, step: int, training: float) -> None:
        """Keeps the times up to `step`, with `training` seconds since step 0. A file that cannot be written is left."""
        if self._before is None:
            self._before = training
        self._now.update(end=time.time(), last_step=step, training=training - self._before, total=training)
        if self._kept:
            with contextlib.suppress(OSError):
                json_files.write(self._path, [*self._earlier, self._now])

    def account(self, training: float) -> Account:
        """The account of a run whose last line says `training` seconds since step 0."""
        training = max(training, self._now.get("total", 0.0))
        all_of_them = [*self._earlier, self._now]
        seconds: dict[str, float] = {}
        for process in all_of_them:
            for kind, value in process["seconds"].items():
                seconds[kind] = seconds.get(kind, 0.0) + value
        wall = sum(process["end"] - process["begin"] for process in all_of_them)
        pairs = itertools.pairwise(all_of_them)
        between = sum(max(0.0, after["begin"] - before["end"]) for before, after in pairs)
        again = max(0.0, sum(process["training"] for process in all_of_them) - training)
        return Account(len(all_of_them), wall, between, training, again, seconds)


def cpu_name() -> str:
    """The processor's model and the number of its cores that this process may use."""
    name = "CPU"
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"
