"""Checkpoints: orbax behind one class that knows which of them are whole.

Orbax loads a flipped bit as a wrong weight without a word, so each step carries our own `checksums.json`: size and sha256 of
every file, shape and dtype of every array, the validation loss. It is written last; while a save is under way its step stands
in `<workdir>/saving`. So a step without checksums was either interrupted (it stands in `saving`, and is discarded) or damaged.
A file `<step>.removed` beside a step says that the step is being removed.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from trialgpt_jax import UserError, files
from trialgpt_jax.parallel import processes

_CHECKSUMS = "checksums.json"
_REMOVED = ".removed"
_DAMAGED = ".damaged"
_ITEM = "state"
_CHUNK_BYTES = 16 * 2**20  # a host of another mesh reads the chunks of its own part, rather than whole arrays
_STEP = re.compile(r"0|[1-9][0-9]*")


class SaveError(Exception):
    """A checkpoint could not be written, for a reason outside this program; the checkpoints before it are as they were."""


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: its folder `checkpoints/` holds one folder a step; a path or a URL, see `files`.
      keep_last: newest checkpoints kept; at least 1.
      keep_best: checkpoints kept for the lowest validation loss.
      keep_period: every multiple of it is kept for ever; 0 = none.
      say: takes a line for the log.

    Attributes:
      saved_step: the newest step that this object has saved whole; None before the first.
    """

    def __init__(
        self,
        workdir: str,
        keep_last: int = 1,
        keep_best: int = 0,
        keep_period: int = 0,
        say: Callable[[str], None] = print,
    ):
        # orbax tells every file it touches, and prints a traceback of what it also raises
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        workdir = files.resolve(workdir)  # orbax accepts a relative path and fails in the background
        self._folder = os.path.join(workdir, "checkpoints")
        self._marker = os.path.join(workdir, "saving")
        self._keep_last, self._keep_best, self._keep_period, self._say = keep_last, keep_best, keep_period, say
        self._manager = None
        self._thread, self._error = None, None
        self.saved_step = None

    def steps(self) -> list[int]:
        """Steps that have a folder, whole or not, ascending; without the one that is being saved, or being removed."""
        names = files.names(self._folder)
        unfinished = self._unfinished()
        return sorted(
            int(name) for name in names if _STEP.fullmatch(name) and name != unfinished and name + _REMOVED not in names
        )

    def problem(self, step: int) -> str | None:
        """What is wrong with the checkpoint of `step`, every byte read and compared; None when it is whole."""
        folder = self._path(step)
        try:
            expected = self._read(step)["files"]
            found = files.sizes(folder)
            for name, (size, digest) in expected.items():
                path = os.path.join(folder, name)
                if name not in found:  # nor is a name read that leads out of the folder
                    return f"{path} is missing"
                if found[name] != size:
                    return f"{path} has {found[name]} bytes instead of {size}"
                if files.sha256(path) != digest:
                    return f"{path} has changed since it was written (checksum)"
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())
        return None

    def newest_whole(self) -> int | None:
        """The newest step whose checkpoint is whole; damaged newer ones are named. None when there are no checkpoints.

        Process 0 reads and decides, and the others take its answer.

        Raises:
          UserError: there are checkpoints, and none is whole.
        """
        return processes.from_first(self._newest_whole)

    def _newest_whole(self) -> int | None:
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
        """Refuses a step that is not there or not whole, as process 0 finds it.

        Raises:
          UserError: says what is wrong, and which steps there are.
        """
        processes.from_first(lambda: self._check(step))

    def _check(self, step: int) -> None:
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self._folder} has no checkpoint of step {step}; it has {have}")
        if problem := self.problem(step):
            raise UserError(f"checkpoint {step} is damaged: {problem}")

    def has(self, step: int, prefix: str) -> bool:
        """Whether any array of `step` has a name that begins so; no for a damaged one, which is `problem`'s to tell."""
        return any(name.startswith(prefix) for name in self._arrays(step))

    def params_only(self, step: int) -> bool:
        """Whether `step` holds parameters without an optimizer's state: converted ones, not yet trained here."""
        names = self._arrays(step)
        return bool(names) and all(name.startswith("params/") for name in names)

    def _arrays(self, step: int) -> dict:
        try:
            return self._read(step)["arrays"]
        except (OSError, ValueError):
            return {}

    def discard_interrupted(self) -> None:
        """Removes what a save or a removal left that was killed half-way. Not for a workdir that a run is using."""
        if jax.process_index() != 0:
            return
        if step := self._unfinished():
            self._say(f"the save of step {step} was interrupted; it is discarded")
        self._discard_unfinished()
        for name in files.names(self._folder):
            if name.endswith(_REMOVED):
                self._remove(name.removesuffix(_REMOVED))

    def set_aside_after(self, step: int) -> None:
        """Renames the damaged checkpoints beyond `step`, the newest whole one, out of the way of those to be written."""
        for damaged in [other for other in self.steps() if other > step] if jax.process_index() == 0 else []:
            self._say(f"checkpoint {damaged} is kept as {damaged}{_DAMAGED} until step {damaged} is saved again")
            files.remove_tree(self._path(damaged) + _DAMAGED)
            files.rename_folder(self._path(damaged), self._path(damaged) + _DAMAGED)

    # ---- saving

    def check_space(self, n_bytes: int) -> None:
        """Refuses a disk on which the checkpoints to be kept, and the one that is being written, find no room.

        Args:
          n_bytes: of the arrays of one checkpoint.

        Raises:
          UserError: says how much is needed and how much is free. Periodic ones are not counted: their number grows.
        """
        free = files.free_bytes(self._folder)
        kept = self._keep_last + self._keep_best + 1
        missing = max(1, kept - len(self.steps())) * n_bytes
        if free is not None and free < missing:
            raise UserError(
                f"{self._folder}: a checkpoint takes {_size(n_bytes)}, and checkpoint.keep_last + checkpoint.keep_best + 1 = "
                f"{kept} of them need {_size(missing)} more, but {_size(free)} are free; free some, keep fewer, or choose "
                "another --workdir"
            )

    def save(self, step: int, state, val_loss: float | None = None) -> float:
        """Starts saving `state` as `step`; the devices' copy is taken before this returns, the files are written behind.

        Args:
          step: greater than every step saved before.
          state: a tree of arrays.
          val_loss: finite validation loss at this step, if it is known.

        Returns:
          Seconds for which the caller was held up.

        Raises:
          SaveError: this save or the one before failed.
        """
        start = time.monotonic()
        self.wait()
        try:
            self._begin(step, state)
        except (OSError, ValueError) as error:
            raise self._failed(step, state_bytes(state), error) from None
        arrays = {_name(path): [list(x.shape), str(x.dtype)] for path, x in jax.tree_util.tree_leaves_with_path(state)}
        n_bytes = state_bytes(state)
        self._thread = threading.Thread(target=self._finish, args=(step, n_bytes, arrays, val_loss), name="checkpoint")
        self._thread.start()
        return time.monotonic() - start

    def _begin(self, step: int, state) -> None:
        if jax.process_index() == 0:
            files.make_folder(self._folder)
            files.write(self._marker, str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint folder")
        if self._manager is None:
            _ignore_late_writes()
            self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=None))
        chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), state)
        item = ocp.args.StandardSave(state, save_args=chunked)
        if not self._manager.save(step, args=ocp.args.Composite(**{_ITEM: item})):
            raise RuntimeError(f"orbax did not save step {step}; it has {self._manager.all_steps()}")

    def _finish(self, step: int, n_bytes: int, arrays: dict, val_loss: float | None) -> None:
        """In the background: waits for the files, writes their checksums, removes checkpoints that are not to be kept."""
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                folder = self._path(step)
                listed = {
                    name: [size, files.sha256(os.path.join(folder, name))] for name, size in files.sizes(folder).items()
                }
                record = {"step": step, "val_loss": val_loss, "arrays": arrays, "files": listed}
                files.write_json(os.path.join(folder, _CHECKSUMS), record | {"sha256": _digest(record)})
                files.remove(self._marker)
                self._prune()
            self.saved_step = step
        except (OSError, ValueError) as error:  # ValueError: TensorStore's form of a full disk
            self._error = self._failed(step, n_bytes, error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the training loop
            self._error = error

    def _failed(self, step: int, n_bytes: int, error: Exception) -> Exception:
        """Removes what a failed save has written, and says in one line why it failed."""
        if not _is_outside(error):
            return error
        with contextlib.suppress(Exception):
            self._manager.close()  # it would raise the same error at the next save
        self._manager = None
        if jax.process_index() == 0:
            self._discard_unfinished()
        why = " ".join(str(error).split())
        if _is_full(error):
            free = files.free_bytes(self._folder)
            missing = f", {_size(n_bytes - free)} too few" if free < n_bytes else ""
            why = f"the disk is full: the checkpoint takes {_size(n_bytes)}, and {_size(free)} are free without it{missing}"
        last = max(self.steps(), default=None)
        whole = "there is no older one" if last is None else f"the last good one is {last}"
        return SaveError(f"the checkpoint of step {step} could not be saved in {self._folder}: {why}; {whole}")

    def _prune(self) -> None:
        losses = {}
        for step in self.steps():
            try:
                losses[step] = self._read(step)["val_loss"]
            except (OSError, ValueError):
                continue  # damaged: not ours to delete, and not counted among those kept
        whole = list(losses)
        best = sorted((step for step in whole if losses[step] is not None), key=lambda step: losses[step])
        keep = set(whole[-self._keep_last :]) | set(best[: self._keep_best])
        keep |= {step for step in whole if self._keep_period and step % self._keep_period == 0}
        for step in whole:
            if step not in keep:
                self._remove(str(step))
        for name in files.names(self._folder):
            if name.endswith(_DAMAGED) and name.removesuffix(_DAMAGED) in map(str, whole):
                files.remove_tree(os.path.join(self._folder, name))

    def _remove(self, name: str) -> None:
        """Removes a step; one that is killed half-way is seen as removed, not as damaged, and finished later."""
        path = os.path.join(self._folder, name)
        files.write(path + _REMOVED, b"")
        if _STEP.fullmatch(name):
            files.remove_tree(path)
        files.remove(path + _REMOVED)

    def idle(self) -> bool:
        """Whether nothing is being saved."""
        return self._thread is None or not self._thread.is_alive()

    def poll(self) -> bool:
        """Whether a save is under way or has ended since the last call; raises what went wrong with it, waits for nothing."""
        saving = self._thread is not None
        if self.idle():
            self.wait()
        return saving

    def wait(self) -> None:
        """Returns when the last save is whole, and raises what went wrong with it: SaveError, or a mistake in here."""
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
          UserError: the checkpoint lacks an array of the layout, or has it in another shape or dtype, or it was not
            written by `save`.
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
        try:
            with ocp.CheckpointManager(self._folder) as manager:  # a fresh one: a manager is bound to how it saved
                return manager.restore(step, args=ocp.args.Composite(**{_ITEM: item}))[_ITEM]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"checkpoint {step} in {self._folder} cannot be read, though it is what was written: "
                f"{type(error).__name__}: {why}"
            ) from error

    # ---- files

    def _path(self, step: int | str) -> str:
        return os.path.join(self._folder, str(step))

    def _read(self, step: int) -> dict:
        """The checksums of a step. Raises OSError, and ValueError for what a save does not write."""
        path = os.path.join(self._path(step), _CHECKSUMS)
        try:
            record = files.read_json(path)
            own = record.pop("sha256")
            listed, arrays, loss = record["files"], record["arrays"], record["val_loss"]
            good = all(type(size) is int and isinstance(digest, str) for size, digest in listed.values())
            good &= isinstance(arrays, dict) and (loss is None or (type(loss) is float and math.isfinite(loss)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from None
        if not good:
            raise ValueError(f"{path} cannot be read: a size, a checksum or the loss is of the wrong type")
        if own != _digest(record) or record["step"] != step:
            raise ValueError(f"{path} has changed since it was written (checksum)")
        return record

    def _unfinished(self) -> str | None:
        """The step whose save has begun and not ended."""
        try:
            with files.open_file(self._marker) as file:
                step = file.read(32).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None
        whole = not _STEP.fullmatch(step) or files.exists(os.path.join(self._path(step), _CHECKSUMS))
        return None if whole else step

    def _discard_unfinished(self) -> None:
        if step := self._unfinished():
            files.remove_tree(self._path(step))
        for name in files.names(self._folder):
            if "orbax-checkpoint-tmp" in name:
                files.remove_tree(os.path.join(self._folder, name))
        files.remove(self._marker)


def state_bytes(state) -> int:
    """Bytes of the arrays of a state or of its layout, which is what a checkpoint takes at most."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@functools.cache
def _ignore_late_writes() -> None:
    """Keeps the log of a failed save to one line: TensorStore's other writes end after orbax has given up, each with a traceback."""
    previous = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook


def _is_outside(error: Exception) -> bool:
    """Whether an error came from the disk or the store, rather than from a mistake in a program."""
    return isinstance(error, OSError) or "os_error_code=" in str(error) or "RESOURCE_EXHAUSTED" in str(error)


def _is_full(error: Exception) -> bool:
    """Whether a disk, or a user's share of it, is full; TensorStore tells it in words."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"os_error_code='{code}'" in str(error) for code in full)


def _digest(record: dict) -> str:
    """Of the checksums' own file, without this."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _size(n_bytes: int) -> str:
    """12.3 MB."""
    unit, name = next(
        (u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if n_bytes >= u or u == 1
    )
    return f"{n_bytes / unit:.1f} {name}" if unit > 1 else f"{n_bytes} {name}"


def _name(path) -> str:
    """`params/wte/embedding` for a path in a tree."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
