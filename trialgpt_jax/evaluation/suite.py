"""The tasks that a command or a run names: parsed, loaded by their protocol, and run one after the other.

hellaswag,lambada_openai:500    tasks of lm-eval, the second with its first 500 items
core                            the 22 tasks of a CORE bundle
hellaswag_llmc                  HellaSwag as llm.c scores it
gpt2                            the six of lm-eval that are usually given for GPT-2
"""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from absl.flags import FlagValues

from trialgpt_jax import UserError, arguments
from trialgpt_jax.console import say
from trialgpt_jax.evaluation import core, harness, harness_index, hellaswag
from trialgpt_jax.evaluation.task import Result, Task
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.schema import INT32_MAX

ALIASES = {"gpt2": ("hellaswag", "lambada_openai", "piqa", "arc_easy", "winogrande", "wikitext")}
CORE, HELLASWAG = "core", "hellaswag_llmc"
_OWN = (CORE, HELLASWAG)  # every other name is a task of lm-eval
_TRAIN = ":train"  # ends a name in task_data whose file has the examples, see `harness.load`
FLAGS = {
    "tasks": (None, "tasks to score, NAME or NAME:LIMIT between commas: those of lm-eval, gpt2, core, hellaswag_llmc"),
    "num_fewshot": (None, "with --tasks: examples before each item, for tasks of lm-eval"),
    "limit": (None, "with --tasks: score the first items only"),
    "include_path": (None, "with --tasks: folder with definitions of further lm-eval tasks"),
    "task_data": (None, "with --tasks: NAME=FILE.jsonl between commas, items in place of those on the hub"),
    "core_bundle": (None, "with --tasks=core: folder or zip of its data"),
}


class Spec(NamedTuple):
    """A task that was asked for.

    Attributes:
      name: of the task.
      limit: its first items only; None = all.
    """

    name: str
    limit: int | None


class Outcome(NamedTuple):
    """What a task gave.

    Attributes:
      task: that was run.
      results: name -> result; a group of tasks has several.
    """

    task: Task
    results: dict[str, Result]


def parse(text: str, where: str = "--tasks") -> list[Spec]:
    """The tasks of a list such as `hellaswag_llmc:1000,gpt2`, aliases replaced, each task once.

    Args:
      text: names between commas, each with or without `:LIMIT`.
      where: the flag or field that holds the text, for messages.

    Raises:
      UserError: no names, an empty name, a limit that is not a whole number of at least 1, or a task with two limits.
    """
    if not text.strip():
        raise UserError(f"{where} is empty; give names of tasks, as in {where}=hellaswag,lambada_openai, or gpt2")
    found: dict[str, int | None] = {}
    for item in text.split(","):
        name, colon, number = item.strip().partition(":")
        if not name:
            raise UserError(f"{where}={text}: there is an empty name between the commas")
        own = None
        if colon:
            if not re.fullmatch(r"[0-9]{1,10}", number) or not 1 <= int(number) <= INT32_MAX:
                raise UserError(f"{where}={text}: `{number}` of {name} is no number of items; it must be at least 1")
            own = int(number)
        for each in ALIASES.get(name, (name,)):
            if found.get(each, own) != own:
                raise UserError(f"{where}={text}: {each} is named twice, with different limits")
            found[each] = own
    return [Spec(*item) for item in found.items()]


def parse_task_data(text: str, where: str = "--task_data") -> dict[str, str]:
    """Name -> path of the local files in a list such as `piqa=piqa.jsonl,wikitext=~/wikitext.jsonl`.

    Raises:
      UserError: an item that is not NAME=FILE, or a name that is given twice.
    """
    found: dict[str, str] = {}
    # A comma ends an item only if a name and `=` come next, because a path may contain commas.
    for item in re.split(r",(?=[^,=/]*=)", text) if text.strip() else []:
        name, _, path = (part.strip() for part in item.partition("="))
        if not name or not path:
            raise UserError(f"{where}={text}: `{item}` is not NAME=FILE, as in {where}=hellaswag=hellaswag.jsonl")
        if name in found:
            raise UserError(f"{where}={text}: {name} is given twice")
        found[name] = str(arguments.expand(path, where))
    return found


def from_flags(flags: FlagValues) -> tuple[list[Spec], dict]:
    """The tasks of a command line with `FLAGS`, and the options of `load`; no tasks without --tasks.

    Raises:
      UserError: a value that is wrong, or a flag that the tasks do not use.
    """
    if flags.tasks is None:
        if given := [f"--{name}" for name in FLAGS if flags[name].value is not None]:
            raise UserError(f"{given[0]} is an option of --tasks; give --tasks=NAMES as well")
        return [], {}
    options = {
        "num_fewshot": _whole(flags, "num_fewshot", 0),
        "limit": _whole(flags, "limit", 1),
        "task_data": parse_task_data(flags.task_data or ""),
        "include_path": flags.include_path or "",
        "core_bundle": flags.core_bundle or "",
    }
    specs = parse(flags.tasks)
    check(specs, **{name: value for name, value in options.items() if name != "limit"})
    return specs, options


def _whole(flags: FlagValues, name: str, least: int) -> int | None:
    text = flags[name].value
    if text is not None and not (re.fullmatch(r"-?[0-9]{1,10}", text) and least <= int(text) <= INT32_MAX):
        raise UserError(f"--{name}={text} is not a whole number of at least {least}")
    return None if text is None else int(text)


def check(
    specs: Sequence[Spec],
    *,
    num_fewshot: int | None = None,
    task_data: dict[str, str] | None = None,
    include_path: str = "",
    core_bundle: str = "",
    prefix: str = "--",
) -> None:
    """Refuses options that none of the tasks would use, and `core` without its bundle; reads no data.

    The arguments are those of `load`.

    Raises:
      UserError: names the option and the task.
    """
    names = [spec.name for spec in specs]
    if CORE in names and not core_bundle:
        raise UserError(f"the task {CORE} needs its data: give {prefix}core_bundle=FOLDER or the zip of it")
    if core_bundle and CORE not in names:
        raise UserError(f"{prefix}core_bundle={core_bundle} is of the task {CORE}, which is not among the tasks")
    for name in task_data or {}:
        if name == CORE:
            raise UserError(
                f"{prefix}task_data: {CORE} has no such file; give {prefix}core_bundle=FOLDER or the zip of it"
            )
        items = name.removesuffix(_TRAIN)
        if items != name and items in _OWN:
            raise UserError(f"{prefix}task_data: {name} is for tasks of lm-eval, and {items} is none")
        if items != name and items not in task_data:
            raise UserError(f"{prefix}task_data: {name} has the examples, but the items are missing: {items}=FILE")
    if set(names) <= set(_OWN):
        for flag, value in (("num_fewshot", num_fewshot), ("include_path", include_path or None)):
            if value is not None:
                raise UserError(f"{prefix}{flag}={value} is for tasks of lm-eval, and {', '.join(names)} is none")


def load(
    specs: Sequence[Spec],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_data: dict[str, str] | None = None,
    include_path: str = "",
    core_bundle: str = "",
    prefix: str = "--",
) -> list[Task]:
    """Reads and checks the data of tasks, before any model is loaded.

    Process 0 loads; in the other processes of a job the list is empty, and nothing is read or downloaded.

    Args:
      specs: from `parse`.
      num_fewshot: examples before each item, for tasks of lm-eval; None = the task's own number.
      limit: first items of the tasks without a limit of their own; None = all.
      task_data: task -> local file with its items, in place of the hub's.
      include_path: folder with definitions of further lm-eval tasks.
      core_bundle: folder or zip with the data of `core`.
      prefix: of the options' names in messages, "eval." for fields of the config.

    Returns:
      The tasks, in the order of `specs`.

    Raises:
      UserError: an unknown name (the message has the nearest ones), an option that no task uses, or data that are
        absent or damaged.
    """
    task_data = task_data or {}
    specs = [Spec(name, own or limit) for name, own in specs]
    options = {"num_fewshot": num_fewshot, "include_path": include_path, "core_bundle": core_bundle}
    check(specs, task_data=task_data, prefix=prefix, **options)
    if jax.process_index() != 0 or not specs:
        return []
    theirs = [spec for spec in specs if spec.name not in _OWN]
    _check_known([spec.name for spec in theirs], include_path)
    _check_used(task_data, specs, include_path, f"{prefix}task_data")
    loaded = {}
    for spec in specs:
        if spec.name == CORE:
            loaded[CORE] = core.load(core_bundle, spec.limit)
        elif spec.name == HELLASWAG:
            loaded[HELLASWAG] = hellaswag.load(task_data.get(HELLASWAG), spec.limit)
    of_lm_eval = {name: path for name, path in task_data.items() if name not in _OWN}
    for items in dict.fromkeys(spec.limit for spec in theirs):
        names = [spec.name for spec in theirs if spec.limit == items]
        tasks = harness.load(
            names, num_fewshot=num_fewshot, limit=items, task_data=of_lm_eval, include_path=include_path
        )
        loaded |= dict(zip(names, tasks, strict=True))
    return [_named(loaded[spec.name]) for spec in specs]


def _named(task: Task) -> Task:
    """The task; a UserError of its run, such as a character that the tokenizer does not have, begins with its name."""

    def run(model: LanguageModel) -> dict[str, Result]:
        try:
            return task.run(model)
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith("task ") else f"task {task.name}: {text}") from None

    return task._replace(run=run)


def _check_known(names: Sequence[str], include_path: str) -> None:
    """Refuses names that lm-eval does not have; without lm-eval its loader says so."""
    known = harness.known(include_path) if names else []
    unknown = [name for name in names if name not in known]
    if not known or not unknown:
        return
    choices = [*_OWN, *ALIASES, *known]
    near = difflib.get_close_matches(unknown[0], choices, 3) or difflib.get_close_matches(unknown[0], choices, 3, 0.4)
    hint = f"; the nearest names are {', '.join(near)}" if near else ""
    raise UserError(f"`{unknown[0]}` is not a task of lm-eval, nor {', '.join([*_OWN, *ALIASES])}{hint}")


def _check_used(task_data: dict[str, str], specs: Sequence[Spec], include_path: str, option: str) -> None:
    """Refuses files of tasks that are neither in the list nor members of its groups."""
    names = {spec.name for spec in specs}
    unused = [name for name in task_data if name.removesuffix(_TRAIN) not in names]
    if unused and (groups := [name for name in names if name not in _OWN]) and harness.known():
        members = harness_index.entries(harness_index.index(include_path), groups)
        unused = [name for name in unused if name.removesuffix(_TRAIN) not in members]
    if unused:
        near = difflib.get_close_matches(unused[0], names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{option}: {unused[0]} is not among the tasks {', '.join(spec.name for spec in specs)}{hint}")


def run(model: LanguageModel, tasks: Sequence[Task]) -> dict[str, Result]:
    """Scores a model on tasks, one after the other; every process of a job calls it.

    Args:
      model: the same in all processes.
      tasks: from `load`.

    Returns:
      In process 0 name -> result of all tasks, in the other processes nothing.
    """
    return {name: result for outcome in run_each(model, tasks) for name, result in outcome.results.items()}


def run_each(
    model: LanguageModel, tasks: Sequence[Task], done: Callable[[int, Outcome], None] = lambda i, outcome: None
) -> list[Outcome]:
    """As `run`, with the results of each task apart, in the order of `tasks`.

    Args:
      model, tasks: as of `run`.
      done: called in process 0 after each task, with its number from 0.
    """

    def all_tasks() -> list[Outcome]:
        outcomes = []
        for i, task in enumerate(tasks):
            say(f"task {i + 1}/{len(tasks)}: {task.name}, {task.protocol}")
            outcomes.append(Outcome(task, task.run(model)))
            done(i, outcomes[-1])
        return outcomes

    return model.drive(all_tasks) or []
