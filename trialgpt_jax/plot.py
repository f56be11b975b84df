"""Draws the curves of runs: `trialgpt plot runs/a runs/b --out=curves.png`.

Loss and bits per byte against tokens, steps and training time, learning rates, gradient norm, tokens/s and scores of
tasks, from the `metrics.jsonl` of each workdir, also of a run that is still training. Needs matplotlib (`pip install
matplotlib`, extra `plot`). A table of the final values goes to stdout; with --json, one JSON object.
"""

import json
import os
from collections.abc import Sequence

from trialgpt_jax import UserError, cli
from trialgpt_jax.console import say
from trialgpt_jax.storage import files
from trialgpt_jax.training import curves
from trialgpt_jax.training.metric_lines import NoLines, distinct_names, read_run


def plot(workdirs: Sequence[str], out: str) -> list[dict]:
    """Draws the runs of some workdirs into one picture.

    Args:
      workdirs: that `train` has written; each a path or a URL.
      out: the picture, which is replaced: .png, .svg, .pdf, .jpg or .webp.

    Returns:
      The final values of each run, see `curves.final`.

    Raises:
      UserError: no runs, one without metrics.jsonl, none with a line in it, another file format, matplotlib is missing,
        or `out` cannot be written.
    """
    file_format = os.path.splitext(out)[1].removeprefix(".").lower()
    if file_format not in curves.FORMATS:
        raise UserError(f"--out={out} should end in one of .{', .'.join(curves.FORMATS)}")
    workdirs = list(dict.fromkeys(os.path.normpath(w) if not files.is_remote(w) else w for w in workdirs))
    if not workdirs:
        raise UserError("name the workdirs of the runs, as in: plot runs/a runs/b")
    if not curves.available():
        raise UserError("pictures need matplotlib, which is not installed; `pip install matplotlib`")
    runs = []
    for workdir, name in zip(workdirs, distinct_names(workdirs), strict=True):
        try:
            runs.append(read_run(workdir, name))
        except NoLines as error:
            if len(workdirs) == 1:
                raise
            say(f"warning: {error}; it is left out")
            continue
        if runs[-1].damaged:
            say(f"warning: {runs[-1].damaged} line(s) of {workdir}/metrics.jsonl cannot be read; they are left out")
    if not runs:
        raise UserError(f"none of the {len(workdirs)} runs has a line in metrics.jsonl yet")
    picture = curves.draw(runs, file_format)
    try:
        files.write(out, picture)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from None
    return [curves.final(run) for run in runs]


FLAGS = {
    "out": ("curves.png", "the picture: .png, .svg, .pdf, .jpg or .webp"),
    "json": (False, "print one JSON object on stdout"),
}


def main(argv: list[str]) -> None:
    workdirs: list[str] = []
    flags, _ = cli.parse(argv, __doc__, FLAGS, paths=workdirs)
    results = plot(workdirs, flags.out)
    if flags.json:
        print(json.dumps({"out": flags.out, "runs": results}), flush=True)
        return
    print(curves.table(results), flush=True)
    say(f"{flags.out}: {len(results)} run{'s' * (len(results) != 1)}")


if __name__ == "__main__":
    cli.run(main)
