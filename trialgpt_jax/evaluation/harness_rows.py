"""lm-eval's tasks with the items of local files: every row is read as the task reads it, before a model is loaded."""

import contextlib
import copy
import functools
import json
import re
from collections.abc import Callable, Iterator

from trialgpt_jax import UserError
from trialgpt_jax.evaluation import task_data
from trialgpt_jax.evaluation.task_data import Row, kind

_UNDEFINED = re.compile(r"'([^']+)' is undefined|has no attribute '([^']+)'")
_OF_TYPE = re.compile(r"'(\w+)' object|'(\w+) object'|^'(None)' has|not '?(\w+)'?$")
_STRUCTURE = {"tag", "group", "task_list"}  # keys of a YAML file that are not of the task itself


class Local:
    """The local files of a task: its items, and the examples if they are in a file of their own."""

    def __init__(self, task: str, files: dict[str, str]):
        self.path, self.train_path = files[task], files.get(f"{task}:train")
        self.rows = _read(self.path, task)
        self.train = _read(self.train_path, task) if self.train_path else None

    def config(self, config: dict, rows: list[Row], path: str) -> dict:
        """The task's definition with `rows` in place of its dataset.

        Without a file of examples they are other items of the same file, as in lm-eval where a task has one split.
        """
        config = copy.deepcopy(config)
        evaluated = config.get("test_split") or config.get("validation_split")
        if not evaluated:
            raise UserError(f"task {config['task']} has neither a test_split nor a validation_split to put {path} in")
        fewshot = dict(config.get("fewshot_config") or {})
        others = {config.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")}
        others = (others | {fewshot.get("split")}) - {None, evaluated}
        splits = {evaluated: rows}
        if self.train is None:
            config |= {"test_split": evaluated, "validation_split": None, "training_split": None}
            fewshot.pop("split", None)
            config["fewshot_split"] = None if "samples" in fewshot else evaluated
            config["fewshot_config"] = fewshot or None
        elif others:
            splits |= dict.fromkeys(others, self.train)
        else:
            splits["train"], config["fewshot_split"] = self.train, "train"
        data = {name: _dataset(part) for name, part in splits.items()}
        return config | {"custom_dataset": lambda **_: data}


def _dataset(rows: list[Row]):
    import datasets

    return datasets.Dataset.from_dict(_columns(rows))


def with_files(entry, local: Local):
    """The index entry of a task that reads local files, after every row has been checked."""
    from lm_eval.api.task import ALL_OUTPUT_TYPES
    from lm_eval.config.task import TaskConfig
    from lm_eval.tasks._index import Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry.kind is not Kind.TASK:
        raise UserError(
            f"task_data: {entry.name} is not a task that a YAML file defines, so it cannot read {local.path}"
        )
    with explained(f"task {entry.name}"):
        config = load_yaml(entry.yaml_path, resolve_func=True)
        found = TaskConfig(**{key: value for key, value in config.items() if key not in _STRUCTURE})
        if found.output_type not in ALL_OUTPUT_TYPES:
            raise ValueError(f"output_type is {found.output_type!r}, not one of {', '.join(ALL_OUTPUT_TYPES)}")
    check_supported(entry.name, found)
    for path, rows in ((local.path, local.rows), (local.train_path, local.train)):
        if rows:
            _check_rows(functools.partial(local.config, config, path=path), rows)
    entry.yaml_path, entry.cfg = None, local.config(config, local.rows, local.path)
    return entry


# ---- what lm-eval and the code of tasks raise


class NotCached(Exception):
    """A dataset is in the cache, but not the configuration that a task needs."""


@functools.cache
def _task_errors() -> tuple[type[Exception], ...]:
    """What a definition, or its code for an item, raises when the definition or the item is wrong."""
    import datasets
    import jinja2

    return (
        (ImportError, AttributeError, LookupError, TypeError, ValueError, SyntaxError, AssertionError)
        + (ArithmeticError, NotImplementedError)
        + (jinja2.TemplateError, datasets.exceptions.DatasetsError)
    )


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns an error of a task's definition into one line."""
    try:
        yield
    except _task_errors() as error:
        if isinstance(error, ValueError) and "find cache" in str(error):
            raise NotCached(str(error)) from None
        raise UserError(f"{what}: {_short(error)}") from None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _wrong_row(row: Row, error: Exception) -> UserError:
    """The message about an item for which a task's code raises an error."""
    match = _UNDEFINED.search(str(error))
    name = str(error.args[0]) if isinstance(error, KeyError) and error.args else match and (match[1] or match[2])
    if name and name.isidentifier() and name not in row.fields and not hasattr(str, name):
        return row.missing(name)
    found = next((group for match in [_OF_TYPE.search(str(error))] if match for group in match.groups() if group), "")
    found = found.removesuffix("Type")
    suspects = [field for field, value in row.fields.items() if type(value).__name__.removesuffix("Type") == found]
    if suspects:
        return UserError(f"{row.where}: field `{'` or `'.join(suspects)}`: {_short(error)}")
    return UserError(f"{row.where}: {_short(error)}; its fields are {', '.join(row.fields) or 'an empty {}'}")


def check_supported(name: str, config) -> None:
    """Refuses a definition (lm-eval's TaskConfig) that asks for more than a language model. Raises UserError."""
    if config.unsafe_code:
        raise UserError(f"task {name} executes code that the model writes, which is not supported")
    if config.doc_to_image or config.doc_to_audio:
        raise UserError(f"task {name} has images or sounds, which a language model does not read")


# ---- items of known tasks, in the field names of the hub; those of other tasks are checked by running their definition


def _hellaswag(row: Row) -> None:
    for name in ("activity_label", "ctx_a", "ctx_b"):
        row.text(name)
    row.index("label", len(row.texts("endings")), digits=True)


def _lambada(row: Row) -> None:
    row.text("text", blank=False)


def _piqa(row: Row) -> None:
    for name in ("goal", "sol1", "sol2"):
        row.text(name)
    row.index("label", 2)


def _arc(row: Row) -> None:
    row.text("question")
    choices, key = row["choices"], row.text("answerKey")
    if not isinstance(choices, dict):
        raise row.wrong("choices", f"is {kind(choices)}, but should be an object")
    inside = Row(choices, f"{row.where}: field `choices`")
    texts, labels = inside.texts("text"), inside.texts("label")
    if len(texts) != len(labels):
        raise row.wrong("choices", f"has {len(texts)} texts and {len(labels)} labels")
    if key not in labels:
        raise row.wrong("answerKey", f"is {kind(key)}, not one of the labels {', '.join(labels)}")


def _winogrande(row: Row) -> None:
    for name in ("sentence", "option1", "option2"):
        row.text(name)
    if "_" not in row.text("sentence"):
        raise row.wrong("sentence", "has no _ in the place of the options")
    if row.text("answer") not in ("1", "2"):
        raise row.wrong("answer", f"is {kind(row['answer'])}, not '1' or '2'")


def _wikitext(row: Row) -> None:
    row.text("page", blank=False)


_CHECKS: dict[str, Callable[[Row], None]] = {
    "hellaswag": _hellaswag,
    "lambada_openai": _lambada,
    "lambada_standard": _lambada,
    "piqa": _piqa,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "winogrande": _winogrande,
    "wikitext": _wikitext,
}


def _read(path: str, task: str) -> list[Row]:
    rows = task_data.read(path)
    if check := _CHECKS.get(task):
        for row in rows:
            check(row)
    return rows


# ---- the rows of a local file


def _first_refused(
    make: Callable[[int], object], n: int, error: Exception, refusals: tuple[type[Exception], ...]
) -> tuple[int, Exception]:
    """Which row makes `make` of the first rows fail, and its error; of all n rows it fails with `error`."""
    fine, bad = 0, n  # numbers of first rows
    while bad - fine > 1:
        middle = (fine + bad) // 2
        try:
            make(middle)
            fine = middle
        except refusals as earlier:
            bad, error = middle, earlier
    return bad - 1, error


def _columns(rows: list[Row]) -> dict[str, list]:
    """Field -> its values; None where a row does not have it. All values of a field must have one type.

    Raises:
      UserError: they have not; it names the file, the line and the field.
    """
    import pyarrow as pa

    found = {name: [row.fields.get(name) for row in rows] for name in dict.fromkeys(n for r in rows for n in r.fields)}
    for name, values in found.items():
        try:
            pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            refusals = pa.ArrowException, OverflowError
            last, _ = _first_refused(lambda n, values=values: pa.array(values[:n]), len(values), error, refusals)
            value, why = json.dumps(values[last], ensure_ascii=False)[:60], str(error).splitlines()[0][:200]
            raise rows[last].wrong(name, f"is {value}, of another type than in the lines before ({why})") from None
    return found


def _check_rows(config: Callable[[list[Row]], dict], rows: list[Row]) -> None:
    """Reads every row as the task would. Raises UserError with the line of the first one that cannot be read."""
    from lm_eval.api.task import ConfigurableTask

    def make(count: int) -> ConfigurableTask:
        definition = config(rows[:count])
        return ConfigurableTask(config={key: definition[key] for key in definition.keys() - _STRUCTURE})

    try:
        task = make(len(rows))
    except _task_errors() as error:
        last, found = _first_refused(make, len(rows), error, _task_errors())
        raise _wrong_row(rows[last], found) from None
    items = list(task.eval_docs)
    if len(items) != len(rows):  # the task's process_docs leaves some out, so there are no lines to name
        return
    for row, item in zip(rows, items, strict=True):
        item = {name: value for name, value in item.items() if value is not None or name in row.fields}
        try:
            _check_item(task, item, row)
        except _task_errors() as error:
            raise _wrong_row(row, error) from None


def _check_item(task, item: dict, row: Row) -> None:
    """Raises UserError for a text or label that is wrong, or what the task's code raises for the item."""
    text, target, choices = task.doc_to_text(item), task.doc_to_target(item), None
    task.doc_to_prefix(item)
    if task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(item)
    context = [""] * len(choices) if task.multiple_input else ""
    task.construct_requests(doc=item, ctx=context, metadata=(task.config.task, 0, 1))
    if task.OUTPUT_TYPE == "loglikelihood_rolling" and not target:
        raise UserError(f"{row.where}: its text is empty")
    if choices is None:
        return
    if not choices or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{row.where}: its choices are {choices!r:.100}, not a list of texts")
    source = task.config.doc_to_text if task.multiple_input else task.config.doc_to_target
    name = re.fullmatch(r"\s*(?:\{\{)?\s*(\w+)\s*(?:\}\})?\s*", source) if isinstance(source, str) else None
    labels = text if task.multiple_input else target
    for label in labels if isinstance(labels, list) else [labels]:
        inside = 0 <= label < len(choices) if isinstance(label, int) else label in choices
        if not inside:
            raise row.no_choice(name[1] if name else "label", label, len(choices))
