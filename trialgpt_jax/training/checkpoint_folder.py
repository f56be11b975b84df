"""The folder of a workdir's checkpoints, without orbax: which steps are whole, which are kept, what is removed.

Orbax restores a flipped bit as a wrong weight without an error, so every step also has a `checksums.json`, see
`storage.integrity`, which adds shape and dtype of every array and the validation loss. It is written last, when all
other files are synced to the disk. While a save is in progress its step is in `<workdir>/saving`, so a step without
checksums is either interrupted (it is in `saving`, and is discarded) or damaged. A file `<step>.removed` next to a step
means that the step is being removed. A process that reads a step holds a shared lock on its `checksums.json`, and a run
removes only steps without such a lock.
"""

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator

import jax

from trialgpt_jax import UserError
from trialgpt_jax.live_line import human_size, task
from trialgpt_jax.parallel import processes
from trialgpt_jax.storage import files, integrity, lock
from trialgpt_jax.training.workdir import checkpoints_path, saving_path

_REMOVED = ".removed"
_DAMAGED = ".damaged"
_STEP = re.compile(r"0|[1-9][0-9]*")


class CheckpointFolder:
    """The checkpoints of one workdir as files.

    Args:
      workdir: its folder `checkpoints/` holds one folder per step; a path or a URL, see `storage.files`.
      keep_last: newest checkpoints to keep; at least 1.
      keep_best: checkpoints to keep for the lowest validation loss.
      keep_period: steps that are a multiple of it are never removed; 0 = none.
      say: takes a line for the log.
    """

    def __init__(
        self,
        workdir: str,
        keep_last: int = 1,
        keep_best: int = 0,
        keep_period: int = 0,
        say: Callable[[str], None] = print,
    ):
        workdir = files.resolve(workdir)  # orbax accepts a relative path and fails in the background
        self._folder, self._marker = checkpoints_path(workdir), saving_path(workdir)
        self._keep_last, self._keep_best, self._keep_period, self._say = keep_last, keep_best, keep_period, say

    def steps(self) -> list[int]:
        """Steps that have a folder, whole or not, ascending; without those being saved or removed."""
        names, unfinished = files.names(self._folder), self._unfinished()
        return sorted(
            int(name) for name in names if _STEP.fullmatch(name) and name != unfinished and name + _REMOVED not in names
        )

    def problem(self, step: int) -> str | None:
        """What is wrong with the checkpoint of `step`, after reading every byte; None when it is whole."""
        try:
            listed = self._record(step)["files"]
            with task(f"checking checkpoint {step}", sum(n for n, _ in listed.values()), size=True) as shown:
                return integrity.first_difference(self._path(step), listed, shown.advance)
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())

    def best(self) -> int:
        """The step with the lowest validation loss; of equal ones the earliest.

        Raises:
          UserError: no checkpoint was saved with a validation loss.
        """
        if not (steps := _by_loss(self._losses())):
            raise UserError(f"{self._folder} has no checkpoint with a validation loss")
        return steps[0]

    def newest_whole(self) -> int | None:
        """The newest step whose checkpoint is whole; logs damaged newer ones. None when there are no checkpoints.

        Process 0 reads and decides for all.

        Raises:
          UserError: there are checkpoints, but none is whole.
        """
        with self.reading() as step:
            return step

    @contextlib.contextmanager
    def reading(self, step: int = -1) -> Iterator[int | None]:
        """A whole checkpoint that a run beside this process does not remove while the block reads it.

        In an object store there is no lock that could prevent the removal. Process 0 reads and decides for all.

        Args:
          step: -1 = the newest whole one; logs damaged newer ones.

        Yields:
          The step; None when there are no checkpoints.

        Raises:
          UserError: `step` does not exist or is damaged, or there are checkpoints but none is whole.
        """
        with contextlib.ExitStack() as held:
            yield processes.from_first(lambda: self._hold_newest(held) if step == -1 else self._hold(step, held))
            processes.meet()

    def _hold(self, step: int, held: contextlib.ExitStack) -> int:
        free = held.enter_context(lock.shared(integrity.record_path(self._path(step))))
        problem = self.problem(step)
        steps = [other for other in self.steps() if free or other != step]
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self._folder} has no checkpoint of step {step}; it has {have}")
        if problem:
            raise UserError(f"checkpoint {step} is damaged: {problem}")
        return step

    def _hold_newest(self, held: contextlib.ExitStack) -> int | None:
        damaged, again = [], True
        while True:
            candidates = [step for step in self.steps() if step not in damaged]
            if not candidates and again:
                again = False  # a listing may miss a step that was saved during it, and the one removed since
                continue
            if not candidates:
                break
            step = candidates[-1]
            with contextlib.ExitStack() as lock_of_step:
                free = lock_of_step.enter_context(lock.shared(integrity.record_path(self._path(step))))
                problem = self.problem(step) if free else "is being removed"
                if problem is None:
                    held.enter_context(lock_of_step.pop_all())
                    return step
            if not free:
                time.sleep(0.01)
            elif step in self.steps():  # otherwise a run has removed it meanwhile
                damaged.append(step)
                self._say(f"checkpoint {step} is damaged: {problem}")
        if damaged:
            raise UserError(
                f"{self._folder}: none of the checkpoints ({', '.join(map(str, sorted(damaged)))}) is whole; restore "
                "one from a backup, or train into another workdir"
            )
        return None

    def last_good(self) -> str:
        """Words for the newest whole checkpoint of a run that ends with an error; reads every byte of it."""
        whole = next((step for step in reversed(self.steps()) if self.problem(step) is None), None)
        return "there is no good checkpoint" if whole is None else f"the last good checkpoint is {whole}"

    def check(self, step: int) -> None:
        """Raises UserError unless the checkpoint of `step` is whole; process 0 reads and decides for all."""
        with self.reading(step):
            pass

    def has(self, step: int, prefix: str) -> bool:
        """Whether any array of `step` has a name with this prefix; False if its checksums cannot be read."""
        return any(name.startswith(prefix) for name in self._arrays(step))

    def params_only(self, step: int) -> bool:
        """Whether `step` holds parameters without optimizer state: converted ones, not yet trained here."""
        names = self._arrays(step)
        return bool(names) and all(name.startswith("params/") for name in names)

    def _arrays(self, step: int) -> dict:
        try:
            return self._record(step)["arrays"]
        except (OSError, ValueError):
            return {}

    def check_before_saving(self, n_bytes: int, most: float = math.inf) -> None:
        """Refuses a folder in which orbax cannot save, and a disk without space for the checkpoints to be kept.

        Args:
          n_bytes: of the arrays of one checkpoint.
          most: checkpoints that the run saves in all.

        Raises:
          UserError: names the characters in the path, or says how much space is needed and how much is free.
            Checkpoints of `keep_period` are not counted.
        """
        # orbax merges the files of the processes by a glob pattern that contains the path without escaping it
        if found := sorted(set(self._folder) & set("*?[]")):
            raise UserError(
                f"{self._folder}: checkpoints cannot be saved below a path with {' '.join(found)}; choose another "
                "--workdir"
            )
        try:
            self._folder.encode()
        except UnicodeEncodeError:  # tensorstore takes paths as UTF-8
            raise UserError(
                f"{self._folder}: checkpoints cannot be saved below a path that is not UTF-8; choose another --workdir"
            ) from None
        free = files.free_bytes(self._folder)
        kept = self._keep_last + self._keep_best + 1
        number = f"checkpoint.keep_last + checkpoint.keep_best + 1 = {kept}"
        if most < kept:
            kept, number = most, f"all {most}"
        missing = max(1, kept - len(self.steps())) * n_bytes
        if free is not None and free < missing:
            raise UserError(
                f"{self._folder}: a checkpoint takes {human_size(n_bytes)}, and {number} of them need "
                f"{human_size(missing)} more, but {human_size(free)} are free; free some, keep fewer, or choose "
                "another --workdir"
            )

    def discard_interrupted(self) -> None:
        """Removes what a killed run left in its workdir: an interrupted save or removal, unfinished files. Not for a
        workdir that another run is using."""
        if jax.process_index() != 0:
            return
        if step := self._unfinished():
            self._say(f"the save of step {step} was interrupted; it is discarded")
        self._discard_unfinished()
        self._finish_removals()
        for folder in (os.path.dirname(self._folder), self._folder):
            files.remove_parts(folder)

    def set_aside_after(self, step: int) -> None:
        """Renames the damaged checkpoints newer than `step`, so that those steps can be saved again."""
        for damaged in [other for other in self.steps() if other > step] if jax.process_index() == 0 else []:
            self._say(f"checkpoint {damaged} is kept as {damaged}{_DAMAGED} until step {damaged} is saved again")
            files.remove_tree(self._path(damaged) + _DAMAGED)
            files.rename_folder(self._path(damaged), self._path(damaged) + _DAMAGED)

    # ---- for `Checkpoints`, which writes the arrays

    def _path(self, step: int | str) -> str:
        return os.path.join(self._folder, str(step))

    def _record(self, step: int) -> dict:
        """The checksums of a step: `step`, `val_loss`, `arrays`, `files`. Raises ValueError if they are damaged."""
        record, path = integrity.read_record(self._path(step)), integrity.record_path(self._path(step))
        loss = record.get("val_loss", math.nan)
        if not isinstance(record.get("arrays"), dict) or not (
            loss is None or (type(loss) is float and math.isfinite(loss))
        ):
            raise ValueError(f"{path} cannot be read: the arrays or the loss are missing or of the wrong type")
        if record.get("step") != step:
            raise ValueError(f"{path} is of step {record.get('step')}")
        return record

    def _losses(self) -> dict[int, float | None]:
        """Step -> validation loss, None if it is not known; without steps whose record is damaged."""
        losses = {}
        for step in self.steps():
            with contextlib.suppress(OSError, ValueError):
                losses[step] = self._record(step)["val_loss"]
        return losses

    def _mark_unfinished(self, step: int) -> None:
        files.make_folder(self._folder)
        files.write(self._marker, str(step))

    def _mark_finished(self, step: int, val_loss: float | None, arrays: dict) -> None:
        """Ends the save of a step, all files of which are durable."""
        integrity.write_record(self._path(step), {"step": step, "val_loss": val_loss, "arrays": arrays})
        files.remove(self._marker)

    def _unfinished(self) -> str | None:
        """The step whose save has begun and not ended."""
        try:
            with files.open_file(self._marker) as file:
                step = file.read(32).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None
        whole = not _STEP.fullmatch(step) or files.exists(integrity.record_path(self._path(step)))
        return None if whole else step

    def _discard_unfinished(self) -> None:
        if step := self._unfinished():
            files.remove_tree(self._path(step))
        for name in files.names(self._folder):
            if "orbax-checkpoint-tmp" in name:
                files.remove_tree(self._path(name))
        files.remove(self._marker)

    def _prune(self) -> None:
        """Removes the checkpoints that are not to be kept, and damaged ones whose step has been saved again."""
        losses = self._losses()  # a damaged one is neither removed nor counted
        whole = list(losses)
        keep = set(whole[-self._keep_last :]) | set(_by_loss(losses)[: self._keep_best])
        keep |= {step for step in whole if self._keep_period and step % self._keep_period == 0}
        self._finish_removals()
        for step in whole:
            if step not in keep:
                self._remove(str(step))
        for name in files.names(self._folder):
            if name.endswith(_DAMAGED) and name.removesuffix(_DAMAGED) in map(str, whole):
                with self._removing(name):
                    files.remove_tree(self._path(name))

    def _finish_removals(self) -> None:
        """Continues the removals that were interrupted."""
        for name in files.names(self._folder):
            if name.endswith(_REMOVED):
                self._remove(name.removesuffix(_REMOVED))

    def _remove(self, name: str) -> None:
        """Removes a step that no other process reads. If this is interrupted, the step counts as removed, not as
        damaged, and is removed later."""
        path = self._path(name)
        with self._removing(name), lock.unshared(integrity.record_path(path)) as free:
            if not free:
                return  # the removal after the next save tries again
            files.write(path + _REMOVED, b"")
            if _STEP.fullmatch(name):
                files.remove_tree(path)
            files.remove(path + _REMOVED)

    @contextlib.contextmanager
    def _removing(self, name: str) -> Iterator[None]:
        """Turns an error of a removal into a warning, because the save before it has succeeded."""
        try:
            yield
        except OSError as error:
            self._say(f"warning: {self._path(name)} cannot be removed: {error.strerror or error}")


def _by_loss(losses: dict[int, float | None]) -> list[int]:
    """The steps that have a loss, lowest first."""
    return sorted((step for step, loss in losses.items() if loss is not None), key=lambda step: losses[step])
