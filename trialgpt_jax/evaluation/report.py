"""The scores of a checkpoint: a table, `<workdir>/evaluations/<step>.json` and the same table as Markdown beside it.

The files have no dates, times or host names. Means of whole numbers, such as accuracies, are exact; every other number
is rounded to DIGITS significant digits, because the next one depends on the order of float32 sums. So any number of
processes and any mesh write the same bytes, unless a value is within rounding of the middle between two numbers, or two
answers are within rounding of each other.
"""

import importlib.metadata
import math
import os
from collections.abc import Sequence
from typing import TypedDict

import jax

from trialgpt_jax import UserError, __version__
from trialgpt_jax.console import say
from trialgpt_jax.data.token_store import TokenStore
from trialgpt_jax.evaluation import references
from trialgpt_jax.evaluation.references import CORE, LM_EVAL, SIZES, SOURCES
from trialgpt_jax.evaluation.suite import Outcome
from trialgpt_jax.live_line import fold
from trialgpt_jax.storage import files, json_files, lock

DIGITS = 5
_STDERR = "_stderr"
_TOKENS = " tokens"  # after a number of them; the other rows have a number of items
_Scores = dict[str, float | int | None]  # metrics, their `_stderr`, and `n`


class Loss(TypedDict):
    """The loss on a split, as `evaluate` prints it; `data` has the sha256 of the token stores."""

    split: str
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    tokens: int
    data: list[str]


class Definition(TypedDict):
    """How the scores of a task were made.

    Attributes:
      protocol, version, digest, num_fewshot: of the `Task`.
      limit: its first items only; None = all.
      dtype: of the model's computation.
      versions: of the packages that take part.
      results: names of its scores in `tasks`.
    """

    protocol: str
    version: str
    digest: str
    num_fewshot: int
    limit: int | None
    dtype: str
    versions: dict[str, str]
    results: list[str]


class Report(TypedDict):
    """The contents of the JSON file.

    Attributes:
      step: of the checkpoint.
      loss: None if no token store was there.
      tasks: name -> metrics, each with `<metric>_stderr` where there is one, and `n`, the number of items.
      definitions: task -> how its scores were made.
    """

    step: int
    loss: Loss | None
    tasks: dict[str, _Scores]
    definitions: dict[str, Definition]


def empty(step: int) -> Report:
    """The report of a checkpoint, without scores and loss."""
    return Report(step=step, loss=None, tasks={}, definitions={})


def loss_part(result: dict, store: TokenStore) -> Loss:
    """The loss of a report: split, loss, perplexity, bits_per_byte and tokens of `result`, over text of `store`."""
    rounded = {name: rounded_to(result[name]) for name in ("loss", "perplexity", "bits_per_byte")}
    data = [digest for _, digest in store.members]
    return Loss(split=result["split"], tokens=result["tokens"], data=data, **rounded)


def add(report: Report, outcome: Outcome, limit: int | None, dtype: str) -> Report:
    """A report with the results of one more task.

    Args:
      report: of the same checkpoint; unchanged.
      outcome: from `suite.run_each`.
      limit: of the task.
      dtype: of the model's computation.
    """
    task, results = outcome
    new = empty(report["step"])
    for name, result in results.items():
        new["tasks"][name] = {
            metric: _finite(value) if metric in result.exact else rounded_to(value)
            for metric, value in result.metrics.items()
        } | {"n": result.n}
    new["definitions"][task.name] = Definition(
        protocol=task.protocol,
        version=task.version,
        digest=task.digest,
        num_fewshot=task.num_fewshot,
        limit=limit,
        dtype=dtype,
        versions=_versions(task.protocol),
        results=list(results),
    )
    return merge(report, new)


def merge(old: Report, new: Report) -> Report:
    """Both; of a task, of a name of scores and of the loss that both have, those of `new`.

    Every name of scores belongs to one definition, that which made it last.
    """
    definitions = {}
    for task, definition in old["definitions"].items():
        kept = [name for name in definition["results"] if name not in new["tasks"]]
        if task not in new["definitions"] and kept:
            definitions[task] = definition | {"results": kept}
    definitions = dict(sorted((definitions | new["definitions"]).items()))
    tasks = old["tasks"] | new["tasks"]
    return Report(
        step=new["step"],
        loss=new["loss"] or old["loss"],
        tasks={name: tasks[name] for definition in definitions.values() for name in definition["results"]},
        definitions=definitions,
    )


def folder(workdir: str) -> str:
    """The folder of the reports of a workdir."""
    return os.path.join(workdir, "evaluations")


def save(workdir: str, report: Report, last: bool = True) -> None:
    """Merges a report into `<workdir>/evaluations/<step>.json`, see `merge`, and writes the Markdown of the result.

    If `last`, the log has a line that says where they are, or why they are not: the folder cannot be written, or
    another evaluation is writing. Otherwise nothing is said, because a later call says it.
    """
    place = folder(workdir)
    path = os.path.join(place, f"{report['step']}.json")
    try:
        with files.storage_faults(place, then="evaluate again"), lock.hold(place, keep_file=False):
            whole = merge(_read(path, report["step"]), report)
            json_files.write(path, whole)
            files.write(path.removesuffix("json") + "md", markdown(whole))
    except UserError as error:
        line = f"the scores are not written to {path}: {error}"
    else:
        line = f"the scores are in {path}"
    if last:
        say(line)


def _read(path: str, step: int) -> Report:
    try:
        report = json_files.read(path, Report)
        named = {name for definition in report["definitions"].values() for name in definition["results"]}
        if named != report["tasks"].keys() or report["step"] != step:
            raise ValueError("its definitions and tasks differ, or it is of another step")
    except FileNotFoundError:
        return empty(step)
    except ValueError as error:
        raise UserError(f"the file there is not a report of this version: {error}; remove it") from None
    return report


def rounded_to(value: float | None) -> float | int | None:
    """A float with DIGITS significant digits; an integer as it is; None for what JSON cannot hold."""
    value = _finite(value)
    return value if value is None or type(value) is int else float(f"{value:.{DIGITS}g}")


def _finite(value: float | None) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return value if type(value) is int else float(value)


def _versions(protocol: str) -> dict[str, str]:
    """Versions of the packages that decide the scores of a protocol."""
    packages = ("lm_eval", "datasets") if protocol.startswith(LM_EVAL) else ()
    return {"trialgpt_jax": __version__, "jax": jax.__version__} | {
        name: importlib.metadata.version(name) for name in packages
    }


# ---- for people


def table(report: Report, width: int | None = None) -> str:
    """A table with aligned columns, and what must be known to read it; in a terminal of `width` columns."""
    (head, *rows), left_out = _fitting(_rows(report), width)
    widths = _widths([head, *rows])
    left = (0, 1, 2)  # words; the rest are numbers
    notes = _notes(report)
    if left_out:
        notes.append(f"The terminal is too narrow for {', '.join(left_out)}.")

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(c.ljust(n) if i in left else c.rjust(n) for i, (c, n) in enumerate(cells)).rstrip()

    lines = [line(head), "  ".join("-" * n for n in widths), *map(line, rows), "", *notes]
    return "\n".join(fold(text, width) for text in lines)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _fitting(rows: list[tuple[str, ...]], width: int | None) -> tuple[list[tuple[str, ...]], list[str]]:
    """The rows, without columns that are empty and then without figures of GPT-2 while a row is longer than `width`;
    and the heads of the figures that are left out."""
    left_out = []

    def too_wide():
        return width is not None and sum(_widths(rows)) + 2 * (len(rows[0]) - 1) > width

    def drop(i):
        return [row[:i] + row[i + 1 :] for row in rows]

    for i in reversed(range(len(rows[0]))):
        if too_wide() and not any(row[i] for row in rows[1:]):
            rows = drop(i)
    while too_wide() and rows[0][-1].startswith("GPT-2"):
        left_out.insert(0, rows[0][-1])
        rows = drop(len(rows[0]) - 1)
    if too_wide():
        rows = [tuple(cell.removesuffix(_TOKENS) for cell in row) for row in rows]
    return rows, left_out


def markdown(report: Report) -> str:
    """The same as a page in Markdown."""
    head, *rows = _rows(report)

    def line(row: Sequence[str]) -> str:
        return f"| {' | '.join(row)} |"

    rule = ["---"] * 3 + ["---:"] * (len(head) - 3)
    notes = [f"- {note}" for note in _notes(report)]
    return "\n".join([f"# Checkpoint {report['step']}", "", *map(line, (head, rule, *rows)), "", *notes, ""])


def _rows(report: Report) -> list[tuple[str, ...]]:
    """The head and the rows of the table: bits per byte first, because it has the least noise."""
    rows = []
    if loss := report["loss"]:
        for metric in ("bits_per_byte", "loss", "perplexity"):
            if loss[metric] is not None:
                n = f"{loss['tokens']:,}{_TOKENS}"
                rows.append(
                    (f"{loss['split']} split", "loss", metric, _number(loss[metric]), "", n, *[""] * len(SIZES))
                )
    for definition in report["definitions"].values():
        shots = "" if definition["protocol"].startswith(CORE) else f", {definition['num_fewshot']}-shot"
        for name in definition["results"]:
            scores = report["tasks"][name]
            for metric, value in scores.items():
                if metric == "n" or metric.endswith(_STDERR):
                    continue
                found = references.find(definition["protocol"], definition["num_fewshot"], name, metric)
                theirs = [f"{v[0]:g} {v[1]}" if v else "" for v in found.values] if found else [""] * len(SIZES)
                error = scores.get(metric + _STDERR)
                rows.append(
                    (
                        name,
                        definition["protocol"] + shots,
                        metric,
                        _number(value),
                        "" if error is None else _number(error),
                        f"{scores['n']:,}",
                        *theirs,
                    )
                )
    rows.sort(key=lambda row: row[2] != "bits_per_byte")  # stable
    return [("task", "protocol", "metric", "value", "stderr", "n", *(f"GPT-2 {size}" for size in SIZES)), *rows]


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,}" if type(value) is int else f"{value:.4f}" if abs(value) < 10 else f"{value:.{DIGITS}g}"


def _notes(report: Report) -> list[str]:
    """What the reader of this table must know, a sentence or two each."""
    notes, letters, protocols = [], set(), {}
    for definition in report["definitions"].values():
        for name in definition["results"]:
            protocols[name] = definition["protocol"]
            scores = report["tasks"][name]
            found = [references.find(definition["protocol"], definition["num_fewshot"], name, m) for m in scores]
            found = [each for each in found if each]
            letters |= {value[1] for each in found for value in each.values if value}
            if found and found[0].items not in (None, scores["n"]):
                notes.append(f"{name}: {scores['n']:,} items here, {found[0].items:,} in the figures of GPT-2.")
            elif found and definition["limit"]:
                limit = f"at most {definition['limit']:,} items of a task here"
                notes.append(f"{name}: {limit}, all of them in the figures of GPT-2.")
    if "lambada_openai" in protocols:
        notes.append(
            "LAMBADA: GPT-2 124M has 32.56% here and 45.99% in OpenAI's paper, which used other preprocessing of "
            "the text (lm-evaluation-harness, issue 2159)."
        )
    if any("hellaswag" in name for name in protocols):
        notes.append(
            "HellaSwag: lm-eval cleans the text and divides by characters, llm.c divides by tokens and cleans nothing, "
            "CORE has a prompt of its own. Compare only within one protocol."
        )
    if "core" in protocols:
        notes.append("CORE: equal training runs differ by about 0.015.")
    if report["loss"] or any("bits_per_byte" in scores for scores in report["tasks"].values()):
        notes.append("bits_per_byte has the least noise of all metrics: it uses every token.")
    if letters:
        notes.append("Sources: " + "; ".join(f"{letter} = {SOURCES[letter]}" for letter in sorted(letters)) + ".")
    return notes
