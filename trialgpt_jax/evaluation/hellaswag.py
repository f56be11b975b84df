"""HellaSwag as build-nanogpt's hellaswag.py and llm.c print it.

A context and " " + ending are encoded apart and joined, without a token before them. `acc` takes the ending with the
smallest sum of losses, `acc_norm` the one with the smallest mean per token. lm-eval's HellaSwag is another number: it
edits the texts and divides by characters.
"""

import hashlib
import json
from typing import NamedTuple

from trialgpt_jax.evaluation import task_data
from trialgpt_jax.evaluation.scoring import Sequences, accuracy, crop, first_minimum
from trialgpt_jax.evaluation.task import Result, Task
from trialgpt_jax.language_model import LanguageModel

NAME, REPO, SPLIT = "hellaswag_llmc", "Rowan/hellaswag", "validation"
_WAY_OUT = (
    f"on a machine with access, run python -c \"import datasets; datasets.load_dataset('{REPO}')\" and copy that "
    f"folder here, or give --task_data={NAME}=FILE (eval.task_data when training), a copy of "
    "https://github.com/rowanz/hellaswag/blob/master/data/hellaswag_val.jsonl"
)


class Item(NamedTuple):
    """A context, its endings, and the index of the right one."""

    context: str
    endings: list[str]
    label: int


class Outcome(NamedTuple):
    """Of an item: whether the smallest sum and the smallest mean are those of the right ending; whether a context was
    cut."""

    by_sum: bool
    by_mean: bool
    cropped: bool


def load(path: str | None, limit: int | None) -> Task:
    """The task `hellaswag_llmc`.

    Args:
      path: JSON lines with `ctx`, `endings` and `label`, a number (hellaswag_val.jsonl) or a string of one (the hub's
        dataset); None or "" = the hub's validation split, from the cache if it is there.
      limit: the first items; None = all, 10,042 in the validation split.

    Returns:
      A task with the result `hellaswag_llmc`: `acc`, `acc_norm`, their `_stderr`, and `cropped`, the number of items
      whose context was cut from the left to fit, if it is not 0. The digest is that of the items, in whatever file.

    Raises:
      UserError: no data, or the file, line and field that is wrong.
    """
    rows = task_data.read(path) if path else task_data.hub_rows(REPO, SPLIT, _WAY_OUT)
    items = [_item(row) for row in rows]
    digest = hashlib.sha256(json.dumps(items).encode()).hexdigest()

    def run(model: LanguageModel) -> dict[str, Result]:
        return {NAME: _result(score_items(model, items[:limit]))}

    return Task(NAME, "llm.c", "", digest, 0, run)


def _item(row: task_data.Row) -> Item:
    endings = row.texts("endings")
    context = row.text("ctx", empty=False)  # the first token of an ending needs one before it
    if row.fields.get("label") == "":  # the hub's test split
        raise row.wrong("label", f"is empty, as in the test split, which has no answers; {SPLIT} is the split to score")
    return Item(context, endings, row.index("label", len(endings), digits=True))


def score_items(model: LanguageModel, items: list[Item]) -> list[Outcome]:
    """The outcome of every item."""
    sequences, prepared = Sequences(), []
    for item in items:
        context = model.encode(item.context)
        endings = [model.encode(" " + ending) for ending in item.endings]
        # The last id is scored and not fed, so one more than the context fits
        spans = [crop(context + ending, len(context), model.block_size + 1) for ending in endings]
        starts = [max(1, span.start) for span in spans]  # 1: an ending that is longer than the context
        places = [sequences.add(span.ids, start) for span, start in zip(spans, starts, strict=True)]
        lengths = [len(span.ids) - start for span, start in zip(spans, starts, strict=True)]
        prepared.append((places, lengths, any(span.cropped for span in spans)))
    scores = sequences.score(model, NAME)
    outcomes = []
    for item, (places, lengths, cropped) in zip(items, prepared, strict=True):
        sums = [-scores[place].log_prob for place in places]
        means = [total / length for total, length in zip(sums, lengths, strict=True)]
        outcomes.append(Outcome(first_minimum(sums) == item.label, first_minimum(means) == item.label, cropped))
    return outcomes


def _result(outcomes: list[Outcome]) -> Result:
    n, cropped = len(outcomes), sum(outcome.cropped for outcome in outcomes)
    metrics = accuracy("acc", sum(outcome.by_sum for outcome in outcomes), n)
    metrics |= accuracy("acc_norm", sum(outcome.by_mean for outcome in outcomes), n)
    return Result(metrics | ({"cropped": cropped} if cropped else {}), n, frozenset({"acc", "acc_norm"}))
