"""What keeps a workdir in order besides its checkpoints: one run at a time, a stop on request, the tokenizer it was made with."""

import contextlib
import fcntl
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from typing import IO

import jax
from jax.experimental import multihost_utils

from trialgpt_jax import UserError, files, lease
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.token_store import TokenStore


def probe(workdir: str) -> None:
    """Finds out whether `locked` would let a run begin here, and leaves everything as it was.

    Raises:
      UserError: as `locked`.
    """
    if files.is_remote(workdir):
        return lease.probe(workdir)
    path = os.path.abspath(workdir)
    missing = []
    while not os.path.isdir(path) and path != os.path.dirname(path):
        missing.append(path)
        path = os.path.dirname(path)
    with _writable(workdir):
        try:
            for folder in reversed(missing):
                os.mkdir(folder)
            with tempfile.NamedTemporaryFile(dir=workdir, prefix="probe"):
                pass
        finally:
            for folder in missing:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(folder)
    with contextlib.suppress(FileNotFoundError), open(os.path.join(workdir, "lock")) as file:
        _take(file, workdir)


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Holds `<workdir>/lock` for this process; the kernel releases it when the process dies, however it dies.

    In an object store there is no such kernel: see `lease`.

    Raises:
      UserError: the folder cannot be written, or another run holds it.
    """
    if files.is_remote(workdir):
        with lease.held(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
            yield
        return
    with _writable(workdir):
        os.makedirs(workdir, exist_ok=True)
        file = open(os.path.join(workdir, "lock"), "a+")  # noqa: SIM115 - open as long as the lock is held
    with file:
        if jax.process_index() == 0:  # one lock for all processes of a job
            _take(file, workdir)
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
            file.flush()
        yield


@contextlib.contextmanager
def _writable(workdir: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}; choose another folder") from None


def _take(file: IO, workdir: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(f"--workdir={workdir} is in use by {holder}; stop it or choose another folder") from None


class StopRequest:
    """SIGTERM or Ctrl-C, once: stop after this step. A second one ends the process at once.

    With several processes JAX's preemption service listens for SIGTERM to any of them and finds a step at which all can
    stop. A second SIGTERM does nothing then, as hosts that are taken away are told one after the other.
    """

    def __enter__(self):
        self._asked = False
        self._previous = {}
        # a handler of SIGTERM here would deafen the preemption service
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,):
            with contextlib.suppress(ValueError):  # not the main thread (a notebook): there is nothing to listen to
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        for each, handler in self._previous.items():
            signal.signal(each, signal.SIG_DFL if each == signal.SIGTERM else handler)
        self._ask_all()
        if jax.process_index() == 0:
            # not `say`: the signal may have come while a line was being printed, whose buffer cannot be entered again
            os.write(2, b"stopping after this step; once more to leave at once\n")

    def _ask_all(self) -> None:
        if jax.process_count() > 1 and not self._asked:
            os.kill(os.getpid(), signal.SIGTERM)
        self._asked = True

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int, elapsed: float, max_seconds: float) -> bool:
        """Whether to stop after `step`; every process gets the same answer at the same step."""
        late = bool(max_seconds) and elapsed >= max_seconds
        if jax.process_count() == 1:
            return self._asked or late
        if late:
            self._ask_all()  # clocks differ: the first one that is late asks, and the service finds the step
        return multihost_utils.reached_preemption_sync_point(step)


def keep_tokenizer(store: TokenStore, workdir: str) -> None:
    """Puts the store's tokenizer into the workdir, so that generation needs no token store.

    Raises:
      UserError: the workdir's model was trained on ids of another tokenizer.
    """
    path = os.path.join(workdir, "tokenizer.json")
    mine = {"name": store.tokenizer, "hash": store.tokenizer_hash}
    if files.exists(path):
        check_tokenizer(store, workdir)
        return
    if store.tokenizer != "gpt2":
        tokenizer_lib.from_store(store.folder).save(workdir)
    files.write_json(path, mine)


def check_tokenizer(store: TokenStore, workdir: str) -> None:
    """Refuses a token store made with another tokenizer than the one that the workdir's model was trained with.

    Raises:
      UserError: names both, or the workdir's file, where that is damaged.
    """
    path = os.path.join(workdir, "tokenizer.json")
    try:
        trained = files.read_json(path)
        name, digest = trained["name"], trained["hash"]
    except FileNotFoundError:
        return  # not trained yet
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the name of a tokenizer: {error!r}") from None
    same_hash = None in (store.tokenizer_hash, digest) or store.tokenizer_hash == digest
    if store.tokenizer != name or not same_hash:
        raise UserError(
            f"data.dir={store.folder} was made with tokenizer {store.tokenizer} ({store.tokenizer_hash}), but the model in "
            f"{workdir} was trained with {name} ({digest}); preprocess the text with that one"
        )
