"""When a run saves: the metrics first, then its state; and what happens if that fails."""

import contextlib
import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from trialgpt_jax.console import say
from trialgpt_jax.training.checkpoint import Checkpoints, SaveError
from trialgpt_jax.training.reporter import Reporter
from trialgpt_jax.training.times import SAVING, Times


class Saver:
    """Saves the state of a run.

    Args:
      checkpoints: of the workdir.
      reporter: whose lines up to a checkpoint are durable before it.
      config: the run's; `checkpoint.on_error` says whether training goes on after a save that has failed.
      step: of the newest checkpoint; 0 = none.
      times: of this process.

    Attributes:
      step: of the last save that has begun.
      seconds: since the last attempt to save, or since the start.
    """

    def __init__(self, checkpoints: Checkpoints, reporter: Reporter, config: ConfigDict, step: int, times: Times):
        self._checkpoints, self._reporter, self._keep = checkpoints, reporter, config.checkpoint
        self._times = times
        self.step, self._time = step, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._time

    def poll(self) -> None:
        """Raises the error of a save that has failed in the background, or reports it, as the config says."""
        with self._errors():
            self._checkpoints.poll()

    def save(self, step: int, state, val_loss: float | None, last: bool) -> None:
        """Begins to save `state`; does nothing if `step` was saved already.

        Args:
          step: that is complete.
          state: after it.
          val_loss: finite validation loss at this step, if known.
          last: the run ends, so the save must succeed.

        Raises:
          SaveError, OSError: this save, or the one before, has failed.
          FloatingPointError: the state is not finite.
        """
        if step == self.step:
            return
        with self._times.of(SAVING), self._errors():
            self._checkpoints.wait()
        with self._times.of(SAVING), self._errors(last):
            self._reporter.sync()
            blocked = self._checkpoints.save(step, state, val_loss)
            self.step = step
            say(f"step {step}: saving a checkpoint; it held training up for {blocked:.2f} s")
        self._time = time.monotonic()

    @contextlib.contextmanager
    def _errors(self, last: bool = False) -> Iterator[None]:
        """Reports a failed save and goes on where the config says so; the `last` save must succeed."""
        try:
            yield
        except (SaveError, OSError) as error:
            if last or self._keep.on_error == "stop":
                raise
            say(f"{error}; training goes on (checkpoint.on_error=continue)")
