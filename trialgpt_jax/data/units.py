"""Units of work: a group of input files -> finished shards. The boundaries of units depend on the input only.

A group is read in order, and a unit ends after the document that brings it to `shard_tokens` tokens. A unit writes at
most one shard of training and one of validation documents. Its bytes depend neither on the workers nor on what ran
before, so a unit that is on disk and recorded in the progress file is never written again.
"""

import collections
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.data import corpora
from trialgpt_jax.data.documents import Document, InputFile, read_documents
from trialgpt_jax.data.encoders import Encode
from trialgpt_jax.data.shard_writer import ShardWriter
from trialgpt_jax.data.token_store import SPLITS
from trialgpt_jax.data.vocabulary import Vocabulary
from trialgpt_jax.schema import choose

Report = Callable[[int, int, int, int], None]  # gets new documents, tokens, UTF-8 bytes, input bytes
_CHUNK_CHARS, _CHUNK_DOCUMENTS = 1 << 20, 1024  # one task of an encoding thread
OTHERS, MAX_SOURCES = "(others)", 100  # a corpus whose `source` is a URL would have one entry per document


@dataclass(frozen=True)
class Job:
    """How a corpus becomes a token store; every worker process gets a copy.

    Attributes:
      data: `config.data` as a dict, because reading a ConfigDict takes microseconds.
      val_rows: for `split=nanogpt`: file name -> the rows that are validation documents.
      only_text: the corpus is one text file, whose end becomes the validation document.
    """

    data: dict
    val_rows: dict[str, frozenset[int]]
    only_text: bool


class Task(NamedTuple):
    """An unfinished group: its number, its files, the number of its next unit, and where that begins (file, record)."""

    group: int
    files: list[InputFile]
    part: int
    start: Sequence[int]


class Encoded(NamedTuple):
    """A document without its text, its ids with end-of-text, and its size in UTF-8 bytes."""

    document: Document
    ids: np.ndarray
    n_bytes: int


def split_of(job: Job, file: InputFile, document: Document) -> str:
    """The split of a document, `train` or `val`."""
    return document.split or choose(_SPLITTERS, job.data["split"], "data.split")(job, file, document)


def _split_by_hash(job: Job, file: InputFile, document: Document) -> str:
    """By a hash of seed and text: independent of the order of documents and of their files."""
    key = job.data["split_seed"].to_bytes(8, "little")
    digest = hashlib.blake2b(document.text.encode(), digest_size=8, key=key).digest()
    return "val" if int.from_bytes(digest, "little") < job.data["val_fraction"] * 2.0**64 else "train"


def _split_by_row(job: Job, file: InputFile, document: Document) -> str:
    return "val" if document.number in job.val_rows[file.name] else "train"


_SPLITTERS = {"hash": _split_by_hash, "nanogpt": _split_by_row}


def read_group(job: Job, files: Sequence[InputFile], start: Sequence[int] = (0, 0)) -> Iterator[Document]:
    """The documents of a group from `start` on (number of a file, of a record in it), unusable ones included.

    Raises UserError for an unusable document, unless `on_error` is `skip`, or a file that cannot be read or fetched.
    """
    options = job.data["source_options"]
    for index in range(start[0], len(files)):
        first = start[1] if index == start[0] else 0
        with corpora.fetched(files[index], os.path.join(job.data["dir"], "downloads")) as path:
            if job.only_text:
                whole = read_documents(files[index], path, options)
                documents = (d for d in _head_and_tail(whole, job.data["val_fraction"]) if d.number >= first)
            else:
                documents = read_documents(files[index], path, options, first)
            for document in documents:
                if document.text is None and not document.left_out and options["on_error"] == "stop":
                    raise UserError(f"{document.where}; data.source_options.on_error=skip skips such documents")
                yield document._replace(file=index)


def encode_group(
    job: Job, tokenizer: Vocabulary, encode: Encode, threads: int, task: Task, report: Report
) -> Iterator[dict]:
    """Encodes the rest of a group and yields the record of every unit once it is durable on disk.

    Raises UserError as `read_group`, or for a disk that is full or fails; the units yielded so far stay valid.
    """
    folder, shard_tokens = job.data["dir"], job.data["shard_tokens"]
    starts = list(itertools.accumulate((file.size for file in task.files), initial=0))  # input bytes before each file
    reported = 0
    unit = _Unit(folder, task.group, task.part, tokenizer.dtype)
    try:
        chunks = _chunks(read_group(job, task.files, task.start))
        for chunk in _map(functools.partial(_encode_chunk, job, task.files, tokenizer, encode), chunks, threads):
            for item in chunk:
                unit.add(item)
                if unit.tokens >= shard_tokens:
                    yield unit.finish([item.document.file, item.document.number + 1])
                    unit = _Unit(folder, task.group, unit.part + 1, tokenizer.dtype)
            unit.write()
            last = chunk[-1].document
            read = starts[last.file] + last.position
            tokens, n_bytes = sum(len(item.ids) for item in chunk), sum(item.n_bytes for item in chunk)
            report(len(chunk), tokens, n_bytes, read - reported)
            reported = read
        yield unit.finish(None)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}; finished work is kept: "
            "free some space and run the same command again"
        ) from None
    finally:
        unit.abort()


class _Unit:
    """The shards of a unit while they are written, and its record."""

    def __init__(self, folder: str, group: int, part: int, dtype: str):
        self._folder, self._group, self.part, self._dtype = folder, group, part, dtype
        self._writers: dict[str, ShardWriter] = {}
        self._skipped, self._sources = collections.Counter(), {}
        self._unwritten: list[Encoded] = []
        self.tokens = 0

    def add(self, item: Encoded) -> None:
        if item.document.text is None:
            self._skipped[item.document.problem] += 1
            return
        source = item.document.source
        if source not in self._sources and len(self._sources) >= MAX_SOURCES:
            source = OTHERS
        add_counts(self._sources, source, (1, len(item.ids), item.n_bytes))
        self.tokens += len(item.ids)
        self._unwritten.append(item)

    def write(self) -> None:
        """Writes the documents that were added since the last call."""
        for split in SPLITS:
            if items := [item for item in self._unwritten if item.document.split == split]:
                if split not in self._writers:
                    # Its final number depends on all groups before this one, so `prepare.merge` gives it
                    name = f"{split}_{self._group:05d}_{self.part:04d}.bin"
                    self._writers[split] = ShardWriter(self._folder, name, split, self._dtype)
                ids = np.concatenate([item.ids for item in items])
                self._writers[split].append(ids, len(items), sum(item.n_bytes for item in items))
        self._unwritten = []

    def finish(self, following: list[int] | None) -> dict:
        """Makes the shards durable; the record names where the next unit begins, [file, record] or None."""
        self.write()
        shards = [self._writers[split].finish() for split in sorted(self._writers)]
        self._writers = {}
        return {
            "group": self._group,
            "part": self.part,
            "next": following,
            "shards": shards,
            "skipped": dict(sorted(self._skipped.items())),
            "sources": dict(sorted(self._sources.items())),
        }

    def abort(self) -> None:
        for writer in self._writers.values():
            writer.abort()


def add_counts(table: dict[str, list[int]], name: str, counts: Sequence[int]) -> None:
    """Adds documents, tokens and UTF-8 bytes to the entry `name`."""
    table[name] = [a + b for a, b in zip(table.get(name, (0, 0, 0)), counts, strict=True)]


def _map(function: Callable, items: Iterable, threads: int) -> Iterator:
    """`map` in several threads, in order; at most threads + 2 items are in memory."""
    if threads <= 1:
        yield from map(function, items)
        return
    pool, pending = ThreadPoolExecutor(threads), collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk, chars = [], 0
    for document in documents:
        chunk.append(document)
        chars += len(document.text or "")
        if chars >= _CHUNK_CHARS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _encode_chunk(
    job: Job, files: list[InputFile], tokenizer: Vocabulary, encode: Encode, chunk: list[Document]
) -> list[Encoded]:
    try:
        all_ids = encode([document.text for document in chunk if document.text is not None])
    except UserError:  # a character that the tokenizer `char` does not have
        chunk = [_encodable(job, files, encode, document) for document in chunk]
        all_ids = encode([document.text for document in chunk if document.text is not None])
    encoded, ids = [], iter(all_ids)
    for document in chunk:
        if document.text is None:
            encoded.append(Encoded(document, np.empty(0, np.uint32), 0))
        else:
            split, n_bytes = split_of(job, files[document.file], document), len(document.text.encode())
            whole = next(ids)
            if tokenizer.eot_id is not None:
                whole = np.append(whole, np.uint32(tokenizer.eot_id))
            encoded.append(Encoded(document._replace(text="", split=split), whole, n_bytes))
    return encoded


def _encodable(job: Job, files: list[InputFile], encode: Encode, document: Document) -> Document:
    """The document, without its text if that cannot be encoded and `on_error` is `skip`. Raises UserError otherwise."""
    try:
        encode([document.text or ""])
    except UserError as error:
        where = f"{files[document.file].name}, document {document.number}: {error}"
        if job.data["source_options"]["on_error"] == "stop":
            raise UserError(f"{where}; data.source_options.on_error=skip skips such documents") from None
        return document._replace(text=None, problem="unknown character", where=where)
    return document


def _head_and_tail(documents: Iterator[Document], fraction: float) -> Iterator[Document]:
    """Cuts a text at the end of a line so that the last `fraction` of it becomes the validation document."""
    for document in documents:
        text = document.text or ""
        middle = int(len(text) * (1 - fraction))
        line_end = text.find("\n", middle) + 1
        cut = line_end if 0 < line_end < len(text) else middle
        if 0 < cut < len(text):
            yield document._replace(text=text[:cut], split="train")
            yield document._replace(number=1, text=text[cut:], split="val")
        else:
            yield document._replace(split="train")
