"""The curves of runs as a picture, with matplotlib (extra `plot`), and their final values as a table. No JAX."""

import importlib.util
import io
import itertools
import statistics
from collections.abc import Iterable, Sequence

from trialgpt_jax.live_line import time_left
from trialgpt_jax.training.metric_lines import TASK, Run

FORMATS = ("png", "svg", "pdf", "jpg", "webp")
_AXES = (("tokens", "tokens"), ("step", "steps"), ("seconds", "training time"))
_UNITS = ((3600 * 48, 86400, "days"), (3600 * 2, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))
_STYLES = ("-", "--", "-.", ":")
_START = 0.02  # share of a run after which its loss is below the top of the picture


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(runs: Sequence[Run], file_format: str = "png") -> bytes:
    """A picture of the runs: loss and bits per byte against tokens, steps and training time; learning rates, gradient
    norm and tokens/s against tokens; a panel for each metric of a task.

    Training losses are thin and their means over a hundredth of the run are dashed; validation losses have a dot per
    evaluation. A run that has diverged does not change the range of the others; `x` is where its training loss leaves
    the picture, or its last finite one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot, which looks for a display
    from matplotlib.figure import Figure

    has = {name for run in runs for line in run.lines for name in line}
    tasks = [name for name in sorted(has) if name.startswith(TASK) and not name.endswith("_stderr")]
    panels = [(_losses, *axis) for axis in _AXES]
    panels += [(_per_byte, *axis) for axis in _AXES] if "val_bits_per_byte" in has else []
    panels += [(_rates, *_AXES[0]), (_norms, *_AXES[0]), (_speed, *_AXES[0])]
    panels += [(name, *_AXES[0]) for name in tasks]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(16, 4.2 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    handles = []
    for number, (what, x, title) in enumerate(panels):
        axes = figure.add_subplot(rows, 3, number + 1)
        axes.grid(alpha=0.3)
        scale = _time_scale(runs) if x == "seconds" else (1, None)
        axes.set_xlabel(f"{title}, {scale[1]}" if scale[1] else title)
        if x != "seconds":
            axes.xaxis.set_major_formatter(_count)
        if callable(what):
            lines = what(axes, runs, x, scale[0])
        else:
            lines = _task(axes, runs, x, what)
        handles = handles or lines
    figure.legend(handles, [_label(run) for run in runs], loc="outside upper center", ncols=min(len(runs), 4))
    data = io.BytesIO()
    figure.savefig(data, format=file_format, dpi=90)
    return data.getvalue()


def _label(run: Run) -> str:
    return f"{run.name} (diverged)" if run.diverged() else run.name


def _count(value: float, _=None) -> str:
    """A number of tokens or steps for an axis: 800, 12k, 1.5M, 9B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _time_scale(runs: Sequence[Run]) -> tuple[int, str]:
    longest = max((run.last("seconds") or 0 for run in runs), default=0)
    return next((size, unit) for least, size, unit in _UNITS if longest >= least)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values up to each one."""
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / (i + 1 - max(0, i + 1 - window)) for i in range(len(values))]


def _losses(axes, runs: Sequence[Run], x: str, scale: float) -> list:
    axes.set_ylabel("loss, nats per token")
    handles, low, high, ends = [], [], [], []
    for i, run in enumerate(runs):
        xs, ys = _scaled(run, "loss", x, scale)
        smooth = _smooth(ys, max(1, len(ys) // 100))
        color = f"C{i}"
        axes.plot(xs, ys, color=color, linewidth=0.6, alpha=0.35)
        axes.plot(xs, smooth, color=color, linewidth=1, linestyle="--", alpha=0.8)
        handles += axes.plot(*_scaled(run, "val_loss", x, scale), color=color, marker="o", markersize=3.5)
        if run.diverged() and ys:
            ends.append((color, xs, ys))
        known = smooth + run.series("val_loss")[1]
        low += [min(known)] if known else []
        high += [(smooth or known)[int(_START * len(smooth or known))]] if known else []
    _limits(axes, low, high)
    top = axes.get_ylim()[1]
    for color, xs, ys in ends:
        inside = max((k for k, y in enumerate(ys) if y <= top), default=0)
        end = min(inside + 1, len(ys) - 1)
        axes.plot(xs[end], min(ys[end], top), color=color, marker="x", markersize=9, markeredgewidth=2, clip_on=False)
    axes.set_title("training (dashed), validation (dots)", fontsize=9)
    return handles


def _per_byte(axes, runs: Sequence[Run], x: str, scale: float) -> None:
    axes.set_ylabel("validation, bits per byte")
    low, high = [], []
    for i, run in enumerate(runs):
        xs, ys = _scaled(run, "val_bits_per_byte", x, scale)
        axes.plot(xs, ys, color=f"C{i}", marker="o", markersize=3.5)
        if ys:
            low.append(min(ys))
            high.append(ys[min(1, len(ys) - 1)] if len(ys) > 3 else ys[0])
    _limits(axes, low, high)


def _limits(axes, low: list[float], high: list[float]) -> None:
    """The range from the lowest value to the highest value near the beginning, whatever a diverged run does later."""
    if low and high and max(high) > min(low):
        margin = 0.05 * (max(high) - min(low))
        axes.set_ylim(min(low) - margin, max(high) + margin)


def _rates(axes, runs: Sequence[Run], x: str, scale: float) -> None:
    """A style per group of weights that has a rate of its own."""
    axes.set_ylabel("learning rate")
    names = sorted({name for run in runs for name in (run.names("lr/") or ["lr"])})
    for number, name in enumerate(names):
        style = _STYLES[number % len(_STYLES)]
        for i, run in enumerate(runs):
            axes.plot(*_scaled(run, name, x, scale), color=f"C{i}", linestyle=style, linewidth=1.2)
        axes.plot([], [], color="black", linestyle=style, label=name.removeprefix("lr/"))
    if names != ["lr"]:
        axes.set_yscale("log")
        axes.legend(fontsize=8)


def _norms(axes, runs: Sequence[Run], x: str, scale: float) -> None:
    axes.set_ylabel("gradient norm")
    axes.set_yscale("log")
    highest = 0.0
    for i, run in enumerate(runs):
        xs, ys = _scaled(run, "grad_norm", x, scale)
        positive = [(a, b) for a, b in zip(xs, ys, strict=True) if b > 0]
        if positive:
            axes.plot(*zip(*positive, strict=True), color=f"C{i}", linewidth=0.8)
            highest = max(highest, min(max(ys), 100 * statistics.median(ys)))
    if highest:
        axes.set_ylim(top=1.3 * highest)


def _speed(axes, runs: Sequence[Run], x: str, scale: float) -> None:
    axes.set_ylabel("tokens/s")
    axes.yaxis.set_major_formatter(_count)
    for i, run in enumerate(runs):
        axes.plot(*_scaled(run, "tokens_per_second", x, scale), color=f"C{i}", linewidth=0.8)
    axes.set_ylim(bottom=0)


def _task(axes, runs: Sequence[Run], x: str, name: str) -> None:
    """Scores with their standard errors, where a line has them."""
    axes.set_ylabel(name.removeprefix(TASK))
    for i, run in enumerate(runs):
        lines = [line for line in run.lines if line.get(name) is not None]
        errors = [line.get(f"{name}_stderr") or 0 for line in lines]
        xs, ys = [line[x] for line in lines], [line[name] for line in lines]
        axes.errorbar(xs, ys, yerr=errors, color=f"C{i}", marker="o", markersize=3.5, capsize=2)


def _scaled(run: Run, name: str, x: str, scale: float) -> tuple[list[float], list[float]]:
    xs, ys = run.series(name, x)
    return [value / scale for value in xs], ys


# ---- final values


def final(run: Run) -> dict:
    """The final values of a run: the last ones, the lowest validation loss, and the median of tokens/s; None = none."""
    best = run.best()
    speeds = run.series("tokens_per_second")[1]
    last_loss = next((line["loss"] for line in reversed(run.lines) if "loss" in line), None)
    return {
        "run": run.name,
        "step": run.lines[-1]["step"],
        "tokens": run.last("tokens"),
        "seconds": run.last("seconds"),
        "loss": last_loss,
        "val_loss": run.last("val_loss"),
        "val_bits_per_byte": run.last("val_bits_per_byte"),
        "best_step": best and best.step,
        "best_val_loss": best and best.val_loss,
        "best_val_bits_per_byte": best and best.val_bits_per_byte,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "skipped": run.last("skipped"),
        "diverged": run.diverged(),
        **{name: run.last(name) for name in run.names(TASK)},
    }


def table(results: Sequence[dict]) -> str:
    """The results of `final` for a reader, a row each; then the tasks, a row for each metric."""
    head = ("run", "step", "tokens", "time", "loss", "val loss", "bits/byte", "best at", "tokens/s")
    rows = [
        (
            _shorten(each["run"]),
            str(each["step"]),
            "-" if each["tokens"] is None else _count(each["tokens"]),
            "-" if each["seconds"] is None else time_left(each["seconds"]),
            "NaN" if each["loss"] is None else _number(each["loss"]),
            _number(each["val_loss"]),
            _number(each["val_bits_per_byte"]),
            "-" if each["best_step"] is None else str(each["best_step"]),
            "-" if each["tokens_per_second"] is None else f"{each['tokens_per_second']:,.0f}",
        )
        for each in results
    ]
    text = _aligned([head, *rows])
    tasks = sorted({name for each in results for name in each if name.startswith(TASK)})
    if tasks := [name for name in tasks if not name.endswith("_stderr")]:
        scores = [(name.removeprefix(TASK), *(_number(each.get(name)) for each in results)) for name in tasks]
        text += "\n\n" + _aligned([("task", *(_shorten(each["run"]) for each in results)), *scores])
    return text


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.2e}"


def _shorten(name: str, most: int = 16) -> str:
    return name if len(name) <= most else f"..{name[-most + 2 :]}"


def _aligned(rows: Iterable[Sequence[str]]) -> str:
    """Columns two spaces apart, the first one flush left and the others flush right."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
