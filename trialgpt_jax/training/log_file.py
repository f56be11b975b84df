"""`<workdir>/log.txt`: the lines that a run says, with their times, appended over restarts. Imports no JAX."""

import contextlib
import os
import shlex
import socket
import sys
import time
import traceback

from trialgpt_jax import UserError, console
from trialgpt_jax.storage import files
from trialgpt_jax.training.workdir import log_path


class LogFile:
    """Context manager: from its start on, lines of `console.say` are kept; `open` writes them, and then each new one.

    An error that leaves the block is the last line of an opened file. A file that cannot be written does not end the
    run. In an object store, which cannot append, it is written when the block ends.
    """

    def __init__(self, workdir: str, kept: bool = True):
        """`kept`: whether this process keeps the file; one process of a job does."""
        self._path, self._early, self._text, self._kept = log_path(workdir), [], None, kept
        self._handle = None

    def __enter__(self):
        console.copies.append(self._write)
        return self

    def open(self) -> None:
        """Begins to write: a line with the time, the process and its command, then what has been said so far."""
        if not self._kept:
            return
        early, self._early = self._early, None
        with contextlib.suppress(OSError):
            if files.is_remote(self._path):
                self._text = b""
                if files.exists(self._path):
                    with files.open_file(self._path) as file:
                        self._text = file.read()
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._handle = os.open(self._path, flags, 0o666)
        command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]) if sys.argv else ""
        self._write(f"---- process {os.getpid()} on {socket.gethostname()}: {command}")
        for line in early:
            self._append(line)

    def _write(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        line = "".join(f"{stamp}  {part}\n" for part in text.split("\n")).encode("utf-8", "backslashreplace")
        if self._early is not None:
            self._early.append(line)
        else:
            self._append(line)

    def _append(self, line: bytes) -> None:
        if self._text is not None:
            self._text += line
        elif self._handle is not None:
            with contextlib.suppress(OSError):
                os.write(self._handle, line)

    def __exit__(self, kind, error, trace):
        console.copies.remove(self._write)
        if self._early is not None:  # nothing has begun
            return
        if isinstance(error, KeyboardInterrupt):
            self._write("interrupted")
        elif isinstance(error, (UserError, FloatingPointError)):
            self._write(f"error: {error}")
        elif error is not None:
            self._write("".join(traceback.format_exception(error)).rstrip())
        with contextlib.suppress(OSError):
            if self._text is not None:
                files.write(self._path, self._text)
            elif self._handle is not None:
                os.close(self._handle)
