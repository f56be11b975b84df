"""Input files and their records: one way to make a `Document` from the value of a text field, whatever the format."""

import io
import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

from trialgpt_jax.data import formats

MAX_SOURCE = 200  # characters of a source that are kept
UNREADABLE = "unreadable"  # the problem of a file that the disk or its permissions keep from being read


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
        kind, compression, _ = formats.of(self.name)
        return self.size * (3 if compression or kind in ("parquet", "zip") else 1)


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
      left_out: nothing is wrong with the record, but it is not text, as a picture in an archive; never an error.
    """

    number: int
    text: str | None
    source: str
    position: int
    problem: str = ""
    where: str = ""
    split: str = ""
    file: int = 0
    left_out: bool = False


class Context(NamedTuple):
    """What a reader needs besides its stream.

    Attributes:
      name: of the file for messages, or of the member of an archive.
      options: `data.source_options`.
      position: gives the bytes of the input file read so far.
      raw: the input file, seekable; None in an archive.
      depth: archives around it.
    """

    name: str
    options: Mapping
    position: Callable[[], int]
    raw: io.BufferedReader | None = None
    depth: int = 0

    @property
    def limit(self) -> int:
        """Bytes of the longest document, as UTF-8."""
        return self.options["max_document_bytes"]


def unusable(context: Context, number: int, problem: str, why: str, source: str = "") -> Document:
    """A record that cannot be used; `why` is a full line that names the file."""
    return Document(number, None, source, context.position(), problem, " ".join(why.split()))


def failed(context: Context, number: int, error: Exception, place: str = "") -> Document:
    """The record at which reading failed: `error` is of the disk, which has an errno, or comes from damaged data.

    `place` is where in the file, as ", line 7".
    """
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if getattr(error, "errno", None):
        why = f"{context.name}{place} cannot be read: {error.strerror or text}"
        return unusable(context, number, UNREADABLE, why)
    what = f"{place}: the file is damaged or truncated here" if place else ": damaged or truncated"
    return unusable(context, number, "damaged file", f"{context.name}{what} ({text})")


def too_large(context: Context, number: int, where: str, source: str = "") -> Document:
    """A record whose text has more bytes than `context.limit`."""
    why = f"{where}: longer than data.source_options.max_document_bytes={context.limit}; a larger value reads it"
    return unusable(context, number, "too large", why, source)


def document(context: Context, number: int, text: object, where: str, source: object = "") -> Document:
    """A document from the value of its text field.

    Args:
      text: usable are a string, and UTF-8 in bytes.
      where: file and line, row or element.
      source: the value of its field `source`.
    """
    source, field = source_text(source), context.options["text_field"]
    try:
        if isinstance(text, (bytes, bytearray)):
            size = len(text)
            text = text.decode() if size <= context.limit else ""
        elif isinstance(text, str):
            size = len(text) if text.isascii() or len(text) > context.limit else len(text.encode())
        else:
            what = "null" if text is None else f"{type(text).__name__}, not a string"
            why = f"the text field `{field}` is {what}; see data.source_options.text_field"
            return unusable(context, number, "no text field", f"{where}: {why}", source)
    except UnicodeDecodeError as error:
        why = f"invalid UTF-8 at byte {error.start} (0x{text[error.start]:02x})"
        return unusable(context, number, "invalid UTF-8", f"{where}: {why}", source)
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair as \ud83d
        why = "the text has half a surrogate pair, or a byte that is not UTF-8"
        return unusable(context, number, "invalid UTF-8", f"{where}: {why}", source)
    if size > context.limit:
        return too_large(context, number, where, source)
    if not text:
        return unusable(context, number, "empty document", f"{where}: the document is empty", source)
    return Document(number, text, source, context.position())


def source_text(value: object) -> str:
    """The name of a source: a string itself, null "", anything else its JSON text; valid Unicode, not longer than 200.

    `subset` is compared with it and the manifest counts by it.
    """
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is None:
        return ""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False, default=str)
        except (ValueError, TypeError, RecursionError):  # keys that are no strings
            value = str(value)
    value = value[:MAX_SOURCE]
    return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
