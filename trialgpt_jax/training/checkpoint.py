"""Checkpoints: orbax behind one class that knows which of them are whole.

Orbax loads a flipped bit as a wrong weight without a word, so each step carries our own `checksums.json`: size and sha256 of
every file, shape and dtype of every array, the validation loss. It is written last; while a save is under way its step stands
in `<workdir>/saving`. So a step without checksums was either interrupted (it stands in `saving`, and is discarded) or damaged.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from trialgpt_jax import UserError

_CHECKSUMS = "checksums.json"
_REMOVED = ".removed"
_ITEM = "state"


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: its folder `checkpoints/` holds one folder a step.
      keep_last: newest checkpoints kept; at least 1.
      keep_best: checkpoints kept for the lowest validation loss.
      say: takes a line for the log.
    """

    def __init__(self, workdir: str, keep_last: int = 1, keep_best: int = 0, say: Callable[[str], None] = print):
        logging.getLogger("absl").setLevel(logging.WARNING)  # orbax tells every file it touches
        workdir = os.path.abspath(workdir)  # orbax accepts a relative path and fails in the background
        self._folder = os.path.join(workdir, "checkpoints")
        self._marker = os.path.join(workdir, "saving")
        self._keep_last, self._keep_best, self._say = keep_last, keep_best, say
        self._manager = None
        self._thread, self._error = None, None

    def steps(self) -> list[int]:
        """Steps that have a folder, whole or not, ascending."""
        names = os.listdir(self._folder) if os.path.isdir(self._folder) else []
        return sorted(int(name) for name in names if name.isdigit())

    def problem(self, step: int) -> str | None:
        """What is wrong with the checkpoint of `step`, every byte read and compared; None when it is whole."""
        folder = os.path.join(self._folder, str(step))
        try:
            expected = self._read(step)["files"]
        except (OSError, ValueError, KeyError) as error:
            return f"{os.path.join(folder, _CHECKSUMS)} cannot be read: {error}"
        found = set(_files(folder))
        for name, (size, digest) in expected.items():
            path = os.path.join(folder, name)
            if name not in found:
                return f"{path} is missing"
            if os.path.getsize(path) != size:
                return f"{path} has {os.path.getsize(path)} bytes instead of {size}"
            if _sha256(path) != digest:
                return f"{path} has changed since it was written (checksum)"
        return None

    def newest_whole(self) -> int | None:
        """The newest step whose checkpoint is whole; damaged newer ones are named. None when there are no checkpoints.

        Raises:
          UserError: there are checkpoints, and none is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            problem = self.problem(step)
            if problem is None:
                return step
            self._say(f"checkpoint {step} is damaged: {problem}")
        if steps:
            raise UserError(
                f"{self._folder}: none of the checkpoints ({', '.join(map(str, steps))}) is whole; restore one from a "
                "backup, or train into another workdir"
            )
        return None

    def check(self, step: int) -> None:
        """Refuses a step that is not there or not whole.

        Raises:
          UserError: says what is wrong, and which steps there are.
        """
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self._folder} has no checkpoint of step {step}; it has {have}")
        if problem := self.problem(step):
            raise UserError(f"checkpoint {step} is damaged: {problem}")

    def params_only(self, step: int) -> bool:
        """Whether `step` holds parameters without an optimizer's state: converted ones, not yet trained here."""
        try:
            return all(name.startswith("params/") for name in self._read(step)["arrays"])
        except (OSError, ValueError, KeyError):
            return False  # damaged, which is `problem`'s to tell

    def discard_interrupted(self) -> None:
        """Removes what a save or a removal left that was killed half-way. Not for a workdir that a run is using."""
        if jax.process_index() != 0 or not os.path.isdir(self._folder):
            return
        if os.path.exists(self._marker):
            with open(self._marker) as file:
                step = file.read().strip()
            folder = os.path.join(self._folder, step)
            if step.isdigit() and not os.path.exists(os.path.join(folder, _CHECKSUMS)):
                self._say(f"the save of step {step} was interrupted; it is discarded")
                shutil.rmtree(folder, ignore_errors=True)
            os.remove(self._marker)
        for name in os.listdir(self._folder):
            if "orbax-checkpoint-tmp" in name or name.endswith(_REMOVED):
                shutil.rmtree(os.path.join(self._folder, name))

    # ---- saving

    def save(self, step: int, state, val_loss: float | None = None) -> float:
        """Starts saving `state` as `step`; the devices' copy is taken before this returns, the files are written behind.

        Args:
          step: greater than every step saved before.
          state: a tree of arrays.
          val_loss: finite validation loss at this step, if it is known.

        Returns:
          Seconds for which the caller was held up.

        Raises:
          OSError and others: this save or the one before failed.
        """
        start = time.monotonic()
        self.wait()
        if jax.process_index() == 0:
            os.makedirs(self._folder, exist_ok=True)
            _write(self._marker, str(step))
        multihost = jax.process_count() > 1
        if multihost:
            multihost_utils.sync_global_devices("checkpoint folder")
        if self._manager is None:
            self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=None))
        if not self._manager.save(step, args=ocp.args.Composite(**{_ITEM: ocp.args.StandardSave(state)})):
            raise RuntimeError(f"orbax did not save step {step}; it has {self._manager.all_steps()}")
        arrays = {_name(path): [list(x.shape), str(x.dtype)] for path, x in jax.tree_util.tree_leaves_with_path(state)}
        self._thread = threading.Thread(target=self._finish, args=(step, arrays, val_loss), name="checkpoint")
        self._thread.start()
        return time.monotonic() - start

    def _finish(self, step: int, arrays: dict, val_loss: float | None) -> None:
        """In the background: waits for the files, writes their checksums, removes checkpoints that are not to be kept."""
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                folder = os.path.join(self._folder, str(step))
                files = {}
                for name in _files(folder):
                    path = os.path.join(folder, name)
                    files[name] = [os.path.getsize(path), _sha256(path)]
                record = {"step": step, "val_loss": val_loss, "arrays": arrays, "files": files}
                _write(os.path.join(folder, _CHECKSUMS), json.dumps(record, indent=1))
                os.remove(self._marker)
                self._prune()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the training loop by `wait`
            self._error = error

    def _prune(self) -> None:
        losses = {}
        whole = []
        for step in self.steps():
            try:
                losses[step] = self._read(step)["val_loss"]
                whole.append(step)
            except (OSError, ValueError, KeyError):
                continue  # damaged: not ours to delete, and not counted among those kept
        best = sorted((step for step in whole if losses[step] is not None), key=lambda step: losses[step])
        keep = set(whole[-self._keep_last :]) | set(best[: self._keep_best])
        for step in whole:
            if step not in keep:
                folder = os.path.join(self._folder, str(step))
                os.rename(folder, folder + _REMOVED)  # so that a kill half-way does not leave a damaged checkpoint
                shutil.rmtree(folder + _REMOVED)

    def wait(self) -> None:
        """Returns when the last save is whole, and raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    # ---- restoring

    def restore(self, step: int, layout):
        """Arrays of `step` in the shapes, dtypes and shardings of `layout`, a tree of ShapeDtypeStructs.

        `layout` may be a part of what was saved: {"params": ...} reads the parameters alone. The mesh may be another.

        Raises:
          UserError: the checkpoint lacks an array of the layout, or has it in another shape or dtype.
        """
        saved = self._read(step)["arrays"]
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
        with ocp.CheckpointManager(self._folder) as manager:  # a fresh one: a manager is bound to how it saved
            return manager.restore(step, args=ocp.args.Composite(**{_ITEM: item}))[_ITEM]

    def _read(self, step: int) -> dict:
        with open(os.path.join(self._folder, str(step), _CHECKSUMS)) as file:
            return json.load(file)


def _files(folder: str) -> list[str]:
    """Relative paths of the files below `folder`, but for the checksums themselves."""
    paths = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(os.path.relpath(path, folder) for path in paths if os.path.basename(path) != _CHECKSUMS)


def _name(path) -> str:
    """`params/wte/embedding` for a path in a tree."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: str, text: str) -> None:
    """Writes a small file whole or not at all, and waits until it is on disk."""
    with open(path + ".part", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)
