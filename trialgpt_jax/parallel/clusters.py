"""Address, number and index of the processes of a job, as JAX detects them; who is missing at the start.

JAX detects the processes of Cloud TPU slices, Slurm, Open MPI and Kubernetes. `jax.distributed.initialize` does so
whenever one of its arguments is missing, the devices included; `processes.join` gives all of them and turns it off.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from jax._src.clusters import ClusterEnv

from trialgpt_jax import UserError, console

_EVERY_SECONDS = 10.0  # between two lines of `Waiting`
_GIVE = "give --coordinator_address, --num_processes and --process_id"


class Place(NamedTuple):
    """A process of a job of `count` processes, as `jax.distributed.initialize` takes it.

    Attributes:
      address: host:port of process 0.
      gpus: indices of the GPUs that this process uses; None = all that it sees.
    """

    address: str
    count: int
    index: int
    gpus: list[int] | None = None


def find(env: Mapping[str, str], timeout_seconds: int) -> Place | None:
    """What JAX detects; None outside a cluster, and for a job of one process.

    Args:
      env: `os.environ`.
      timeout_seconds: how long to wait on Cloud TPU and Kubernetes until the name of process 0 resolves.

    Raises UserError as `detected` does.
    """
    if detected(env) <= 1:
        return None
    try:
        address, count, index, gpus = ClusterEnv.auto_detect_unset_distributed_params(
            env.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout_seconds
        )
    except RuntimeError as error:  # Kubernetes without access to its API, mpi4py that is not installed
        raise UserError(f"JAX does not find the other processes: {_one_line(error)}; {_GIVE}") from None
    return Place(address, count, index, None if has_own_gpus(env) else gpus)


def detected(env: Mapping[str, str]) -> int:
    """Number of processes that JAX detects; 1 outside a cluster.

    Args:
      env: the environment. (JAX's own detection reads `os.environ` and, on Cloud TPU, the metadata server.)

    Raises:
      UserError: the environment belongs to several processes, but JAX does not detect them.
    """
    # JAX takes any pod for Kubernetes, but only a pod of an Indexed Job can be one of several processes.
    pod = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" not in env
    for cluster in ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or (pod and cluster.__name__ == "K8sCluster"):
            continue
        try:
            if cluster.is_env_present():
                return cluster.get_process_count()
        except RuntimeError as error:
            raise UserError(f"JAX does not find the other processes: {_one_line(error)}; {_GIVE}") from None
    for name, count in (
        ("OMPI_COMM_WORLD_SIZE", env.get("OMPI_COMM_WORLD_SIZE", "1")),
        ("SLURM_NTASKS", env.get("SLURM_NTASKS", "1") if "SLURM_STEP_ID" in env else "1"),
        ("JOB_COMPLETION_INDEX", "several" if "JOB_COMPLETION_INDEX" in env else "1"),
    ):
        if count != "1":
            raise UserError(
                f"{name} means {count} processes, but JAX does not find the others (Open MPI from 5 on needs the "
                f"package `mpi4py`, Kubernetes the package `kubernetes`); {_GIVE}"
            )
    return 1


def has_own_gpus(env: Mapping[str, str]) -> bool:
    """Whether a process should use all GPUs it can see, under Slurm or Open MPI.

    There JAX gives each process the one GPU with its local rank. That is right only if several processes share a node
    and see all its GPUs: a single process per node would use one GPU of eight, and one that sees a single GPU none.
    JAX_LOCAL_DEVICE_IDS, which JAX reads itself, names them.
    """
    per_node = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") or env.get("SLURM_STEP_TASKS_PER_NODE", "")
    alone = set(re.findall(r"(?:^|,)(\d+)", per_node)) == {"1"}  # Slurm writes 1(x4) or 2(x3),1
    one = len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    return alone or one or "JAX_LOCAL_DEVICE_IDS" in env


class Waiting:
    """A block in which this process waits for the others; a line every ten seconds says for whom.

    `jax.distributed.initialize` waits in C++, and logs nothing until it gives up.
    """

    def __init__(self, place: Place):
        self._place, self._started = place, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._say, name="waiting", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._over.set()

    def _say(self) -> None:
        while not self._over.wait(_EVERY_SECONDS):
            line = missing(self._place)
            if line and not self._over.is_set():
                console.say_always(f"{line} ({time.monotonic() - self._started:.0f} s)")


def missing(place: Place) -> str:
    """Which processes have not connected yet; "" if all have.

    Process 0 counts the connections to its port. The others see only process 0: whether its name resolves, and whether
    it accepts a connection.
    """
    host, port = place.address.rsplit(":", 1)
    if place.index:
        why = _unreachable(host.strip("[]"), int(port))
        if why:
            return f"process {place.index} is waiting for process 0 of {place.count} at {place.address}: {why}"
        return f"process {place.index} has found process 0 of {place.count} at {place.address}; waiting for the others"
    connected = _connections(int(port))
    if connected is None:
        return f"waiting for {place.count - 1} of {place.count} processes at {place.address}"
    left = place.count - max(1, connected)
    return f"waiting for {left} of {place.count} processes at {place.address}" if left > 0 else ""


def _unreachable(host: str, port: int) -> str:
    """Why no connection can be made; "" if it can."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except socket.gaierror as error:
        return f"the name {host} does not resolve ({error.strerror})"
    except OSError as error:
        return f"{error.strerror or error}"
    return ""


def _connections(port: int, proc: str = "/proc/net") -> int | None:
    """Established TCP connections to a port of this host, its own one included; None where the system does not tell.

    Each process of a job keeps one, in which JAX's client talks to its coordination service.
    """
    found = None
    for name in ("tcp", "tcp6"):
        try:
            with open(os.path.join(proc, name)) as file:
                rows = [line.split() for line in file][1:]
        except OSError:
            continue
        ours = [row for row in rows if int(row[1].rsplit(":", 1)[1], 16) == port and row[3] == "01"]  # ESTABLISHED
        found = (found or 0) + len(ours)
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
