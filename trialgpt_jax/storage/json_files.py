"""JSON files: read and compared with a type in one place, written whole or not at all."""

import json
from typing import Annotated, Any, TypeVar

import msgspec

from trialgpt_jax.storage import files

Count = Annotated[int, msgspec.Meta(ge=0)]  # a number of something
Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]  # of a dimension: JAX's default integers are int32
_T = TypeVar("_T")
_LONGEST = 1 << 30  # bytes


def read(path: str, shape: type[_T] = object) -> _T:
    """The contents of a JSON file.

    Args:
      path: local or a URL.
      shape: what the value must be: built-in types, `dict[str, int]`, `tuple[str, int]`, a TypedDict (unknown keys are
        kept), `Annotated` with `msgspec.Meta`. Nothing is converted: a `tuple` of the shape is returned as a list.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not JSON, is nested too deeply, is not UTF-8, or is not of that shape; the message says where.
    """
    with files.open_file(path) as file:
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise ValueError(f"it has more than {_LONGEST} bytes")
    return parse(data, shape)


def parse(data: bytes | str, shape: type[_T] = object) -> _T:
    """The value of a JSON text, see `read`. Raises ValueError."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return check(value, shape)


def check(value: object, shape: type[_T]) -> _T:
    """The value itself, if it is of that shape, see `read`. Raises ValueError, which says where it is not."""
    try:
        msgspec.convert(value, shape if shape is not object else Any)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        raise ValueError(f"{where.rstrip('`').lstrip('.') or 'it'}: {what.replace('`', '')}") from None
    return value


def write(path: str, value: object) -> None:
    """Writes JSON as `files.write` does; escapes half a surrogate pair, as in a file name that is not UTF-8."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = json.dumps(value, indent=1)
    files.write(path, text + "\n")
