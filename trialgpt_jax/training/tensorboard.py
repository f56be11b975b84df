"""Event files for TensorBoard: scalars, as records of protocol buffers, written without a library.

tensorboardX imports torch wherever that is installed, two seconds of every start, and its writer has a thread that a full disk
ends, whereupon the run would wait for ever. The formats: TensorFlow's `event.proto`, `summary.proto` and TFRecord.
"""

import os
import socket
import struct
import time


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, reflected
        table.append(byte)
    return table


_TABLE = _crc32c_table()


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C of `data`, rotated and shifted as TFRecord has it, little-endian."""
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
    """A field of bytes, text or a message."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


class EventFile:
    """One event file of a folder, begun now.

    Args:
      folder: made if it is not there.
      resume_step: not 0 = hide the points of steps after it, which an earlier process wrote and this one will write again.
    """

    def __init__(self, folder: str, resume_step: int):
        os.makedirs(folder, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"  # sorts by the time when it was begun
        self._file = open(os.path.join(folder, name), "xb")  # noqa: SIM115 - `close` closes it
        self._add(0, _field(3, b"brain.Event:2"))  # file_version
        if resume_step:
            self._add(resume_step + 1, _field(7, b"\x08\x01"))  # session_log {status: START}
        self._flush()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Adds a point to each curve; on disk within half a minute of steps.

        Raises:
          OSError: it cannot be written.
        """
        values = (_field(1, name.encode()) + b"\x15" + struct.pack("<f", value) for name, value in numbers.items())
        self._add(
            step, _field(5, b"".join(_field(1, value) for value in values))
        )  # summary {value {tag, simple_value}}
        if time.monotonic() - self._flushed > 30:
            self._flush()

    def _add(self, step: int, what: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + what  # wall_time, step
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))

    def _flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Puts the rest on disk."""
        self._file.close()
