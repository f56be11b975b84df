"""Writes the tables and the plot of docs/learning.md from the figures of `ladder.py`.

python scripts/bench/ladder_table.py
"""

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator

import ladder
import report

DOC = os.path.join(report.RESULTS, "..", "..", "..", "docs", "learning.md")


def summary(figures: dict, rung: ladder.Rung, shape: dict | None = None) -> dict | None:
    """Mean and standard deviation over the finished seeds at the best rate of a rung, or None before the first one.

    Args:
      shape: of another model on other data, see `ladder.untuned`.
    """
    fields = ladder.tuned(figures, rung, shape)
    runs = {seed: ladder.find(figures, fields | {"seed": seed}) for seed in ladder.SEEDS}
    scores = {seed: run["bits_per_byte"] for seed, run in runs.items() if run}
    runs = [run for run in runs.values() if run]
    if not runs:
        return None
    return {
        "rate": _rate(rung, fields),
        "scores": scores,
        "mean": statistics.mean(scores.values()),
        "sigma": statistics.stdev(scores.values()) if len(runs) > 1 else None,
        "tokens": runs[0]["tokens"],
        "parameters": runs[0]["parameters"],
        "averages": {d: statistics.mean(run["averages"][d] for run in runs) for d in map(str, ladder.EMA)}
        if rung.averages
        else {},
    }


def _rate(rung: ladder.Rung, fields: dict) -> str:
    """The best value of a rung's own grid."""
    if not rung.grid:
        return ""
    edge = " (end of the grid)" if fields[rung.rate] in (min(rung.grid), max(rung.grid)) else ""
    return f"{fields[rung.rate]:g}{edge}"


COLUMNS = ("change", "bits per byte", "seeds", "sigma", "gain", "gain / sigma", "best rate", "parameters")


def rows(figures: dict, shape: dict | None = None) -> Iterator[tuple[ladder.Rung, list[str]]]:
    """The cells of `COLUMNS` for each rung, with its gain over the newest rung above it that is taken, on the seeds of
    both."""
    base = None
    for rung in ladder.RUNGS:
        row = summary(figures, rung, shape)
        builds = rung.taken and rung.steps == ladder.STEPS
        if row is None:
            base = None if builds else base
            continue
        gain = relative = ""
        if base and rung.steps == ladder.STEPS:
            both = base["scores"].keys() & row["scores"].keys()
            gained = statistics.mean(base["scores"][seed] - row["scores"][seed] for seed in both)
            gain = f"{gained:+.4f}"
            if base["sigma"] and row["sigma"]:
                relative = f"{gained / math.sqrt((base['sigma'] ** 2 + row['sigma'] ** 2) / 2):+.1f}"
        sigma = "" if row["sigma"] is None else f"{row['sigma']:.4f}"
        cells = [rung.name, f"{row['mean']:.4f}", str(len(row["scores"])), sigma, gain, relative]
        yield rung, [*cells, row["rate"], f"{row['parameters'] / 1e6:.2f}M"]
        base = row if builds else base


def table(columns: Iterable[str], lines: Iterable[list[str]]) -> str:
    """Markdown."""
    columns = list(columns)
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(head + [f"| {' | '.join(cells)} |" for cells in lines])


def ladder_table(figures: dict) -> str:
    """A row a rung."""

    def lines():
        for rung, cells in rows(figures):
            milliseconds, h200 = (figures.get(name, {}).get(rung.name) for name in ("step_ms", "h200"))
            taken = "yes" if rung.taken else "no"
            taken += f": {rung.why}" if rung.why else ", removed" if rung.removed else ""
            static = f"{h200['gflops']:.3f}, {h200['megabytes']:.2f}" if h200 else ""
            yield [*cells, "" if milliseconds is None else f"{milliseconds:.0f}", static, taken]

    return table((*COLUMNS, "ms a step", "H200: GFLOPs, MB a token", "taken"), lines())


def others_table(figures: dict) -> str:
    """A table for each other model and corpus that has runs."""
    keys = ("data.dir", "model.n_layer", "model.n_embd", "train.steps")
    found = {tuple(run["fields"][key] for key in keys) for run in figures["runs"]}
    shapes = [shape for shape in sorted(found) if shape[0] != ladder.BASE["data.dir"]]
    return "\n\n".join(
        f"{folder}, {layers} layers of {width}, {steps} steps:\n\n"
        + table(COLUMNS, (cells for _, cells in rows(figures, dict(zip(keys, (folder, layers, width, steps))))))
        for folder, layers, width, steps in shapes
    )


def average_table(figures: dict) -> str:
    """The last weights against moving averages of them, with the decays of `ladder.EMA`."""
    found = [(rung.name, row) for rung in ladder.RUNGS if rung.averages and (row := summary(figures, rung))]
    lines = ([name, *(f"{v:.4f}" for v in (row["mean"], *row["averages"].values()))] for name, row in found)
    return table(("change", "last weights", *(f"average, {d}" for d in ladder.EMA)), lines)


def plot(figures: dict) -> str:
    """A mermaid chart: bits per byte after each rung that is taken."""
    rows = [(rung, summary(figures, rung)) for rung in ladder.RUNGS if rung.taken and rung.steps == ladder.STEPS]
    rows = [(rung.name, row["mean"]) for rung, row in rows if row]
    if not rows:
        return ""
    names, values = ", ".join(f'"{name}"' for name, _ in rows), ", ".join(f"{value:.3f}" for _, value in rows)
    low, high = min(v for _, v in rows), max(v for _, v in rows)
    return "\n".join(
        (
            "```mermaid",
            "xychart-beta horizontal",
            f'    title "bits per byte after {ladder.STEPS} steps"',
            f"    x-axis [{names}]",
            f'    y-axis "bits per byte" {low - 0.05:.2f} --> {high + 0.02:.2f}',
            f"    bar [{values}]",
            "```",
        )
    )


SECTIONS = {"ladder": ladder_table, "plot": plot, "others": others_table, "averages": average_table}


def main() -> None:
    with open(os.path.join(report.RESULTS, "ladder.json"), encoding="utf-8") as file:
        figures = json.load(file)
    with open(DOC, encoding="utf-8") as file:
        text = file.read()
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = text[: text.index(begin) + len(begin)] + "\n\n" + section(figures) + "\n\n" + text[text.index(end) :]
    with open(DOC, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
