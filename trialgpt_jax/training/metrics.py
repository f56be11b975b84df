"""What is said about a run: FLOPs, MFU and bits per byte, and where the numbers go."""

import contextlib
import json
import math
import os
import sys

import jax
from ml_collections import ConfigDict

from trialgpt_jax import UserError, files
from trialgpt_jax.model.gpt import GPTConfig, head
from trialgpt_jax.training.tensorboard import EventFile


def parameter_count(params) -> int:
    """Number of parameters, the padding of the vocabulary included."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(params, config: GPTConfig) -> float:
    """Training FLOPs per token: 6 per parameter that sits in a matmul, and 12 * n_layer * width * block_size for attention.

    The head counts once, positions and an untied input embedding do not. The convention of nanoGPT, PaLM (appendix B) and
    torchtitan: causality is not subtracted and recomputation not added. `params` may be shapes.
    """
    kernels = sum(
        x.size for path, x in jax.tree_util.tree_leaves_with_path(params["blocks"]) if path[-1].key == "kernel"
    )
    attention = 12 * config.n_layer * config.n_head * config.head_dim * config.block_size
    return 6.0 * (kernels + head(params, config).size) + attention


def bits_per_byte(nats_per_token: float, tokens: int, n_bytes: int | None) -> float | None:
    """Cross-entropy per UTF-8 byte of the text, which does not depend on the tokenizer.

    Args:
      nats_per_token: mean loss over tokens of the split.
      tokens: tokens of the whole split.
      n_bytes: UTF-8 bytes of the whole split's documents; None (unknown) or 0 gives None.
    """
    return nats_per_token * tokens / n_bytes / math.log(2) if n_bytes else None


def time_left(seconds: float) -> str:
    """A duration as a person writes it: 12s, 3m05s, 2h10m, 4d03h."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    for unit, below, size in (("m", "s", 60), ("h", "m", 3600), ("d", "h", 86400)):
        if seconds < size * {"m": 60, "h": 24, "d": 10**9}[unit]:
            return f"{seconds // size}{unit}{seconds % size // {'s': 1, 'm': 60, 'h': 3600}[below]:02d}{below}"
    raise AssertionError


def progress_line(line: dict, steps: int) -> str:
    """The line of one training step: step, loss, learning rate, gradient norm, speed, MFU where known, time left."""
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


class MetricsLog:
    """`metrics.jsonl`, one object a line, with copies to TensorBoard and Weights & Biases where they are on.

    Attributes:
      last: the last line kept from an earlier run of the workdir, or {}.
    """

    def __init__(self, workdir: str, log: ConfigDict, resume_step: int, config: ConfigDict):
        """Opens the log and drops lines of steps after `resume_step`, which will be run again; all for 0.

        Raises:
          UserError: W&B is asked for and not installed, or a line before the last is not JSON.
        """
        self._path = os.path.join(workdir, "metrics.jsonl")
        kept = _lines_up_to(self._path, resume_step)
        self.last = kept[-1] if kept else {}
        self._text = "".join(json.dumps(line) + "\n" for line in kept)  # of a store's object: nothing can be appended
        files.write(self._path, self._text)
        self._size = len(self._text.encode())  # bytes of whole lines on disk
        self._unwritten = ""
        self._tensorboard = self._wandb = None
        if log.tensorboard and files.is_remote(workdir):
            say("log.tensorboard is off: its files are appended to, which an object store cannot do")
        elif log.tensorboard:
            self._tensorboard = EventFile(os.path.join(workdir, "tensorboard"), resume_step)
        if log.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError("log.wandb is set, but wandb is not installed; `pip install wandb`") from None
            name = os.path.basename(os.path.normpath(workdir))
            self._wandb = wandb.init(project=log.wandb, name=name, id=name, resume="allow", config=config.to_dict())

    def write(self, line: dict) -> None:
        """Adds a line; it carries `step`. While the disk is full, lines wait for room, and `sync` tells it."""
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
            file.truncate(self._size)  # of a write that a full disk cut short
            file.seek(self._size)
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        self._size, self._unwritten = self._size + len(data), ""

    def sync(self) -> None:
        """Puts everything on disk or into the store; called before a checkpoint, which promises the lines up to its step.

        Raises:
          OSError: it cannot be written; nothing is lost yet.
        """
        if files.is_remote(self._path):
            self._text, self._unwritten = self._text + self._unwritten, ""
            files.write(self._path, self._text)
        else:
            self._append(sync=True)

    def close(self) -> None:
        """Ends the log. What could not be written since the last `sync` belongs to no checkpoint."""
        with contextlib.suppress(OSError):
            self.sync()
            if self._tensorboard:
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _lines_up_to(path: str, step: int) -> list[dict]:
    """The lines of steps <= `step`, none for 0; a last line that a kill cut short is dropped."""
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
                raise UserError(f"{path}, line {number}: not a line of metrics; mend or remove the file") from None
    # a run killed before its first checkpoint begins anew, with the evaluation of step 0
    return [line for line in lines if line["step"] <= step] if step else []


def say(text: str) -> None:
    """Prints a line of the run's log to stderr, from the first process only; stdout is for results."""
    if jax.process_index() == 0:
        # in one write: what another thread says at this moment, the end of the job perhaps, begins a line of its own
        print(f"{text}\n", end="", file=sys.stderr, flush=True)
