"""The processes of one job: how they find each other, decide together, and end together.

JAX's coordination service, which lives in process 0, does the work: it introduces the processes, notices by missing
heartbeats that one has died, and then ends the others from its C++ threads. What is added here is what a person needs
at that moment: an error that only one process meets is told by all of them, at once and with its exit status, and a
process that is ended from below still leaves a line that says what to do.
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
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
from jax._src import distributed  # the key-value store that all processes share has no public name
from jax._src.clusters import ClusterEnv

from trialgpt_jax import UserError

T = TypeVar("T")

FLAGS = {
    "coordinator_address": (None, "host:port of process 0, where JAX does not find it by itself"),
    "num_processes": (0, "processes of the job, with --coordinator_address"),
    "process_id": (-1, "number of this process from 0, with --coordinator_address"),
    "peer_timeout_seconds": (100, "a process that has not been heard of for this long is dead, and ends the others"),
    "start_timeout_seconds": (300, "how long to wait for the other processes at the start"),
}
_FAILED, _LEFT, _DECISION = "trialgpt_jax/failed", "trialgpt_jax/left/", "trialgpt_jax/decision/"
_APPOINTMENT = "trialgpt_jax/appointment/"
_POLL_SECONDS = 0.5  # between two looks at whether another process has failed
_FAREWELL_SECONDS = 5.0  # process 0 waits this long for the others to read why, for the store dies with it
_DAY_MS = 24 * 3600 * 1000
# In an exception's text: it is the connection to another process that broke, and not the program.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|socket closed|heartbeat|coordination service", re.IGNORECASE)
_decisions, _appointments = itertools.count(), itertools.count()


@contextlib.contextmanager
def joined(flags) -> Iterator[None]:
    """Joins the other processes of the job, if there are any, for the length of the block; ends together with them.

    With several processes an exception does not leave the block: it is printed, told to the others, and every process
    exits with its status (2 for a UserError, otherwise 1).

    Args:
      flags: has the attributes of `FLAGS`. Without an address JAX finds the others on Cloud TPU, Slurm, Open MPI and
        Kubernetes; where there are none this is a job of one process.

    Raises:
      UserError: the flags do not go together, or the environment speaks of processes that JAX cannot find.
    """
    given = [flags.coordinator_address is not None, flags.num_processes > 0, flags.process_id >= 0]
    if any(given) and not all(given):
        raise UserError("--coordinator_address, --num_processes and --process_id go together; give all three")
    for name in ("peer_timeout_seconds", "start_timeout_seconds"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)} must be at least 1")
    if all(given):
        if flags.process_id >= flags.num_processes:
            raise UserError(
                f"--process_id={flags.process_id} is not below --num_processes={flags.num_processes}; they count from 0"
            )
        where = (flags.coordinator_address, flags.num_processes, flags.process_id)
    elif detected(os.environ) > 1:
        where = ()
    else:
        yield
        return

    _keep_stdout()
    last_words = _last_words()
    jax.distributed.initialize(
        *where,
        initialization_timeout=flags.start_timeout_seconds,
        heartbeat_timeout_seconds=flags.peer_timeout_seconds,
        shutdown_timeout_seconds=24
        * 3600,  # process 0 may still check a large checkpoint; a dead one is noticed anyway
    )
    if not where and each_has_its_own_gpu(os.environ):
        jax.config.update("jax_cuda_visible_devices", "all")
    listener = _Listener(last_words)
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - whatever it is, the other processes must not wait for this one
        listener.leave(*_describe(error))
    listener.stop()
    jax.distributed.shutdown()
    _finished(last_words)


def from_first(compute: Callable[[], T]) -> T:
    """What `compute` returns in process 0, in every process: for what only one may decide, such as what is on disk.

    Args:
      compute: returns a value that JSON can carry; runs in process 0 alone. All processes call in the same order.
    """
    if distributed.global_state.num_processes == 1:
        return compute()
    client, key = distributed.global_state.client, f"{_DECISION}{next(_decisions)}"
    if distributed.global_state.process_id == 0:
        value = compute()
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, _DAY_MS))


class Appointments:
    """Steps that process 0 chooses, after which all processes do something together. All make such objects in the same order.

    Process 0 names a step two ahead, and the others look whether it has: nothing waits, and no device is asked. That is
    enough, because a step is a collective: who has the metrics of step k knows that process 0 has dispatched step k.
    """

    def __init__(self):
        self._key, self._count, self._step = f"{_APPOINTMENT}{next(_appointments)}", 0, None

    def due(self, step: int, wish: bool) -> bool:
        """Whether it is to be done after `step`; the same answer in all processes.

        Args:
          step: dispatched just now, while the metrics of the one before have been fetched. No step is left out.
          wish: of process 0; it may last until it is granted.
        """
        state = distributed.global_state
        if state.num_processes == 1:
            return wish
        key = f"{self._key}/{self._count}"
        if self._step is None and state.process_id == 0 and wish:
            self._step = step + 2
            state.client.key_value_set(key, str(self._step))
        elif self._step is None and state.process_id:
            # none has been named; or process 0 is gone, and JAX ends this process
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._step = int(state.client.key_value_try_get(key))
        if self._step != step:
            return False
        self._count, self._step = self._count + 1, None
        return True


def detected(env: Mapping[str, str]) -> int:
    """How many processes JAX will find by itself; 1 when this is not a cluster.

    Args:
      env: the environment. (JAX's own detection reads `os.environ` and, on Cloud TPU, the metadata server.)

    Raises:
      UserError: the environment speaks of several processes, but JAX does not find them.
    """
    # The environment of every pod looks like Kubernetes to JAX; only one of an Indexed Job can be one of several.
    pod = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" not in env
    for cluster in ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or (pod and cluster.__name__ == "K8sCluster"):
            continue
        if cluster.is_env_present():
            return cluster.get_process_count()
    for name, count in (
        ("OMPI_COMM_WORLD_SIZE", env.get("OMPI_COMM_WORLD_SIZE", "1")),
        ("SLURM_NTASKS", env.get("SLURM_NTASKS", "1") if "SLURM_STEP_ID" in env else "1"),
        ("JOB_COMPLETION_INDEX", "several" if "JOB_COMPLETION_INDEX" in env else "1"),
    ):
        if count != "1":
            raise UserError(
                f"{name} speaks of {count} processes, but JAX does not find the others (Open MPI from 5 on; Kubernetes "
                "without the package `kubernetes`); give --coordinator_address, --num_processes and --process_id"
            )
    return 1


def each_has_its_own_gpu(env: Mapping[str, str]) -> bool:
    """Whether a process should use all the GPUs it can see, under Slurm or Open MPI.

    JAX gives each process there the one GPU that has its local rank. That is right only where several processes share a
    node and see all its GPUs: one process per node would use one GPU of eight, and one that sees a single GPU none.
    """
    per_node = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") or env.get("SLURM_STEP_TASKS_PER_NODE", "")
    alone = set(re.findall(r"(?:^|,)(\d+)", per_node)) == {"1"}  # Slurm writes 1(x4) or 2(x3),1
    return alone or len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1


class _Listener:
    """A thread that ends this process when another one has said that it failed."""

    def __init__(self, last_words: subprocess.Popen):
        state = distributed.global_state
        self._client, self._id, self._count = state.client, state.process_id, state.num_processes
        self._last_words = last_words
        self._leaving, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            try:
                status, text = json.loads(self._client.key_value_try_get(_FAILED))
            except jax.errors.JaxRuntimeError:  # nobody has; or process 0 is gone, and JAX ends this process
                continue
            self.leave(status, text, None)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def leave(self, status: int, text: str, told: str | None) -> None:
        """Prints `text`, tells `told` to the other processes, and exits with `status`: the first caller only."""
        with self._leaving:  # never released: there is one end
            print(f"{text}\n", end="", file=sys.stderr, flush=True)
            sys.stdout.flush()
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has failed first, or process 0 is gone
                if told:
                    self._client.key_value_set(_FAILED, json.dumps([status, told]))
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(f"{_LEFT}{self._id}", "")
                end = time.monotonic() + _FAREWELL_SECONDS
                while self._id == 0 and time.monotonic() < end:
                    if len(self._client.key_value_dir_get(_LEFT)) == self._count:
                        break
                    time.sleep(0.05)
            _finished(self._last_words)
            os._exit(status)  # not sys.exit: JAX would wait at its end for processes that wait for this one


def _describe(error: BaseException) -> tuple[int, str, str]:
    """Exit status, what this process prints of an error, and what the others print."""
    state = distributed.global_state
    me = f"process {state.process_id} of {state.num_processes} (host {socket.gethostname()}, pid {os.getpid()})"
    line = next(iter(str(error).splitlines()), "")
    if isinstance(error, UserError):
        return 2, f"error: {error}", f"error: {me}: {error}"
    if isinstance(error, (jax.errors.JaxRuntimeError, ValueError, RuntimeError)) and _LOST.search(str(error)):
        text = f"error: {me} has lost another process of this job, which has died: {line}; {_AGAIN}"
        return 1, text, text
    text = "".join(traceback.format_exception(error)).rstrip()
    return 1, text, f"error: {me} failed: {type(error).__name__}: {line}; {_AGAIN}"


_AGAIN = "the same command on every host continues from the newest whole checkpoint"


def _last_words() -> subprocess.Popen:
    """A shell that speaks up if this process ends without a word: when JAX's C++ threads or a signal end it."""
    text = (
        f"error: pid {os.getpid()} on host {socket.gethostname()} ended without finishing: another process of this job "
        f"died or could not be reached (JAX's lines above say which), or this one was killed; {_AGAIN}"
    )
    script = "trap '' INT TERM HUP; read -r finished || echo \"$1\" >&2"
    return subprocess.Popen(["sh", "-c", script, "sh", text], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def _keep_stdout() -> None:
    """Leaves stdout to Python: Gloo, which connects processes on CPU, prints its own lines there from C++."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def _finished(last_words: subprocess.Popen) -> None:
    with contextlib.suppress(OSError):
        last_words.communicate(b"yes\n")
