"""What `train` leaves at its end beside the checkpoints: `<workdir>/summary.md` and `<workdir>/curves.png`."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping

import jax
from ml_collections import ConfigDict

from trialgpt_jax import UserError, __version__
from trialgpt_jax.console import say
from trialgpt_jax.live_line import human_size, task, time_left
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.storage import files
from trialgpt_jax.training import curves
from trialgpt_jax.training import workdir as workdir_lib
from trialgpt_jax.training.checkpoint_folder import CheckpointFolder
from trialgpt_jax.training.metric_lines import NoLines, Run, read_run
from trialgpt_jax.training.times import Account, Times, cpu_name

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_LONGEST_SAMPLE = 2000  # characters


@contextlib.contextmanager
def at_end(workdir: str, times: Times, *about) -> Iterator[None]:
    """Calls `write` after the block, in process 0; also of a run that has diverged, but not of one that failed."""
    try:
        yield
    except FloatingPointError:
        if jax.process_index() == 0:
            write(workdir, times, *about)
        raise
    if jax.process_index() == 0:
        write(workdir, times, *about)


def write(
    workdir: str,
    times: Times,
    checkpoints: CheckpointFolder,
    differences: Mapping[str, tuple[object, object]],
    config: ConfigDict,
    plan: str,
) -> None:
    """Writes both files; one that cannot be written is a line of the log.

    Args:
      workdir: of the run.
      times: of this process.
      checkpoints: of the workdir.
      differences: config field -> (its value, the default).
      config: the resolved config.
      plan: what was said of the run at its start.
    """
    try:
        run = read_run(workdir)
        account, best = times.account(run.last("seconds") or 0.0), None
        with contextlib.suppress(UserError):  # none has a validation loss
            best = checkpoints.best()
        drawn = config.log.curves and curves.available()
        if drawn:
            with task("drawing curves.png"):
                files.write(workdir_lib.curves_path(workdir), curves.draw([run]))
        text = describe(workdir, run, account, differences, config.train.steps, plan, best, drawn)
        files.write(workdir_lib.summary_path(workdir), text)
    except NoLines:
        say(f"no summary: {workdir}/metrics.jsonl has no line yet")
    except Exception as error:  # noqa: BLE001 - of a disk, an object store or matplotlib; the run itself is complete
        say(f"warning: no summary in {workdir}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def describe(
    workdir: str,
    run: Run,
    account: Account,
    differences: Mapping[str, tuple[object, object]],
    steps: int,
    plan: str,
    best: int | None,
    drawn: bool,
) -> str:
    """The text of `summary.md`.

    Args:
      workdir, differences, plan: as of `write`.
      run: its lines.
      account: where its time went.
      steps: of the whole run.
      best: the checkpoint with the lowest validation loss; None = none has one.
      drawn: whether there is a picture.
    """
    parts = [f"# {run.name}", _result(run, steps, workdir, best)]
    if drawn:
        parts.append("![curves](curves.png)")
    parts += [f"## Run\n\n```\n{plan}\n```", _times(account), _config(differences), _versions(), _sample(workdir)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _result(run: Run, steps: int, workdir: str, best: int | None) -> str:
    final, place = curves.final(run), run.lines[-1]["step"]
    state = "complete" if place >= steps else "not complete"
    lines = [f"Step {place:,} of {steps:,}, {state}{', diverged' if final['diverged'] else ''}."]
    if final["val_loss"] is not None:
        per_byte = final["val_bits_per_byte"]
        text = f", {per_byte:.4f} bits per byte" if per_byte is not None else ""
        lines.append(f"Last validation loss {final['val_loss']:.4f}{text}.")
    if best is not None:
        loss = next((line["val_loss"] for line in run.lines if line["step"] == best and "val_loss" in line), None)
        text = f", validation loss {loss:.4f}" if loss is not None else ""
        lines.append(f"Best checkpoint: {best}{text} (`--workdir={workdir} --checkpoint_step=best`).")
    return "\n".join(lines)


def _times(account: Account) -> str:
    rows = [("training", account.training), *sorted(account.seconds.items(), key=lambda item: -item[1])]
    rows += [("steps that ran again after a restart", account.again), ("other", account.other)]
    share = f"{100 * account.goodput:.1f}%"
    text = "## Time\n\n| | time | share |\n|---|---|---|\n"
    for name, seconds in rows:
        text += f"| {name} | {time_left(seconds)} | {100 * seconds / max(account.wall, 1e-9):.1f}% |\n"
    text += f"| all, of {account.processes} process(es) one after the other | {time_left(account.wall)} | 100% |\n"
    text += f"\nGoodput (training / all): {share}."
    if account.processes > 1:
        text += f" Between the processes: {time_left(account.between)}, which is not counted."
    return text


def _config(differences: Mapping[str, tuple[object, object]]) -> str:
    if not differences:
        return "## Config\n\nThe defaults."
    rows = "\n".join(f"| {name} | {_cell(value)} | {_cell(old)} |" for name, (value, old) in differences.items())
    return f"## Config\n\nFields that differ from the default:\n\n| field | value | default |\n|---|---|---|\n{rows}"


def _cell(value: object) -> str:
    text = "|".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"([|`*_<\\])", r"\\\1", " ".join(text.split()))


def _versions() -> str:
    device = jax.devices()[0]
    memory = accelerators.memory_bytes(device)
    rows = [
        ("devices", f"{jax.device_count()} x {device.device_kind}, {jax.process_count()} process(es)"),
        ("memory of a device", human_size(memory) if memory else "not known"),
        ("host", f"{cpu_name()}, {human_size(accelerators.host_bytes())}, {platform.platform()}"),
        ("trialgpt_jax", __version__),
        ("Python", platform.python_version()),
    ]
    for package in _PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    return f"## Hardware and versions\n\n| | |\n|---|---|\n{table}"


def _sample(workdir: str) -> str:
    """The last sample of the run, if it has any."""
    path = workdir_lib.samples_path(workdir)
    if files.exists(path):
        with files.open_file(path) as file:
            *lines, _incomplete = file.read().split(b"\n")
        if lines:
            line = json.loads(lines[-1])
            text = (line["prompt"] + line["text"])[:_LONGEST_SAMPLE]
            quoted = "\n".join(f"    {part}" for part in text.splitlines())
            return f"## Sample\n\nAfter step {line['step']:,}, prompt {line['prompt']!r}:\n\n{quoted}"
    command = f"python -m trialgpt_jax.infer --workdir={os.path.normpath(workdir)}"
    return f"## Sample\n\nNone was asked for (`eval.sample_prompts`). `{command}` writes one."
