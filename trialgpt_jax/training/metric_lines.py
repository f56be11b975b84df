"""The lines of `metrics.jsonl`: what is on one, in which order they come, those of a run as curves. No JAX."""

import json
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

from trialgpt_jax import UserError
from trialgpt_jax.schema import INT32_MAX
from trialgpt_jax.storage import files
from trialgpt_jax.training.workdir import metrics_path

TASK = "task/"  # how the names of a task's metrics begin
_MAX_SECONDS = 1e10  # of training; more is no time


def has_tasks(line: dict) -> bool:
    """Whether a line is that of tasks."""
    return any(name.startswith(TASK) for name in line)


def place(line: dict) -> tuple[int, int]:
    """Grows from line to line: a step has up to three, of training, of the validation loss, and of tasks."""
    return line["step"], 2 if has_tasks(line) else int("val_loss" in line)


def parse(text: bytes) -> dict[str, int | float | None]:
    """A line: a `step` and numbers, None for one that is not finite.

    Raises:
      ValueError, TypeError or RecursionError: it is not one.
    """
    line = json.loads(text)
    if not isinstance(line, dict):
        raise TypeError("not an object")
    for name, value in {"step": None, **line}.items():
        number = type(value) is float and math.isfinite(value) or type(value) is int and abs(value) < 2**63
        if name == "step":
            number = type(value) is int and 0 <= value <= INT32_MAX
        elif name == "seconds":
            number = number and 0 <= value < _MAX_SECONDS
        elif value is None:
            number = True
        if not number:
            raise ValueError(f"`{name}` is {value!r:.50}")
    return line


class NoLines(UserError):
    """A run that has not written a line yet."""


class Best(NamedTuple):
    """The lowest validation loss of a run, and the rest of its line."""

    step: int
    val_loss: float
    val_bits_per_byte: float | None


class Run(NamedTuple):
    """The curves of a run.

    Attributes:
      name: for a legend.
      lines: of `metrics.jsonl`, one for each `place`.
      damaged: number of lines that are not read.
    """

    name: str
    lines: list[dict]
    damaged: int = 0

    def series(self, name: str, x: str = "step") -> tuple[list[float], list[float]]:
        """The finite values of `name` and those of `x` on the same lines."""
        pairs = [(line[x], line[name]) for line in self.lines if line.get(name) is not None and line.get(x) is not None]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def names(self, prefix: str) -> list[str]:
        """The names of values that begin with `prefix`, sorted."""
        return sorted({name for line in self.lines for name in line if name.startswith(prefix)})

    def last(self, name: str) -> float | None:
        """The last finite value of `name`."""
        return next((line[name] for line in reversed(self.lines) if line.get(name) is not None), None)

    def best(self) -> Best | None:
        """The earliest line with the lowest validation loss."""
        lines = [line for line in self.lines if line.get("val_loss") is not None]
        if not lines:
            return None
        line = min(lines, key=lambda line: line["val_loss"])
        return Best(line["step"], line["val_loss"], line.get("val_bits_per_byte"))

    def diverged(self) -> bool:
        """Whether its last training loss is not finite, or above the first one."""
        losses = [line["loss"] for line in self.lines if "loss" in line]
        finite = [loss for loss in losses if loss is not None]
        return bool(losses) and (losses[-1] is None or finite[-1] > finite[0])


def read_run(workdir: str, name: str = "") -> Run:
    """The run of a workdir, also of one that is training or was killed.

    Lines of steps that ran again after the process was killed replace those of the first time: a line drops all
    earlier ones that do not come before its `place`. The last line may be incomplete and is then left out.

    Raises:
      UserError: there is no metrics.jsonl; NoLines: it has no line.
    """
    path = metrics_path(workdir)
    if not files.exists(path):
        raise UserError(f"{path} does not exist; name workdirs that `train` has written")
    with files.named(path), files.open_file(path) as file:
        *texts, _incomplete = file.read().split(b"\n")
    lines, damaged = [], 0
    for text in texts:
        try:
            line = parse(text)
        except (ValueError, TypeError, RecursionError):
            damaged += 1
            continue
        while lines and place(lines[-1]) >= place(line):
            lines.pop()
        lines.append(line)
    if not lines:
        raise NoLines(f"{path} has no line yet")
    return Run(name or os.path.basename(os.path.abspath(workdir)), lines, damaged)


def distinct_names(workdirs: list[str]) -> Iterator[str]:
    """The last part of each path, preceded by as many others as make all of them different."""
    parts = [os.path.abspath(workdir).strip(os.sep).split(os.sep) for workdir in workdirs]
    for own in parts:
        others = [other for other in parts if other is not own]
        n = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        yield os.sep.join(own[-n:])
