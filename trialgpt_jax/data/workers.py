"""Spreads the groups of a job over processes and threads, and shows how far it is.

Each process takes whole groups and has threads of its own for the encoding when there are fewer groups than cores.
Processes scale better (reading, decompressing and hashing run in parallel as well); threads need no start-up and share
one tokenizer.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
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
    """As `_run_here`, in child processes; records, counts and errors come back through a queue."""
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    todo, events = context.Queue(), context.Queue()
    todo.cancel_join_thread()  # at an error, do not wait at exit for somebody to take the tasks that are left
    for task in (*tasks, *[None] * processes):
        todo.put(task)
    children = [
        context.Process(target=_child, args=(job, threads, todo, events), daemon=True) for _ in range(processes)
    ]
    for child in children:
        child.start()
    running = processes
    try:
        while running:
            try:
                kind, *rest = events.get(timeout=1)
            except queue.Empty:
                if dead := [child.exitcode for child in children if child.exitcode]:
                    raise UserError(
                        f"a worker process ended with status {dead[0]} (-9: killed, as when memory runs out); lower "
                        "data.num_workers; what is finished is kept, and the same command goes on"
                    ) from None
                continue
            if kind == "unit":
                finish(*rest)
            elif kind == "counts":
                report(*rest)
            elif kind == "error":
                raise UserError(*rest)
            else:
                running -= 1
    finally:
        for child in children:
            if running:
                child.terminate()
            child.join()


def _child(job: Job, threads: int, todo: multiprocessing.Queue, events: multiprocessing.Queue) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends us
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # a killed parent: no orphans
    try:
        _run_here(
            job,
            threads,
            iter(todo.get, None),
            lambda record: events.put(("unit", record)),
            lambda *counts: events.put(("counts", *counts)),
        )
        events.put(("end",))
    except UserError as error:
        events.put(("error", str(error)))


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
