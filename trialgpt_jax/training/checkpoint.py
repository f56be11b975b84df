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
from jax.experimental import multihost_utils

from trialgpt_jax import UserError
from trialgpt_jax.storage import files
from trialgpt_jax.storage.integrity import human_size
from trialgpt_jax.training.checkpoint_folder import CheckpointFolder

_ITEM = "state"
_CHUNK_BYTES = 16 * 2**20  # small enough that a host of another mesh reads its own part and not whole arrays


class SaveError(Exception):
    """A checkpoint could not be written, for a reason outside this program; earlier checkpoints are unchanged."""


@functools.cache
def quiet_libraries() -> None:
    """Limits what orbax and TensorStore print in this process to errors that they do not also raise.

    Orbax logs every file that it touches, and a traceback of each exception that it raises. When a save fails,
    TensorStore's other writes end after orbax has closed its event loop, each with an unraisable exception.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
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

    def save(self, step: int, state, val_loss: float | None = None) -> float:
        """Starts saving `state` as `step`: copies it off the devices, then writes it in the background.

        Args:
          step: greater than every step saved before.
          state: a tree of arrays.
          val_loss: finite validation loss at this step, if known.

        Returns:
          Seconds for which the caller was blocked.

        Raises:
          SaveError: this save or the one before failed.
        """
        start = time.monotonic()
        self.wait()
        n_bytes = state_bytes(state)
        try:
            self._begin(step, state)
        except (OSError, ValueError) as error:
            raise self._failed(step, n_bytes, error) from None
        arrays = {_name(path): [list(x.shape), str(x.dtype)] for path, x in jax.tree_util.tree_leaves_with_path(state)}
        self._thread = threading.Thread(target=self._finish, args=(step, n_bytes, arrays, val_loss), name="checkpoint")
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
        """In the background: waits for orbax, writes the checksums, removes the checkpoints that are not kept."""
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                self._mark_finished(step, val_loss, arrays)
                self._prune()
        except (OSError, ValueError) as error:  # ValueError: how TensorStore reports a full disk
            self._error = self._failed(step, n_bytes, error)
        except Exception as error:  # noqa: BLE001 - raised again by `wait` in the training loop
            self._error = error

    def _failed(self, step: int, n_bytes: int, error: Exception) -> Exception:
        """Removes what a failed save has written; returns the exception to raise."""
        if not files.is_storage_error(error):
            return error
        with contextlib.suppress(Exception):
            self._manager.close()  # the manager would raise the same error at the next save
        self._manager = None
        if jax.process_index() == 0:
            self._discard_unfinished()
        why = " ".join(str(error).split())
        if files.is_disk_full(error):
            free = files.free_bytes(self._folder)
            missing = f", {human_size(n_bytes - free)} too few" if free < n_bytes else ""
            sizes = f"takes {human_size(n_bytes)}, and {human_size(free)} are free without it{missing}"
            why = f"the disk is full: the checkpoint {sizes}"
        last = max(self.steps(), default=None)
        whole = "there is no older one" if last is None else f"the last good one is {last}"
        return SaveError(f"the checkpoint of step {step} could not be saved in {self._folder}: {why}; {whole}")

    def idle(self) -> bool:
        """Whether no save is in progress."""
        return self._thread is None or not self._thread.is_alive()

    def poll(self) -> None:
        """Raises the exception of a save that has ended, as `wait` does; does not wait for one in progress."""
        if self.idle():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is whole. Raises its exception: SaveError, or an error in this program."""
        if self._thread is not None:
            self._thread.join()
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
        saved = self._record(step)["arrays"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(layout):
            want = [list(leaf.shape), str(leaf.dtype)]
            if saved.get(_name(path)) != want:
                raise UserError(
                    f"checkpoint {step} belongs to another model: its `{_name(path)}` is {saved.get(_name(path))}, "
                    f"and the config asks for {want}"
                )
        restore_args = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype), layout
        )
        item = ocp.args.PyTreeRestore(item=layout, restore_args=restore_args, partial_restore=True)
        try:
            # a new manager, because one that has saved restores with the handler that it saved with
            with ocp.CheckpointManager(self._folder) as manager:
                return manager.restore(step, args=ocp.args.Composite(**{_ITEM: item}))[_ITEM]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"checkpoint {step} in {self._folder} cannot be read, although its checksums are right: "
                f"{type(error).__name__}: {why}"
            ) from error


def state_bytes(state) -> int:
    """Bytes of the arrays of a state or of its layout: an upper limit for the size of its checkpoint."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _name(path) -> str:
    """`params/wte/embedding` for a path in a tree."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
