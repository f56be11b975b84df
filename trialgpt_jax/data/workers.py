"""Spreads the groups of a job over processes and threads, and shows how far it is.

Each process takes whole groups and has threads of its own for the encoding when there are fewer groups than cores.
Processes scale better (reading, decompressing and hashing run in parallel as well); threads need no start-up and share
one tokenizer.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from tqdm import tqdm

from trialgpt_jax import UserError
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data import units
from trialgpt_jax.data.corpora import InputFile
from trialgpt_jax.data.units import Job


class Task(NamedTuple):
    """An unfinished group: its number, files, the records of its finished units, and whether it is one text alone."""

    group: int
    files: list[InputFile]
    done: list[dict]
    only_text: bool


def run(
    job: Job, num_workers: int, tasks: list[Task], finish: Callable[[dict], None], report: Callable[..., None]
) -> None:
    """Works through all tasks.

    Args:
      num_workers: encoders at a time; 0 = one per core.
      finish: called with the record of every unit once it is durable, in this process.
      report: called with group, documents, tokens, UTF-8 bytes since its last call, and bytes of the group read so far.

    Raises:
      UserError: as `units.encode_group`, or a worker process died. What `finish` was told of stays good.
    """
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )  # macOS has no affinity
    cores = num_workers or usable
    processes = max(1, min(cores, len(tasks)))
    threads = -(-cores // processes)
    if processes == 1:
        _run_here(job, threads, tasks, finish, report)
    else:
        _run_processes(job, threads, tasks, processes, finish, report)


def _run_here(
    job: Job, threads: int, tasks: Iterable[Task], finish: Callable[[dict], None], report: Callable[..., None]
) -> None:
    tokenizer = tokenizer_lib.load(job.tokenizer, job.folder)
    encode = tokenizer_lib.batch_encoder(tokenizer, job.encoder)
    for task in tasks:

        def counts(*numbers: int, group: int = task.group) -> None:
            report(group, *numbers)

        for record in units.encode_group(job, tokenizer, encode, threads, *task, counts):
            finish(record)


def _run_processes(
    job: Job,
    threads: int,
    tasks: list[Task],
    processes: int,
    finish: Callable[[dict], None],
    report: Callable[..., None],
) -> None:
    """As `_run_here`, in child processes, which ask for tasks and send records, counts and errors, each by its own pipe.

    Pipes alone: a queue's locks are named semaphores, which outlive a process that is stopped, and whoever is killed
    holding one blocks the others.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    children: dict[Connection, BaseProcess] = {}
    left = iter(tasks)
    try:
        for _ in range(processes):
            pipe, childs_end = context.Pipe()
            children[pipe] = context.Process(target=_child, args=(job, threads, childs_end), daemon=True)
            children[pipe].start()
            childs_end.close()  # the child's own is then the only one, so its end is the pipe's
        running = set(children)
        while running:
            for pipe in connection.wait(running):
                try:
                    kind, *rest = pipe.recv()
                except (EOFError, ConnectionResetError):
                    running.remove(pipe)
                    children[pipe].join()
                    if status := children[pipe].exitcode:
                        raise UserError(
                            f"a worker process ended with status {status} (-9: killed, as when memory runs out); lower "
                            "data.num_workers; what is finished is kept, and the same command goes on"
                        ) from None
                    continue
                if kind == "task":
                    with contextlib.suppress(BrokenPipeError):  # it is dead, which the next `recv` finds
                        pipe.send(next(left, None))
                elif kind == "unit":
                    finish(*rest)
                elif kind == "counts":
                    report(*rest)
                else:
                    raise UserError(*rest)
    finally:
        for child in children.values():
            if child.is_alive():
                child.terminate()
                child.join()


def _child(job: Job, threads: int, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends us
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # a killed parent: no orphans

    def next_task() -> Task | None:
        pipe.send(("task",))
        return pipe.recv()

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        try:
            _run_here(
                job,
                threads,
                iter(next_task, None),
                lambda record: pipe.send(("unit", record)),
                lambda *counts: pipe.send(("counts", *counts)),
            )
        except UserError as error:
            pipe.send(("error", str(error)))


class ProgressBar(contextlib.AbstractContextManager):
    """The bar on stderr: input read, documents, tokens, megabytes of text a second, time left; totals at the end."""

    def __init__(self, total: int):
        """total: bytes of input, as stored; 0 when unknown."""
        every = 0.2 if sys.stderr.isatty() else 10
        self._bar = tqdm(total=total or None, unit="B", unit_scale=True, mininterval=every, file=sys.stderr)
        self._documents = self._tokens = self._bytes = 0
        self._read: dict[int, int] = {}  # group -> bytes of it read
        self._started = time.perf_counter()

    def update(self, group: int, documents: int, tokens: int, n_bytes: int, read: int) -> None:
        """Adds documents, tokens and UTF-8 bytes; `read` bytes of the group's input are done."""
        self._documents += documents
        self._tokens += tokens
        self._bytes += n_bytes
        self._bar.set_postfix_str(self._counts(), refresh=False)
        self._bar.update(read - self._read.get(group, 0))
        self._read[group] = read

    def _counts(self) -> str:
        rate = self._bytes / (time.perf_counter() - self._started) / 1e6
        return f"{self._documents:,} documents, {self._tokens:,} tokens, {rate:.1f} MB/s of text"

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        print(f"{self._counts()}, {time.perf_counter() - self._started:.1f} s", file=sys.stderr)
