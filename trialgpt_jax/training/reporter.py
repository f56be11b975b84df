"""The reports of a training run: lines of steps, evaluations and samples, and the refusal of a run that only skips."""

import collections
import contextlib
import math
from collections.abc import Mapping, Sequence

import jax

from trialgpt_jax.console import one_line, say
from trialgpt_jax.data.token_store import Mixture, Split
from trialgpt_jax.live_line import task, terminal_width
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.training.meter import Completions, Meter
from trialgpt_jax.training.metrics import (
    MetricsLog,
    bits_per_byte,
    finite,
    flops_per_token,
    progress_line,
    task_line,
)
from trialgpt_jax.training.program import Program

_LONGEST_SAMPLE = 160  # characters in the log


def _short(value: float) -> str:
    """A number with four decimals, without zeros at its end."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


class Reporter:
    """What a run writes while it trains, to the log, `metrics.jsonl` and `samples.jsonl`.

    Args:
      program: the run's.
      val_split: what it evaluates on.
      workdir: of the run.
      first_step: the step it continues from; 0 = none.
      seconds: training time up to there; None = that of the last line up to there.

    Attributes:
      seconds: training time since step 0.
    """

    def __init__(
        self, program: Program, val_split: Split | Mixture, workdir: str, first_step: int, seconds: float | None = None
    ):
        self._program, self._val_split, self._config = program, val_split, program.config
        self._tokens_per_step = self._config.train.batch_size * program.gpt.block_size
        self._log = None
        if jax.process_index() == 0:
            self._log = MetricsLog(workdir, self._config.log, first_step, self._config)
        chip = accelerators.chip(jax.devices()[0].device_kind)
        peak = chip and chip.peak_flops * jax.device_count()
        if seconds is None:
            seconds = self._log.last.get("seconds", 0.0) if self._log else 0.0
        flops = flops_per_token(program.params_layout, program.gpt)
        self._meter, self._completions = Meter(self._tokens_per_step, flops, peak, seconds), Completions()
        self._shown, self._bar = contextlib.ExitStack(), None  # progress between two lines, in a terminal
        self._dispatched = collections.deque()  # (step, metrics) of steps that have no line yet
        # Lines are written one step late, so that the device never waits. On CPU a step runs synchronously.
        self._late = int(accelerators.dispatches_ahead(jax.devices()[0].platform))

    @property
    def seconds(self) -> float:
        return self._meter.seconds

    def restart_clock(self, step: int) -> None:
        """Starts the clock of training time after `step`, which is complete."""
        self._meter.restart(step)

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Writes the lines that are due up to the step before `step`, which has been dispatched; on CPU up to `step`.

        Raises:
          FloatingPointError: train.max_skipped steps in a row were skipped.
        """
        if self._bar is None:
            steps = self._config.train.steps
            self._bar = self._shown.enter_context(task("training", steps, done=step - 1, plain=False))
        self._bar.advance()
        self._completions.add(metrics)
        self._dispatched.append((step, metrics))
        self._write_steps(self._late)

    def finish_steps(self) -> None:
        """Waits until all dispatched steps are complete, and writes their lines; otherwise as `step`."""
        self._write_steps(0)
        self._hide()

    def _hide(self) -> None:
        self._shown.close()
        self._bar = None

    def _write_steps(self, remaining: int) -> None:
        while len(self._dispatched) > remaining:
            step, metrics = self._dispatched.popleft()
            values = jax.device_get(metrics)
            self._meter.complete(step, self._completions.next())
            self._write_step(step, values)

    def _write_step(self, step: int, values: dict) -> None:
        config = self._config
        self._check_skipped(step, values)
        if step % config.log.every_steps and step != config.train.steps:
            return
        rates, steps = self._meter.rates(), config.train.steps
        line = {
            "step": step,
            "tokens": step * self._tokens_per_step,
            "loss": finite(values["loss"]),
            **{name: float(value) for name, value in values.items() if name == "lr" or name.startswith("lr/")},
            "grad_norm": finite(values["grad_norm"]),
            "tokens_per_second": rates["tokens_per_second"],
            "seconds": self.seconds,
            "skipped": int(values["skipped"]),
        }
        if "mfu" in rates:
            line["mfu"] = rates["mfu"]
        self._write(line)
        width = terminal_width()
        say(progress_line(line | rates, steps), width and progress_line(line | rates, steps, width))

    def _check_skipped(self, step: int, values: dict) -> None:
        skipped, train = int(values["skipped_in_a_row"]), self._config.train
        if not skipped:
            return
        loss, norm = float(values["loss"]), float(values["grad_norm"])
        pair = {f"loss {loss:.4g}": loss, f"gradient norm {norm:.4g}": norm}
        if bad := [text for text, value in pair.items() if not math.isfinite(value)]:
            why = f"{' and '.join(bad)} of batch {step - 1} {'is' if len(bad) == 1 else 'are'} not finite"
        elif not values["update_finite"]:
            why = f"{' and '.join(pair)} of batch {step - 1} give new parameters that are not finite"
        else:
            spike = f"are a spike (train.skip_spikes={train.skip_spikes:g})"
            why = f"{' or '.join(pair)} of batch {step - 1} {spike}"
        say(f"step {step}: {why}; the update is skipped")
        if skipped >= train.max_skipped:
            raise FloatingPointError(
                f"{skipped} steps in a row were skipped (train.max_skipped), up to step {step}. Lower the learning "
                "rate, or look at the batches"
            )

    def evaluate(self, step: int, params) -> float | None:
        """Writes the validation loss at `step`, and returns it if it is finite."""
        split = self._val_split
        batches = self._program.eval_batches(split, self._config.eval.batches)
        total = self._program.count_eval_batches(split, self._config.eval.batches)
        loss, n_tokens = self._program.evaluate(params, batches, total)
        line = {"step": step, "tokens": step * self._tokens_per_step, "val_loss": finite(loss), "seconds": self.seconds}
        per_byte = bits_per_byte(loss, split.n_tokens, split.n_bytes)
        if per_byte is not None:
            line["val_bits_per_byte"] = finite(per_byte)
        self._write(line)
        text = f", {per_byte:.4f} bits per byte" if per_byte is not None else ""
        say(f"step {step}: validation loss {loss:.4f}{text} over {n_tokens:,} tokens")
        return finite(loss)

    def tasks(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Writes the scores of tasks at `step`, metric -> value by name; a metric `m_stderr` is the error of `m`."""
        line = {"step": step, "tokens": step * self._tokens_per_step, "seconds": self.seconds}
        self._write(line | task_line(results))
        for name, values in results.items():
            scores = {metric: f"{metric} {_short(value)}" for metric, value in values.items()}
            for metric in values:
                if (error := f"{metric}_stderr") in values:
                    scores[metric] += f" +- {_short(values[error])}"
                    del scores[error]
            say(f"step {step}: {name}: {', '.join(scores.values())}")

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Writes prompts and the texts with which the model continues them at `step`."""
        if self._log:
            self._log.write_samples(step, samples)
        for prompt, text in samples:
            whole = one_line(prompt + text)
            say(f"step {step}: {whole if len(whole) <= _LONGEST_SAMPLE else whole[: _LONGEST_SAMPLE - 3] + '...'}")

    def _write(self, line: dict) -> None:
        if self._log:
            self._log.write(line)

    def sync(self) -> None:
        """As `MetricsLog.sync`."""
        if self._log:
            self._log.sync()

    def close(self) -> None:
        """As `MetricsLog.close`."""
        self._hide()
        self._completions.close()
        if self._log:
            self._log.close()
