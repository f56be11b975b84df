"""Units of work: a group of input files -> finished shards. Where a unit begins and ends follows from the input alone.

A group is read in order and cut after the document that brings a unit to `shard_tokens` tokens. Each unit gives one
shard of training and one of validation documents at most, so its bytes depend neither on the workers nor on what ran
before; a unit that is on disk with its record in the progress file is never touched again.
"""

import collections
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.data import corpora
from trialgpt_jax.data.corpora import Document, InputFile
from trialgpt_jax.data.shard_writer import ShardWriter
from trialgpt_jax.data.tokenizer import Tokenizer

_CHUNK_CHARS, _CHUNK_DOCUMENTS = 1 << 20, 1024  # what a thread encodes at a time: enough to make handing over cheap

OTHERS, _MAX_SOURCES = "(others)", 100  # where `source` is an address or the like, a table of them all would be endless


@dataclass(frozen=True)
class Job:
    """How a corpus becomes a token store; every worker gets it.

    Attributes:
      folder: the token store.
      tokenizer, encoder: the config's fields.
      options: `data.source_options`.
      split, split_seed, val_fraction, shard_tokens: the config's fields.
      val_rows: for `split=nanogpt`: file name -> the rows that are validation documents.
    """

    folder: str
    tokenizer: str
    encoder: str
    options: dict
    split: str
    split_seed: int
    val_fraction: float
    shard_tokens: int
    val_rows: dict[str, frozenset[int]]


class Encoded(NamedTuple):
    """A document, the split it is in, its ids with end-of-text, and its size in UTF-8 bytes."""

    document: Document
    file: int
    split: str
    ids: np.ndarray
    n_bytes: int


def shard_name(split: str, group: int, part: int) -> str:
    """A shard's name while the job is under way; the number it gets in the end needs all groups before it."""
    return f"{split}_{group:05d}_{part:04d}.bin"


def split_of(job: Job, file: InputFile, document: Document) -> str:
    """`train` or `val`: a hash of seed and text decides, so order and files do not matter (or nanoGPT's rows)."""
    if document.split:
        return document.split
    if job.split == "nanogpt":
        return "val" if document.number in job.val_rows[file.name] else "train"
    key = job.split_seed.to_bytes(8, "little")
    digest = hashlib.blake2b(document.text.encode(), digest_size=8, key=key).digest()
    return "val" if int.from_bytes(digest, "little") < job.val_fraction * 2.0**64 else "train"


def read_group(
    job: Job, files: Sequence[InputFile], start: tuple[int, int] = (0, 0), only_text: bool = False
) -> Iterator[tuple[int, Document]]:
    """The documents of a group: (number of the file in the group, document), unusable ones included.

    Args:
      start: number of a file in the group and of a record in it: where to begin.
      only_text: this group is the whole corpus and one text file: its end becomes the validation document.

    Raises:
      UserError: an unusable document, unless `on_error` is `skip`; a file that cannot be read or fetched.
    """
    for index in range(start[0], len(files)):
        first = start[1] if index == start[0] else 0
        with corpora.fetched(files[index], os.path.join(job.folder, "downloads")) as path:
            documents = corpora.read_documents(files[index], path, job.options, 0 if only_text else first)
            if only_text:
                documents = (d for d in _head_and_tail(documents, job.val_fraction) if d.number >= first)
            for document in documents:
                if document.text is None and job.options["on_error"] == "stop":
                    raise UserError(f"{document.where}; data.source_options.on_error=skip leaves such documents out")
                yield index, document


def encode_group(
    job: Job,
    tokenizer: Tokenizer,
    encode: Callable[[list[str]], list[np.ndarray]],
    threads: int,
    group: int,
    files: Sequence[InputFile],
    done: Sequence[dict],
    only_text: bool,
    report: Callable[[int, int, int, int], None],
) -> Iterator[dict]:
    """Encodes what is left of a group and yields the record of every unit as soon as it is durable on disk.

    Args:
      encode: texts -> their ids without end-of-text; called from several threads.
      group, files: the group's number and files.
      done: the records of its finished units.
      only_text: as in `read_group`.
      report: called with documents, tokens, UTF-8 bytes since the last call, and the bytes of the group read so far.

    Raises:
      UserError: as `read_group`, or a disk that is full or fails; the units yielded so far stay good.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    before = [0]
    for file in files:
        before.append(before[-1] + file.size)
    part, start = (done[-1]["part"] + 1, tuple(done[-1]["next"])) if done else (0, (0, 0))
    unit = _Unit(job, group, part, dtype)
    try:
        stream = read_group(job, files, start, only_text)
        for chunk in _encoded_chunks(stream, job, files, tokenizer, encode, threads):
            first = 0
            room = job.shard_tokens - unit.tokens
            for place, item in enumerate(chunk):
                room -= len(item.ids)
                if room <= 0:  # this document completes the unit
                    unit.append(chunk[first : place + 1])
                    first, room = place + 1, job.shard_tokens
                    yield unit.finish([item.file, item.document.number + 1])
                    unit = _Unit(job, group, unit.part + 1, dtype)
            unit.append(chunk[first:])
            last = chunk[-1]
            read = before[last.file] + last.document.position
            report(len(chunk), sum(len(item.ids) for item in chunk), sum(item.n_bytes for item in chunk), read)
        yield unit.finish(None)
    except OSError as error:
        raise UserError(
            f"{error.filename or job.folder} cannot be written: {error.strerror or error}; what is finished is kept, so "
            "make room and run the same command again"
        ) from None
    finally:
        unit.abort()


class _Unit:
    """The shards of a unit while they are written, and its record."""

    def __init__(self, job: Job, group: int, part: int, dtype: type):
        self._job, self._group, self.part, self._dtype = job, group, part, dtype
        self._writers: dict[str, ShardWriter] = {}
        self._skipped, self._sources = collections.Counter(), {}
        self.tokens = 0

    def append(self, items: list[Encoded]) -> None:
        for split in ("train", "val"):
            if mine := [item for item in items if item.split == split]:
                if split not in self._writers:
                    file = shard_name(split, self._group, self.part)
                    self._writers[split] = ShardWriter(self._job.folder, file, split, self._dtype)
                n_bytes = sum(item.n_bytes for item in mine)
                self._writers[split].append(np.concatenate([item.ids for item in mine]), len(mine), n_bytes)
        for item in items:
            if item.document.text is None:
                self._skipped[item.document.problem] += 1
                continue
            source = item.document.source
            if source not in self._sources and len(self._sources) >= _MAX_SOURCES:
                source = OTHERS
            counts = self._sources.setdefault(source, [0, 0, 0])
            for i, count in enumerate((1, len(item.ids), item.n_bytes)):
                counts[i] += count
            self.tokens += len(item.ids)

    def finish(self, following: list[int] | None) -> dict:
        """Makes the unit durable; `following` is where the next one begins, [file, record], None at the group's end."""
        shards = [self._writers[split].finish() for split in sorted(self._writers)]
        self._writers = {}
        return {
            "group": self._group, "part": self.part, "next": following, "shards": shards,
            "skipped": dict(sorted(self._skipped.items())), "sources": dict(sorted(self._sources.items())),
        }  # fmt: skip

    def abort(self) -> None:
        for writer in self._writers.values():
            writer.abort()


def _encoded_chunks(
    stream: Iterator[tuple[int, Document]],
    job: Job,
    files: Sequence[InputFile],
    tokenizer: Tokenizer,
    encode: Callable[[list[str]], list[np.ndarray]],
    threads: int,
) -> Iterator[list[Encoded]]:
    """Encodes documents chunk by chunk, in order; at most threads + 2 chunks are in memory."""

    def encode_chunk(chunk: list[tuple[int, Document]]) -> list[Encoded]:
        ids = iter(encode([document.text for _, document in chunk if document.text is not None]))
        return [_with_split(job, files, index, document, ids, tokenizer.eot_id) for index, document in chunk]

    if threads <= 1:
        yield from map(encode_chunk, _chunks(stream))
        return
    with ThreadPoolExecutor(threads) as pool:
        pending: collections.deque[Future] = collections.deque()
        try:
            for chunk in _chunks(stream):
                pending.append(pool.submit(encode_chunk, chunk))
                if len(pending) > threads + 1:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _chunks(stream: Iterator[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    chunk, chars = [], 0
    for item in stream:
        chunk.append(item)
        chars += len(item[1].text or "")
        if chars >= _CHUNK_CHARS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _with_split(
    job: Job, files: Sequence[InputFile], index: int, document: Document, ids: Iterator[np.ndarray], eot_id: int
) -> Encoded:
    if document.text is None:
        return Encoded(document, index, "", np.empty(0, np.uint32), 0)
    split, n_bytes = split_of(job, files[index], document), len(document.text.encode())
    # The text is done with: what waits to be written keeps its ids alone
    return Encoded(document._replace(text=""), index, split, np.append(next(ids), np.uint32(eot_id)), n_bytes)


def _head_and_tail(documents: Iterator[Document], fraction: float) -> Iterator[Document]:
    """Cuts a text at a line's end so that the last `fraction` of it becomes the validation document."""
    for document in documents:
        if document.text is None or not fraction:
            yield document
            continue
        cut = document.text.find("\n", int(len(document.text) * (1 - fraction))) + 1
        cut = cut if 0 < cut < len(document.text) else int(len(document.text) * (1 - fraction))
        if 0 < cut < len(document.text):
            yield document._replace(text=document.text[:cut], split="train")
            yield document._replace(number=1, text=document.text[cut:], split="val")
        else:
            yield document._replace(split="train")
