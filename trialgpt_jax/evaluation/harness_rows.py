"""lm-eval's tasks with the items of local files: every row is read as the task reads it, before a model is loaded."""

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator

from trialgpt_jax import UserError
from trialgpt_jax.evaluation import harness_data
from trialgpt_jax.evaluation.harness_data import Row

_UNDEFINED = re.compile(r"'([^']+)' is undefined|has no attribute '([^']+)'")
_OF_TYPE = re.compile(r"'(\w+)' object|'(\w+) object'|^'(None)' has|not '?(\w+)'?$")
_STRUCTURE = {"tag", "group", "task_list"}  # keys of a YAML file that are not of the task itself


class Local:
    """The local files of a task: its items, and the examples if they are in a file of their own."""

    def __init__(self, task: str, files: dict[str, str]):
        self.path, self.train_path = files[task], files.get(f"{task}:train")
        self.rows = harness_data.read(self.path, task)
        self.train = harness_data.read(self.train_path, task) if self.train_path else None

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
        data = {name: _dataset(self.train_path if part is self.train else path, part) for name, part in splits.items()}
        return config | {"custom_dataset": lambda **_: data}


def _dataset(path: str, rows: list[Row]):
    import datasets

    return datasets.Dataset.from_dict(harness_data.columns(path, rows))


def with_files(entry, local: Local):
    """The index entry of a task that reads local files, after every row has been checked."""
    from lm_eval.api.task import ALL_OUTPUT_TYPES
    from lm_eval.config.task import TaskConfig
    from lm_eval.tasks._index import Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry.kind is not Kind.TASK:
        raise UserError(
            f"--task_data: {entry.name} is not a task that a YAML file defines, so it cannot read {local.path}"
        )
    with explained(f"task {entry.name}"):
        config = load_yaml(entry.yaml_path, resolve_func=True)
        found = TaskConfig(**{key: value for key, value in config.items() if key not in _STRUCTURE})
        if found.output_type not in ALL_OUTPUT_TYPES:
            raise ValueError(f"output_type is {found.output_type!r}, not one of {', '.join(ALL_OUTPUT_TYPES)}")
    check_supported(entry.name, found)
    for path, rows in ((local.path, local.rows), (local.train_path, local.train)):
        if rows:
            _check_rows(functools.partial(local.config, config, path=path), rows, path)
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


def _wrong_row(path: str, row: Row, error: Exception) -> UserError:
    """The message about an item for which a task's code raises an error."""
    place, fields = f"{path}, line {row.line}", ", ".join(row.values) or "an empty {}"
    match = _UNDEFINED.search(str(error))
    name = str(error.args[0]) if isinstance(error, KeyError) and error.args else match and (match[1] or match[2])
    if name and name.isidentifier() and name not in row.values and not hasattr(str, name):
        return UserError(f"{place}: no field `{name}`, only {fields}")
    kind = next((group for match in [_OF_TYPE.search(str(error))] if match for group in match.groups() if group), "")
    kind = kind.removesuffix("Type")
    suspects = [field for field, value in row.values.items() if type(value).__name__.removesuffix("Type") == kind]
    if suspects:
        return UserError(f"{place}: field `{'` or `'.join(suspects)}`: {_short(error)}")
    return UserError(f"{place}: {_short(error)}; its fields are {fields}")


def check_supported(name: str, config) -> None:
    """Refuses a definition (lm-eval's TaskConfig) that asks for more than a language model. Raises UserError."""
    if config.unsafe_code:
        raise UserError(f"task {name} executes code that the model writes, which is not supported")
    if config.doc_to_image or config.doc_to_audio:
        raise UserError(f"task {name} has images or sounds, which a language model does not read")


# ---- the rows of a local file


def _check_rows(config: Callable[[list[Row]], dict], rows: list[Row], path: str) -> None:
    """Reads every row as the task would. Raises UserError with the line of the first one that cannot be read."""
    from lm_eval.api.task import ConfigurableTask

    def make(count: int) -> ConfigurableTask:
        definition = config(rows[:count])
        return ConfigurableTask(config={key: definition[key] for key in definition.keys() - _STRUCTURE})

    try:
        task = make(len(rows))
    except _task_errors() as error:
        low, high, found = 0, len(rows), error  # the first `low` rows are fine, the first `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            try:
                make(middle)
                low = middle
            except _task_errors() as error:
                high, found = middle, error
        raise _wrong_row(path, rows[high - 1], found) from None
    items = list(task.eval_docs)
    if len(items) != len(rows):  # the task's process_docs leaves some out, so there are no lines to name
        return
    for row, item in zip(rows, items, strict=True):
        item = {name: value for name, value in item.items() if value is not None or name in row.values}
        try:
            problem = _problem(task, item)
        except _task_errors() as error:
            raise _wrong_row(path, row, error) from None
        if problem:
            raise UserError(f"{path}, line {row.line}: {problem}")


def _problem(task, item: dict) -> str:
    """What is wrong with the label of an item; raises what the task's code raises for it."""
    text, target, choices = task.doc_to_text(item), task.doc_to_target(item), None
    task.doc_to_prefix(item)
    if task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(item)
    context = [""] * len(choices) if task.multiple_input else ""
    task.construct_requests(doc=item, ctx=context, metadata=(task.config.task, 0, 1))
    if task.OUTPUT_TYPE == "loglikelihood_rolling" and not target:
        return "its text is empty"
    if choices is None:
        return ""
    if not choices or not all(isinstance(choice, str) for choice in choices):
        return f"its choices are {choices!r:.100}, not a list of texts"
    source = task.config.doc_to_text if task.multiple_input else task.config.doc_to_target
    name = re.fullmatch(r"\s*(?:\{\{)?\s*(\w+)\s*(?:\}\})?\s*", source) if isinstance(source, str) else None
    labels = text if task.multiple_input else target
    for label in labels if isinstance(labels, list) else [labels]:
        inside = 0 <= label < len(choices) if isinstance(label, int) else label in choices
        if not inside:
            return harness_data.wrong_label(name[1] if name else "label", label, len(choices))
    return ""
