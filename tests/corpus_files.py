"""Corpora that tests write: their records as the reader gives them, and archives of files."""

import io
import json
import tarfile
import zipfile

import pyarrow as pa

from trialgpt_jax.config import default_config
from trialgpt_jax.data import corpora
from trialgpt_jax.data.documents import read_documents


def options(path, **changes):
    return default_config().data.source_options.to_dict() | {"path": str(path)} | changes


def read(path, start=0, **changes):
    """All records of all files, in order, each file from record `start` on."""
    given = options(path, **changes)
    return [d for file in corpora.list_files("files", given) for d in read_documents(file, file.path, given, start)]


def lines(*records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def zst(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def tar(members, **options):
    """An archive of (name, contents) pairs or `TarInfo`s."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def packed(members, method=zipfile.ZIP_DEFLATED):
    """A zip archive of (name, contents) pairs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def peak_memory(path, **changes):
    """Python source of a program that reads `path` and prints the growth of its peak memory, MiB, then its records."""
    return f"""
import resource
from corpus_files import options
from trialgpt_jax.data import corpora, documents
import pyarrow.parquet, pyarrow.compute
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
given = options({str(path)!r}, **{changes!r})
(file,) = corpora.list_files("files", given)
before = peak()
records = [(d.text or d.problem) for d in documents.read_documents(file, file.path, given)]
print(peak() - before, *records)
"""
