"""Checkpoints: saves a training state in the background with orbax, and restores it on any mesh.

`checkpoint_folder` decides which steps are whole and which are kept, and describes the files.
"""

import contextlib
import functools
import logging
import math
import sys
import threading
import time

import jax
import orbax.checkpoint as ocp
from etils import epath  # orbax's paths, on disk and in object stores
from jax.experimental import multihost_utils

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.live_line import human_size, task
from trialgpt_jax.storage import files
from trialgpt_jax.training.checkpoint_folder import CheckpointFolder
from trialgpt_jax.training.train_step import describe_nonfinite, nonfinite

_ITEM = "state"
_CHUNK_BYTES = 16 * 2**20  # small enough that a host of another mesh reads its own part and not whole arrays


class SaveError(UserError):
    """A checkpoint could not be written, for a reason outside this program; earlier checkpoints are unchanged."""


class _LibraryLog(logging.Handler):
    """Reports what orbax warns of as one line of the log.

    It logs at a higher level, with a traceback, only what it also raises.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING and not record.exc_info:
            say(f"warning of {record.module}: {' '.join(record.getMessage().split())[:300]}")


@functools.cache
def report_libraries() -> None:
    """Makes the warnings of orbax and TensorStore lines of our log, in this process.

    When a save fails, TensorStore's other writes end after orbax has closed its event loop, each with an unraisable
    exception; those are dropped.
    """
    log = logging.getLogger("absl")
    log.handlers, log.propagate = [_LibraryLog()], False
    log.setLevel(logging.WARNING)
    previous = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook


class Checkpoints(CheckpointFolder):
    """The checkpoints of one workdir; the arguments are those of `CheckpointFolder`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._manager = None
        self._thread, self._error = None, None

    def save(self, step: int, state, val_loss: float | None = None, allow_nonfinite: bool = False) -> float:
        """Starts saving `state` as `step`: copies it off the devices, then writes it in the background.

        Args:
          step: greater than every step saved before.
          state: a tree of arrays.
          val_loss: finite validation loss at this step, if known.
          allow_nonfinite: also save a state with NaN or infinite values.

        Returns:
          Seconds for which the caller was blocked.

        Raises:
          SaveError: this save or the one before failed.
          FloatingPointError: the state has NaN or infinite values.
        """
        start = time.monotonic()
        self.wait()
        if not allow_nonfinite and (bad := nonfinite(state)):
            raise FloatingPointError(f"step {step} is not saved, because it has {describe_nonfinite(bad)}")
        n_bytes = state_bytes(state)
        try:
            self._begin(step, state)
        except (OSError, ValueError) as error:
            raise self._failed(step, n_bytes, error) from None
        args = step, n_bytes, _describe(state), val_loss
        self._thread = threading.Thread(target=self._finish, args=args, name="checkpoint")
        self._thread.start()
        return time.monotonic() - start

    def _begin(self, step: int, state) -> None:
        if jax.process_index() == 0:
            self._mark_unfinished(step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint folder")
        if self._manager is None:
            self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=None))
        chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), state)
        item = ocp.args.StandardSave(state, save_args=chunked)
        if not self._manager.save(step, args=ocp.args.Composite(**{_ITEM: item})):
            raise RuntimeError(f"orbax did not save step {step}; it has {self._manager.all_steps()}")

    def _finish(self, step: int, n_bytes: int, arrays: dict, val_loss: float | None) -> None:
        """In the background: waits for orbax, makes the step whole, removes the checkpoints that are not kept."""
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                files.sync_tree(self._path(step))  # orbax syncs the arrays, but none of its metadata files
                self._open(step, arrays)
                self._mark_finished(step, val_loss, arrays)
                self._prune()
        except (OSError, ValueError) as error:  # ValueError: how TensorStore reports a full disk
            self._error = self._failed(step, n_bytes, error)
        except SaveError as error:
            self._abandon()
            self._error = error
        except Exception as error:  # noqa: BLE001 - raised again by `wait` in the training loop
            self._error = error

    def _open(self, step: int, arrays: dict) -> None:
        """Opens every array of a step, without reading its values, and compares names, shapes and dtypes.

        Raises:
          SaveError: they cannot be opened, or are not `arrays`, what `save` was given.
        """
        try:
            found, why = _describe(ocp.PyTreeCheckpointHandler().metadata(self._item_path(step)).tree), ""
        except Exception as error:  # TensorStore raises several types
            if files.is_storage_error(error):
                raise
            found, why = {}, f": {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if found != arrays:
            name = next(name for name in arrays | found if found.get(name) != arrays.get(name))
            raise SaveError(
                f"the checkpoint of step {step} in {self._folder} cannot be read back: `{name}` is "
                f"{found.get(name)} there and {arrays.get(name)} in the run{why}; {self.last_good()}"
            )

    def _item_path(self, step: int) -> epath.Path:
        return epath.Path(self._path(step)) / _ITEM

    def _failed(self, step: int, n_bytes: int, error: Exception) -> Exception:
        """Removes what a failed save has written; returns the exception to raise."""
        if not files.is_storage_error(error):
            return error
        self._abandon()
        why = " ".join(str(error).split())
        if files.is_disk_full(error):
            free = files.free_bytes(self._folder)
            missing = f", {human_size(n_bytes - free)} too few" if free < n_bytes else ""
            sizes = f"arrays take {human_size(n_bytes)}, and {human_size(free)} are free without it{missing}"
            why = f"the disk is full: the checkpoint's {sizes}"
        return SaveError(
            f"the checkpoint of step {step} could not be saved in {self._folder}: {why}; {self.last_good()}"
        )

    def _abandon(self) -> None:
        """Removes what a failed save has written."""
        with contextlib.suppress(Exception):
            self._manager.close()  # the manager would raise the same error at the next save
        self._manager = None
        if jax.process_index() == 0:
            self._discard_unfinished()

    def idle(self) -> bool:
        """Whether no save is in progress."""
        return self._thread is None or not self._thread.is_alive()

    def poll(self) -> None:
        """Raises the exception of a save that has ended, as `wait` does; does not wait for one in progress."""
        if self.idle():
            self.wait()

    def settle(self) -> None:
        """Returns when no save is in progress; `wait` raises its exception."""
        if self._thread not in (None, threading.current_thread()):
            with task("writing the checkpoint"):
                self._thread.join()

    def last_good(self) -> str:
        """As of `CheckpointFolder`, after the save in progress."""
        self.settle()
        return super().last_good()

    def wait(self) -> None:
        """Returns when the last save is whole. Raises its exception: SaveError, or an error in this program."""
        self.settle()
        self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore(self, step: int, layout):
        """The arrays of `step` in the shapes, dtypes and shardings of `layout`, a tree of ShapeDtypeStructs.

        `layout` may be a part of what was saved: {"params": ...} reads only the parameters. The mesh may differ from
        the one that saved.

        Raises:
          UserError: the checkpoint lacks an array of the layout, has it in another shape or dtype, or was not written
            by `save`.
        """
        try:
            saved = self._record(step)["arrays"]
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {step} is damaged: {error}") from None
        for name, want in _describe(layout).items():
            if saved.get(name) != want:
                raise UserError(
                    f"checkpoint {step} belongs to another model: its `{name}` is {saved.get(name)}, and the config "
                    f"asks for {want}"
                )
        restore_args = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype), layout
        )
        item = ocp.args.PyTreeRestore(item=layout, restore_args=restore_args, partial_restore=True)
        try:
            # not by a CheckpointManager, which looks at all steps and fails if a run removes one of them meanwhile
            with task(f"restoring checkpoint {step} ({human_size(state_bytes(layout))})"):
                return ocp.PyTreeCheckpointHandler().restore(self._item_path(step), args=item)
        except jax.errors.JaxRuntimeError:
            raise  # out of memory, or another process has died
        except Exception as error:  # TensorStore raises several types
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"checkpoint {step} in {self._folder} cannot be read, although its checksums are right: "
                f"{type(error).__name__}: {why}"
            ) from error


def state_bytes(state) -> int:
    """Bytes of the arrays of a state or of its layout: an upper limit for the size of its checkpoint."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _describe(tree) -> dict[str, list]:
    """Name -> [shape, dtype] of every array of a tree, such as `params/wte/embedding` -> [[50304, 768], "float32"]."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}
