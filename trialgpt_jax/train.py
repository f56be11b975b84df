"""Trains a GPT: `trialgpt train --config=quickstart --workdir=runs/quickstart`.

The same command resumes a workdir that has checkpoints, exactly. SIGTERM or Ctrl-C saves and exits with status 75.
"""

import contextlib
import sys

import jax
from ml_collections import ConfigDict

from trialgpt_jax import CallableModule, cli
from trialgpt_jax import config as config_lib
from trialgpt_jax.console import say
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.evaluation.in_loop import InLoop
from trialgpt_jax.parallel import processes
from trialgpt_jax.parallel.sharding import batch_sharding, put_batch
from trialgpt_jax.storage import files, lock
from trialgpt_jax.training import plan, summary
from trialgpt_jax.training import start as start_lib
from trialgpt_jax.training import workdir as workdir_lib
from trialgpt_jax.training.checkpoint import Checkpoints, state_bytes
from trialgpt_jax.training.log_file import LogFile
from trialgpt_jax.training.profile import Profiler
from trialgpt_jax.training.program import Program, resolve
from trialgpt_jax.training.reporter import Reporter
from trialgpt_jax.training.saver import Saver
from trialgpt_jax.training.stop import StopRequest
from trialgpt_jax.training.times import COMPILING, EVALUATING, RESTORING, SAVING, Times


def train(config: ConfigDict, workdir: str, allow_config_change: tuple[str, ...] = (), *, dry_run: bool = False) -> int:
    """Trains from the newest whole checkpoint of `workdir`, or from step 0, to `config.train.steps` or what gives it.

    Args:
      config: see `config.default_config`.
      workdir: folder for config.json, metrics.jsonl, samples.jsonl, checkpoints/, tensorboard/, log.txt, summary.md
        and curves.png; created if it does not exist.
      allow_config_change: fields in which the config may differ from that of the workdir's run.
      dry_run: check everything, compile and read one batch, and leave the workdir unchanged.

    Returns:
      The exit status: 0 when the last step is done and saved, 75 when stopped on request after saving.

    Raises:
      UserError: a config, token store or workdir that cannot be used, or a full disk.
    """
    config_lib.validate(config, jax.device_count())
    config_lib.set_precision(config)
    store = open_store(workdir_lib.find_data(config.data.dir, workdir))
    workdir_lib.check_tokenizer(store, workdir)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(LogFile(workdir, kept=jax.process_index() == 0))
        given, config = config, resolve(config, store)
        stack.enter_context(files.storage_faults(workdir))
        if dry_run:
            lock.probe(workdir)
        else:
            stack.enter_context(lock.hold(workdir, take=jax.process_index() == 0))
        stop = stack.enter_context(StopRequest(config.train.max_seconds))
        profiler = stack.enter_context(Profiler(workdir, config.log.profile))

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
            for change in config_lib.check_resumable(config, snapshot, allow_config_change, converted, same, given):
                say(change)
        start = start_lib.decide(config, workdir, store, whole, converted)
        first_step = start.step or 0
        in_loop = InLoop(config, workdir, start.step)
        if start.step is not None and first_step >= config.train.steps and not in_loop.due(first_step):
            say(f"done: {workdir} has the checkpoint of step {first_step}; nothing to do")
            return 0

        # Before compiling: a split without a window is refused at once, and batches are prefetched meanwhile.
        program = Program(config)
        plan.check_run(program)
        evaluations = in_loop.prepare(program, store)
        batches = program.train_batches(store.split("train"), first_step)
        if config.eval.every_steps:
            next(program.eval_batches(store.split("val"), config.eval.batches))
        checkpoints.check_before_saving(state_bytes(program.layout), plan.most_saves(config))
        if not dry_run:
            log.open()
        times = Times(workdir, first_step, kept=jax.process_index() == 0 and not dry_run)
        say(description := "\n".join(filter(None, (plan.describe(program, store), evaluations))))
        with times.of(COMPILING):
            say(plan.compile_steps(program, strict=dry_run))
        if dry_run:
            begin = f"go on from checkpoint {first_step}" if first_step else "start at step 0"
            say(f"dry run: {plan.measure(program, next(batches))}; nothing is written; a run would {begin}")
            batches.close()
            return 0

        with times.of(RESTORING):
            state = start_lib.create_state(start, program, checkpoints)
        differences, seconds = config_lib.differences(config), times.trained(first_step)
        stack.enter_context(summary.at_end(workdir, times, checkpoints, differences, config, description))
        with contextlib.closing(Reporter(program, store.split("val"), workdir, first_step, seconds)) as reporter:
            if jax.process_index() == 0:
                workdir_lib.keep_tokenizer(store, workdir)
                workdir_lib.keep_data(store, workdir)
                workdir_lib.save_snapshot(config, workdir)
            return _loop(program, state, first_step, batches, checkpoints, stop, reporter, in_loop, times, profiler)


def _loop(program, state, first_step, batches, checkpoints, stop, reporter, in_loop, times, profiler) -> int:
    """Runs the steps after `first_step`; returns the exit status."""
    config, n_steps, sharding = program.config, program.config.train.steps, batch_sharding(program.mesh)
    saver = Saver(checkpoints, reporter, config, first_step, times)
    stop.start_clock()
    times.note(first_step, reporter.seconds)
    with times.of(EVALUATING):
        if first_step == 0 and config.eval.every_steps:
            reporter.evaluate(0, state.params)
        step, stopped = first_step, not in_loop.run(first_step, state.params, reporter, stop)
    reporter.restart_clock(first_step)
    stop.begin(first_step)
    save_by_clock = processes.AgreedStep()
    batch = put_batch(next(batches), sharding)
    try:
        while step < n_steps and not stopped:
            step += 1
            saver.poll()

            # one optimizer step; the next batch is transferred while the device computes
            profiler.before(step)
            state, metrics = program.step(state, batch)
            if step < n_steps:
                batch = put_batch(next(batches), sharding)

            reporter.step(step, metrics)

            # once in a while: evaluate, save, stop
            last = step == n_steps
            minutes, every = config.checkpoint.every_minutes, config.checkpoint.every_steps
            clock = bool(minutes) and save_by_clock.due(step, saver.seconds >= 60 * minutes)
            stopped = not last and stop.requested(step)
            traced = profiler.ends(step, last=last or stopped)
            evaluate = config.eval.every_steps and (last or step % config.eval.every_steps == 0)
            save = last or stopped or clock or (every and step % every == 0)
            if evaluate or save or traced or in_loop.due(step):
                reporter.finish_steps()
                if traced:
                    profiler.finish()
                with times.of(EVALUATING):
                    val_loss = reporter.evaluate(step, state.params) if evaluate else None
                if save:
                    saver.save(step, state, val_loss, last=last or stopped)
                with times.of(EVALUATING):
                    finished = stopped or in_loop.run(step, state.params, reporter, stop)
                if not finished:  # a long one, cut short
                    stopped = True
                    saver.save(step, state, val_loss, last=True)
                times.note(step, reporter.seconds)
                reporter.restart_clock(step)
        with times.of(SAVING):
            checkpoints.wait()
    except FloatingPointError as error:  # too many skipped steps, or a state that is not saved
        raise FloatingPointError(f"{error}; {checkpoints.last_good()}") from None
    finally:
        batches.close()
        checkpoints.settle()  # a save that has begun is completed
        times.note(step, reporter.seconds)
    if stopped:
        where = f"after step {step}, which is saved" if step else "before step 1"
        say(f"stopped {where}; run the same command to continue")
        return cli.EXIT_STOPPED
    say(f"done: step {n_steps}, {reporter.seconds:.1f} s of training")
    return 0


sys.modules[__name__].__class__ = CallableModule  # trialgpt_jax.train(config, workdir)
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
