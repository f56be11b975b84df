"""Traces of steps with JAX's profiler, on request (`log.profile`, SIGUSR1), and the longest operations in them."""

import collections
import contextlib
import glob
import os
import re
import signal
from collections.abc import Iterator
from typing import NamedTuple

import jax

from trialgpt_jax.console import say
from trialgpt_jax.live_line import task
from trialgpt_jax.training.workdir import profile_path

_ON_SIGNAL = 3  # steps that are traced after SIGUSR1
_ROWS, _NAME_WIDTH = 10, 42
_CONTAINERS = ("while", "call", "conditional")  # their time is that of the operations inside


def parse_range(text: str) -> range:
    """The steps of `log.profile`: `10-12`, or `10`; empty = none.

    `config.validate` refuses other texts.
    """
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1) if text else range(0)


class Profiler:
    """Context manager: traces the steps of `log.profile`, and the next three after each SIGUSR1, in process 0.

    Args:
      workdir: gets `profile/<first step>/`, which TensorBoard, xprof and Perfetto read.
      steps: the value of `log.profile`.
    """

    def __init__(self, workdir: str, steps: str):
        self._folder, self._steps, self._asked = profile_path(workdir), parse_range(steps), False
        self._last, self._path, self._traced = 0, "", 0
        self._active = jax.process_index() == 0

    def __enter__(self):
        self._previous = None
        with contextlib.suppress(ValueError):  # not in the main thread
            self._previous = signal.signal(signal.SIGUSR1, self._on_signal)
        return self

    def _on_signal(self, number, frame):
        self._asked = True

    def before(self, step: int) -> None:
        """Starts a trace if one begins at `step`, which has not been dispatched."""
        if not self._active or self._path:
            return
        if self._asked:
            self._asked, self._last = False, step + _ON_SIGNAL - 1
        elif step in self._steps:
            self._last = self._steps[-1]
        else:
            return
        self._path, self._traced = os.path.join(self._folder, str(step)), 0
        try:
            jax.profiler.start_trace(self._path)
        except Exception as error:  # noqa: BLE001 - a trace is no reason to end a run
            self._fail(error)

    def ends(self, step: int, last: bool) -> bool:
        """Whether the trace ends after `step`; `last`: no step follows."""
        self._traced += bool(self._path)
        return bool(self._path) and (last or step >= self._last)

    def finish(self) -> None:
        """Writes the trace, whose steps are complete, and says where the time went."""
        try:
            with task("writing the trace"):
                jax.profiler.stop_trace()
                text = table(self._path, self._traced)
        except Exception as error:  # noqa: BLE001
            self._fail(error)
            return
        say(f"trace of {self._traced} step(s) in {self._path}\n{text}")
        self._path = ""

    def _fail(self, error: Exception) -> None:
        say(f"warning: no trace: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        self._path, self._steps = "", range(0)

    def __exit__(self, *exception):
        if self._path:  # the run has ended inside of it
            with contextlib.suppress(Exception):
                jax.profiler.stop_trace()
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)


# ---- the table


class Row(NamedTuple):
    """An operation: its name, how often it ran in all, and how long it took in all, ms."""

    name: str
    calls: int
    milliseconds: float


def operations(folder: str) -> list[Row]:
    """Kernels of the first accelerator in a trace, or operations on the CPU, longest first.

    Numbers at the end of a name are left out, so that the same operation of all layers is one row.

    Raises:
      ValueError: there is no trace, or no operation in it.
    """
    from jax.profiler import ProfileData

    paths = sorted(glob.glob(f"{glob.escape(folder)}/plugins/profile/*/*.xplane.pb"))
    if not paths:
        raise ValueError(f"{folder} has no trace")
    data = ProfileData.from_file(paths[-1])
    found: dict[str, list] = collections.defaultdict(lambda: [0, 0.0])
    for event in _events(data):
        entry = found[re.sub(r"([._]\d+|[._]clone|[._]remat\d*)+$", "", event.name)]
        entry[0] += 1
        entry[1] += event.duration_ns / 1e6
    if not found:
        raise ValueError(f"{paths[-1]} has no operation")
    return sorted((Row(name, *entry) for name, entry in found.items()), key=lambda row: -row.milliseconds)


def _events(data) -> Iterator:
    """The events that are operations: on an accelerator those of the lines of kernels, on the CPU those of XLA's."""
    planes = list(data.planes)
    device = next((plane for plane in planes if re.search(r"/device:(GPU|TPU):0", plane.name)), None)
    for plane in [device] if device else planes:
        for line in plane.lines:
            kernels = "Compute" in line.name if "GPU" in plane.name else line.name == "XLA Ops"
            if device and not kernels:
                continue
            for event in line.events:
                whole = event.name.startswith(_CONTAINERS)
                if not whole and (device or any(name == "hlo_op" for name, _ in event.stats)):
                    yield event


def table(folder: str, steps: int) -> str:
    """The ten longest operations, per step: at most 80 columns."""
    rows = operations(folder)
    total = sum(row.milliseconds for row in rows)
    lines = [f"{'operation':<{_NAME_WIDTH}} {'ms a step':>10} {'share':>6} {'calls a step':>13}"]
    for row in rows[:_ROWS]:
        name = row.name if len(row.name) <= _NAME_WIDTH else f"{row.name[: _NAME_WIDTH - 2]}.."
        share = f"{100 * row.milliseconds / total:.1f}%"
        lines.append(f"{name:<{_NAME_WIDTH}} {row.milliseconds / steps:>10.3f} {share:>6} {row.calls / steps:>13.1f}")
    rest = sum(row.milliseconds for row in rows[_ROWS:])
    lines.append(f"{f'{len(rows)} in all':<{_NAME_WIDTH}} {total / steps:>10.3f}")
    if rest:
        lines.insert(-1, f"{'others':<{_NAME_WIDTH}} {rest / steps:>10.3f} {f'{100 * rest / total:.1f}%':>6}")
    return "\n".join(lines)
