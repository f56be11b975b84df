"""Archives -> the records of their members, as a stream: nothing is extracted, so names and links lead nowhere.

The records of an archive are numbered through, those of a member that is left out or damaged included.
"""

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator

from trialgpt_jax.data import formats, streams
from trialgpt_jax.data.records import Context, Document, failed, unusable

MAX_DEPTH = 4  # archives within archives; OpenWebText's have 2
_LONGEST_HEADER = 1 << 20  # bytes of a name or of extended attributes, which tarfile reads at once
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_EXTENDED += (tarfile.GNUTYPE_LONGLINK,)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)  # deflate64 is 9
ReadMember = Callable[[Context, io.IOBase], Iterator[Document]]


class _Member(tarfile.TarInfo):
    """A member whose header is checked: tarfile takes a damaged one, and a missing end, for the end of the archive."""

    @classmethod
    def frombuf(cls, buffer: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        member = super().frombuf(buffer, encoding, errors)
        if member.type in _EXTENDED and member.size > _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {member.size} bytes")
        return member

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}") from None


def tar_documents(context: Context, stream: io.IOBase, read_member: ReadMember) -> Iterator[Document]:
    """The records of the members of a tar archive, in its order."""
    numbered = _Numbered(context)
    try:
        archive = tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member)  # noqa: SIM115 - owns nothing
        while (member := _following(archive)) is not None:
            if member.isdir():
                continue
            reason = "" if member.isreg() else "link or device in an archive"
            if reason := reason or _left_out(context, member.name):
                yield numbered.left_out(member.name, reason)
            else:
                yield from numbered.records(member.name, _Stream(archive.extractfile(member)), read_member)
        while rest := archive.fileobj.read(1 << 18):  # to the end, where a compressed stream has its checksum
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is something after the end of the archive")
    except (tarfile.TarError, *streams.DAMAGE) as error:
        yield failed(context, numbered.next, error, f", after {numbered.next} records")


def _following(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    archive.members = []  # it keeps all of them for links
    try:
        return archive.next()
    except ValueError as error:  # numbers in extended headers
        raise tarfile.ReadError(str(error)) from None


def zip_documents(context: Context, read_member: ReadMember) -> Iterator[Document]:
    """The records of the members of the zip archive `context.raw`, in the order of its directory."""
    numbered = _Numbered(context)
    try:
        archive = zipfile.ZipFile(context.raw)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        yield failed(context, 0, error)
        return
    for member in archive.infolist():
        if member.is_dir():
            continue
        if reason := _left_out(context, member.filename):
            yield numbered.left_out(member.filename, reason)
            continue
        if member.flag_bits & 1:
            yield numbered.refused(member.filename, "encrypted file", "is encrypted")
            continue
        if member.compress_type not in _METHODS:
            how = f"is compressed with method {member.compress_type}, which cannot be read; pack it with another one"
            yield numbered.refused(member.filename, "unknown compression", how)
            continue
        try:
            stream = archive.open(member)
        except (zipfile.BadZipFile, RuntimeError, ValueError, *streams.DAMAGE) as error:  # an unknown codec
            yield numbered.failed(member.filename, error)
        else:
            with stream:
                yield from numbered.records(member.filename, _Stream(stream), read_member)


class _Stream(streams.Readable):
    """The contents of a member; damage is one of `streams.DAMAGE`, as in the other formats."""

    def __init__(self, stream: io.IOBase):
        self._stream = stream

    def next_bytes(self, n: int) -> bytes:
        try:
            return self._stream.read(n)
        except (tarfile.TarError, zipfile.BadZipFile) as error:
            raise EOFError(str(error)) from None


def _left_out(context: Context, name: str) -> str:
    """Why a member is not read; "" if it is."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in (".", "..", "")]
    if any(part.startswith(".") for part in parts):
        return "hidden file in an archive"
    kind, compression, _ = formats.of(name, formats.extensions(context.options.get("extensions", "")))
    return "" if kind or compression else "other ending in an archive"


class _Numbered:
    """Gives the records of consecutive members their numbers in the archive."""

    def __init__(self, context: Context):
        self._context, self.next = context, 0

    def records(self, name: str, stream: io.IOBase, read_member: ReadMember) -> Iterator[Document]:
        first = self.next
        for record in read_member(self._inner(name), stream):
            self.next = first + record.number + 1
            yield record._replace(number=first + record.number)

    def left_out(self, name: str, reason: str) -> Document:
        return self.refused(name, reason, f"is left out: {reason}")._replace(left_out=True)

    def refused(self, name: str, problem: str, why: str) -> Document:
        inner = self._inner(name)
        return self._take(unusable(inner, 0, problem, f"{inner.name} {why}"))

    def failed(self, name: str, error: Exception) -> Document:
        return self._take(failed(self._inner(name), 0, error))

    def _inner(self, name: str) -> Context:
        name = f"{self._context.name}, {name}"
        return self._context._replace(name=name, raw=None, depth=self._context.depth + 1)

    def _take(self, record: Document) -> Document:
        self.next += 1
        return record._replace(number=self.next - 1)
