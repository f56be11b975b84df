"""What all protocols share: sequences scored once each, and the standard error of an accuracy."""

import array
import math
from collections.abc import Sequence
from typing import NamedTuple

from trialgpt_jax.language_model import LanguageModel, Score

# Ids as int32: a list of Python's integers takes 40 bytes an id, and 10-shot HellaSwag has 30 million of them.
Ids = array.array


class Sequences:
    """Sequences to score, equal ones once: the log-probabilities of equal ones may differ by rounding, because they can
    be computed in batches of different lengths, and then a tie between two choices would not go to the first one."""

    def __init__(self):
        self._places: dict[tuple[bytes, int], int] = {}
        self._requests: list[tuple[Ids, Ids]] = []

    def add(self, ids: Sequence[int], start: int) -> int:
        """Asks for ids[start:] after ids[:start], both not empty; returns the number of the score."""
        packed = array.array("i", ids)
        place = self._places.setdefault((packed.tobytes(), start), len(self._requests))
        if place == len(self._requests):
            self._requests.append((packed[:start], packed[start:]))
        return place

    def score(self, model: LanguageModel, what: str) -> list[Score]:
        """The scores of all sequences, in one call of the model; `what` is for its progress bar."""
        return model.score_tokens(self._requests, what) if self._requests else []


class Span(NamedTuple):
    """A sequence that fits in the context.

    Attributes:
      ids: those that are left.
      start: of the part that is scored; at least 1 if any of it can be scored.
      cropped: whether ids were cut from the left.
    """

    ids: Sequence[int]
    start: int
    cropped: bool


def crop(ids: Sequence[int], start: int, longest: int) -> Span:
    """The last `longest` ids."""
    drop = max(0, len(ids) - longest)
    return Span(ids[drop:], start - drop, drop > 0)


def first_minimum(losses: Sequence[float]) -> int:
    """Index of the smallest loss, the first one of equal ones; NaN is smaller than nothing, and nothing than it."""
    best = 0
    for i, loss in enumerate(losses):
        if loss < losses[best]:
            best = i
    return best


def accuracy(name: str, correct: int, n: int) -> dict[str, float]:
    """`name` and `name_stderr`, the sample standard error of a mean of n values 0 and 1; it needs n > 1."""
    mean = correct / n
    return {name: mean} | ({f"{name}_stderr": math.sqrt(mean * (1 - mean) / (n - 1))} if n > 1 else {})
