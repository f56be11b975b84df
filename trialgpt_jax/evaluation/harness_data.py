"""Local files with the items of tasks: one JSON object per line, in the field names of the dataset on the hub."""

import json
from collections.abc import Callable
from typing import Annotated, NamedTuple, TypedDict

import msgspec

from trialgpt_jax import UserError
from trialgpt_jax.data.vocabulary import has_valid_utf8
from trialgpt_jax.storage import files, json_files

_Texts = Annotated[list[str], msgspec.Meta(min_length=2)]


class _HellaSwag(TypedDict):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: _Texts
    label: str | int


class _Lambada(TypedDict):
    text: str


class _Piqa(TypedDict):
    goal: str
    sol1: str
    sol2: str
    label: int


class _Choices(TypedDict):
    text: _Texts
    label: _Texts


class _Arc(TypedDict):
    question: str
    choices: _Choices
    answerKey: str


class _WinoGrande(TypedDict):
    sentence: str
    option1: str
    option2: str
    answer: str


class _WikiText(TypedDict):
    page: str


class Row(NamedTuple):
    """An item and its line, from 1."""

    line: int
    values: dict


def wrong_label(field: str, value: object, n_choices: int) -> str:
    """The message about a label that no choice has."""
    return f"field `{field}` is {value!r}, but the item has {n_choices} choices, 0 ... {n_choices - 1}"


def _hellaswag(row: dict) -> str:
    n = len(row["endings"])
    return "" if str(row["label"]) in map(str, range(n)) else wrong_label("label", row["label"], n)


def _lambada(row: dict) -> str:
    return "" if row["text"].strip() else "field `text` is blank"


def _piqa(row: dict) -> str:
    return "" if row["label"] in (0, 1) else wrong_label("label", row["label"], 2)


def _arc(row: dict) -> str:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    if len(texts) != len(labels):
        return f"field `choices` has {len(texts)} texts and {len(labels)} labels"
    if row["answerKey"] not in labels:
        return f"field `answerKey` is {row['answerKey']!r}, not one of the labels {', '.join(labels)}"
    return ""


def _winogrande(row: dict) -> str:
    if "_" not in row["sentence"]:
        return "field `sentence` has no _ in the place of the options"
    return "" if row["answer"] in ("1", "2") else f"field `answer` is {row['answer']!r}, not '1' or '2'"


def _wikitext(row: dict) -> str:
    return "" if row["page"].strip() else "field `page` is blank"


# Task -> the shape of an item, and what is wrong with one of that shape. Other tasks say it when they read the items.
_SHAPES: dict[str, tuple[type, Callable[[dict], str]]] = {
    "hellaswag": (_HellaSwag, _hellaswag),
    "lambada_openai": (_Lambada, _lambada),
    "lambada_standard": (_Lambada, _lambada),
    "piqa": (_Piqa, _piqa),
    "arc_easy": (_Arc, _arc),
    "arc_challenge": (_Arc, _arc),
    "winogrande": (_WinoGrande, _winogrande),
    "wikitext": (_WikiText, _wikitext),
}


def read(path: str, task: str = "") -> list[Row]:
    """The items of a file; blank lines are left out.

    Args:
      path: of JSON lines, UTF-8; local or a URL.
      task: whose shape the items must have; "" = any objects.

    Raises:
      UserError: the file is absent, empty or a Git LFS pointer; a line is not a JSON object, lacks a field that the
        task needs, or has one of another type or out of range. It names the file, the line and the field.
    """
    rows = [_row(path, n, line) for n, line in enumerate(_read_bytes(path).split(b"\n"), 1) if line.strip()]
    if not rows:
        raise UserError(f"{path} is empty; it should have one JSON object per line")
    if task in _SHAPES:
        for row in rows:
            check(path, row, *_SHAPES[task])
    return rows


def check(path: str, row: Row, shape: type, problem: Callable[[dict], str] = lambda row: "") -> None:
    """Raises UserError if an item is not of a shape (a TypedDict), or `problem` finds something."""
    if missing := [name for name in shape.__annotations__ if name not in row.values]:
        raise UserError(
            f"{path}, line {row.line}: no field `{missing[0]}`, only {', '.join(row.values) or 'an empty {}'}"
        )
    try:
        json_files.check(row.values, shape)
    except ValueError as error:
        where, _, what = str(error).partition(": ")
        raise UserError(f"{path}, line {row.line}: field `{where}`: {what}") from None
    if found := problem(row.values):
        raise UserError(f"{path}, line {row.line}: {found}")


def _read_bytes(path: str) -> bytes:
    try:
        with files.open_file(path) as file:
            data = file.read()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file with one JSON object per line") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if files.is_lfs_pointer(data[:200]):
        raise UserError(f"{path} is a Git LFS pointer, not the items of a task; fetch the file itself")
    return data.removeprefix(b"\xef\xbb\xbf")


def _row(path: str, number: int, line: bytes) -> Row:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise UserError(f"{path}, line {number}: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: {type(value).__name__}, not a JSON object with the fields of an item")
    if b"\\u" in line and not has_valid_utf8(json.dumps(value, ensure_ascii=False)):
        raise UserError(
            f"{path}, line {number}: half of a surrogate pair (\\ud800 ... \\udfff), which is not valid text"
        )
    return Row(number, value)


def columns(path: str, rows: list[Row]) -> dict[str, list]:
    """Field -> its values; None where a row does not have it. All values of a field must have one type.

    Raises:
      UserError: they have not; it names the file, the line and the field.
    """
    import pyarrow as pa

    found = {name: [row.values.get(name) for row in rows] for name in dict.fromkeys(n for r in rows for n in r.values)}
    for name, values in found.items():
        try:
            pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            low, high = 0, len(values)  # of the beginnings of the column, the first one that is refused ends in high
            while high - low > 1:
                middle = (low + high) // 2
                try:
                    pa.array(values[:middle])
                    low = middle
                except (pa.ArrowException, OverflowError):
                    high = middle
            value, why = json.dumps(values[high - 1], ensure_ascii=False)[:60], str(error).splitlines()[0][:200]
            raise UserError(
                f"{path}, line {rows[high - 1].line}: field `{name}` is {value}, of another type than in the lines "
                f"before ({why})"
            ) from None
    return found
