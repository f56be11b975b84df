"""Binary streams of input files: decompressed, joined, as UTF-8; in chunks, so that their size does not matter."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable

# What reading a damaged compressed stream raises: truncated; invalid data; bad header or checksum, zstd, bzip2
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, OSError)
HEAD = 512  # bytes that tell a format: tar has its magic at 257
_CHUNK = 1 << 18
_XZ_MEMORY = 256 << 20  # bytes of the decoder; `xz -9` needs 65 MiB, a dictionary can have 1.5 GiB
_ENCODINGS = {  # in this order, because the mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def buffered(stream: io.IOBase, head: bytes = b"") -> io.BufferedReader:
    """`head`, which was read from `stream` before, and the rest of it."""
    return io.BufferedReader(_Chained(head, stream), _CHUNK)


def read_up_to(stream: io.IOBase, n: int) -> bytearray:
    """The next `n` bytes; fewer only at the end of the stream."""
    read, data = _read1(stream), bytearray()
    while len(data) < n and (more := read(min(n - len(data), 1 << 20))):
        data += more
    return data


def peeked(stream: io.IOBase) -> tuple[bytes, io.BufferedReader]:
    """The first `HEAD` bytes, and the stream from its beginning; what precedes a damaged place is kept."""
    read, data = _read1(stream), bytearray()
    try:
        while len(data) < HEAD and (more := read(HEAD - len(data))):
            data += more
    except DAMAGE as error:
        if not data:
            raise
        stream = _Damaged(error)
    return bytes(data), buffered(stream, bytes(data))


def decompressed(raw: io.IOBase, compression: str) -> io.IOBase:
    """A stream of what `raw` holds; `compression` is one of `formats.COMPRESSIONS` or "". Reads raise `DAMAGE`."""
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)
    if compression == ".xz":
        return io.BufferedReader(_Decompressed(raw, _xz_decoder), _CHUNK)
    if compression == ".bz2":
        return io.BufferedReader(_Decompressed(raw, bz2.BZ2Decompressor), _CHUNK)
    return raw


def utf8(stream: io.BufferedReader) -> io.BufferedReader:
    """`stream` without a byte order mark; text that begins with that of UTF-16 or UTF-32 becomes UTF-8."""
    head = bytes(read_up_to(stream, 4))
    for mark, encoding in _ENCODINGS.items():
        if head.startswith(mark):
            return io.BufferedReader(_Transcoded(buffered(stream, head), encoding), _CHUNK)
    return buffered(stream, head.removeprefix(codecs.BOM_UTF8))


def _xz_decoder() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=_XZ_MEMORY)


def _read1(stream: io.IOBase) -> Callable[[int], bytes]:
    """Reads what there is: `read` drops what precedes a damaged place."""
    return getattr(stream, "read1", stream.read)


class Readable(io.RawIOBase):
    """`readinto` by means of `next_bytes(n)`, which returns at most `n` bytes, and none at the end."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self.next_bytes(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Chained(Readable):
    def __init__(self, head: bytes, stream: io.IOBase):
        self._head, self._read = head, _read1(stream)

    def next_bytes(self, n: int) -> bytes:
        if self._head:
            head, self._head = self._head[:n], self._head[n:]
            return head
        return self._read(n)


class _Damaged(Readable):
    """The rest of a stream from a damaged place on."""

    def __init__(self, error: Exception):
        self._error = error

    def next_bytes(self, n: int) -> bytes:
        raise self._error


class _Decompressed(Readable):
    """Streams of xz or bzip2, one after another as their commands write them; anything else after them is an error.

    Not `lzma.open`: that has no limit of memory, and ignores what follows the first stream if it is not xz.
    """

    def __init__(self, raw: io.IOBase, new_decoder: Callable):
        self._raw, self._new_decoder, self._decoder = raw, new_decoder, new_decoder()

    def next_bytes(self, n: int) -> bytes:
        while True:
            if self._decoder.eof:
                rest = self._decoder.unused_data.lstrip(b"\0")  # xz pads streams with zeros
                while not rest and (data := self._raw.read(_CHUNK)):
                    rest = data.lstrip(b"\0")
                if not rest:
                    return b""
                self._decoder = self._new_decoder()
            elif self._decoder.needs_input:
                rest = self._raw.read(_CHUNK)
                if not rest:
                    raise EOFError("it ends before the end of the compressed data")
            else:
                rest = b""
            if data := self._decoder.decompress(rest, n):
                return data


class _Transcoded(Readable):
    """UTF-8 of text in another encoding."""

    def __init__(self, stream: io.IOBase, encoding: str):
        self._stream, self._encoding = stream, encoding
        self._decoder, self._rest = codecs.getincrementaldecoder(encoding)(), b""

    def next_bytes(self, n: int) -> bytes:
        while not self._rest:
            data = self._stream.read(_CHUNK)
            try:
                self._rest = self._decoder.decode(data, final=not data).encode()
            except UnicodeDecodeError as error:
                raise OSError(f"invalid {self._encoding.upper()}: {error.reason}") from None
            if not data:
                break
        data, self._rest = self._rest[:n], self._rest[n:]
        return data
