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
    """Mean and standard deviation over the finished seeds at the best rate of a rung, or None before the first one."""
    fields = ladder.tuned(figures, rung)
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


def ladder_table(figures: dict) -> str:
    """Markdown: a row a rung, with its gain over the newest rung above it that is taken, on the seeds of both."""
    columns = ("change", "bits per byte", "seeds", "sigma", "gain", "gain / sigma", "best rate", "parameters")
    columns += ("ms a step", "H200: GFLOPs, MB a token", "taken")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    base = None
    for rung in ladder.RUNGS:
        row = summary(figures, rung)
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
        milliseconds, h200 = (figures.get(name, {}).get(rung.name) for name in ("step_ms", "h200"))
        taken = "yes" if rung.taken else "no"
        taken += f": {rung.why}" if rung.why else ", removed" if rung.removed else ""
        static = f"{h200['gflops']:.3f}, {h200['megabytes']:.2f}" if h200 else ""
        lines.append(
            f"| {rung.name} | {row['mean']:.4f} | {len(row['scores'])} "
            f"| {'' if row['sigma'] is None else format(row['sigma'], '.4f')} | {gain} | {relative} "
            f"| {row['rate']} | {row['parameters'] / 1e6:.2f}M "
            f"| {'' if milliseconds is None else f'{milliseconds:.0f}'} | {static} | {taken} |"
        )
        base = row if builds else base
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
