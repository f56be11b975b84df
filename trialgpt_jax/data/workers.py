"""Distributes the groups of a job over processes and threads, and shows the progress.

Each process takes whole groups; with fewer groups than cores it encodes in several threads. Processes scale better,
because reading, decompressing and hashing run in parallel as well; threads need no start-up and share one tokenizer.
"""

import collections
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from trialgpt_jax import UserError, console, live_line
from trialgpt_jax.console import say
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.encoders import batch_encoder
from trialgpt_jax.data.units import Job, Report, Task, encode_group
from trialgpt_jax.live_line import human_size

Finish = Callable[[dict], None]  # gets the record of a unit that is durable


def run(job: Job, tasks: list[Task], finish: Finish, report: Report) -> None:
    """Processes all tasks with `data.num_workers` parallel encoders; 0 = one per core.

    Raises UserError as `encode_group`, or if a worker process died. Units that were passed to `finish` stay valid.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = job.data["num_workers"] or (len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count())
    processes = max(1, min(cores, len(tasks)))
    threads = -(-cores // processes)
    if processes == 1:
        _run_here(job, threads, tasks, finish, report)
    else:
        _run_processes(job, threads, tasks, processes, finish, report)


def _run_here(job: Job, threads: int, tasks: Iterable[Task], finish: Finish, report: Report) -> None:
    tokenizer = tokenizer_lib.load(job.data["tokenizer"], job.data["dir"])
    encode = batch_encoder(tokenizer, job.data["encoder"])
    for task in tasks:
        for record in encode_group(job, tokenizer, encode, threads, task, report):
            finish(record)


def _run_processes(job: Job, threads: int, tasks: list[Task], processes: int, finish: Finish, report: Report) -> None:
    """`_run_here` in child processes, which request tasks and send records, counts and errors, each over its own pipe.

    Pipes instead of a queue: the locks of a queue are named semaphores, which outlive a process that is stopped, and a
    process that is killed while it holds one blocks the others.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    children: dict[Connection, BaseProcess] = {}
    remaining = iter(tasks)
    try:
        for _ in range(processes):
            pipe, child_end = context.Pipe()
            children[pipe] = context.Process(target=_child, args=(job, threads, child_end), daemon=True)
            with _inherited_block():
                children[pipe].start()
            child_end.close()  # only the child holds its end now, so the pipe closes when the child exits
        while children:
            for pipe in connection.wait(children):
                try:
                    kind, *rest = pipe.recv()
                except (EOFError, ConnectionResetError):
                    child = children.pop(pipe)
                    child.join()
                    if status := child.exitcode:
                        raise UserError(
                            f"a worker process ended with status {status} (-9: killed, e.g. out of memory); lower "
                            "data.num_workers; finished work is kept, and the same command continues"
                        ) from None
                    continue
                if kind == "task":
                    with contextlib.suppress(BrokenPipeError):  # the child is dead, which the next `recv` finds
                        pipe.send(next(remaining, None))
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


@contextlib.contextmanager
def _inherited_block() -> Iterator[None]:
    """Children started in the block never get SIGINT and SIGHUP, which reach the whole process group: their parent ends
    them. In this process the signals are delayed until the block ends."""
    resource_tracker.ensure_running()  # otherwise the first start does that, and unblocks SIGINT afterwards
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(job: Job, threads: int, pipe: Connection) -> None:
    console.guard()
    parent = multiprocessing.parent_process()
    # Exit if the parent is killed
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

    def send(*message: object) -> None:
        pipe.send(message)

    def next_task() -> Task | None:
        send("task")
        return pipe.recv()

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        try:
            tasks = iter(next_task, None)
            _run_here(job, threads, tasks, functools.partial(send, "unit"), functools.partial(send, "counts"))
        except UserError as error:
            send("error", str(error))


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Report]:
    """A bar on stderr of `total` bytes of input (0: unknown), documents, tokens, speed, time left; logs the totals."""
    started, totals = time.perf_counter(), collections.Counter()

    def summary() -> str:
        rate = totals["bytes"] / (time.perf_counter() - started) / 1e6
        return f"{totals['documents']:,} documents, {totals['tokens']:,} tokens, {rate:.1f} MB/s of text"

    def report(documents: int, tokens: int, n_bytes: int, read: int) -> None:
        totals.update(documents=documents, tokens=tokens, bytes=n_bytes)
        bar.advance(read, summary())

    try:
        say(f"reading {human_size(total)}" if total else "reading")
        with live_line.task("tokenizing", total, size=True) as bar:
            yield report
    finally:
        say(f"{summary()}, {time.perf_counter() - started:.1f} s")
