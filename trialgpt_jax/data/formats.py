"""The format of a file or archive member, from its name; what its first bytes say."""

import codecs
import os
import re
from typing import NamedTuple

from trialgpt_jax.data import streams

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".tar": "tar",
    ".zip": "zip",
}
_SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".tbz": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
_ALONE = (".parquet", ".zip")  # compressed inside
ENDINGS = (*(e + c for e in _KINDS if e not in _ALONE for c in ("", *COMPRESSIONS)), *_ALONE, *_SHORT)
KNOWN = (
    ".txt .md .jsonl .ndjson .json .tar, each also with .gz .zst .xz or .bz2 after it; .tgz .txz .tbz2 .tzst .zip "
    ".parquet"
)


class Format(NamedTuple):
    """How a file is read.

    Attributes:
      kind: `text`, `json`, `parquet`, `tar`, `zip`; "" if the name does not say.
      compression: one of `COMPRESSIONS`, or "".
      plain: the name in lower case, without the ending of the compression.
    """

    kind: str
    compression: str
    plain: str


def of(name: str, extensions: tuple[str, ...] = ()) -> Format:
    """The format that a name says; upper and lower case are the same.

    Args:
      name: a file name or path.
      extensions: endings (`.py`) and whole file names (`LICENSE`) that are read as text besides `ENDINGS`.
    """
    plain = name.lower()
    for short, long in _SHORT.items():
        if plain.endswith(short):
            plain = plain.removesuffix(short) + long
    compression = next((ending for ending in COMPRESSIONS if plain.endswith(ending)), "")
    plain = plain.removesuffix(compression)
    kind = next((kind for ending, kind in _KINDS.items() if plain.endswith(ending)), "")
    if kind in ("parquet", "zip") and compression:
        kind = ""
    base = re.split(r"[/\\]", plain)[-1]
    if not kind and any(base.endswith(e) if e.startswith(".") else base == e for e in map(str.lower, extensions)):
        kind = "text"
    return Format(kind, compression, plain)


def extensions(option: str) -> tuple[str, ...]:
    """The entries of `data.source_options.extensions`, separated by spaces or commas; `*.py` is `.py`."""
    entries = [entry for entry in re.split(r"[\s,]+", option) if entry]
    return tuple(entry[1:] if entry.startswith("*.") else entry for entry in entries)


def is_tar(head: bytes | bytearray) -> bool:
    """Whether a file that begins with these (at least 262) bytes is a POSIX or GNU tar archive."""
    return head[257:262] == b"ustar"


_COMPRESSED = {  # the beginnings of compressed data; zstd has frames to skip, xz an older format
    ".gz": ("gzip", rb"\x1f\x8b"),
    ".zst": ("zstd", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    ".xz": ("xz", rb"\xfd7zXZ|\x5d\x00\x00"),
    ".bz2": ("bzip2", rb"BZh"),
}


def not_compressed(compression: str, head: bytes) -> str:
    """What is wrong with a file that begins with `head`, if it is not compressed as its ending says; "" if it is."""
    name, beginning = _COMPRESSED[compression]
    if len(head) < 8 or re.match(beginning, head):
        return ""
    return f"is not {name} data, though its name ends in {compression}"


def is_card(name: str, head: bytes) -> bool:
    """Whether a file is the README of a dataset, which begins with YAML; `name` may have a path before it."""
    first = head.removeprefix(codecs.BOM_UTF8).split(b"\n", 1)[0]
    return bool(re.search(r"(^|[/\\ ])readme\.md$", name, re.IGNORECASE)) and first.rstrip() == b"---"


_MAGIC = (  # first bytes, what they are, the ending that such a file has
    (b"\x1f\x8b\x08", "gzip", ".gz"),
    (b"\x28\xb5\x2f\xfd", "zstd", ".zst"),
    (b"\xfd7zXZ\x00", "xz", ".xz"),
    (b"PK\x03\x04", "zip", ".zip"),
)


_BINARY = {b"PAR1": "parquet", b"%PDF": "PDF", b"ARROW1": "Arrow", b"SQLite format 3": "SQLite", b"\x7fELF": "ELF"}
_BINARY |= {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"\xd0\xcf\x11\xe0": "Microsoft Office"}


def mismatch(kind: str, head: bytes) -> str:
    """What a file that begins with `head` is, if not the `text`, `json` or `tar` of its name; "" if it may be that."""
    for magic, name, ending in _MAGIC:
        if head.startswith(magic):
            return f"is {name} data, not {kind}; its name should end in {ending}"
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return f"is bzip2 data, not {kind}; its name should end in .bz2"
    if kind == "tar":
        return ""
    if is_tar(head) and b"\0" in head:
        return f"is a tar archive, not {kind}; its name should end in .tar"
    for magic, name in _BINARY.items():
        if b"\0" in head and head.startswith(magic):
            return f"is {name} data, not {kind}"
    if len(head) >= 8 and not head.strip(b"\0"):
        return "begins with NUL bytes alone, as a damaged file does"
    if len(head) >= 8 and head.strip(b"\0") and not (any(head[1::2]) and any(head[0::2])):
        return "looks like UTF-16 without a byte order mark; UTF-8 is wanted"
    if kind == "json" and head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is an HTML or XML page, not JSON"
    return ""


_TABLE = (
    'is a table; convert it with python -c "import pyarrow.csv as c, pyarrow.parquet as p; p.write_table(c.read_csv('
    '{path!r}, parse_options=c.ParseOptions(delimiter={delimiter!r}, newlines_in_values=True)), {parquet!r})" and name '
    "the column of the text with data.source_options.text_field"
)
_ARROW = (
    'is an Arrow file; if save_to_disk of `datasets` wrote it, convert it with python -c "import datasets; '
    'datasets.Dataset.from_file({path!r}).to_parquet({parquet!r})"'
)
_MARKUP = "holds formatted text; extract the text, and save it as .txt (one document) or .jsonl (one object a line)"
_PACKED = "is packed in a format that cannot be read; unpack it"
_ADVICE = {".csv": _TABLE, ".tsv": _TABLE, ".arrow": _ARROW} | dict.fromkeys((".7z", ".rar", ".lz4", ".z"), _PACKED)
_ADVICE |= dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".html", ".htm", ".xml"), _MARKUP)


def advice(name: str, path: str) -> str:
    """What a file that cannot be read is, and what makes it readable; continues a sentence that names the file."""
    plain = of(name).plain
    ending = re.search(r"(\.[^./\\]*)?$", plain)[0]
    if text := _ADVICE.get(ending):
        delimiter = "\t" if ending == ".tsv" else ","
        return text.format(path=path, parquet=path + ".parquet", delimiter=delimiter)
    try:
        with open(path, "rb") as file:
            if b"\0" in file.read(streams.HEAD) and not of(name).compression:
                return f"is not text; readable are {KNOWN}"
    except OSError:
        pass
    as_given = re.split(r"[/\\]", name)[-1][: len(re.split(r"[/\\]", plain)[-1])]
    own = os.path.splitext(as_given)[1] or as_given
    if re.search(r"[\s,]", own):
        return f"has none of the known endings {KNOWN}; a name that ends in .txt is read as text"
    return f"has none of the known endings {KNOWN}; data.source_options.extensions={own} reads it as text"


def has_tar(path: str, compression: str) -> bool:
    """Whether the compressed local file `path` holds a tar archive, as OpenWebText's `..._data.xz` do."""
    try:
        with open(path, "rb") as raw:
            return is_tar(streams.read_up_to(streams.decompressed(raw, compression), streams.HEAD))
    except streams.DAMAGE:
        return False


def is_readable(name: str, extensions: tuple[str, ...] = (), path: str = "") -> bool:
    """Whether a file can be read as documents.

    Args:
      name: its name; the ending says how it is read.
      extensions: as in `of`.
      path: a local path, whose contents tell whether a compressed file without another ending (`x_data.xz`) is a tar.
    """
    kind, compression, _ = of(name, extensions)
    return bool(kind) or bool(compression and path and has_tar(path, compression))
