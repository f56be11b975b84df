"""An input file -> its documents, usable or not, from any record on.

Formats by ending: .txt .md (one document per file); .jsonl .ndjson .json (an object per document) and .parquet (a row
per document), both with a text field; .tar .zip (members by the same rules). All but .parquet and .zip may be
compressed: .gz .zst .xz .bz2. Everything is read as a stream, and no document is longer than `max_document_bytes`.
"""

import io
from collections.abc import Iterator, Mapping

from trialgpt_jax import UserError
from trialgpt_jax.data import archives, formats, hub, streams
from trialgpt_jax.data.formats import is_readable
from trialgpt_jax.data.json_documents import json_documents
from trialgpt_jax.data.parquet_documents import count_rows as count_local_rows
from trialgpt_jax.data.parquet_documents import parquet_documents
from trialgpt_jax.data.records import (
    MAX_SOURCE,
    UNREADABLE,
    Context,
    Document,
    InputFile,
    document,
    failed,
    too_large,
    unusable,
)
from trialgpt_jax.storage.files import is_lfs_pointer, is_remote, open_file

_LFS_POINTER = "is a Git LFS pointer and not the file; `git lfs pull` in its repository fetches that"
__all__ = ["Document", "InputFile", "count_rows", "is_readable", "is_text", "read_documents"]


def read_documents(file: InputFile, path: str, options: Mapping, start: int = 0) -> Iterator[Document]:
    """The records of a file from number `start` on, unusable ones included; `path` is its local copy.

    Raises:
      UserError: it has no column `text_field`, or one that is not text.
    """
    wanted = {name.strip()[:MAX_SOURCE] for name in options["subset"].split(",") if name.strip()}
    number = start
    try:
        with open_file(path) as raw:
            context = Context(file.name, options, raw.tell, raw)
            for record in _records(context, raw, start):
                if record.problem == UNREADABLE:  # not before `start`, where the file could be read once
                    record = record._replace(number=max(start, record.number))
                if record.number >= start and (not wanted or record.text is None or record.source in wanted):
                    yield record
                number = max(number, record.number + 1)
    except OSError as error:
        yield failed(Context(file.name, options, lambda: file.size), number, error)


def count_rows(file: InputFile) -> int:
    """The number of rows of a parquet file, from its footer; UserError if the file is not parquet."""
    if formats.of(file.name).kind != "parquet":
        raise UserError(f"data.split=nanogpt numbers rows, so it needs .parquet files, not {file.name}; use hash")
    if is_remote(file.path):
        return hub.count_rows(file.path)
    try:
        with open(file.path, "rb") as raw:
            if is_lfs_pointer(raw.read(streams.HEAD)):
                raise UserError(f"{file.name} {_LFS_POINTER}")
    except OSError as error:
        raise UserError(f"{file.name} cannot be read: {error.strerror or error}") from None
    return count_local_rows(file.name, file.path)


def is_text(file: InputFile, options: Mapping) -> bool:
    """Whether the whole file is one document."""
    return formats.of(file.name, formats.extensions(options["extensions"])).kind == "text"


def _records(context: Context, stream: io.IOBase, start: int = 0) -> Iterator[Document]:
    """The records of a file or of a member of an archive; also some before `start`, where that costs nothing."""
    kind, compression, _ = formats.of(context.name, formats.extensions(context.options.get("extensions", "")))
    try:
        head = bytes(streams.read_up_to(stream, streams.HEAD))
        if is_lfs_pointer(head):
            yield unusable(context, 0, "Git LFS pointer", f"{context.name} {_LFS_POINTER}")
            return
        if not head:
            yield unusable(context, 0, "empty file", f"{context.name} is empty")
            return
        if context.raw is not None:
            context.raw.seek(0)
        else:
            stream = streams.buffered(stream, head)
        if compression:
            if found := formats.not_compressed(compression, head):
                yield unusable(context, 0, "wrong format", f"{context.name} {found}")
                return
            head, stream = streams.peeked(streams.decompressed(stream, compression))
    except streams.DAMAGE as error:
        yield failed(context, 0, error, ", line 1" if kind == "json" else "")
        return
    if kind in ("text", "json", "tar") and (found := formats.mismatch(kind, head)):
        yield unusable(context, 0, "wrong format", f"{context.name} {found}")
        return
    if not kind and formats.is_tar(head):
        kind = "tar"
    if kind in ("tar", "zip") and context.depth >= archives.MAX_DEPTH:
        why = f"{context.name}: archives within archives are read {archives.MAX_DEPTH} deep"
        yield unusable(context, 0, "nested archives", why)
    elif kind in ("zip", "parquet") and context.raw is None:
        why = f"{context.name}: {kind} is not read within an archive, because its directory is at its end"
        yield unusable(context, 0, f"{kind} in an archive", why)
    elif kind == "text" and context.depth and formats.is_card(context.name, head):
        why = f"{context.name} is left out: dataset card in an archive"
        yield unusable(context, 0, "dataset card in an archive", why)._replace(left_out=True)
    elif kind == "text":
        yield _whole_text(context, stream)
    elif kind == "json":
        yield from json_documents(context, stream, start)
    elif kind == "parquet":
        yield from parquet_documents(context, start)
    elif kind == "tar":
        yield from archives.tar_documents(context, stream, _records)
    elif kind == "zip":
        yield from archives.zip_documents(context, _records)
    else:
        reason = "other ending in an archive" if context.depth else "other ending"
        yield unusable(context, 0, reason, f"{context.name}: {reason}")._replace(left_out=True)


def _whole_text(context: Context, stream: io.IOBase) -> Document:
    try:
        data = streams.read_up_to(streams.utf8(stream), context.limit + 1)
    except streams.DAMAGE as error:
        return failed(context, 0, error)
    if len(data) > context.limit:
        return too_large(context, 0, context.name)
    made = document(context, 0, data, context.name)
    if made.problem == "invalid UTF-8":
        made = made._replace(where=f"{made.where}; text in latin-1 or another encoding is to be converted to UTF-8")
    return made
