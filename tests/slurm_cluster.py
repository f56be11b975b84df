"""A real Slurm of two nodes on this machine, for a test: no accounting, and two partitions of which one preempts.

The nodes' names are addresses, because JAX takes the coordinator's from the node list and it must resolve.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

_TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
_CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool-%n
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd-%n.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdLogFile={at}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerType=sched/builtin
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
JobRequeue=1
KillWait=60
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [s.getsockname()[1] for s in sockets]


class Slurm:
    """Runs Slurm's commands; see `running`."""

    def __init__(self, at: pathlib.Path):
        self.at = at
        venv = {"VENV": sys.prefix, "PYTHONPATH": os.getcwd()}
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.env |= {"SLURM_CONF": str(at / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"} | venv

    def __call__(self, *command: str) -> str:
        result = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, condition, seconds: float = 240):
        """Waits; a requeued job, which Slurm delays by two minutes, is started at once."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self("scontrol", "show", "job")
            time.sleep(0.3)


@contextlib.contextmanager
def running(at: pathlib.Path):
    """Starts Slurm with its state below `at`; skips the test where that is not possible."""
    path, host = f"{os.environ['PATH']}:/usr/sbin", socket.gethostname()
    missing = [tool for tool in _TOOLS if not shutil.which(tool, path=path)]
    if missing:
        pytest.skip(f"{missing[0]} is not installed (Debian: slurmctld, slurmd, slurm-client, munge)")
    if os.geteuid():
        pytest.skip("Slurm's daemons are started as root")
    try:
        socket.gethostbyname(host)
    except OSError:
        pytest.skip(f"{host}, the name of this machine, does not resolve")
    slurm, started = Slurm(at), []
    (at / "state").mkdir()
    (at / "munge.key").write_bytes(os.urandom(1024))
    (at / "munge.key").chmod(0o400)
    (at / "slurm.conf").write_text(_CONF.format(at=at, host=host, ports=_free_ports(3)))
    files = [f"--{name}-file={at}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    commands = [["munged", "--foreground", "--force", f"--socket={at}/munge.socket", *files]]
    commands += [["slurmctld", "-D"]]
    commands += [["slurmd", "-D", "-N", f"127.0.0.{i}"] for i in (1, 2)]
    try:
        with open(at / "daemons.log", "w") as log:
            for command in commands:
                started.append(subprocess.Popen(command, env=slurm.env, stdout=log, stderr=log))
                time.sleep(1)
        slurm.until(lambda: slurm("sinfo", "--noheader", "--format=%D %t", "--partition=low").split() == ["2", "idle"])
        yield slurm
    finally:
        with contextlib.suppress(AssertionError):
            slurm("scancel", "--user=root")
        for process in reversed(started):
            process.terminate()
            process.wait(30)
