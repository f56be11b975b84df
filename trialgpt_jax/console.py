"""The terminal of a command: its log on stderr, its results on stdout, and Ctrl-C.

The log never ends the work: lines that cannot be written are dropped. Results that cannot be written end the command.
"""

import atexit
import codecs
import contextlib
import io
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator

from trialgpt_jax import live_line

# What a shell reports for a process that a signal has ended.
EXIT_INTERRUPTED = 128 + signal.SIGINT
_EXIT_CLOSED_PIPE = 128 + signal.SIGPIPE
_EXIT_NOT_WRITTEN = 2

copies: list[Callable[[str], None]] = []  # get each line of `say`; they do not raise


class OutputError(Exception):
    """Results cannot be written to stdout.

    Attributes:
      status: the exit status of the command.
      line: for the log; empty if the reader of a pipe has closed it, as `head` does.
    """

    def __init__(self, error: OSError):
        closed = isinstance(error, BrokenPipeError)
        self.status = _EXIT_CLOSED_PIPE if closed else _EXIT_NOT_WRITTEN
        self.line = "" if closed else f"error: stdout cannot be written: {error.strerror}"
        super().__init__(self.line or "stdout was closed")


def enable(enabled: bool) -> None:
    """Turns `say` on or off; in a job of several processes only process 0 writes the log."""
    live_line.enabled = enabled


def say(text: str, terminal: str | None = None) -> None:
    """Writes a line to the log, unless `enable` has turned it off; `terminal` is a shorter one for a terminal.

    Never raises.
    """
    if not live_line.enabled:
        return
    for copy in copies:
        copy(text)
    live_line.write_line(text if terminal is None or live_line.terminal_width() is None else terminal)


def print_result(text: str) -> None:
    """Writes lines to stdout, folded at spaces if that is a terminal."""
    print(live_line.fold(text, live_line.terminal_width(sys.stdout)), flush=True)


def say_always(text: str) -> None:
    """Writes a line to stderr alone. Never raises."""
    live_line.write_line(text)


def one_line(text: str) -> str:
    """`text` with its control characters as escapes: a folder's name may hold a newline."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], text)


def guard() -> None:
    """Makes stdout and stderr of this process behave as the module says, for prints of libraries as well.

    Streams that were replaced, for example by a test, are left alone.
    """
    # A closed one (`2>&-`) would be the number of the next file that is opened, which C++ libraries then log to.
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `handle`
    if sys.stderr is sys.__stderr__ and not _is_ours(sys.stderr):
        sys.stderr = sys.__stderr__ = _text(_Log(2), sys.stderr)
    if sys.stdout is sys.__stdout__ and not _is_ours(sys.stdout):
        sys.stdout = sys.__stdout__ = _text(_Results(1), sys.stdout)


def results(handle: int) -> io.TextIOWrapper:
    """A text file that writes results to a file descriptor, and raises OutputError if that fails."""
    return _text(_Results(handle), sys.stdout)


class _Output(io.FileIO):
    def __init__(self, handle: int):
        super().__init__(handle, "wb", closefd=False)

    def _write(self, data) -> int:
        while (n := super().write(data)) is None:  # a terminal or pipe in non-blocking mode is full
            select.select([], [self], [])
        return n


class _Log(_Output):
    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            return self._write(data)
        return len(data)


class _Results(_Output):
    _broken = False

    def write(self, data) -> int:
        if self._broken:  # Python flushes what is left at exit, and a failure would change the status to 120
            return len(data)
        try:
            with live_line.results(data):
                return self._write(data)
        except OSError as error:
            self._broken = True
            raise OutputError(error) from None


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of an argument or file name that are not UTF-8 are written as they were, other characters as escapes."""
    text = error.object[error.start : error.end]
    try:
        return text.encode("ascii", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


_ESCAPE = "trialgpt_jax.escape"
codecs.register_error(_ESCAPE, _escape)


def _is_ours(stream: io.TextIOWrapper | None) -> bool:
    return isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Output)


def _text(raw: _Output, old: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """A text file on `raw` with the encoding and buffering of `old`."""
    if old is None:  # the descriptor was closed
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)
    errors = _ESCAPE if old.errors in ("strict", "surrogateescape") else old.errors
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, old.encoding, errors, line_buffering=old.line_buffering or old.write_through)


# ---- Ctrl-C


def leave_on_interrupt() -> None:
    """Ctrl-C ends this process at once, with one line and status 130, until `interrupts` is entered.

    For the seconds in which a command imports its libraries. Does nothing where Ctrl-C is ignored (a background job).
    When the process ends by itself and its exit handlers have run, Ctrl-C is ignored: its status stands. As the first
    process of a container it also ends at once on SIGTERM, as any other process does.
    """
    if _is_first_process():
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, _leave)
    # When Python ends, it restores the default handler, which would kill a command that is done; it keeps SIG_IGN. The
    # libraries register their functions later, so this one runs after theirs.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    previous = sys.unraisablehook

    def hook(unraisable):
        if issubclass(unraisable.exc_type, KeyboardInterrupt):  # raised in a callback or `__del__`: nobody catches it
            _leave()
        previous(unraisable)

    sys.unraisablehook = hook


def _is_first_process() -> bool:
    """Whether this is the entry point of a container, for which the kernel drops signals that have no handler."""
    return os.getpid() == 1


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt inside the block; afterwards it ends the process at once again."""
    ours = signal.getsignal(signal.SIGINT) is _leave
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, _leave)


@contextlib.contextmanager
def interrupts_end_process() -> Iterator[None]:
    """Ctrl-C ends this process inside the block without Python's help: for long calls of C++ libraries."""
    previous = signal.getsignal(signal.SIGINT)
    try:
        if previous is signal.default_int_handler and not _is_first_process():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # not in the main thread (a notebook)
        previous = None
    try:
        yield
    finally:
        if previous is signal.default_int_handler:
            signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def terminations_interrupt() -> Iterator[None]:
    """The first SIGTERM or SIGHUP in the block raises KeyboardInterrupt, as Ctrl-C does; a SIGHUP that was ignored
    (`nohup`) stays so.

    Later ones are ignored, because shells and service managers send both, or one of them twice.
    """
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    numbers = [number for number, handler in previous.items() if handler is not signal.SIG_IGN]

    def interrupt(number, frame):
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in numbers:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each in numbers:
            signal.signal(each, previous[each])


def _leave(*_) -> None:
    live_line.enabled = False  # nothing is drawn after the last line
    with contextlib.suppress(OSError):
        # not `say`: the signal may interrupt a print, and its buffer is not reentrant
        os.write(2, live_line.erase_now() + b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def requests_bar(
    total: int, what: str, shown: bool, then: Callable[[], None] = lambda: None
) -> Iterator[Callable[[int, int], None]]:
    """A `live_line.task`: requests, time left, tokens and tokens/s.

    Args:
      total: requests.
      what: they are.
      shown: False = no bar.
      then: called after each advance.

    Yields:
      A function to call with the numbers of requests and tokens that are done since the last call.
    """
    started, n_tokens = time.perf_counter(), 0

    def advance(n: int, tokens: int) -> None:
        nonlocal n_tokens
        n_tokens += tokens
        rate = n_tokens / (time.perf_counter() - started)
        if shown:
            bar.advance(n, f"{n_tokens:,} tokens, {rate:,.0f} tokens/s")
        then()

    with live_line.task(what, total) if shown else contextlib.nullcontext() as bar:
        yield advance
