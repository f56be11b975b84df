"""Writes the tables and the plot of docs/learning.md from the figures of `ladder.py`.

python scripts/bench/ladder_table.py
"""

import json
import math
import os
import statistics

import ladder
import report

DOC = os.path.join(report.RESULTS, "..", "..", "..", "docs", "learning.md")


def summary(figures: dict, rung: ladder.Rung) -> dict | None:
    """Mean and standard deviation over the seeds at the best rate of a rung, or None if runs are missing."""
    fields = ladder.tuned(figures, rung)
    runs = [ladder.find(figures, fields | {"seed": seed}) for seed in ladder.SEEDS]
    if None in runs:
        return None
    values = [run["bits_per_byte"] for run in runs]
    return {
        "rate": _rate(rung, fields),
        "mean": statistics.mean(values),
        "sigma": statistics.stdev(values),
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


def ladder_table(figures: dict) -> str:
    """Markdown: a row a rung, with its gain over the newest rung above it that is taken."""
    lines = [
        "| change | bits per byte | sigma | gain | gain / sigma | best rate | parameters | ms a step | taken |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = None
    for rung in ladder.RUNGS:
        row = summary(figures, rung)
        if row is None:
            continue
        gain = relative = ""
        if base and rung.steps == ladder.STEPS:
            sigma = math.sqrt((base["sigma"] ** 2 + row["sigma"] ** 2) / 2)
            gain, relative = f"{base['mean'] - row['mean']:+.4f}", f"{(base['mean'] - row['mean']) / sigma:+.1f}"
        milliseconds = figures.get("step_ms", {}).get(rung.name)
        lines.append(
            f"| {rung.name} | {row['mean']:.4f} | {row['sigma']:.4f} | {gain} | {relative} "
            f"| {row['rate']} | {row['parameters'] / 1e6:.2f}M "
            f"| {'' if milliseconds is None else f'{milliseconds:.0f}'} | {'yes' if rung.taken else 'no'} |"
        )
        if rung.taken and rung.steps == ladder.STEPS:
            base = row
    return "\n".join(lines)


def average_table(figures: dict) -> str:
    """Markdown: the last weights against moving averages of them, with the decays of `ladder.EMA`."""
    lines = [f"| change | last weights | {' | '.join(f'average, {d}' for d in ladder.EMA)} |"]
    lines.append("|---|---|" + "---|" * len(ladder.EMA))
    for rung in ladder.RUNGS:
        if rung.averages and (row := summary(figures, rung)):
            cells = " | ".join(f"{value:.4f}" for value in row["averages"].values())
            lines.append(f"| {rung.name} | {row['mean']:.4f} | {cells} |")
    return "\n".join(lines)


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


SECTIONS = {"ladder": ladder_table, "plot": plot, "averages": average_table}


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
