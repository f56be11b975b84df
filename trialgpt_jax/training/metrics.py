"""The numbers of a run: FLOPs, bits per byte, clocks and rates, and `metrics.jsonl` with its copies."""

import contextlib
import hashlib
import json
import math
import os
import re
import time

import jax
from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.gpt import head
from trialgpt_jax.schema import INT32_MAX
from trialgpt_jax.storage import files
from trialgpt_jax.training import workdir as workdir_lib
from trialgpt_jax.training.tensorboard import EventFile

_MAX_SECONDS = 1e10  # of training; more is no time


def parameter_count(params) -> int:
    """Number of parameters, including the padding of the vocabulary."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(params, config: GPTConfig) -> float:
    """Training FLOPs per token: 6 per parameter in a matmul, plus 12 * n_layer * width * block_size for attention.

    The head counts once; positions and an untied input embedding do not count. This is the convention of nanoGPT, PaLM
    (appendix B) and torchtitan: causality is not subtracted, recomputation is not added. `params` may be shapes.
    """
    kernels = sum(
        x.size for path, x in jax.tree_util.tree_leaves_with_path(params["blocks"]) if path[-1].key == "kernel"
    )
    attention = 12 * config.n_layer * config.n_head * config.head_dim * config.block_size
    return 6.0 * (kernels + head(params, config).size) + attention


def bits_per_byte(nats_per_token: float, tokens: int, n_bytes: int | None) -> float | None:
    """Cross-entropy per UTF-8 byte of the text, in bits; it does not depend on the tokenizer.

    Args:
      nats_per_token: mean loss over tokens of the split.
      tokens: tokens of the whole split.
      n_bytes: UTF-8 bytes of the whole split's documents; None (unknown) or 0 gives None.
    """
    return nats_per_token * tokens / n_bytes / math.log(2) if n_bytes else None


def time_left(seconds: float) -> str:
    """A duration in two units: 12s, 3m05s, 2h10m, 4d03h."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    units = (("m", 60, "s", 1), ("h", 3600, "m", 60), ("d", 86400, "h", 3600))
    unit, size, minor_unit, minor = next(u for u in reversed(units) if seconds >= u[1])
    return f"{seconds // size}{unit}{seconds % size // minor:02d}{minor_unit}"


def progress_line(line: dict, steps: int) -> str:
    """The log line of a training step: step, loss, learning rate, gradient norm, speed, MFU if known, time left."""
    step_seconds = line["step_seconds"]
    loss, norm = (math.nan if line[name] is None else line[name] for name in ("loss", "grad_norm"))
    parts = [
        f"step {line['step']:>{len(str(steps))}}/{steps}",
        f"loss {loss:.4f}",
        f"lr {line['lr']:.2e}",
        f"norm {norm:.3f}",
        f"{1e3 * step_seconds:.0f} ms" if step_seconds < 10 else f"{step_seconds:.1f} s",
        f"{line['tokens_per_second']:,.0f} tokens/s",
    ]
    if "mfu" in line:
        parts.append(f"mfu {100 * line['mfu']:.1f}%")
    parts.append(f"{time_left((steps - line['step']) * step_seconds)} left")
    return " | ".join(parts)


class Meter:
    """Training time and rates.

    Time counts from `restart` to the completion of a step, so evaluation, saving and compilation are excluded.

    Attributes:
      seconds: training time since step 0.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak_flops: float | None, seconds: float = 0.0):
        """`peak_flops`: of all devices together; None = unknown, so no MFU. `seconds`: from an earlier process."""
        self._tokens_per_step, self._flops_per_token, self._peak_flops = tokens_per_step, flops_per_token, peak_flops
        self.seconds = seconds
        self._step, self._time = 0, 0.0  # the last completed step and when it was
        self._window_steps, self._window_seconds = 0, 0.0  # since the last `rates`

    def restart(self, step: int) -> None:
        """Starts the clock after `step`, which is complete."""
        self._step, self._time = step, time.monotonic()

    def complete(self, step: int) -> None:
        """Records that `step` is complete."""
        now = time.monotonic()
        self.seconds += now - self._time
        self._window_seconds += now - self._time
        self._window_steps += step - self._step
        self._step, self._time = step, now

    def rates(self) -> dict[str, float]:
        """step_seconds, tokens_per_second and mfu (if the peak is known) since the last call."""
        step_seconds = self._window_seconds / self._window_steps
        self._window_steps, self._window_seconds = 0, 0.0
        rates = {"step_seconds": step_seconds, "tokens_per_second": self._tokens_per_step / step_seconds}
        if self._peak_flops:
            rates["mfu"] = rates["tokens_per_second"] * self._flops_per_token / self._peak_flops
        return rates


def finite(value) -> float | None:
    """A float for JSON, which has neither NaN nor infinity: None stands for them."""
    return float(value) if math.isfinite(value) else None


class MetricsLog:
    """`metrics.jsonl`, one JSON object per line, copied to TensorBoard and Weights & Biases if they are enabled.

    Attributes:
      last: the last line kept from an earlier process in the workdir, or {}.
    """

    def __init__(self, workdir: str, log: ConfigDict, resume_step: int, config: ConfigDict):
        """Opens the log and drops the lines of steps after `resume_step`, which will run again; 0 drops all.

        Raises:
          UserError: W&B is enabled and cannot be started, or a line of the steps to keep is damaged.
        """
        self._path = workdir_lib.metrics_path(workdir)
        kept = _lines_up_to(self._path, resume_step)
        self.last = kept[-1] if kept else {}
        text = "".join(_to_json(line) for line in kept)
        files.write(self._path, text)
        self._text = text if files.is_remote(workdir) else ""  # object stores cannot append
        self._durable = len(text.encode())  # bytes
        self._pending, self._in_file = b"", 0  # lines after that; how many bytes of them are in the file, not synced
        self._tensorboard = self._wandb = None
        if log.tensorboard and files.is_remote(workdir):
            say("log.tensorboard is off: its files are appended to, which an object store cannot do")
        elif log.tensorboard:
            self._tensorboard = EventFile(workdir_lib.tensorboard_path(workdir), resume_step)
        if log.wandb:
            self._wandb = _start_wandb(log.wandb, workdir, config)

    def write(self, line: dict) -> None:
        """Adds a line: a `step` and numbers, None for one that is not finite.

        While it cannot be written, for example on a full disk, it stays in memory, and `sync` raises.
        """
        line = {name: finite(value) if isinstance(value, float) else value for name, value in line.items()}
        self._pending += _to_json(line).encode()
        if not files.is_remote(self._path):
            with contextlib.suppress(OSError):
                self._append(self._in_file)
        numbers = {name: value for name, value in line.items() if name != "step" and value is not None}
        try:
            if self._tensorboard:
                self._tensorboard.write(line["step"], numbers)
        except OSError as error:
            say(f"log.tensorboard is off from step {line['step']} on: {error}")
            self._tensorboard = None
        try:
            if self._wandb:
                self._wandb.log(numbers, step=line["step"])
        except Exception as error:  # noqa: BLE001 - it raises many types; a failed log does not end the run
            say(f"log.wandb is off from step {line['step']} on: {type(error).__name__}: {error}")
            self._wandb = None

    def _append(self, start: int, sync: bool = False) -> None:
        """Writes the pending lines from byte `start` of them on."""
        with files.named(self._path), open(self._path, "r+b") as file:
            file.seek(self._durable + start)
            file.write(self._pending[start:])
            file.truncate()  # a full disk may have cut a longer write short
            file.flush()
            if sync:
                os.fsync(file.fileno())
        self._in_file = len(self._pending)

    def sync(self) -> None:
        """Writes all lines durably. Called before a checkpoint, which guarantees the lines up to its step.

        Raises:
          OSError: they cannot be written; they stay in memory.
        """
        if files.is_remote(self._path):
            self._text, self._pending = self._text + self._pending.decode(), b""
            files.write(self._path, self._text)
            return
        # All of them again: the kernel drops what an fsync has failed to write, and the next fsync succeeds.
        self._append(0, sync=True)
        self._durable, self._pending, self._in_file = self._durable + len(self._pending), b"", 0

    def close(self) -> None:
        """Closes the log. Lines that cannot be written are later than every checkpoint: a resumed run writes them."""
        with contextlib.suppress(OSError):
            self.sync()
        with contextlib.suppress(OSError):
            if self._tensorboard:
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _start_wandb(project: str, workdir: str, config: ConfigDict):
    """The W&B run of a workdir. Raises UserError if it cannot be started; `plan.check_wandb` has looked for a key."""
    import wandb  # an optional package

    name = os.path.basename(os.path.normpath(os.path.abspath(workdir)))
    try:
        return wandb.init(project=project, name=name, id=wandb_id(name), resume="allow", config=config.to_dict())
    except Exception as error:  # noqa: BLE001 - it raises many types: no network, a refused key, no such project
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"log.wandb={project} cannot be started: {type(error).__name__}: {why}; set WANDB_MODE=offline, or give "
            "--config.log.wandb= for none"
        ) from None


def wandb_id(name: str) -> str:
    """The id of the W&B run of a workdir: its name, which must be at most 64 letters, digits, `-` and `_` of ASCII.

    Another name has its other characters replaced, and ends with a digest so that two names stay two runs.
    """
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:55]}-{digest}"


def _to_json(line: dict) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _lines_up_to(path: str, step: int) -> list[dict]:
    """The lines of steps <= `step`, none for 0, as `MetricsLog.write` has written them.

    Later lines were not synced when the process or its host ended, so the last one may be incomplete, and after a loss
    of power some may be zeros; those are dropped. Any other line that was not written so is refused.
    """
    if not step or not files.exists(path):  # without a checkpoint the run starts over, with the evaluation of step 0
        return []
    with files.named(path), files.open_file(path) as file:
        *raw, _incomplete = file.read().split(b"\n")
    lines, last, lost = [], (-1, False), 0
    for number, text in enumerate(raw, 1):
        if b"\0" in text:
            lost = lost or number
            continue
        try:
            line = _parse(text)
            place = line["step"], "val_loss" in line
        except (ValueError, TypeError, RecursionError) as error:
            why = "is not JSON" if isinstance(error, json.JSONDecodeError) else f"is not a line of metrics: {error}"
            raise UserError(f"{path}, line {number} {why}; repair or remove the file") from None
        if place <= last:
            raise UserError(
                f"{path}, line {number}: step {place[0]} again or after step {last[0]}; repair or remove the file"
            )
        if place[0] <= step:
            if lost:
                raise UserError(f"{path}, line {lost}: zeros instead of metrics; repair or remove the file")
            lines.append(line)
        last = place
    return lines


def _parse(text: bytes) -> dict[str, int | float | None]:
    """A line of metrics. Raises ValueError, TypeError or RecursionError if it is not one."""
    line = json.loads(text)
    if not isinstance(line, dict):
        raise TypeError("not an object")
    for name, value in {"step": None, **line}.items():
        number = type(value) is float and math.isfinite(value) or type(value) is int and abs(value) < 2**63
        if name == "step":
            number = type(value) is int and 0 <= value <= INT32_MAX
        elif name == "seconds":
            number = number and 0 <= value < _MAX_SECONDS
        elif value is None:
            number = True
        if not number:
            raise ValueError(f"`{name}` is {value!r:.50}")
    return line
