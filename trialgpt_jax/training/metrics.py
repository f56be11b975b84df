"""The numbers of a run: FLOPs, bits per byte, clocks and rates, and `metrics.jsonl` with its copies."""

import contextlib
import json
import math
import os
import time

import jax
from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.gpt import head
from trialgpt_jax.storage import files
from trialgpt_jax.training import workdir as workdir_lib
from trialgpt_jax.training.tensorboard import EventFile


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
          UserError: W&B is enabled but not installed, or a line before the last is not JSON.
        """
        self._path = workdir_lib.metrics_path(workdir)
        kept = _lines_up_to(self._path, resume_step)
        self.last = kept[-1] if kept else {}
        self._text = "".join(json.dumps(line) + "\n" for line in kept)  # for object stores, which cannot append
        files.write(self._path, self._text)
        self._size = len(self._text.encode())  # bytes of complete lines on disk
        self._unwritten = ""
        self._tensorboard = self._wandb = None
        if log.tensorboard and files.is_remote(workdir):
            say("log.tensorboard is off: its files are appended to, which an object store cannot do")
        elif log.tensorboard:
            self._tensorboard = EventFile(workdir_lib.tensorboard_path(workdir), resume_step)
        if log.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError("log.wandb is set, but wandb is not installed; `pip install wandb`") from None
            name = os.path.basename(os.path.normpath(workdir))
            self._wandb = wandb.init(project=log.wandb, name=name, id=name, resume="allow", config=config.to_dict())

    def write(self, line: dict) -> None:
        """Adds a line, which has a `step`. While the disk is full, lines stay in memory, and `sync` raises."""
        self._unwritten += json.dumps(line) + "\n"
        if not files.is_remote(self._path):
            with contextlib.suppress(OSError):
                self._append(sync=False)
        numbers = {k: v for k, v in line.items() if k != "step" and v is not None}
        if self._tensorboard:
            try:
                self._tensorboard.write(line["step"], numbers)
            except OSError as error:
                say(f"log.tensorboard is off from step {line['step']} on: {error}")
                self._tensorboard = None
        if self._wandb:
            self._wandb.log(numbers, step=line["step"])

    def _append(self, sync: bool) -> None:
        data = self._unwritten.encode()
        with open(self._path, "r+b") as file:
            file.truncate(self._size)  # drops a line that a full disk cut short
            file.seek(self._size)
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        self._size, self._unwritten = self._size + len(data), ""

    def sync(self) -> None:
        """Writes all lines durably. Called before a checkpoint, which guarantees the lines up to its step.

        Raises:
          OSError: they cannot be written; they stay in memory.
        """
        if files.is_remote(self._path):
            self._text, self._unwritten = self._text + self._unwritten, ""
            files.write(self._path, self._text)
        else:
            self._append(sync=True)

    def close(self) -> None:
        """Closes the log. Lines that cannot be written are later than every checkpoint: a resumed run writes them."""
        with contextlib.suppress(OSError):
            self.sync()
            if self._tensorboard:
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _lines_up_to(path: str, step: int) -> list[dict]:
    """The lines of steps <= `step`, none for 0. An incomplete last line, after a kill, is dropped."""
    if not files.exists(path):
        return []
    with files.open_file(path) as file:
        raw = file.read().splitlines()
    lines = []
    for number, text in enumerate(raw, 1):
        try:
            line = json.loads(text)
            if type(line["step"]) is not int or not isinstance(line.get("seconds", 0.0), int | float):
                raise ValueError("no step")
            lines.append(line)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number < len(raw):
                raise UserError(f"{path}, line {number}: not a line of metrics; repair or remove the file") from None
    # Without a checkpoint the run starts over, including the evaluation of step 0.
    return [line for line in lines if line["step"] <= step] if step else []
