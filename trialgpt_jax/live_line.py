"""What a command shows on stderr while it works.

In a terminal it is one line at the bottom, which is rewritten: twice a second by a thread, so that long calls of
libraries are no silence, and never longer than the terminal is wide. In a file or pipe it is a plain line after two
seconds, and then every ten. (tqdm has no thread for calls without progress, cuts what does not fit, and writes carriage
returns to files.)
"""

import contextlib
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import TextIO

_FIRST, _EVERY, _TICK, _REDRAW = 2.0, 10.0, 0.5, 0.1  # seconds: plain lines; of the thread; between two drawings
_SHORTEST_BAR, _LONGEST_BAR = 8, 40  # characters
_ERASE = "\r\x1b[K"

_lock = threading.RLock()
_tasks: list["Task"] = []  # the last one is shown
_shown = False  # whether the last line of the terminal is ours
_midline = False  # whether a result on stdout has begun a line of the terminal and not ended it
_drawn = 0.0  # when
_ticker: threading.Event | None = None  # ends the thread
enabled = True  # False in the processes of a job that write no log


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that `stream`, by default stderr, writes to; None if it is none."""
    stream = stream or sys.stderr
    try:
        if not stream.isatty() or os.environ.get("TERM") == "dumb":
            return None
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):  # no such call, closed, or None
        return None


def write_line(text: str) -> None:
    """Writes lines to stderr, above the live line; in a terminal longer ones are folded at spaces. Never raises.

    It is a single write, so that lines of other threads cannot split it.
    """
    with hidden():
        _write(f"{fold(text, terminal_width())}\n")


def fold(text: str, width: int | None) -> str:
    """`text` with lines of at most `width` characters, if it can be split at spaces; None = as it is."""
    return "\n".join(_fold(line, width) for line in text.split("\n"))


def _fold(line: str, width: int | None) -> str:
    if width is None or len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    # a path is left in one piece
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # broken, closed, or None
        try:
            sys.stderr.write(text)
        except UnicodeEncodeError:
            sys.stderr.write(text.encode("ascii", "backslashreplace").decode())
        sys.stderr.flush()


def starting() -> None:
    """Shows that the command starts, in a terminal, until its first line, result or task."""
    if terminal_width() is not None:
        _tasks.append(Task("starting", plain=False))
        _start_ticker()


def _started() -> None:
    if _tasks and _tasks[0].what == "starting":
        del _tasks[0]
        if not _tasks:
            _stop_ticker()


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """The live line is erased while the block writes to the terminal, and drawn again afterwards."""
    with _lock:
        _hide()
        _started()
        yield
        _draw()


@contextlib.contextmanager
def results(data: bytes) -> Iterator[None]:
    """The live line is erased while the block writes `data` to stdout; drawn again if that ends a line."""
    global _midline
    with _lock:
        _hide()
        _started()
        yield
        _midline = bytes(data[-1:]) != b"\n"


def erase_now() -> bytes:
    """What a signal handler writes before its own line: the lock may be held by what it interrupts."""
    return _ERASE.encode() if _shown else b""


def _hide() -> None:
    global _shown
    if _shown:
        _write(_ERASE)
    _shown = False


def _draw() -> None:
    global _shown, _drawn
    width = terminal_width() if _tasks and enabled and not _midline else None
    if width:
        _write(f"{_ERASE}{_tasks[-1].text(width - 1)}")
        _shown, _drawn = True, time.monotonic()


class Task:
    """Something that takes time.

    Args:
      what: is done.
      total: how much there is to do; 0 = not known, so only the time is shown.
      done: of it already.
      size: the amounts are bytes.
      plain: whether it has lines in a file.
    """

    def __init__(self, what: str, total: int = 0, done: int = 0, size: bool = False, plain: bool = True):
        self.what, self.total, self.done, self.note = what, total, done, ""
        self._before, self._size, self._plain = done, size, plain
        self._began = time.monotonic()
        self._next = self._began + _FIRST

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """`n` more are done; `note` is shown beside it."""
        with _lock:
            self.done += n
            self.note = self.note if note is None else note
            if _tasks and _tasks[-1] is self and time.monotonic() - _drawn > _REDRAW:
                _draw()
            self.tick()

    def tick(self) -> None:
        """Writes a plain line if one is due and stderr is no terminal."""
        if self._plain and enabled and time.monotonic() >= self._next and terminal_width() is None:
            self._next = time.monotonic() + _EVERY
            _write(f"{self.text(10_000, bar=False)}\n")

    def text(self, width: int, bar: bool = True) -> str:
        """At most `width` characters: what, amounts, time, note; what does not fit is left out, the note first."""
        seconds = time.monotonic() - self._began
        parts = [self.what]
        if self.total:
            amount = human_size if self._size else "{:,}".format
            parts.append(f"{amount(self.done)}/{amount(self.total)}")
            new = self.done - self._before
            left = seconds * (self.total - self.done) / new if new > 0 else None
            parts.append(f"{time_left(seconds)}" if left is None else f"{time_left(max(0, left))} left")
        else:
            parts.append(time_left(seconds))
        if self.note:
            parts.append(self.note)
        while len(parts) > 1 and len(", ".join(parts)) > width:
            parts.pop()
        text = ", ".join(parts)
        room = min(width - len(text) - 3, _LONGEST_BAR)
        if bar and self.total and room >= _SHORTEST_BAR:
            filled = min(room, room * self.done // self.total)
            text += f" [{'#' * filled}{'.' * (room - filled)}]"
        return text if len(text) <= width else f"{text[: width - 2]}.."


@contextlib.contextmanager
def task(what: str, total: int = 0, *, done: int = 0, size: bool = False, plain: bool = True) -> Iterator[Task]:
    """Shows a `Task` while the block runs; a task inside the block is shown instead of it."""
    with _lock:
        _started()
        new = Task(what, total, done, size, plain)
        _tasks.append(new)
        _draw()
        if plain or terminal_width() is not None:
            _start_ticker()
    try:
        yield new
    finally:
        with _lock:
            _hide()
            _tasks.remove(new)
            _draw()
            if not _tasks:
                _stop_ticker()


def _start_ticker() -> None:
    global _ticker
    if _ticker is None:
        _ticker = threading.Event()
        threading.Thread(target=_tick, args=(_ticker,), name="live line", daemon=True).start()


def _stop_ticker() -> None:
    global _ticker
    if _ticker is not None:
        _ticker.set()
    _ticker = None


def _tick(ended: threading.Event) -> None:
    while not ended.wait(_TICK):
        with _lock:
            if _tasks and not ended.is_set():
                _draw()
                _tasks[-1].tick()


def human_size(n_bytes: int) -> str:
    """`12.3 MB` or `512 bytes`; 1 kB = 1000 bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.1f} {name}"
    return f"{n_bytes} bytes"


def time_left(seconds: float) -> str:
    """A duration in two units: 12s, 3m05s, 2h10m, 4d03h."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    units = (("m", 60, "s", 1), ("h", 3600, "m", 60), ("d", 86400, "h", 3600))
    unit, size, minor_unit, minor = next(u for u in reversed(units) if seconds >= u[1])
    return f"{seconds // size}{unit}{seconds % size // minor:02d}{minor_unit}"
