"""Stopping a run on request, by a signal or a time limit; all processes of a job stop after the same step."""

import contextlib
import math
import os
import signal
import time

import jax
from jax.experimental import multihost_utils

from trialgpt_jax import live_line
from trialgpt_jax.parallel import processes


class StopRequest:
    """Context manager: the first SIGTERM, SIGHUP or Ctrl-C asks for a stop after the current step.

    The second SIGTERM or Ctrl-C ends the process at once. A second SIGHUP does not, nor does a SIGHUP count as the
    first of two: when a terminal closes, both the shell and the kernel send one, and systemd sends one with each
    SIGTERM. A SIGHUP that was ignored at the start (`nohup`) stays so. Ctrl-C asks for a stop only after `begin`;
    before, there is nothing to save, and it raises KeyboardInterrupt as elsewhere.

    With several processes JAX's preemption service listens for SIGTERM in each of them and agrees on a step at which
    all can stop. A second SIGTERM has no effect there, because a scheduler that takes hosts away signals them one by
    one.

    Args:
      max_seconds: after `start_clock`, when a stop is asked for as well; 0 = never.
    """

    def __init__(self, max_seconds: float = 0.0):
        self._max_seconds, self._deadline = max_seconds, math.inf

    def __enter__(self):
        self._asked = self._early = False
        self._previous = {}
        if jax.process_count() == 1:  # otherwise a handler would replace the preemption service's
            self._handle(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self._handle(signal.SIGHUP)
        return self

    def start_clock(self) -> None:
        """Starts the time limit."""
        self._deadline = time.monotonic() + (self._max_seconds or math.inf)

    def begin(self, step: int) -> None:
        """Step `step` + 1 follows: from here on Ctrl-C asks for a stop.

        The preemption service agrees on the step after the last one that it was asked about, 0 so far. Of a resumed run
        that is an earlier step, which never comes, so a notice from before this call is remembered here.
        """
        self._handle(signal.SIGINT)
        if jax.process_count() > 1:
            multihost_utils.reached_preemption_sync_point(step)
            self._early = processes.from_first(processes.stop_noticed)

    def _handle(self, number: int) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread (a notebook): no signals to handle
            self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        again = b""
        if number != signal.SIGHUP:
            for each in self._previous.keys() - {signal.SIGHUP}:
                signal.signal(each, signal.SIG_DFL)
            again = b"; once more to leave at once"
        self._ask_all()
        if jax.process_index() == 0:
            # os.write and not `say`: the signal may interrupt a print, and Python's buffers are not reentrant
            with contextlib.suppress(OSError):
                os.write(2, live_line.erase_now() + b"stopping after this step" + again + b"\n")

    def _ask_all(self) -> None:
        if jax.process_count() > 1 and not self._asked:
            os.kill(os.getpid(), signal.SIGTERM)  # the preemption service passes it on to the other processes
        self._asked = True

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether a stop has been asked for, between two steps.

        Of several processes process 0 knows of every request, and its answer is the one to act on.
        """
        return self._asked or self._late() or processes.stop_noticed()

    def _late(self) -> bool:
        return time.monotonic() >= self._deadline

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`, which has just been dispatched; all processes get the same answer at the same
        step."""
        if jax.process_count() == 1:
            return self._asked or self._late()
        if self._late():
            self._ask_all()  # clocks differ: the first process past the limit asks, and the service agrees on a step
        return multihost_utils.reached_preemption_sync_point(step) or self._early
