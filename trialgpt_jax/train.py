"""Trains a GPT: `python -m trialgpt_jax.train --config=configs/quickstart.py --workdir=runs/quickstart`.

The same command resumes a workdir that has checkpoints, exactly. SIGTERM or Ctrl-C saves and exits with status 75.
"""

import collections
import contextlib
import time
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from trialgpt_jax import UserError, cli
from trialgpt_jax import config as config_lib
from trialgpt_jax.console import say
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.parallel import accelerators, processes
from trialgpt_jax.parallel.sharding import batch_sharding, put_batch
from trialgpt_jax.storage import files, lock
from trialgpt_jax.training import plan
from trialgpt_jax.training import start as start_lib
from trialgpt_jax.training import workdir as workdir_lib
from trialgpt_jax.training.checkpoint import Checkpoints, SaveError, state_bytes
from trialgpt_jax.training.program import Program, resolve
from trialgpt_jax.training.reporter import Reporter
from trialgpt_jax.training.stop import StopRequest


def train(config: ConfigDict, workdir: str, allow_config_change: tuple[str, ...] = (), *, dry_run: bool = False) -> int:
    """Trains from the newest whole checkpoint of `workdir`, or from step 0, to `config.train.steps`.

    Args:
      config: see `config.default_config`.
      workdir: folder for config.json, metrics.jsonl, checkpoints/ and tensorboard/; created if it does not exist.
      allow_config_change: fields in which the config may differ from that of the workdir's run.
      dry_run: check everything, compile and read one batch, and leave the workdir unchanged.

    Returns:
      The exit status: 0 when the last step is done and saved, 75 when stopped on request after saving.

    Raises:
      UserError: a config, token store or workdir that cannot be used, or a full disk.
    """
    config_lib.validate(config, jax.device_count())
    config_lib.enable_x64(config)
    store = open_store(workdir_lib.find_data(config.data.dir, workdir))
    workdir_lib.check_tokenizer(store, workdir)
    config = resolve(config, store)
    if config.checkpoint.on_error == "continue" and jax.process_count() > 1:
        raise UserError("checkpoint.on_error=continue is for one process: others would wait for the one that failed")
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.storage_faults(workdir))
        if dry_run:
            lock.probe(workdir)
        else:
            stack.enter_context(lock.hold(workdir, take=jax.process_index() == 0))
        stop = stack.enter_context(StopRequest())

        # what the run starts from
        keep = config.checkpoint
        checkpoints = Checkpoints(workdir, keep.keep_last, keep.keep_best, keep.keep_period, say)
        if not dry_run:
            checkpoints.discard_interrupted()
        whole = checkpoints.newest_whole()
        converted = start_lib.is_converted(checkpoints, whole)
        if files.exists(workdir_lib.config_path(workdir)):
            snapshot = config_lib.load_snapshot(workdir)
            same = workdir_lib.check_data(store, workdir, allowed="data.dir" in allow_config_change)
            for change in config_lib.check_resumable(config, snapshot, allow_config_change, converted, same_data=same):
                say(change)
        start = start_lib.decide(config, workdir, store, whole, converted)
        first_step = start.step or 0
        if start.step is not None and first_step >= config.train.steps:
            say(f"done: {workdir} has the checkpoint of step {first_step}; nothing to do")
            return 0

        # The data are opened before anything is compiled: a split without a window is refused at once, and batches are
        # prefetched meanwhile.
        program = Program(config)
        plan.check_run(program)
        batches = program.train_batches(store.split("train"), first_step)
        if config.eval.every_steps:
            next(program.eval_batches(store.split("val"), config.eval.batches))
        checkpoints.check_before_saving(state_bytes(program.layout), plan.most_saves(config))
        say(plan.describe(program, store))
        say(plan.compile_steps(program, strict=dry_run))
        if dry_run:
            begin = f"go on from checkpoint {first_step}" if first_step else "start at step 0"
            say(f"dry run: {plan.measure(program, next(batches))}; nothing is written; a run would {begin}")
            batches.close()
            return 0

        state = start_lib.create_state(start, program, checkpoints)
        with contextlib.closing(Reporter(program, store.split("val"), workdir, first_step)) as reporter:
            if jax.process_index() == 0:
                workdir_lib.keep_tokenizer(store, workdir)
                workdir_lib.keep_data(store, workdir)
                workdir_lib.save_snapshot(config, workdir)
            return _loop(program, state, first_step, batches, checkpoints, stop, reporter)


def _loop(program, state, first_step, batches, checkpoints, stop, reporter) -> int:
    """Runs the steps after `first_step`; returns the exit status."""
    config, n_steps, sharding = program.config, program.config.train.steps, batch_sharding(program.mesh)
    started = saved_at = time.monotonic()
    if first_step == 0 and config.eval.every_steps:
        reporter.evaluate(0, state.params)
    reporter.restart_clock(first_step)
    stop.begin()
    pending = collections.deque()  # (step, metrics): dispatched, not fetched yet
    # Metrics are fetched one step late, so that the device never waits. On CPU a step runs synchronously.
    late = int(accelerators.dispatches_ahead(jax.devices()[0].platform))
    saved_step, stopped, save_by_clock = first_step, False, processes.AgreedStep()
    batch = put_batch(next(batches), sharding)
    try:
        for step in range(first_step + 1, n_steps + 1):
            with _save_errors(config):
                checkpoints.poll()

            # one optimizer step; the next batch is transferred while the device computes
            state, metrics = program.step(state, batch)
            if step < n_steps:
                batch = put_batch(next(batches), sharding)

            pending.append((step, metrics))
            if len(pending) > late:
                reporter.step(*pending.popleft())

            # once in a while: evaluate, save, stop
            now, last = time.monotonic(), step == n_steps
            minutes, every = config.checkpoint.every_minutes, config.checkpoint.every_steps
            clock = bool(minutes) and save_by_clock.due(step, now - saved_at >= 60 * minutes)
            stopped = not last and stop.requested(step, now - started, config.train.max_seconds)
            evaluate = config.eval.every_steps and (last or step % config.eval.every_steps == 0)
            save = last or stopped or clock or (every and step % every == 0)
            if evaluate or save:
                while pending:
                    reporter.step(*pending.popleft())
                val_loss = reporter.evaluate(step, state.params) if evaluate else None
                if save:
                    _save(checkpoints, step, state, val_loss, reporter, config, last=last or stopped)
                    saved_at, saved_step = time.monotonic(), step
                reporter.restart_clock(step)
            if stopped:
                break
        checkpoints.wait()
    except FloatingPointError as error:  # too many skipped steps, or a state that is not saved
        raise FloatingPointError(f"{error}; {checkpoints.last_good()}") from None
    finally:
        batches.close()
        checkpoints.settle()  # a save that has begun is completed
    if stopped:
        say(f"stopped after step {saved_step}, which is saved; run the same command to continue")
        return cli.EXIT_STOPPED
    say(f"done: step {n_steps}, {reporter.seconds:.1f} s of training")
    return 0


def _save(checkpoints, step, state, val_loss, reporter, config, last) -> None:
    with _save_errors(config):
        checkpoints.wait()
    with _save_errors(config, last):
        reporter.sync()
        blocked = checkpoints.save(step, state, val_loss)
        say(f"step {step}: saving a checkpoint; it held training up for {blocked:.2f} s")


@contextlib.contextmanager
def _save_errors(config: ConfigDict, last: bool = False) -> Iterator[None]:
    """Reports a failed save and goes on where the config says so; the `last` save must succeed."""
    try:
        yield
    except (SaveError, OSError) as error:
        if last or config.checkpoint.on_error == "stop":
            raise
        say(f"{error}; training goes on (checkpoint.on_error=continue)")


FLAGS = {
    "workdir": (None, "folder of the run; one that has checkpoints is resumed"),
    "allow_config_change": ("", "comma-separated config fields in which a resumed run may differ"),
    "dry_run": (False, "check everything, compile, print the plan, read a batch; write nothing"),
} | processes.FLAGS


def main(argv: list[str]) -> int:
    flags, config = cli.parse(argv, __doc__, FLAGS)
    workdir = cli.require_workdir(flags, "where the run keeps its config, metrics and checkpoints")
    with files.storage_faults(workdir):
        config = start_lib.adopt_model(config, workdir, cli.given_fields(argv, FLAGS))
    allowed = tuple(filter(None, flags.allow_config_change.split(",")))
    with cli.start(flags, config, reuse_memory=True):
        return train(config, workdir, allowed, dry_run=flags.dry_run)


if __name__ == "__main__":
    cli.run(main)
