"""The clock of a run: when each step is complete, training time, and rates."""

import contextlib
import queue
import threading
import time

import jax


class Completions:
    """When dispatched steps are complete.

    A thread waits for them. The main thread is inside the dispatch of the next step meanwhile, which on a GPU returns
    only when most of that step has run: read there, a step's time was up to a fifth of five steps late.
    """

    def __init__(self):
        self._dispatched, self._times = queue.SimpleQueue(), queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name="completions", daemon=True)
        self._thread.start()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds a step that has been dispatched after those before, by its outputs."""
        self._dispatched.put(metrics)

    def next(self) -> float:
        """The value of `time.monotonic` when the oldest step not asked for yet was complete; waits until it is."""
        return self._times.get()

    def close(self) -> None:
        """Ends the thread after the steps that have been added, and waits for it: a thread inside JAX's C++ code when
        Python ends may abort the process."""
        self._dispatched.put(None)
        self._thread.join(timeout=10)

    def _wait(self) -> None:
        while (metrics := self._dispatched.get()) is not None:
            with contextlib.suppress(Exception):  # of a step that has failed; it is raised where the values are read
                jax.block_until_ready(metrics)
            self._times.put(time.monotonic())


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

    def complete(self, step: int, at: float) -> None:
        """Records that `step` was complete `at` this value of `time.monotonic`."""
        self.seconds += at - self._time
        self._window_seconds += at - self._time
        self._window_steps += step - self._step
        self._step, self._time = step, at

    def rates(self) -> dict[str, float]:
        """step_seconds, tokens_per_second and mfu (if the peak is known) since the last call."""
        step_seconds = self._window_seconds / self._window_steps
        self._window_steps, self._window_seconds = 0, 0.0
        rates = {"step_seconds": step_seconds, "tokens_per_second": self._tokens_per_step / step_seconds}
        if self._peak_flops:
            rates["mfu"] = rates["tokens_per_second"] * self._flops_per_token / self._peak_flops
        return rates
