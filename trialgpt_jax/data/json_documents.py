"""JSON -> documents: an object a line; or an array of objects or strings; or objects one after another, as printed.

An array and pretty-printed objects are parsed from a window that holds one record, whatever the size of the file.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator

from trialgpt_jax.data import streams
from trialgpt_jax.data.records import Context, Document, document, failed, too_large, unusable

_WANTED = "one JSON object a line, or an array of objects, is wanted"
_CHUNK, _ROOM = 1 << 18, 1 << 20  # _ROOM: bytes that the other fields of a record may take
_ESCAPES = re.compile(r'(?:\\.[^"\\]{0,8}+)++', re.DOTALL)  # many of them, as in text that is not English
_DELIMITER = re.compile(r'["{}\[\]]')
_MARK = "\ufeff"  # the byte order mark
_SPACE = re.compile(f"[ \\t\\r\\n{_MARK}]*")
_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def json_documents(context: Context, stream: io.BufferedReader, start: int = 0) -> Iterator[Document]:
    """The records of a JSON file from number `start` on, at least: lines that are not blank, or elements."""
    longest = 3 * context.limit + _ROOM  # `é` as \u00e9 has three times the bytes of its UTF-8
    blank, first = 0, b""
    try:
        stream = streams.utf8(stream)
        while (first := stream.readline(_CHUNK)).isspace():
            blank += first.endswith(b"\n")
    except streams.DAMAGE as error:
        yield failed(context, blank, error, f", line {blank + 1}")
        return
    stream = streams.buffered(stream, first)
    if _is_lines(context, first):
        yield from _lines(context, stream, longest, blank, start)
    else:
        yield from _elements(context, stream, longest)


def _is_lines(context: Context, first: bytes) -> bool:
    """Whether a file is JSON lines; `first` is its first line or the beginning of that.

    It is not if the line is an array in a `.json`, or is cut where only more lines can follow, or has two values.
    """
    opening = first.lstrip()[:1]
    text = first.decode(errors="replace").strip()
    if opening == b"[" and (
        ".json" in context.name.lower().replace(".jsonl", "")
        or not first.endswith(b"\n")
        or text[1:].lstrip().startswith("{")
    ):
        return False
    if opening not in (b"[", b"{"):
        return True
    if len(first) >= _CHUNK and not first.endswith(b"\n"):
        return not _begins_with_two_objects(text)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text) and not error.msg.startswith("Unterminated string")
        return not (cut or (error.msg == "Extra data" and text[error.pos] == "{"))
    except (ValueError, RecursionError):
        pass
    return True


def _begins_with_two_objects(text: str) -> bool:
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # ValueError: the first one is longer
        return False
    return text[end:].lstrip().startswith("{")


def _lines(context: Context, stream: io.BufferedReader, longest: int, number: int, start: int) -> Iterator[Document]:
    """`number` is that of the first line."""
    try:
        while line := stream.readline(_CHUNK):
            where = f"{context.name}, line {number + 1}"
            if len(line) == _CHUNK and not line.endswith(b"\n"):
                line = _long_line(line, stream, longest)
            if line is None:
                yield too_large(context, number, where)
            elif number >= start and not line.isspace():
                yield _line(context, number, line, where)
            number += 1
    except streams.DAMAGE as error:
        yield failed(context, number, error, f", line {number + 1}")


def _long_line(head: bytes, stream: io.BufferedReader, longest: int) -> bytearray | None:
    """The line that begins with `head`; None if it has more than `longest` bytes, which are skipped."""
    line: bytearray | None = bytearray(head)
    while more := stream.readline(_CHUNK):
        if line is not None and len(line) + len(more) <= longest:
            line += more
        else:
            line = None
        if more.endswith(b"\n"):
            break
    return line


def _line(context: Context, number: int, line: bytes | bytearray, where: str) -> Document:
    try:
        value = _parsed(line.decode())
    except UnicodeDecodeError as error:
        why = f"invalid UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x})"
        return unusable(context, number, "invalid UTF-8", f"{where}: {why}")
    except RecursionError:
        return unusable(context, number, "malformed JSON", f"{where}: malformed JSON (nested too deeply)")
    except ValueError as error:
        return unusable(context, number, "malformed JSON", f"{where}: malformed JSON ({error})")
    return _record(context, number, value, where)


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        if not line.startswith(_MARK):
            raise
        return _parsed(line.lstrip(_MARK))  # of a file that was appended
    except ValueError:  # an integer of more than 4,300 digits
        return json.loads(line, parse_int=float)


def _record(context: Context, number: int, value: object, where: str) -> Document:
    field = context.options["text_field"]
    why = f"{where}: the text field `{field}` is missing"
    if not isinstance(value, dict):
        why += f", because this is {_NAMES.get(type(value), 'a number')}; {_WANTED}"
        return unusable(context, number, "no text field", why)
    found, text = _lookup(value, field)
    if found:
        return document(context, number, text, where, value.get("source"))
    names = ", ".join(repr(name[:40]) for name in list(value)[:8]) or "nothing"
    lists = any(isinstance(item, list) and item and isinstance(item[0], dict) for item in value.values())
    why += f" or not a string; the record has {names}; " + (_WANTED if lists else "see data.source_options.text_field")
    return unusable(context, number, "no text field", why)


def _lookup(record: dict, field: str) -> tuple[bool, object]:
    """Whether a record has a field, and its value; `a.b` is the field `b` of the object `a` unless a field has that
    name."""
    if field in record or "." not in field:
        return field in record, record.get(field)
    value: object = record
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            return False, None
        value = value[name]
    return True, value


def _elements(context: Context, stream: io.BufferedReader, longest: int) -> Iterator[Document]:
    number, window, in_array, separated = 0, _Window(stream, longest), False, True
    try:
        while char := window.next_char():
            where = f"{context.name}, element {number + 1}"
            if char == "[" and not in_array:
                in_array = separated = True
                window.pos += 1
            elif char == "]" and in_array:
                in_array, separated = False, True
                window.pos += 1
            elif char == "," and in_array and not separated:
                separated = True
                window.pos += 1
            elif not separated:
                raise _MalformedError(f"`,` or `]` is missing before {char!r}")
            else:
                separated, found, value = not in_array, *window.value()
                if found and isinstance(value, str) and in_array:
                    yield document(context, number, value, where)
                elif found:
                    yield _record(context, number, value, where)
                else:
                    yield too_large(context, number, where)
                number += 1
        if in_array:
            raise _MalformedError("the file ends within the array")
    except _MalformedError as error:
        why = f"{context.name}, element {number + 1}: malformed JSON ({error}); nothing after it can be read"
        yield unusable(context, number, "malformed JSON", why)
    except streams.DAMAGE as error:
        yield failed(context, number, error, f", element {number + 1}")


class _MalformedError(Exception):
    pass


class _Window:
    """The part of a JSON text that is being parsed. A byte that is not UTF-8 becomes half a surrogate pair."""

    def __init__(self, stream: io.BufferedReader, longest: int):
        self._stream, self._longest = stream, longest
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self.pos, self._ended = "", 0, False
        self._parse = json.JSONDecoder().raw_decode

    def _more(self) -> bool:
        """Drops what is before `pos` and doubles the rest; False at the end of the file."""
        if self._ended:
            return False
        rest = len(self._text) - self.pos
        data = streams.read_up_to(self._stream, max(_CHUNK, min(rest, self._longest + 1 - rest)))
        self._ended = not data
        self._text = self._text[self.pos :] + self._decoder.decode(data, final=not data)
        self.pos = 0
        return True

    def next_char(self) -> str:
        """The next character that is not white space, to which `pos` moves; "" at the end of the file."""
        while True:
            self.pos = _SPACE.match(self._text, self.pos).end()
            if self.pos < len(self._text):
                return self._text[self.pos]
            if not self._more():
                return ""

    def value(self) -> tuple[bool, object]:
        """True and the value at `pos`, or False if it is longer than `longest`; `pos` moves behind it."""
        while True:
            try:
                value, end = self._parse(self._text, self.pos)
                if end < len(self._text) or self._ended or isinstance(value, (dict, list, str)):
                    self.pos = end
                    return True, value
            except RecursionError:
                raise _MalformedError("nested too deeply") from None
            except ValueError as error:
                if not isinstance(error, json.JSONDecodeError):  # an integer of more than 4,300 digits
                    self._parse = json.JSONDecoder(parse_int=float).raw_decode
                    continue
                at = error.pos
                cut = at > len(self._text) - 16 or str(error).startswith("Unterminated string")
                if self._ended or not cut:
                    raise _MalformedError(str(error).partition(": line")[0]) from None
            if len(self._text) - self.pos > self._longest:
                self._skip()
                return False, None
            self._more()

    def _skip(self) -> None:
        """Moves `pos` behind the value there, which has more than `longest` bytes; keeps nothing of it."""
        depth, string = 0, False
        while True:
            at = self._next_quote() if string else self._next_delimiter()
            if at < 0:
                if not self._more():
                    raise _MalformedError("the file ends within it")
                continue
            char, self.pos = self._text[at], at + 1
            if char == '"':
                string = not string
            else:
                depth += 1 if char in "{[" else -1
            if depth <= 0 and not string:
                return

    def _next_delimiter(self) -> int:
        match = _DELIMITER.search(self._text, self.pos)
        self.pos = len(self._text)
        return match.start() if match else -1

    def _next_quote(self) -> int:
        """Where the string ends; -1 and `pos` at the end of the window, or at a backslash there, if it does not."""
        while True:
            quote = self._text.find('"', self.pos)  # 300 times as fast as a regular expression
            escape = self._text.find("\\", self.pos, quote if quote >= 0 else len(self._text))
            if escape < 0:
                self.pos = len(self._text)
                return quote
            if escape + 2 > len(self._text):
                self.pos = escape
                return -1
            self.pos = _ESCAPES.match(self._text, escape).end()
