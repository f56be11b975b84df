"""The processes of one job: how they find each other, decide together, and end together.

JAX's coordination service, which runs in process 0, connects the processes, detects a dead one by its missing
heartbeats, and then ends the others from C++ threads. This module adds the messages a user needs: an error in one
process is printed by all of them, which exit with its status, and a process that JAX ends leaves a line that says what
to do.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from jax._src import distributed  # the key-value store of the coordination service has no public name

from trialgpt_jax import UserError, console, faults
from trialgpt_jax.parallel import clusters

T = TypeVar("T")

EXIT_PEER_LOST = 76  # another process has ended or does not answer; where JAX's C++ threads notice it first it is 134
FLAGS = {
    "coordinator_address": (None, "host:port of process 0, where JAX does not detect it"),
    "num_processes": (0, "processes of the job, with --coordinator_address"),
    "process_id": (-1, "number of this process from 0, with --coordinator_address"),
    "peer_timeout_seconds": (100, "a process without heartbeat for this long counts as dead and ends the others"),
    "start_timeout_seconds": (300, "how long to wait for the other processes at the start"),
}
# Keys of the key-value store.
_FAILURE, _EXITED = "trialgpt_jax/failure", "trialgpt_jax/exited/"
_VALUE, _STEP = "trialgpt_jax/value/", "trialgpt_jax/step/"
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # of XLA's preemption service
_POLL_SECONDS = 0.5  # between two reads of _FAILURE
_EXIT_SECONDS = 5.0  # process 0 waits this long for the others to read _FAILURE, because the store ends with it
_DAY = 24 * 3600
_NEXT_STEPS = "the same command on every host continues from the newest whole checkpoint"
_RAISE = "if it is only slow, raise --peer_timeout_seconds, or --start_timeout_seconds at the start"
# In the text of an exception: the connection to another process broke, and not the program.
_CONNECTION = re.compile(
    r"gloo|nccl|connection (closed|reset)|socket closed|heartbeat|coordination service", re.IGNORECASE
)
# Of these: the other process has not answered in time, because it is slow or has died. Gloo waits 30 s for the others
# at the first collective of each group of devices; JAX has no option for that.
_NO_ANSWER = re.compile(r"context initialization failed|timed out|deadline_exceeded|timeout", re.IGNORECASE)
_values, _agreed_steps, _meetings = itertools.count(), itertools.count(), itertools.count()


@contextlib.contextmanager
def join(flags) -> Iterator[None]:
    """Connects the processes of the job, if there are several, for the length of the block.

    With several processes an exception does not leave the block: it is printed, sent to the others, and every process
    exits with its status: 2 for a UserError, EXIT_PEER_LOST where another process was lost, otherwise 1. If JAX's C++
    threads notice a lost process before Python does, they end this one with SIGABRT (a shell's status 134).

    Args:
      flags: has the attributes of `FLAGS`. Without an address JAX detects the processes on Cloud TPU, Slurm, Open MPI
        and Kubernetes; if it detects none, this is a job of one process.

    Raises:
      UserError: flags that contradict each other, or an environment of several processes that JAX cannot detect.
    """
    place = _given(flags) or clusters.find(os.environ, flags.start_timeout_seconds)
    if place is None:
        yield
        return

    _redirect_native_stdout()
    notice = _ExitNotice()
    # it waits in C++, where Python's handler of Ctrl-C would not run
    with console.interrupts_end_process(), clusters.Waiting(place):
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            place.gpus,
            # otherwise JAX detects them as well, to find the GPUs of this process; with Open MPI 5 and without mpi4py
            # it fails, although all that it would find is given
            cluster_detection_method="deactivate",
            initialization_timeout=flags.start_timeout_seconds,
            heartbeat_timeout_seconds=flags.peer_timeout_seconds,
            # long, because process 0 may still check a large checkpoint; a dead process is detected by its heartbeat
            shutdown_timeout_seconds=_DAY,
        )
    console.enable(place.index == 0)
    watchdog = _Watchdog(notice)
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - whatever it is, the other processes must not wait for this one
        watchdog.exit(*_describe(error))
    watchdog.stop()
    jax.distributed.shutdown()
    notice.cancel()


def _given(flags) -> clusters.Place | None:
    """The place of this process, if the flags give it. Raises UserError as `join` does."""
    given = [flags.coordinator_address is not None, flags.num_processes > 0, flags.process_id >= 0]
    if any(given) and not all(given):
        raise UserError("--coordinator_address, --num_processes and --process_id go together; give all three")
    for name in ("peer_timeout_seconds", "start_timeout_seconds"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)} must be at least 1")
    if not any(given):
        return None
    if flags.process_id >= flags.num_processes:
        raise UserError(
            f"--process_id={flags.process_id} is not below --num_processes={flags.num_processes}; they count from 0"
        )
    if not re.fullmatch(r".+:\d{1,5}", flags.coordinator_address):
        raise UserError(f"--coordinator_address={flags.coordinator_address} is not host:port")
    return clusters.Place(flags.coordinator_address, flags.num_processes, flags.process_id)


def from_first(compute: Callable[[], T]) -> T:
    """Returns in every process what `compute` returns in process 0, for what must be decided once, such as what is on
    disk.

    Args:
      compute: returns a JSON value; runs in process 0 only. All processes call `from_first` in the same order.
    """
    if distributed.global_state.num_processes == 1:
        return compute()
    client, key = distributed.global_state.client, f"{_VALUE}{next(_values)}"
    if distributed.global_state.process_id == 0:
        value = compute()
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(wait_for(key))


def wait_for(key: str) -> str:
    """The value of a key of the key-value store, once a process has set it."""
    return distributed.global_state.client.blocking_key_value_get(key, _DAY * 1000)


def meet() -> None:
    """Waits for all processes: called after something that takes them different times, such as compilation or reading.

    No device takes part: in a collective the first to come would wait for the others, where Gloo gives up after 30 s.
    Here it waits for a day. A process that dies meanwhile is detected by its heartbeat, and an error of another one
    ends this process.
    """
    if distributed.global_state.num_processes != 1:
        distributed.global_state.client.wait_at_barrier(f"trialgpt_jax/meeting/{next(_meetings)}", _DAY * 1000)


def stop_noticed() -> bool:
    """Whether any process of the job has had a SIGTERM, as process 0 knows up to a second later.

    JAX's preemption service tells it to the processes by this key, long before the step at which they stop.
    """
    if distributed.global_state.num_processes == 1:
        return False
    try:
        distributed.global_state.client.key_value_try_get(_NOTICE)
    except jax.errors.JaxRuntimeError:  # no such key
        return False
    return True


class AgreedStep:
    """A step that process 0 chooses and after which all processes do the same thing, such as saving by the clock.

    Process 0 writes a step two ahead to the key-value store, and the others read it without blocking; no device takes
    part. Two are enough because a step is a collective: a process that has the metrics of step k knows that process 0
    has dispatched step k. All processes create these objects in the same order.
    """

    def __init__(self):
        self._key, self._count, self._step = f"{_STEP}{next(_agreed_steps)}", 0, None

    def due(self, step: int, wanted: bool) -> bool:
        """Whether `step` is the agreed step; the same answer in all processes.

        Args:
          step: the step just dispatched; the metrics of the step before have been fetched. Called for every step.
          wanted: process 0's request; it may stay True until the step is due. Ignored in the other processes.
        """
        state = distributed.global_state
        if state.num_processes == 1:
            return wanted
        key = f"{self._key}/{self._count}"
        if self._step is None and state.process_id == 0 and wanted:
            self._step = step + 2
            state.client.key_value_set(key, str(self._step))
        elif self._step is None and state.process_id:
            # the key does not exist yet; or process 0 is dead, and JAX ends this process
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._step = int(state.client.key_value_try_get(key))
        if self._step != step:
            return False
        self._count, self._step = self._count + 1, None
        return True


class _ExitNotice:
    """A child process that prints a line if this process ends without `cancel`: when JAX's C++ threads or a signal end
    it."""

    def __init__(self):
        text = (
            f"error: pid {os.getpid()} on host {socket.gethostname()} ended without finishing: another process of this "
            f"job died or could not be reached (JAX's lines above say which; {_RAISE}), or this one was killed; "
            f"{_NEXT_STEPS}"
        )
        script = "trap '' INT TERM HUP; read -r finished || echo \"$1\" >&2"
        self._shell = subprocess.Popen(
            ["sh", "-c", script, "sh", text], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )

    def cancel(self) -> None:
        with contextlib.suppress(OSError):
            self._shell.communicate(b"yes\n")


class _Watchdog:
    """A thread that ends this process when another one has reported a failure."""

    def __init__(self, notice: _ExitNotice):
        state = distributed.global_state
        self._client, self._id, self._count = state.client, state.process_id, state.num_processes
        self._notice = notice
        self._exiting, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            try:
                status, text = json.loads(self._client.key_value_try_get(_FAILURE))
            except jax.errors.JaxRuntimeError:  # no failure yet; or process 0 is dead, and JAX ends this process
                continue
            self.exit(status, text, None)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def exit(self, status: int, text: str, report: str | None) -> None:
        """Prints `text`, sends `report` to the other processes, and exits with `status`; only the first call does."""
        with self._exiting:  # never released: a second caller waits here until the process ends
            if text:
                console.say_always(text)
            with contextlib.suppress(console.OutputError):
                sys.stdout.flush()
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process failed first, or process 0 is dead
                if report:
                    self._client.key_value_set(_FAILURE, json.dumps([status, report]))
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(f"{_EXITED}{self._id}", "")
                end = time.monotonic() + _EXIT_SECONDS
                while self._id == 0 and time.monotonic() < end:
                    if len(self._client.key_value_dir_get(_EXITED)) == self._count:
                        break
                    time.sleep(0.05)
            self._notice.cancel()
            os._exit(status)  # not sys.exit: at exit JAX would wait for processes that wait for this one


def _describe(error: BaseException) -> tuple[int, str, str]:
    """Exit status, what this process prints about an error, and what the others print."""
    state = distributed.global_state
    me = f"process {state.process_id} of {state.num_processes} (host {socket.gethostname()}, pid {os.getpid()})"
    line = next(iter(str(error).splitlines()), "")
    if isinstance(error, UserError):
        return 2, f"error: {error}", f"error: {me}: {error}"
    if isinstance(error, console.OutputError):
        return error.status, error.line, f"error: {me}: {error}"
    if isinstance(error, KeyboardInterrupt):
        return console.EXIT_INTERRUPTED, "interrupted", f"error: {me} was interrupted; {_NEXT_STEPS}"
    if isinstance(error, (jax.errors.JaxRuntimeError, ValueError, RuntimeError)) and _CONNECTION.search(str(error)):
        if _NO_ANSWER.search(str(error)):
            why = f"has waited too long for another process of this job, which is slow or has ended ({_RAISE})"
        else:
            why = "has lost the connection to another process of this job, which has ended or cannot be reached"
        text = f"error: {me} {why}: {line}; {_NEXT_STEPS}"
        return EXIT_PEER_LOST, text, text
    if (why := faults.explain(error)) is not None:
        return 2, f"error: {why}", f"error: {me}: {why}"
    text = "".join(traceback.format_exception(error)).rstrip()
    return 1, text, f"error: {me} failed: {type(error).__name__}: {line}; {_NEXT_STEPS}"


def _redirect_native_stdout() -> None:
    """Keeps stdout for Python: Gloo, which connects processes on CPU, prints lines of its own to stdout from C++."""
    sys.stdout.flush()
    sys.stdout = console.results(os.dup(1))
    os.dup2(2, 1)
