"""An input file -> its documents, usable or not, from any record on.

Formats by ending: .txt .md (one document per file); .jsonl .json (one JSON object per line) and .parquet (one row per
document), both with a text field. Text formats may be compressed: .gz .zst.
"""

import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from trialgpt_jax import UserError
from trialgpt_jax.data import hub
from trialgpt_jax.storage.files import is_remote

_COMPRESSIONS = (".gz", ".zst")
# What reading a damaged compressed stream raises: truncated; invalid data (gzip); bad header or checksum, zstd
_DAMAGE = (EOFError, zlib.error, OSError)


class InputFile(NamedTuple):
    """One file of a corpus.

    Attributes:
      name: its path relative to the corpus, or its URL; used in messages and in the manifest's digest.
      size: bytes as stored; 0 if unknown.
      path: local path, or the URL of a remote file: `hf://datasets/owner/name@revision/path` or `https://...`.
    """

    name: str
    size: int
    path: str

    @property
    def text_bytes(self) -> int:
        """Estimated bytes of text in it; compressed files and parquet hold about three times their size."""
        return self.size * (3 if self.name.endswith((*_COMPRESSIONS, ".parquet")) else 1)

    @property
    def is_text(self) -> bool:
        """Whether the whole file is one document."""
        return _reader(self.name) is _whole_text


class Document(NamedTuple):
    """A record of an input file.

    Attributes:
      number: its number in the file, from 0; unusable records count.
      text: None for an unusable record.
      source: its `source` field, or "".
      position: bytes of the file read so far, as stored.
      problem: of an unusable record: the kind of problem, in a few words; the manifest counts these.
      where: of an unusable record: file, line and reason.
      split: `train` or `val`; "" if not decided yet.
      file: number of its file in the group; set by `units.read_group`.
    """

    number: int
    text: str | None
    source: str
    position: int
    problem: str = ""
    where: str = ""
    split: str = ""
    file: int = 0


def read_documents(file: InputFile, path: str, options: Mapping, start: int = 0) -> Iterator[Document]:
    """The records of a file from number `start` on, unusable ones included; `path` is its local copy.

    Raises:
      UserError: the file cannot be opened, or has no column `text_field`.
    """
    wanted = {name.strip() for name in options["subset"].split(",") if name.strip()}
    try:
        with open(path, "rb") as raw:
            if os.fstat(raw.fileno()).st_size == 0:
                records = iter([_unusable(0, "empty file", f"{file.name} is empty", 0)])
            else:
                records = _reader(file.name)(file, raw, options, start)
            for record in records:
                if record.number >= start and (not wanted or record.text is None or record.source in wanted):
                    yield record
    except OSError as error:
        raise UserError(f"{file.name} cannot be read: {error.strerror or error}") from None


def count_rows(file: InputFile) -> int:
    """The number of rows of a parquet file, from its footer; UserError if the file is not parquet."""
    if not file.name.endswith(".parquet"):
        raise UserError(f"data.split=nanogpt numbers rows, so it needs .parquet files, not {file.name}; use hash")
    if is_remote(file.path):
        return hub.count_rows(file.path)
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file.path).metadata.num_rows


def _unusable(number: int, problem: str, where: str, position: int, source: str = "") -> Document:
    return Document(number, None, source, position, problem, where)


def _decompressed(name: str, raw: io.BufferedReader) -> io.BufferedIOBase:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


def _whole_text(file: InputFile, raw: io.BufferedReader, options: Mapping, start: int) -> Iterator[Document]:
    try:
        data = _decompressed(file.name, raw).read()
    except _DAMAGE as error:
        yield _unusable(0, "damaged file", f"{file.name}: damaged or truncated ({error})", file.size)
    else:
        yield _document(0, data, file.name, "", "", file.size)


def _json_lines(file: InputFile, raw: io.BufferedReader, options: Mapping, start: int) -> Iterator[Document]:
    number = -1
    try:
        for number, line in enumerate(_decompressed(file.name, raw)):
            if number >= start and not line.isspace():
                yield _json_record(number, line, f"{file.name}, line {number + 1}", options["text_field"], raw.tell())
    except _DAMAGE as error:
        where = f"{file.name}, line {number + 2}: the file is damaged or truncated here ({error})"
        yield _unusable(number + 1, "damaged file", where, file.size)


def _json_record(number: int, line: bytes, where: str, text_field: str, position: int) -> Document:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return _unusable(number, "invalid UTF-8", f"{where}: invalid UTF-8 at byte {error.start} of the line", position)
    except (ValueError, RecursionError) as error:
        return _unusable(number, "malformed JSON", f"{where}: malformed JSON ({error})", position)
    record = record if isinstance(record, dict) else {}
    return _document(number, record.get(text_field), where, text_field, record.get("source"), position)


def _parquet_rows(file: InputFile, raw: io.BufferedReader, options: Mapping, start: int) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    number, field = 0, options["text_field"]
    try:
        table = pyarrow.parquet.ParquetFile(raw)
        names = table.schema_arrow.names
        if field not in names:
            raise UserError(
                f"{file.name} has no column `{field}` (data.source_options.text_field), but {', '.join(names)}"
            )
        columns = [field] + ["source"] * ("source" in names and field != "source")
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if number + rows <= start:
                number += rows
                continue
            for batch in table.iter_batches(256, [group], columns):
                sources = batch["source"].to_pylist() if len(columns) > 1 else [""] * len(batch)
                for text, source in zip(_strings(batch[field]), sources, strict=True):
                    position = file.size * number // table.metadata.num_rows
                    yield _document(number, text, f"{file.name}, row {number}", field, source, position)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        where = f"{file.name}: damaged parquet, row {number} ({error})"
        yield _unusable(number, "damaged file", where, file.size)


def _strings(column) -> list:
    """Python strings, or bytes if any of them is not UTF-8."""
    with contextlib.suppress(UnicodeDecodeError):
        return column.to_pylist()
    return column.cast("binary").to_pylist()


def _document(number: int, text: object, where: str, text_field: str, source: object, position: int) -> Document:
    """A document from the value of its text field: a string, or UTF-8 bytes whose byte order mark is dropped."""
    source = source if isinstance(source, str) else ""
    try:
        if isinstance(text, bytes):
            text = text.decode().removeprefix("\ufeff")
        elif isinstance(text, str) and not text.isascii():
            text.encode()
    except UnicodeDecodeError as error:
        problem, why = "invalid UTF-8", f"invalid UTF-8 at byte {error.start} (0x{text[error.start]:02x})"
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair as \ud83d
        problem, why = "invalid UTF-8", "the text has half a surrogate pair, which UTF-8 cannot encode"
    else:
        if isinstance(text, str) and text:
            return Document(number, text, source, position)
        if isinstance(text, str):
            problem, why = "empty document", "the document is empty"
        else:
            problem = "no text field"
            why = f"the text field `{text_field}` is missing or not a string; see data.source_options.text_field"
    return _unusable(number, problem, f"{where}: {why}", position, source)


_READERS = {
    ".txt": _whole_text,
    ".md": _whole_text,
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet_rows,
}
ENDINGS = (*(e + c for e in _READERS if e != ".parquet" for c in ("", *_COMPRESSIONS)), ".parquet")


def _reader(name: str) -> Callable[[InputFile, io.BufferedReader, Mapping, int], Iterator[Document]]:
    """The reader of a file whose name ends with one of `ENDINGS`."""
    plain = name.removesuffix(".gz").removesuffix(".zst")
    return next(reader for ending, reader in _READERS.items() if plain.endswith(ending))
