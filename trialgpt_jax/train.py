"""Trains a GPT: `python -m trialgpt_jax.train --config=configs/quickstart.py --workdir=runs/quickstart`.

A workdir that has checkpoints is resumed, exactly, by the same command. SIGTERM or Ctrl-C saves and exits with status 75.
"""

import collections
import contextlib
import errno
import math
import os
import time
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from trialgpt_jax import UserError, files, pretrained
from trialgpt_jax import config as config_lib
from trialgpt_jax.data.batches import eval_batches, train_batches
from trialgpt_jax.data.token_store import TokenStore, open_store
from trialgpt_jax.model import hf
from trialgpt_jax.parallel import accelerators, processes
from trialgpt_jax.parallel.sharding import batch_sharding, local_blocks, make_mesh, put_batch, replicated
from trialgpt_jax.training import train_step as steps_lib
from trialgpt_jax.training.checkpoint import Checkpoints, SaveError, state_bytes
from trialgpt_jax.training.metrics import (
    MetricsLog,
    bits_per_byte,
    flops_per_token,
    parameter_count,
    progress_line,
    say,
)
from trialgpt_jax.training.optimizer import make_optimizer, schedule
from trialgpt_jax.training.spikes import Window
from trialgpt_jax.workdir import StopRequest, check_tokenizer, keep_tokenizer, locked, probe


def train(config: ConfigDict, workdir: str, allow_config_change: tuple[str, ...] = (), *, dry_run: bool = False) -> int:
    """Trains from the newest whole checkpoint of `workdir`, or from step 0, to `config.train.steps`.

    Args:
      config: see `config.default_config`.
      workdir: folder for config.json, metrics.jsonl, checkpoints/ and tensorboard/; made if it is not there.
      allow_config_change: fields that may differ from the ones the workdir's run was started with.
      dry_run: check everything, compile and read one batch, and leave the workdir as it was.

    Returns:
      The exit status: 0 when the last step is done and saved, 75 when stopped on request after saving.

    Raises:
      UserError: a config, token store or workdir that cannot be trained with, or a disk that is full.
    """
    try:
        return _train(config, workdir, allow_config_change, dry_run)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{error.filename or workdir} cannot be written, for the disk is full; free some space, and run the same "
            "command to go on from the newest checkpoint"
        ) from None


def _train(config: ConfigDict, workdir: str, allow_config_change: tuple[str, ...], dry_run: bool) -> int:
    config_lib.validate(config, jax.device_count())
    store = open_store(config.data.dir)
    config = config.copy_and_resolve_references()
    config.model.vocab_size = config.model.vocab_size or store.vocab_size
    if config.data.tokenizer != store.tokenizer:  # generation reads the tokenizer's name from the workdir's config
        say(
            f"data.tokenizer={config.data.tokenizer}, but {store.folder} was made with {store.tokenizer}, which is used"
        )
        config.data.tokenizer = store.tokenizer
    check_vocabulary(store, config)
    if config.checkpoint.on_error == "continue" and jax.process_count() > 1:
        raise UserError(
            "checkpoint.on_error=continue is for one process: of several, the others wait for the one that failed"
        )
    if dry_run:
        probe(workdir)
    with contextlib.nullcontext() if dry_run else locked(workdir), StopRequest() as stop:
        keep = config.checkpoint
        checkpoints = Checkpoints(workdir, keep.keep_last, keep.keep_best, keep.keep_period, say)
        if not dry_run:
            checkpoints.discard_interrupted()
        steps = processes.from_first(checkpoints.steps)
        # a workdir of `convert` has parameters alone: its run has yet to begin, and may be any run of that model
        converted = bool(steps) and processes.from_first(lambda: checkpoints.params_only(steps[-1]))
        if files.exists(os.path.join(workdir, "config.json")):
            snapshot = config_lib.load_snapshot(workdir)
            if converted:
                free = [name for name in config_lib.fields(config) if not name.startswith("model.")]
                config_lib.check_resumable(config, snapshot, (*free, "model.dropout", *allow_config_change))
            else:
                config_lib.validate(snapshot)  # a run's own was valid
                for change in config_lib.check_resumable(config, snapshot, allow_config_change):
                    say(change)
            check_tokenizer(store, workdir)
        step = None if converted else checkpoints.newest_whole()
        if step is not None and step >= config.train.steps:
            say(f"done: {workdir} has the checkpoint of step {step}; nothing to do")
            return 0
        init_from = workdir if converted else "" if steps else config.train.init_from
        if init_from:
            pretrained.check(init_from, config, store)
            if not hf.is_hf_folder(init_from):
                check_tokenizer(store, init_from)
        run = _Run(config, store, checkpoints, stop, step)
        if dry_run:
            begin = f"go on from checkpoint {step}" if step else "start at step 0"
            say(f"dry run: a batch of {next(run.batches).shape} ids is read, nothing is written; a run would {begin}")
            run.batches.close()
            return 0
        run.start(workdir, store, init_from)
        return run.loop()


class _Run:
    """The compiled step, the state and the data of one run, and the loop over them."""

    def __init__(self, config, store, checkpoints, stop, step):
        """Plans and compiles, and writes nothing; `step` is that of the checkpoint to go on from, None = none."""
        self.config, self.checkpoints, self.stop = config, checkpoints, stop
        train = config.train
        self.gpt = config_lib.gpt_config(config, jax.devices()[0].platform)
        self.mesh = make_mesh(config_lib.mesh_sizes(config.mesh, jax.device_count()))
        self.optimizer = make_optimizer(config.optim, train.steps)
        self.tokens_per_step = train.batch_size * self.gpt.block_size
        self.train_split, self.val_split = store.split("train"), store.split("val")
        self.eval_batch_size = train.batch_size // train.accumulate_steps
        self.resumed, self.first_step = step is not None, step or 0
        # The data first: a split without a window is refused now, and batches are made ready while the step is compiled.
        self.batches = train_batches(
            self.train_split,
            block_size=self.gpt.block_size,
            batch_size=train.batch_size,
            seed=config.seed,
            shuffle=config.data.shuffle,
            start_step=self.first_step,
            blocks=local_blocks(batch_sharding(self.mesh)),
        )
        if config.eval.every_steps:
            next(self._eval_batches())

        self.layout = layout = steps_lib.state_layout(self.gpt, self.optimizer, self.mesh, train.skip_spikes)
        checkpoints.check_space(state_bytes(layout))
        self.flops_per_token = flops_per_token(layout.params, self.gpt)
        device = jax.devices()[0]
        self.chip = accelerators.chip(device.device_kind)
        say(
            f"{jax.device_count()} x {device.device_kind}, mesh {dict(self.mesh.shape)}, {jax.process_count()} process(es)\n"
            f"{parameter_count(layout.params):,} parameters, {self.gpt.dtype} matmuls, attention kernel "
            f"{self.gpt.attention}, remat {self.gpt.remat}\n"
            f"{self.tokens_per_step:,} tokens per step, {train.steps * self.tokens_per_step:.3g} in all; "
            f"{self.train_split.n_tokens:,} in the training split\n"
            f"{self.flops_per_token:.3g} FLOPs per token"
            + ("" if self.chip else "; no MFU, for this chip's peak is not known")
        )
        start = time.monotonic()
        self.step = steps_lib.compile_train_step(
            self.gpt,
            self.optimizer,
            self.mesh,
            batch_size=train.batch_size,
            accumulate_steps=train.accumulate_steps,
            seed=config.seed,
            skip_spikes=train.skip_spikes,
            learning_rate=schedule(config.optim, train.steps, config.optim.learning_rate),
        )
        self.eval_step = None
        if config.eval.every_steps:
            self.eval_step = steps_lib.compile_eval_step(
                self.gpt, self.mesh, layout.params, batch_size=self.eval_batch_size
            )
        say(f"compiled in {time.monotonic() - start:.1f} s; {memory_plan(self.step, device)}")

    def start(self, workdir: str, store: TokenStore, init_from: str) -> None:
        """Makes or restores the state, and opens the workdir's files."""
        config = self.config
        if self.resumed:
            layout, window = self.layout, self.layout.window
            if window is not None and not self.checkpoints.has(self.first_step, "window/"):
                layout = layout.replace(window=None)  # train.skip_spikes is new here, and allowed to be
            self.state = self.checkpoints.restore(self.first_step, layout)
            if layout.window is not window:
                self.state = self.state.replace(window=jax.device_put(Window.empty(), replicated(self.mesh)))
            self.checkpoints.set_aside_after(self.first_step)
            say(f"resumed from checkpoint {self.first_step}")
        else:
            self.state = steps_lib.create_state(
                self.gpt, self.optimizer, config.seed, self.mesh, config.train.skip_spikes
            )
            if init_from:
                self.state = self.state.replace(params=pretrained.load(init_from, self.gpt, self.mesh))
        self.memory_limit = accelerators.leave_room(self.step)
        self.log = None
        if jax.process_index() == 0:
            self.log = MetricsLog(workdir, config.log, self.first_step, config)
            keep_tokenizer(store, workdir)
            config_lib.save_snapshot(config, workdir)

    def loop(self) -> int:
        """Runs the steps that are left. Step k is dispatched before the metrics of step k-1 are fetched.

        Not where a step runs in the thread that dispatches it: the time of step k would count as step k-1's.
        """
        config, n_steps = self.config, self.config.train.steps
        sharding = batch_sharding(self.mesh)
        self.seconds = self.log.last.get("seconds", 0.0) if self.log else 0.0  # training time since step 0
        self._unlogged_seconds, self._unlogged_steps = 0.0, 0
        started = saved_at = time.monotonic()
        saved_step = self.first_step
        if self.first_step == 0 and self.eval_step:
            self._evaluate(0)
        self._restart_clock(self.first_step)
        pending = collections.deque()  # (step, metrics) dispatched and not yet fetched
        ahead = int(accelerators.dispatches_ahead(jax.devices()[0].platform))
        tokens = put_batch(next(self.batches), sharding)
        stopped, by_the_clock = False, processes.Appointments()
        try:
            for step in range(self.first_step + 1, n_steps + 1):
                with self._save_may_fail():
                    if self.checkpoints.poll():
                        accelerators.return_freed_memory()
                self.state, metrics = self.step(self.state, tokens)
                if step < n_steps:
                    tokens = put_batch(next(self.batches), sharding)  # while the device computes
                pending.append((step, metrics))
                if len(pending) > ahead:
                    self._account(*pending.popleft())
                accelerators.return_freed_memory(self.memory_limit)

                elapsed = time.monotonic() - started
                minutes, every = (time.monotonic() - saved_at) / 60, config.checkpoint.every_minutes
                time_to_save = bool(every) and by_the_clock.due(step, minutes >= every)
                stopped = step < n_steps and self.stop.requested(step, elapsed, config.train.max_seconds)
                evaluate = self.eval_step and (step % config.eval.every_steps == 0 or step == n_steps)
                save = (
                    step == n_steps
                    or stopped
                    or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0)
                    or time_to_save
                )
                if evaluate or save:
                    while pending:
                        self._account(*pending.popleft())
                    accelerators.return_freed_memory()
                    val_loss = self._evaluate(step) if evaluate else None
                    if save:
                        self._save(step, val_loss, last=stopped or step == n_steps)
                        saved_at, saved_step = time.monotonic(), step
                    self._restart_clock(step)
                if stopped:
                    break
            self.checkpoints.wait()
        except SaveError as error:
            raise UserError(str(error)) from None
        finally:
            self.batches.close()
            with contextlib.suppress(SaveError):  # something else ended the loop, and is told
                self.checkpoints.wait()  # however it ends: a save that has begun becomes whole
            if self.log:
                self.log.close()
        if stopped:
            say(f"stopped after step {saved_step}, which is saved; run the same command to continue")
            return config_lib.EXIT_STOPPED
        say(f"done: step {n_steps}, {self.seconds:.1f} s of training")
        return 0

    def _restart_clock(self, step: int) -> None:
        """Time runs again after `step`, whose work is done; what lay before does not count as training."""
        self._timed_step, self._timed_at = step, time.monotonic()

    def _account(self, step: int, metrics: dict) -> None:
        """Waits until `step` is done, keeps the time, logs the step where that is due, stops a run that went bad."""
        values = jax.device_get(metrics)
        now = time.monotonic()
        skipped = int(values["skipped_in_a_row"])
        if skipped:
            loss, norm = float(values["loss"]), float(values["grad_norm"])
            spike = f"are a spike (train.skip_spikes={self.config.train.skip_spikes:g})"
            why = spike if math.isfinite(loss) and math.isfinite(norm) else "are not finite"
            say(
                f"step {step}: loss {loss:.4g} or gradients {norm:.4g} of batch {step - 1} {why}; the update is skipped"
            )
            if skipped >= self.config.train.max_skipped:
                raise FloatingPointError(
                    f"{skipped} steps in a row were skipped (train.max_skipped), up to step {step}; the last good "
                    "state is in the newest checkpoint. Lower the learning rate, or look at the batches"
                )
        self.seconds += now - self._timed_at
        self._unlogged_seconds += now - self._timed_at
        self._unlogged_steps += step - self._timed_step
        self._timed_step, self._timed_at = step, now
        if step % self.config.log.every_steps and step != self.config.train.steps:
            return
        step_seconds = self._unlogged_seconds / self._unlogged_steps
        self._unlogged_seconds, self._unlogged_steps = 0.0, 0
        rate = self.tokens_per_step / step_seconds
        line = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": _number(values["loss"]),
            "lr": float(values["lr"]),
            "grad_norm": _number(values["grad_norm"]),
            "tokens_per_second": rate,
            "seconds": self.seconds,
            "skipped": int(values["skipped"]),
        }
        if self.chip:
            line["mfu"] = rate * self.flops_per_token / (self.chip.peak_flops * jax.device_count())
        if self.log:
            self.log.write(line)
        say(progress_line(line | {"step_seconds": step_seconds}, self.config.train.steps))

    def _eval_batches(self) -> Iterator:
        return eval_batches(
            self.val_split,
            block_size=self.gpt.block_size,
            batch_size=self.eval_batch_size,
            n_batches=self.config.eval.batches * self.config.train.accumulate_steps,
            blocks=local_blocks(batch_sharding(self.mesh)),
        )

    def _evaluate(self, step: int) -> float | None:
        """Logs the validation loss at `step`; returns it where it is finite."""
        loss, n_tokens = steps_lib.evaluate(self.eval_step, self.state.params, self._eval_batches(), self.mesh)
        line = {"step": step, "tokens": step * self.tokens_per_step, "val_loss": _number(loss), "seconds": self.seconds}
        per_byte = bits_per_byte(loss, self.val_split.n_tokens, self.val_split.n_bytes)
        if per_byte is not None:
            line["val_bits_per_byte"] = _number(per_byte)
        if self.log:
            self.log.write(line)
        say(
            f"step {step}: validation loss {loss:.4f}"
            + (f", {per_byte:.4f} bits per byte" if per_byte is not None else "")
            + f" over {n_tokens:,} tokens"
        )
        return loss if math.isfinite(loss) else None

    def _save(self, step: int, val_loss: float | None, last: bool) -> None:
        with self._save_may_fail():
            self.checkpoints.wait()
        with self._save_may_fail(last):
            if self.log:
                self.log.sync()
            held_up = self.checkpoints.save(step, self.state, val_loss)
            say(f"step {step}: saving a checkpoint; it held training up for {held_up:.2f} s")

    @contextlib.contextmanager
    def _save_may_fail(self, last: bool = False) -> Iterator[None]:
        """Around what tells that a save has failed: training goes on where that is asked for, but never ends unsaved."""
        try:
            yield
        except (SaveError, OSError) as error:
            if last or self.config.checkpoint.on_error == "stop":
                raise
            say(f"{error}; training goes on (checkpoint.on_error=continue)")


def _number(value) -> float | None:
    """A float for JSON, which has no NaN and no infinity: None stands for them."""
    value = float(value)
    return value if math.isfinite(value) else None


def check_vocabulary(store: TokenStore, config: ConfigDict) -> None:
    """Refuses a token store with ids that the model does not have, and says when the model has more than it needs."""
    vocab_size = config.model.vocab_size
    if store.vocab_size > vocab_size:
        raise UserError(
            f"{store.folder}: tokenizer {store.tokenizer} has {store.vocab_size} ids, beyond model.vocab_size={vocab_size}; "
            f"set model.vocab_size={store.vocab_size}, or 0 for the store's"
        )
    if store.vocab_size < vocab_size:
        say(
            f"model.vocab_size={vocab_size}, but tokenizer {store.tokenizer} has only {store.vocab_size} ids; the rest idle"
        )


def memory_plan(compiled: jax.stages.Compiled, device: jax.Device) -> str:
    """The compiled program's memory per device against what the device has, and what to change if it does not fit."""
    plan = compiled.memory_analysis()
    state = plan.argument_size_in_bytes
    total = state + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    text = f"memory per device: {state / 2**30:.2f} GiB state and batch + {plan.temp_size_in_bytes / 2**30:.2f} GiB temporaries"
    has = accelerators.memory_bytes(device)
    if has is None:
        return text
    text += f" = {total / 2**30:.2f} of {has / 2**30:.1f} GiB"
    if total > has:
        text += "; THIS DOES NOT FIT: raise train.accumulate_steps, set train.remat=block, or split the state with mesh.fsdp"
    return text


FLAGS = {
    "workdir": (None, "folder of the run; one that has checkpoints is resumed"),
    "allow_config_change": ("", "comma-separated config fields in which a resumed run may differ"),
    "dry_run": (False, "check everything, compile, print the plan, read a batch; write nothing"),
} | processes.FLAGS


def main(argv: list[str]) -> int:
    flags, config = config_lib.parse_command_line(argv, __doc__, FLAGS)
    if not flags.workdir:
        raise UserError("--workdir=FOLDER is missing: where the run keeps its config, metrics and checkpoints")
    config_lib.validate(config)
    accelerators.use_compilation_cache()
    accelerators.keep_freed_memory()
    allowed = tuple(filter(None, flags.allow_config_change.split(",")))
    with processes.joined(flags):
        return train(config, flags.workdir, allowed, dry_run=flags.dry_run)


if __name__ == "__main__":
    config_lib.run(main)
