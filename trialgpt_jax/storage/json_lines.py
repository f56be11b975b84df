"""Files of JSON objects, one per line, that a run appends to and that a resumed run continues."""

import contextlib
import json
import os
from collections.abc import Callable

from trialgpt_jax import UserError
from trialgpt_jax.storage import files


class JsonLines:
    """A file that lines are added to.

    A line that was written survives the end of the process, and after `sync` a loss of power as well. In an object
    store, which cannot append, the lines are in memory until `sync`.
    """

    def __init__(self, path: str, kept: list[dict]):
        """Replaces the contents of the file by the lines `kept`. Raises OSError."""
        text = "".join(map(_to_json, kept))
        files.write(path, text)
        self._path = path
        self._text = text if files.is_remote(path) else ""
        self._durable = len(text.encode())  # bytes
        self._pending, self._in_file = b"", 0  # lines after that; how many bytes of them are in the file, not synced

    def write(self, *lines: dict) -> None:
        """Adds lines. While they cannot be written, as on a full disk, they stay in memory, and `sync` raises."""
        self._pending += "".join(map(_to_json, lines)).encode()
        if not files.is_remote(self._path):
            with contextlib.suppress(OSError):
                self._append(self._in_file)

    def _append(self, start: int, sync: bool = False) -> None:
        """Writes the pending lines from byte `start` of them on."""
        with files.named(self._path), open(self._path, "r+b") as file:
            file.seek(self._durable + start)
            file.write(self._pending[start:])
            file.truncate()  # a full disk may have cut a longer write short
            file.flush()
            if sync:
                os.fsync(file.fileno())
        self._in_file = len(self._pending)

    def sync(self) -> None:
        """Writes all lines durably.

        Raises:
          OSError: they cannot be written; they stay in memory.
        """
        if files.is_remote(self._path):
            self._text, self._pending = self._text + self._pending.decode(), b""
            files.write(self._path, self._text)
            return
        # All of them again: the kernel drops what an fsync has failed to write, and the next fsync succeeds.
        self._append(0, sync=True)
        self._durable, self._pending, self._in_file = self._durable + len(self._pending), b"", 0


def read(path: str, step: int, what: str, parse: Callable[[bytes], dict], place: Callable[[dict], tuple]) -> list[dict]:
    """The lines of steps <= `step`, none for 0, as `JsonLines.write` has written them.

    Later lines were not synced when the process or its host ended, so the last one may be incomplete, and after a loss
    of power some may be zeros; those are dropped.

    Args:
      path: of the file; none = no lines.
      step: of the checkpoint that the run continues from.
      what: is on a line, for messages.
      parse: a line's object. Raises ValueError, TypeError or RecursionError if it is not one.
      place: (step, ...) of a line; it grows from line to line.

    Raises:
      UserError: any other line was not written so.
    """
    if not step or not files.exists(path):  # without a checkpoint the run starts over, with what is written at step 0
        return []
    with files.named(path), files.open_file(path) as file:
        *raw, _incomplete = file.read().split(b"\n")
    lines, last, lost = [], (-1,), 0
    for number, text in enumerate(raw, 1):
        if b"\0" in text:
            lost = lost or number
            continue
        try:
            line = parse(text)
        except (ValueError, TypeError, RecursionError) as error:
            why = "is not JSON" if isinstance(error, json.JSONDecodeError) else f"is not a line of {what}: {error}"
            raise UserError(f"{path}, line {number} {why}; repair or remove the file") from None
        if place(line) <= last:
            raise UserError(
                f"{path}, line {number}: step {line['step']} again or after step {last[0]}; repair or remove the file"
            )
        if line["step"] <= step:
            if lost:
                raise UserError(f"{path}, line {lost}: zeros instead of {what}; repair or remove the file")
            lines.append(line)
        last = place(line)
    return lines


def _to_json(line: dict) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
