"""Event files for TensorBoard: scalars, texts and settings in TFRecord framing, written without a library.

tensorboardX imports torch if it is installed, which takes two seconds of every start, and a full disk ends its writer
thread, after which the run waits without end. Formats: TensorFlow's `event.proto`, `summary.proto`,
`tensor.proto` and TFRecord, TensorBoard's `hparams/plugin_data.proto`.
"""

import math
import os
import socket
import struct
import time

from trialgpt_jax.storage import files


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, reflected
        table.append(byte)
    return table


_TABLE = _crc32c_table()


def _masked_crc(data: bytes) -> bytes:
    """TFRecord's masked CRC-32C of `data`, little-endian."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field: bytes, text or a message."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


_TEXT = _field(9, _field(1, _field(1, b"text")))  # metadata {plugin_data {plugin_name}}


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _value(value: object) -> bytes:
    """A google.protobuf.Value."""
    if isinstance(value, bool):
        return b"\x20" + bytes([value])
    if isinstance(value, (int, float)):
        return b"\x11" + struct.pack("<d", value)
    return _field(3, _utf8("|".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))


def _float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", math.copysign(math.inf, value))


class EventFile:
    """A new event file in a folder.

    Args:
      folder: created if it does not exist.
      resume_step: not 0 = TensorBoard drops points of later steps, written by an earlier process.
    """

    def __init__(self, folder: str, resume_step: int):
        os.makedirs(folder, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"  # sorts by creation time
        self._path = os.path.join(folder, name)
        self._file = open(self._path, "xb")  # noqa: SIM115 - closed by `close`
        self._add(0, _field(3, b"brain.Event:2"))  # file_version
        if resume_step:
            self._add(resume_step + 1, _field(7, b"\x08\x01"))  # session_log {status: START}
        self._flush()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Adds a point to each curve; flushed every 30 seconds.

        Raises:
          OSError: it cannot be written.
        """
        # summary {value {tag, simple_value}}
        values = (_field(1, name.encode()) + b"\x15" + _float32(value) for name, value in numbers.items())
        self._add(step, _field(5, b"".join(_field(1, value) for value in values)))
        if time.monotonic() - self._flushed > 30:
            self._flush()

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        """Adds texts, which TensorBoard shows as Markdown, under their tags; flushed at once.

        Raises:
          OSError: it cannot be written.
        """
        # summary {value {tag, tensor {dtype: DT_STRING, tensor_shape {}, string_val}, metadata}}
        values = (
            _field(1, tag.encode()) + _field(8, b"\x08\x07" + _field(2, b"") + _field(8, _utf8(text))) + _TEXT
            for tag, text in texts.items()
        )
        self._add(step, _field(5, b"".join(_field(1, value) for value in values)))
        self._flush()

    def write_hparams(self, values: dict[str, object]) -> None:
        """Adds the settings of a run, for the tab HPARAMS: numbers, booleans and texts by name.

        Raises:
          OSError: it cannot be written.
        """
        # HParamsPluginData {version: 0, session_start_info {hparams {key, value}, start_time_secs}}
        pairs = (_field(1, _field(1, _utf8(name)) + _field(2, _value(value))) for name, value in values.items())
        info = b"".join(pairs) + b"\x29" + struct.pack("<d", time.time())
        metadata = _field(9, _field(1, _field(1, b"hparams") + _field(2, _field(3, info))))
        null = _field(8, b"\x08\x01" + _field(2, _field(2, b"\x08\x01")) + _field(4, b"\0" * 4))  # DT_FLOAT [1]
        self._add(0, _field(5, _field(1, _field(1, b"_hparams_/session_start_info") + null + metadata)))
        self._flush()

    def _add(self, step: int, what: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + what  # wall_time, step
        length = struct.pack("<Q", len(event))
        with files.named(self._path):
            self._file.write(length + _masked_crc(length) + event + _masked_crc(event))

    def _flush(self) -> None:
        with files.named(self._path):
            self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()
