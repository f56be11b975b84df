"""What every kind of task is to the command, the report and the training loop."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from trialgpt_jax.language_model import LanguageModel


class Result(NamedTuple):
    """The scores of a task.

    Attributes:
      metrics: name -> value, and `name_stderr` where there is one.
      n: items scored.
      exact: the metrics that are means of whole numbers, as accuracies are; rounding of the computation is not in them.
    """

    metrics: dict[str, float]
    n: int
    exact: frozenset[str] = frozenset()


class Task(NamedTuple):
    """A task whose data are read and checked.

    Attributes:
      name: `hellaswag`, `core`, `hellaswag_llmc`.
      protocol: whose numbers it gives, with the version: `lm-eval 0.4.13`, `nanochat CORE`, `llm.c`.
      version: of the task's definition, "" if it has none.
      digest: sha256 (hex) of the data and of what defines the task.
      num_fewshot: examples before each item.
      run: scores a model; name -> result, more than one for a group of tasks. Called in process 0 only.
    """

    name: str
    protocol: str
    version: str
    digest: str
    num_fewshot: int
    run: Callable[[LanguageModel], dict[str, Result]]


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the process-wide generators of `random` and numpy, which lm-eval and the code of tasks seed."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
