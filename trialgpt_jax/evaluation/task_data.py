"""The items of a task from a file of JSON lines or from the hub; what is wrong with one names file, line and field."""

import json
import os

from trialgpt_jax import UserError
from trialgpt_jax.data import formats, hub, network, streams
from trialgpt_jax.data.vocabulary import has_valid_utf8
from trialgpt_jax.storage import files

_LONGEST = 1 << 29  # bytes of a file; HellaSwag's validation split has 12 MB
_FETCH_SECONDS = 600
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


class Row:
    """An item, whose fields are checked when they are read: each method returns one or raises UserError.

    Attributes:
      fields: name -> value.
      where: file and line (or number of the item), for messages.
    """

    def __init__(self, fields: dict[str, object], where: str):
        self.fields, self.where = fields, where

    def __getitem__(self, name: str) -> object:
        """The field; UserError if it is missing."""
        if name not in self.fields:
            raise self.missing(name)
        return self.fields[name]

    def missing(self, name: str) -> UserError:
        """The error for a field that the item lacks."""
        names = ", ".join(repr(each[:40]) for each in list(self.fields)[:8]) or "no fields"
        return self.wrong(name, f"is missing; the item has {names}")

    def wrong(self, name: str, why: str) -> UserError:
        """The error for a field."""
        return UserError(f"{self.where}: field `{name}` {why}")

    def text(self, name: str, empty: bool = True, blank: bool = True) -> str:
        """A field that is a string; not "" unless `empty`, not only white space unless `blank`."""
        value = self[name]
        if not isinstance(value, str):
            raise self.wrong(name, f"is {kind(value)}, but should be a string")
        if not value and not empty:
            raise self.wrong(name, "is empty")
        if not blank and not value.strip():
            raise self.wrong(name, "is blank")
        return value

    def texts(self, name: str) -> list[str]:
        """A field that is a list of two or more strings."""
        values = self[name]
        if not isinstance(values, list):
            raise self.wrong(name, f"is {kind(values)}, but should be a list of strings")
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise self.wrong(f"{name}[{i}]", f"is {kind(value)}, but should be a string")
        if len(values) < 2:
            raise self.wrong(name, f"has {len(values)} strings, but should have two or more")
        return values

    def index(self, name: str, n: int, digits: bool = False) -> int:
        """A field that is a whole number below `n`; with `digits` it may be a string of digits, as on the hub."""
        value = self[name]
        if digits and isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n:
            raise self.no_choice(name, value, n)
        return value

    def no_choice(self, name: str, value: object, n: int) -> UserError:
        """The error for a label that is none of `n` choices."""
        return self.wrong(name, f"is {kind(value)}, but should be 0 ... {n - 1}, because there are {n} choices")


def kind(value: object) -> str:
    """What a JSON value is, for a message: a number and a short string as they are."""
    if isinstance(value, str) and len(value) <= 40:
        return repr(value)
    return _KINDS.get(type(value)) or str(value)[:40]


def read(path: str) -> list[Row]:
    """The items of a file of JSON lines, local or a URL.

    Raises:
      UserError: it is missing, not a regular file, cannot be read or is too long, or as `rows`.
    """
    if not files.is_remote(path) and not os.path.isfile(path):
        raise UserError(f"{path} {'is not a regular file' if os.path.exists(path) else 'does not exist'}")
    try:
        with files.open_file(path) as file:
            data = file.read(_LONGEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) > _LONGEST:
        raise UserError(f"{path} has more than {_LONGEST:,} bytes, which is too long for a file of items")
    return rows(data, path)


def not_lines(head: bytes) -> str:
    """What a file that begins with `head` is, if not JSON lines, such as a web page or gzip data; "" if it may be."""
    if files.is_lfs_pointer(head):
        return "is a Git LFS pointer, not the items of a task; fetch the file itself"
    return formats.mismatch("json", head).partition(";")[0]


def rows(data: bytes, file: str) -> list[Row]:
    """The items of a file of JSON lines, one object per line; blank lines are left out.

    Args:
      data: the bytes of the file.
      file: its name, for messages.

    Raises:
      UserError: there are none, or a line is not UTF-8, not JSON or not an object.
    """
    if what := not_lines(data[: streams.HEAD]):
        raise UserError(f"{file} {what}")
    found = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: invalid UTF-8 at byte {error.start} of the line") from None
        except RecursionError:
            raise UserError(f"{where}: malformed JSON (nested too deeply)") from None
        except ValueError as error:
            raise UserError(f"{where}: malformed JSON ({error}); each line should be one object") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: this is {kind(value)}, but should be an object")
        if b"\\u" in line and not has_valid_utf8(json.dumps(value, ensure_ascii=False)):
            raise UserError(f"{where}: half of a surrogate pair (\\ud800 ... \\udfff), which is not valid text")
        found.append(Row(value, where))
    if not found:
        raise UserError(f"{file} has no items; it should have one JSON object per line")
    return found


def hub_rows(repo: str, split: str, way_out: str) -> list[Row]:
    """The items of a dataset on the hub: from the cache of `datasets`, and fetched if they are not there.

    Args:
      repo: `owner/name`, a dataset with one configuration.
      split: of it.
      way_out: what the user can do without network, for the message.

    Raises:
      UserError: they are not in the cache, and the hub cannot be reached within `network.FIRST_SECONDS`.
    """
    import datasets

    def load():
        return datasets.load_dataset(repo, split=split)

    hub.quiet()
    try:
        with hub.offline():
            data = load()
    except (ConnectionError, FileNotFoundError, ValueError):  # ValueError: the cache has another split only
        why = hub.why_unreachable(repo)
        if why is None:
            try:
                data = network.with_retries(load, f"hf:{repo}", seconds=_FETCH_SECONDS)
            except UserError as error:
                why = str(error).partition(";")[0]
        if why is not None:
            cache = datasets.config.HF_DATASETS_CACHE
            raise UserError(f"{repo} is not in the cache {cache}, and {why}; {way_out}") from None
    return [Row(row, f"{repo}, {split}, item {number}") for number, row in enumerate(data)]
