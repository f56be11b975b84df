"""Prompts from a file of JSON lines, and their continuations as JSON lines in the same order.

In: {"prompt": "text"}, "" = a new document; other fields are ignored. Out: {"prompt": ..., "samples": [{"text": ...,
"tokens": [...]}]}, with "logprobs" where they are asked for.

Prompts are continued a block at a time, and sorted by length within it. A block of equal prompts gives equal lines, so
a command that was killed continues with the block of the first missing line and ends with the same bytes. What decides
them is in `FILE.settings.json`.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypedDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.generation.samples import Options, Sample
from trialgpt_jax.storage import files, json_files, lock
from trialgpt_jax.storage.json_lines import JsonLines

_BATCHES = 8  # of a block: what a killed command repeats, and what is sorted by length
_LONGEST_PROMPT = 16 << 20  # bytes; no model has so long a context


def read_prompt(prompt: str | None) -> str | None:
    """The prompt of the command line: text, or the contents of a file for `FILE:path`.

    Raises:
      UserError: the file cannot be read, or is not UTF-8 (names the offset).
    """
    if prompt is None or not prompt.startswith("FILE:"):
        return prompt
    path = prompt.removeprefix("FILE:")
    try:
        with open(path, "rb") as file:
            data = file.read(_LONGEST_PROMPT + 1)
        if len(data) > _LONGEST_PROMPT:
            raise UserError(
                f"--prompt={prompt}: {path} has more than {_LONGEST_PROMPT >> 20} MiB, which no model reads"
            )
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt={prompt}: {path} is not UTF-8 at byte {error.start}; convert it first") from None
    except (OSError, ValueError) as error:  # ValueError: not a possible file name
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--prompt={prompt!a}: {path!a} cannot be read: {why}") from None


class _Request(TypedDict):
    prompt: str


def read(path: str) -> Iterable[str]:
    """The prompts of a file; of stdin, for `-`, line by line.

    Raises:
      UserError: the file cannot be read or has no prompts; a line that is not a prompt, with its number.
    """
    if path == "-":
        return _parsed(sys.stdin.buffer, "stdin")
    try:
        with files.open_file(path) as file:
            prompts = list(_parsed(file, path))
    except (OSError, ValueError) as error:  # ValueError: not a possible file name
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--prompts={path!a} cannot be read: {why}") from None
    if not prompts:
        raise UserError(f'--prompts={path} has no prompts; write lines such as {{"prompt": "The people"}}')
    return prompts


def _parsed(lines: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json_files.parse(line, _Request)["prompt"]
        except ValueError as error:
            why = "is not JSON" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else str(error)
            raise UserError(f'--prompts={name}, line {number} {why}; a line is {{"prompt": "text"}}') from None


class Output:
    """Where the lines go: stdout, or a file that a killed command continues.

    Attributes:
      path: of the file; None = stdout.
      kept: lines that the file has already.
    """

    def __init__(self, path: str | None, settings: Mapping[str, object]):
        """`path`: of the file; None = stdout. `settings`: what decides the lines, by the name of its flag.

        Raises:
          UserError: the file was not written by this command with these settings.
        """
        self.path, self.kept, self._file = path, [], None
        if path is None:
            return
        given, record = {name: json.dumps(value) for name, value in settings.items()}, f"{path}.settings.json"
        if files.exists(path):
            self._continue(record, given)
        else:
            json_files.write(record, given)
        self._file = JsonLines(path, self.kept)

    def _continue(self, record: str, given: dict[str, str]) -> None:
        path = self.path
        try:
            old = json_files.read(record, dict[str, str])
        except (OSError, ValueError) as error:
            why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            raise UserError(
                f"--out={path} exists, but {record}, which says how it was made, {why}; choose another --out"
            ) from None
        for name, value in given.items():
            if old.get(name) != value:
                raise UserError(
                    f"--out={path} was begun with {name}={old.get(name)}, and this command has {value}; "
                    "choose another --out or remove the file"
                )
        with files.open_file(path) as file:
            *lines, _incomplete = file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                self.kept.append(json_files.parse(line, _Line))
            except ValueError:
                raise UserError(f"--out={path}, line {number} is not one of this command; remove the file") from None

    def write(self, lines: list[dict]) -> None:
        """Adds lines, durably in a file."""
        if self._file is None:
            sys.stdout.write("".join(json.dumps(line) + "\n" for line in lines))
            sys.stdout.flush()
        else:
            self._file.write(*lines)
            self._file.sync()


@contextlib.contextmanager
def open_output(path: str | None, settings: Mapping[str, object]) -> Iterator[Output]:
    """An `Output` that no other process writes meanwhile. Raises UserError as it does, and if another process does."""
    if path is None:
        yield Output(None, settings)
        return
    if os.path.isdir(path):
        raise UserError(f"--out={path} is a folder, not a file")
    path = os.path.realpath(path) if os.path.islink(path) else path  # files are replaced, links are not
    folder, name = os.path.split(path)
    fault = files.storage_faults(path, then="run the same command again")
    with fault, lock.hold(folder or ".", name=f"{name}.lock", flag="--out", value=path, keep_file=False):
        yield Output(path, settings)


class _Sample(TypedDict, total=False):
    text: str
    tokens: list[json_files.Count]
    logprobs: list[float]


class _Line(TypedDict):
    prompt: str
    samples: list[_Sample]


def continue_all(
    prompts: Iterable[str],
    output: Output,
    options: Options,
    continue_block: Callable[[list[str], int], list[list[Sample]]],
) -> int:
    """Continues prompts and writes a line for each.

    Args:
      prompts: from `read`.
      output: where the lines go.
      options: of the continuations.
      continue_block: (prompts, number of the first of them) -> the samples of each.

    Returns:
      The number of prompts.

    Raises:
      UserError: the file has lines of other prompts.
    """
    remaining, n, kept = iter(prompts), 0, output.kept
    if kept:
        say(f"{output.path} has {len(kept):,} lines; continuing after them")
    while block := list(itertools.islice(remaining, _BATCHES * options.prompts_per_batch)):
        there = kept[n : n + len(block)]
        for number, (line, prompt) in enumerate(zip(there, block, strict=False), n + 1):
            if line["prompt"] != prompt:
                raise UserError(f"--out={output.path}, line {number} is of another prompt; choose another --out")
        if len(there) < len(block):
            found = continue_block(block, n)
            lines = [as_line(prompt, samples) for prompt, samples in zip(block, found, strict=True)]
            output.write(lines[len(there) :])
        n += len(block)
    if len(kept) > n:
        raise UserError(f"--out={output.path} has {len(kept)} lines, but there are {n} prompts; choose another --out")
    return n


def as_line(prompt: str | None, samples: list[Sample]) -> dict:
    """The JSON object of a prompt and its continuations."""
    fields = ({name: value for name, value in sample._asdict().items() if value is not None} for sample in samples)
    return {"prompt": prompt, "samples": list(fields)}
