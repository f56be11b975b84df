"""The numbers of a run: FLOPs, bits per byte, its lines; `metrics.jsonl`, `samples.jsonl` and their copies."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, TypedDict

import jax
import msgspec
from ml_collections import ConfigDict

from trialgpt_jax.console import say
from trialgpt_jax.live_line import time_left
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.gpt import head
from trialgpt_jax.schema import INT32_MAX
from trialgpt_jax.storage import files, json_files, json_lines
from trialgpt_jax.storage.json_lines import JsonLines
from trialgpt_jax.training import metric_lines, wandb_run
from trialgpt_jax.training import workdir as workdir_lib
from trialgpt_jax.training.metric_lines import TASK
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


def progress_line(line: dict, steps: int, width: int | None = None) -> str:
    """The log line of a training step: step, loss, learning rate, gradient norm, speed, MFU if known, time left.

    Of `width` columns where given: learning rate, time of a step and gradient norm are left out in this order, which
    metrics.jsonl has.
    """
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
    dispensable = [parts[2], parts[4], parts[3]]
    while width and len(" | ".join(parts)) > width and dispensable:
        parts.remove(dispensable.pop(0))
    return " | ".join(parts)


def finite(value) -> float | None:
    """A float for JSON, which has neither NaN nor infinity: None stands for them."""
    return float(value) if math.isfinite(value) else None


class MetricsLog:
    """`metrics.jsonl`, one JSON object per line, and `samples.jsonl`, a line per text that the model has written; both
    copied to TensorBoard, and the numbers to Weights & Biases, if they are enabled.

    Attributes:
      last: the last line of metrics kept from an earlier process in the workdir, or {}.
    """

    def __init__(self, workdir: str, log: ConfigDict, resume_step: int, config: ConfigDict):
        """Opens the log and drops the lines of steps after `resume_step`, which will run again; 0 drops all.

        Raises:
          UserError: W&B is enabled and cannot be started, or a line of the steps to keep is damaged.
        """
        kept = read_metrics(workdir, resume_step)
        self.last = kept[-1] if kept else {}
        samples, prompts = workdir_lib.samples_path(workdir), config.eval.sample_prompts
        kept_samples = read_samples(workdir, resume_step, prompts)
        self._lines = JsonLines(workdir_lib.metrics_path(workdir), kept)
        self._samples = JsonLines(samples, kept_samples) if prompts or files.exists(samples) else None
        self._tensorboard = self._wandb = None
        if log.tensorboard and files.is_remote(workdir):
            say("log.tensorboard is off: its files are appended to, which an object store cannot do")
        elif log.tensorboard:
            self._tensorboard = EventFile(workdir_lib.tensorboard_path(workdir), resume_step)
            with self._copy(resume_step):
                self._tensorboard.write_hparams(_flat(config.to_dict()))
        if log.wandb:
            self._wandb = wandb_run.start(log.wandb, workdir, config)

    def write(self, line: dict) -> None:
        """Adds a line: a `step` and numbers, None for one that is not finite.

        While it cannot be written, for example on a full disk, it stays in memory, and `sync` raises.
        """
        line = {name: finite(value) if isinstance(value, float) else value for name, value in line.items()}
        self._lines.write(line)
        numbers = {_tag(name): value for name, value in line.items() if name != "step" and value is not None}
        with self._copy(line["step"]):
            if self._tensorboard:
                self._tensorboard.write(line["step"], numbers)
        try:
            if self._wandb:
                self._wandb.log(numbers, step=line["step"])
        except Exception as error:  # noqa: BLE001 - it raises many types; a failed log does not end the run
            say(f"log.wandb is off from step {line['step']} on: {type(error).__name__}: {error}")
            self._wandb = None

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Adds a line for each prompt and the text with which the model continues it at `step`; otherwise as `write`.

        TensorBoard shows them under `sample/0`, ... as Markdown.
        """
        self._samples.write(
            *({"step": step, "index": i, "prompt": prompt, "text": text} for i, (prompt, text) in enumerate(samples))
        )
        with self._copy(step):
            if self._tensorboard:
                texts = {f"sample/{i}": prompt + text for i, (prompt, text) in enumerate(samples)}
                self._tensorboard.write_texts(step, texts)

    @contextlib.contextmanager
    def _copy(self, step: int) -> Iterator[None]:
        """Turns TensorBoard off if its file cannot be written."""
        try:
            yield
        except OSError as error:
            say(f"log.tensorboard is off from step {step} on: {error}")
            self._tensorboard = None

    def sync(self) -> None:
        """Writes all lines durably. Called before a checkpoint, which guarantees the lines up to its step.

        Raises:
          OSError: they cannot be written; they stay in memory.
        """
        for lines in filter(None, (self._lines, self._samples)):
            lines.sync()

    def close(self) -> None:
        """Closes the log. Lines that cannot be written are later than every checkpoint: a resumed run writes them."""
        with contextlib.suppress(OSError):
            self.sync()
        with contextlib.suppress(OSError):
            if self._tensorboard:
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


# Groups of the curves in TensorBoard and W&B; names that are not here, such as task/NAME/METRIC, are tags as they are.
_TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "skipped": "train/skipped",
    "val_loss": "validation/loss",
    "val_bits_per_byte": "validation/bits_per_byte",
    "lr": "learning_rate/all",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "tokens": "progress/tokens",
    "seconds": "progress/seconds",
}


def _tag(name: str) -> str:
    """The tag of a value of `metrics.jsonl`, GROUP/NAME."""
    return _TAGS.get(name) or re.sub(r"^lr/", "learning_rate/", name)


def _flat(group: Mapping, prefix: str = "") -> dict[str, object]:
    """{"model": {"n_layer": 12}} -> {"model.n_layer": 12}."""
    flat = {}
    for name, value in group.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


# ---- lines of an earlier process

_Step = Annotated[int, msgspec.Meta(ge=0, le=INT32_MAX)]


class _Sample(TypedDict):
    """A line of samples.jsonl: the text with which the model continues prompt number `index` at `step`."""

    step: _Step
    index: Annotated[int, msgspec.Meta(ge=0, le=INT32_MAX)]
    prompt: str
    text: str


def read_metrics(workdir: str, step: int) -> list[dict]:
    """The lines of `metrics.jsonl` that a run which continues from checkpoint `step` keeps, see `json_lines.read`."""
    path = workdir_lib.metrics_path(workdir)
    return json_lines.read(path, step, "metrics", metric_lines.parse, metric_lines.place)


def read_samples(workdir: str, step: int, prompts: Sequence[str]) -> list[dict]:
    """The lines of `samples.jsonl` that a run which continues from checkpoint `step` keeps, see `json_lines.read`.

    Those of `step` itself are dropped if they are only the first of `prompts`: the process ended between two of them.
    """

    def parse(text: bytes) -> dict:
        return json_files.parse(text, _Sample)

    def place(line: dict) -> tuple[int, int]:
        return line["step"], line["index"]

    kept = json_lines.read(workdir_lib.samples_path(workdir), step, "samples", parse, place)
    last = [line["prompt"] for line in kept if line["step"] == step]
    if len(last) < len(prompts) and last == list(prompts[: len(last)]):
        kept = kept[: len(kept) - len(last)]
    return kept


def task_line(results: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """`task/NAME/METRIC` -> value, None if it is not finite, of results by name and metric."""
    return {f"{TASK}{name}/{key}": finite(value) for name, values in results.items() for key, value in values.items()}
