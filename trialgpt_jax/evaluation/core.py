"""CORE: the mean of 22 tasks, each centred between guessing and perfect, as nanochat computes it.

DCLM (arXiv:2406.11794) defines the metric; nanochat's `core_eval.py` and `base_eval.py` are the protocol followed here,
item by item: shots, rendering, where an answer begins, and the crop to the context.

Items on which nanochat stops with an assertion are wrong and counted here: `no_common_prefix`, a context whose token
ids do not begin those of context and continuation; `too_long`, an answer that does not fit in the context. Counted and
scored are `cropped`, prompts that lose their first tokens, and `empty_span`, items of which one choice is the beginning
of another (4 of PIQA's 1,838 in GPT-2's tokens) or has no token before its answer. The mean loss of that choice is NaN,
which nanochat's minimum takes if it is the first choice, and otherwise never.
"""

import math
import random
from typing import NamedTuple

from trialgpt_jax.evaluation import core_bundle
from trialgpt_jax.evaluation.core_bundle import CoreTask
from trialgpt_jax.evaluation.scoring import Sequences, Span, accuracy, crop, first_minimum
from trialgpt_jax.evaluation.task import Result, Task
from trialgpt_jax.language_model import LanguageModel

NO_PREFIX, TOO_LONG, CROPPED, EMPTY = "no_common_prefix", "too_long", "cropped", "empty_span"
_SHOT_SEED = 1234  # plus the index of the item


class Outcome(NamedTuple):
    """Of an item: whether it was answered correctly, and the counters above that it adds to."""

    correct: bool
    notes: tuple[str, ...]


class _Prompts(NamedTuple):
    """The prompts of an item: the spans to score, or none if it is wrong without a model; and its counters."""

    spans: list[Span]
    notes: tuple[str, ...]


def load(bundle: str, limit: int | None) -> Task:
    """The task `core`; all of the bundle is read and checked.

    Args:
      bundle: a folder or a zip, see `core_bundle`.
      limit: the first items of each of its tasks, after they are shuffled; None = all.

    Returns:
      A task with the results `core` (`core`, `core_stderr`; n is the number of all items) and `core/<label>` (`acc`,
      `acc_stderr`, `centered`) in the order of the bundle, with the counters that are not 0.

    Raises:
      UserError: as `core_bundle.read`.
    """
    tasks, digest = core_bundle.read(bundle, limit)

    def run(model: LanguageModel) -> dict[str, Result]:
        return _results(tasks, [score_task(model, task) for task in tasks])

    return Task("core", "nanochat CORE", "", digest, max(task.shots for task in tasks), run)


def score_task(model: LanguageModel, task: CoreTask) -> list[Outcome]:
    """The outcome of every item, in the order of `task.items`."""
    sequences, prepared = Sequences(), []
    for index in range(len(task.items)):
        spans, notes = _prompts(model, task, index)
        places = [_place(sequences, span) for span in spans]
        prepared.append((places, [len(span.ids) - span.start for span in spans], notes))
    scores = sequences.score(model, f"core, {task.label}")
    outcomes = []
    for item, (places, lengths, notes) in zip(task.items, prepared, strict=True):
        if not places:
            correct = False
        elif task.kind == "language_modeling":
            correct = scores[places[0]].is_greedy
        else:
            losses = [
                math.nan if place is None else -scores[place].log_prob / length
                for place, length in zip(places, lengths, strict=True)
            ]
            correct = first_minimum(losses) == item.gold
        outcomes.append(Outcome(correct, notes))
    return outcomes


def _place(sequences: Sequences, span: Span) -> int | None:
    """The number of its score; None if there is no token to score, or none before it."""
    return sequences.add(span.ids, span.start) if 0 < span.start < len(span.ids) else None


def _prompts(model: LanguageModel, task: CoreTask, index: int) -> _Prompts:
    """Renders, encodes and crops the prompts of an item."""
    ids = [[model.start_id, *model.encode(text)] for text in render(task, index)]
    lowest = 0  # start of a scored part
    if task.kind == "language_modeling":
        without, whole = ids
        if len(without) >= len(whole) or whole[: len(without)] != without:
            return _Prompts([], (NO_PREFIX,))
        ids, starts, lowest = [whole], [len(without)], 1
    elif task.kind == "schema":
        common = _common([each[::-1] for each in ids])
        starts = [len(each) - common for each in ids]
    else:
        starts = [_common(ids)] * len(ids)
    spans = [crop(each, start, model.block_size) for each, start in zip(ids, starts, strict=True)]
    if any(span.start < lowest for span in spans):
        return _Prompts([], (TOO_LONG,))
    cropped = any(span.cropped for span in spans)
    empty = any(span.start in (0, len(span.ids)) for span in spans)
    return _Prompts(spans, (CROPPED,) * cropped + (EMPTY,) * empty)


def render(task: CoreTask, index: int) -> list[str]:
    """The prompts of an item: solved items, then one of its options.

    Of language_modeling there are two, without and with the continuation. The first one is stripped, because GPT-2's
    tokens begin with the space before a word.
    """
    item = task.items[index]
    # As Random(...).sample(all other items) chooses, without a list of them for each item
    chosen = random.Random(_SHOT_SEED + index).sample(range(len(task.items) - 1), task.shots)
    solved = [task.items[i + (i >= index)] for i in chosen]
    shots = "".join(f"{task.delimiter.join(each.options[each.gold])}\n\n" for each in solved)
    prompts = [shots + task.delimiter.join(option) for option in item.options]
    if task.kind != "language_modeling":
        return prompts
    return [(shots + item.options[0][0] + task.delimiter).strip(), *prompts]


def _common(sequences: list[list[int]]) -> int:
    """Length of the common prefix."""
    for i, ids in enumerate(zip(*sequences, strict=False)):
        if any(each != ids[0] for each in ids):
            return i
    return min(map(len, sequences))


def _results(tasks: list[CoreTask], outcomes: list[list[Outcome]]) -> dict[str, Result]:
    results, centered, variances = {}, [], []
    for task, found in zip(tasks, outcomes, strict=True):
        n = len(found)
        metrics = accuracy("acc", sum(outcome.correct for outcome in found), n)
        centered.append((metrics["acc"] - task.baseline) / (1 - task.baseline))
        variances.append((metrics.get("acc_stderr", math.nan) / (1 - task.baseline)) ** 2)
        metrics |= {"centered": centered[-1]} | _counts(found)
        results[f"core/{task.label}"] = Result(metrics, n, frozenset({"acc", "centered"}))
    whole = {"core": sum(centered) / len(centered)}
    if not math.isnan(stderr := math.sqrt(sum(variances)) / len(variances)):
        whole["core_stderr"] = stderr  # of the mean of independent tasks
    everything = [outcome for found in outcomes for outcome in found]
    return {"core": Result(whole | _counts(everything), len(everything), frozenset({"core"})), **results}


def _counts(outcomes: list[Outcome]) -> dict[str, float]:
    notes = [note for outcome in outcomes for note in outcome.notes]
    return {name: notes.count(name) for name in (CROPPED, TOO_LONG, NO_PREFIX, EMPTY) if name in notes}
