"""Tasks of lm-eval, EleutherAI's evaluation harness, run in process on a LanguageModel.

Numbers equal those of lm-eval's `hf` model on the exported weights, with its default seeds, bootstrap_iters=1000,
logits_cache=False and each task alone. lm_eval is the extra `eval`; it is imported when the first task is loaded, and
torch is never.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import random
import sys
from collections.abc import Iterator, MutableMapping

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data import hub
from trialgpt_jax.evaluation import harness_index, harness_tasks
from trialgpt_jax.evaluation.harness_model import wrap
from trialgpt_jax.evaluation.task import Result, Task, random_state_kept
from trialgpt_jax.language_model import LanguageModel

# For the standard error of perplexities and F1 scores; those of means have a formula. lm-eval's default of 100,000
# takes 3 minutes for LAMBADA's 5,153 items, and 1,000 give the same two digits.
BOOTSTRAP = 1000
_SEEDS = 0, 1234  # of `random` and numpy, before the data are read; lm-eval's defaults


def known(include_path: str = "") -> list[str]:
    """The names of all tasks, groups and tags, those in a folder as well; [] if lm-eval is not installed."""
    return harness_index.index(include_path).names() if _installed() else []


def load(
    names: list[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_data: dict[str, str] | None = None,
    include_path: str = "",
) -> list[Task]:
    """Reads and checks the data of tasks, and builds all their requests.

    Args:
      names: of tasks, groups or tags.
      num_fewshot: examples before each item; None = the task's own number. As in lm-eval, a task that fixes 0 keeps it.
      limit: the first items of each task; None = all.
      task_data: task -> file with its items, JSON lines in the field names of the hub. `NAME:train` is the file with
        the examples; without it they are other items of the same file.
      include_path: folder with YAML files of further tasks.

    Returns:
      One for each name. The digest is that of the task's definition and of the data, wherever they come from.

    Raises:
      UserError: lm-eval is not installed, a name is unknown, a definition is wrong, or data are absent or damaged.
    """
    if not _installed():
        raise UserError("tasks of lm-eval need the extra `eval`: `pip install 'trialgpt_jax[eval]'`")
    hub.quiet()
    _log()
    index = harness_index.index(include_path)
    files = task_data or {}
    return [_load(name, index, files, num_fewshot, limit) for name in names]


def _installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


@functools.cache
def _log() -> logging.Logger:
    """lm-eval's logger: warnings become lines of our log, each once and cut to one line."""
    said = set()

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())[:300]
            if text not in said:
                said.add(text)
                with _visible():
                    say(f"lm-eval: {text}")

    logger = logging.getLogger("lm_eval")
    logger.handlers, logger.propagate = [Lines(logging.WARNING)], False
    logger.setLevel(logging.WARNING)
    return logger


_streams: list[tuple] = []  # stdout and stderr while lm-eval's are hidden


@contextlib.contextmanager
def _hidden() -> Iterator[None]:
    """Hides what lm-eval prints and its progress bars."""
    _streams.append((sys.stdout, sys.stderr))
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            yield
    finally:
        _streams.pop()


@contextlib.contextmanager
def _visible() -> Iterator[None]:
    """Inside `_hidden`: the real streams."""
    out, err = _streams[-1] if _streams else (sys.stdout, sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Seeds the global generators as lm-eval does, because some tasks shuffle with them, and restores them."""
    with random_state_kept():
        random.seed(_SEEDS[0])
        np.random.seed(_SEEDS[1])
        yield


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """For calls of lm-eval: its output is hidden, it forks no processes, and it compiles each template once."""
    from lm_eval.utils import env

    compiled = functools.cache(env.from_string)  # lm-eval compiles it again for every item: 0.8 ms each
    # It would bootstrap in a pool of forked processes, and a process with JAX's threads must not be forked.
    one_process = _set(os.environ, "DISABLE_MULTIPROC", "1")
    with _hidden(), _seeded(), one_process, _set(env.__dict__, "from_string", compiled):
        yield


@contextlib.contextmanager
def _set(where: MutableMapping, key: str, value: object) -> Iterator[None]:
    """`where[key]` is `value` inside the block."""
    before = where.get(key)
    where[key] = value
    try:
        yield
    finally:
        if before is None:
            del where[key]
        else:
            where[key] = before


def _load(
    name: str, index: harness_index.Index, files: dict[str, str], num_fewshot: int | None, limit: int | None
) -> Task:
    with _surroundings():
        logger = _log()
        logger.setLevel(logging.ERROR)  # warnings about definitions, most of them in lm-eval's own files
        try:
            loaded = harness_tasks.build(name, index, files)
        finally:
            logger.setLevel(logging.WARNING)
        for task in loaded["tasks"].values():
            harness_tasks.prepare(task, num_fewshot, limit)
    tasks = loaded["tasks"]
    versions = [str(group.version) for group in loaded["groups"].values() if group.name == name]
    versions += [str(task.VERSION) for task in tasks.values()]
    return Task(
        name=name,
        protocol=f"lm-eval {importlib.metadata.version('lm_eval')}",
        version=next((version for version in versions if version not in ("None", "N/A", "Yaml")), ""),
        digest=hashlib.sha256("".join(harness_tasks.digest(tasks[key]) for key in sorted(tasks)).encode()).hexdigest(),
        num_fewshot=max(task.config.num_fewshot or 0 for task in tasks.values()),
        run=functools.partial(_run, loaded, limit),
    )


def _run(loaded: dict, limit: int | None, model: LanguageModel) -> dict[str, Result]:
    """Scores a model on built tasks; task or group -> result."""
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        harness_tasks.forget_answers(task)
    with _surroundings():
        found = evaluate(
            lm=wrap(model, _visible),
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,  # for `exact`
        )
    results = {}
    for name, task in loaded["tasks"].items():
        results[name] = _result(found["results"][name], _whole(task, found["samples"][name]))
    for group in loaded["groups"].values():
        if group.has_aggregation:
            inside = [results[task.task_name].exact for task in group.get_all_tasks()]
            results[group.name] = _result(found["groups"][group.name], frozenset.intersection(*inside))
    return results


def _result(found: dict, whole: frozenset[str]) -> Result:
    """lm-eval's dictionary of a task, with keys `metric,filter` and `metric_stderr,filter`, as a Result."""
    metrics = {}
    for key, value in found.items():
        metric, comma, chosen = key.partition(",")
        if not comma or isinstance(value, str) or not np.isscalar(value):  # not a metric, or "N/A"
            continue
        base = metric.removesuffix("_stderr")
        metrics[_metric_name(base, chosen) + metric[len(base) :]] = float(value)
    return Result(metrics, int(found["sample_len"]), frozenset(metrics).intersection(whole))


def _metric_name(metric: str, chosen: str) -> str:
    """`chosen` is the name of a filter of the answers; "none" is the default one."""
    return metric if chosen == "none" else f"{metric},{chosen}"


def _whole(task, samples: list[dict]) -> frozenset[str]:
    """The metrics that are means of whole numbers."""
    from lm_eval.api.metrics import mean

    found, others = set(), set()
    for sample in samples:
        for metric in sample["metrics"]:
            value = sample[metric]
            is_whole = isinstance(value, (bool, int, float, np.number, np.bool_)) and float(value).is_integer()
            is_mean = task.aggregation().get(metric, mean) is mean
            (found if is_whole and is_mean else others).add(_metric_name(metric, sample["filter"]))
    return frozenset(found - others)
