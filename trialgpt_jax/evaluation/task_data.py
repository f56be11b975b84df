"""The items of a task from a file of JSON lines or from the hub; what is wrong with one names file, line and field."""

import contextlib
import json
import os
from collections.abc import Iterator

from trialgpt_jax import UserError
from trialgpt_jax.data import hub, network

_LONGEST = 1 << 29  # bytes of a file; HellaSwag's validation split has 12 MB
_FETCH_SECONDS = 600
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


class Row:
    """An item: fields by name, each checked when it is read."""

    def __init__(self, fields: dict[str, object], where: str):
        """`where`: file and line, for messages."""
        self.fields, self.where = fields, where

    def __getitem__(self, name: str) -> object:
        """The field; UserError if it is missing."""
        if name not in self.fields:
            names = ", ".join(repr(name[:40]) for name in list(self.fields)[:8]) or "no fields"
            raise self.wrong(name, f"is missing; the item has {names}")
        return self.fields[name]

    def wrong(self, name: str, why: str) -> UserError:
        """The error for a field."""
        return UserError(f"{self.where}: field `{name}` {why}")

    def text(self, name: str, empty: bool = True) -> str:
        """A field that is a string, and not empty unless `empty`."""
        value = self[name]
        if not isinstance(value, str):
            raise self.wrong(name, f"is {kind(value)}, but should be a string")
        if not value and not empty:
            raise self.wrong(name, "is empty")
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
            raise self.wrong(name, f"is {kind(value)}, but should be 0 ... {n - 1}, because there are {n} choices")
        return value


def kind(value: object) -> str:
    """What a JSON value is, for a message: a number and a short string as they are."""
    if isinstance(value, str) and len(value) <= 40:
        return repr(value)
    return _KINDS.get(type(value)) or str(value)[:40]


def read(path: str) -> bytes:
    """The bytes of a local file. Raises UserError if there is none, or it is too long for a file of items."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is {'not a regular file' if os.path.exists(path) else 'no file on this machine'}")
    with open(path, "rb") as file:
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise UserError(f"{path} has more than {_LONGEST:,} bytes, which is too long for a file of items")
    return data


def rows(data: bytes, file: str) -> list[Row]:
    """The items of a file of JSON lines, an object a line; blank lines are left out. Raises UserError."""
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
            raise UserError(f"{where}: malformed JSON ({error}); one object a line is wanted") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: this is {kind(value)}, but should be an object")
        found.append(Row(value, where))
    if not found:
        raise UserError(f"{file} has no items")
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
    import huggingface_hub

    hub.quiet()
    try:
        with _offline():
            data = datasets.load_dataset(repo, split=split)
    except (ConnectionError, FileNotFoundError, ValueError):  # ValueError: the cache has another split only
        why = "HF_HUB_OFFLINE is set"
        try:
            if huggingface_hub.constants.is_offline_mode() or datasets.config.HF_HUB_OFFLINE:
                raise UserError(why) from None
            hub.check_reachable(repo)
            fetch = f"hf:{repo}"
            data = network.with_retries(lambda: datasets.load_dataset(repo, split=split), fetch, seconds=_FETCH_SECONDS)
        except UserError as error:
            why = str(error).partition("; ")[0]
            cache = datasets.config.HF_DATASETS_CACHE
            raise UserError(f"{repo} is not in the cache {cache}, and {why}; {way_out}") from None
    return [Row(row, f"{repo}, {split}, item {number}") for number, row in enumerate(data)]


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """`datasets` sends no requests in this block: without a network it retries for about 20 s."""
    import datasets
    import huggingface_hub

    places = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in places]
    try:
        for module in places:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(places, before, strict=True):
            module.HF_HUB_OFFLINE = value
