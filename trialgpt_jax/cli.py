"""Shared by all commands: flags and `--config`, exit status, and the start-up of JAX.

This module imports no JAX; `start` does.
"""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping

from absl import flags as absl_flags
from ml_collections import ConfigDict

from trialgpt_jax import UserError, arguments, config_file, console, faults, help_text
from trialgpt_jax.config import default_config, fields, load_snapshot, set_field, set_precision, validate
from trialgpt_jax.schema import INT32_MAX
from trialgpt_jax.storage import files
from trialgpt_jax.training import horizon

# The flag of the commands that read a checkpoint, see `checkpoint_step`.
CHECKPOINT_STEP = ("-1", "which checkpoint; -1 = the newest whole one, best = the one with the lowest validation loss")
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved on request, the same command continues


def run(main: Callable[[list[str]], int | None]) -> None:
    """Calls `main(sys.argv)` and exits with its status.

    0 = done, 2 = the user's mistake or a fault outside the program, 75 = stopped on request after saving, 130 =
    interrupted by Ctrl-C, 141 = the reader of stdout has closed it, 1 = anything else. A job of several processes also
    ends with 76 = another process was lost (`processes.EXIT_PEER_LOST`).
    """
    console.guard()
    try:
        with console.interrupts():
            try:
                status = main(sys.argv) or 0
            except SystemExit as end:  # --help
                status = end.code
            sys.stdout.flush()
    except UserError as error:
        console.say_always(f"error: {console.one_line(str(error))}")
        status = EXIT_USER_ERROR
    except console.OutputError as error:
        if error.line:
            console.say_always(error.line)
        status = error.status
    except KeyboardInterrupt:
        console.say_always("interrupted")
        status = console.EXIT_INTERRUPTED
    except FloatingPointError as error:  # the run has diverged
        console.say_always(f"error: {error}")
        status = 1
    except Exception as error:
        line = faults.explain(error)
        if line is None:
            raise
        console.say_always(f"error: {console.one_line(line)}")
        status = EXIT_USER_ERROR
    with contextlib.suppress(console.OutputError):
        sys.stdout.flush()  # what is left; Python's own flush at exit would turn a failure into status 120
    sys.exit(status)


@contextlib.contextmanager
def start(
    flags: absl_flags.FlagValues | Mapping, config: ConfigDict, check: bool = True, reuse_memory: bool = False
) -> Iterator[None]:
    """The start-up of the commands that use JAX: process-wide settings, then the other processes of the job.

    Args:
      flags: of the command; with `processes.FLAGS`, unless the command always runs as a single process. The Python API
        has none.
      config: the resolved config.
      check: refuse an invalid config, before JAX is imported.
      reuse_memory: on CPU, keep freed memory in the process, see `parallel.host_memory`.

    Raises:
      UserError: an invalid config, or flags that do not describe a job.
    """
    if check:
        validate(config)
    import jax  # late: slow to import, and not needed to refuse a wrong config

    from trialgpt_jax.parallel import environment, processes
    from trialgpt_jax.parallel.host_memory import MEMORY
    from trialgpt_jax.training import checkpoint

    environment.check_xla_flags()
    environment.use_compilation_cache()
    checkpoint.report_libraries()
    set_precision(config)
    if jax.config.jax_platforms == "cpu":
        # With asynchronous dispatch the temporaries of step k are often allocated before those of step k-1 are freed.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        if reuse_memory:
            MEMORY.reuse()
    with contextlib.ExitStack() as stack:
        if "process_id" in flags:
            stack.enter_context(processes.join(flags))
        environment.check_devices()
        workdir = getattr(flags, "workdir", None) or "a file"
        stack.enter_context(files.storage_faults(workdir, then="run the same command again"))
        yield


def require_workdir(flags: absl_flags.FlagValues, what: str = "the folder of a run") -> str:
    """`--workdir`.

    Raises:
      UserError: the flag is missing; the message says `what` it names.
    """
    if not flags.workdir:
        raise UserError(f"--workdir=FOLDER is missing: {what}")
    return flags.workdir


def checkpoint_step(flags: absl_flags.FlagValues, name: str = "checkpoint_step") -> int | str:
    """The value of a flag like CHECKPOINT_STEP, as `training.start.load_params` takes it.

    Raises:
      UserError: neither a step, nor -1, nor best.
    """
    text = flags[name].value
    if text == "best" or re.fullmatch(r"-1|[0-9]{1,10}", text):
        return text if text == "best" else int(text)
    raise UserError(f"--{name}={text} is neither a step, nor -1 (the newest), nor best")


def at_most(flags: absl_flags.FlagValues, **limits: int) -> None:
    """Refuses a flag above its limit, before memory is taken for it."""
    for name, most in limits.items():
        if flags[name].value > most:
            raise UserError(f"--{name}={flags[name].value} is more than {most}, the most that is possible")


def parse(
    argv: list[str],
    doc: str,
    options: Mapping[str, tuple],
    new_workdir: bool = False,
    paths: list[str] | None = None,
) -> tuple[absl_flags.FlagValues, ConfigDict]:
    """Parses `argv` into the command's own flags and the config; `~` in paths is the home folder.

    The config comes from `--config=FILE` if given, otherwise from the snapshot in `--workdir`; every `--config.x.y=v`
    overrides a field of it, and one that gives the length of the run or its warmup also the others that do, see
    `horizon.replace`. In `--config=FILE:ARGUMENT` the argument is passed to the file's `get_config`.

    Args:
      argv: the arguments, preceded by the program's name.
      doc: of the command, for `--help`.
      options: flag name -> (default, help); the flag has the type of its default, None = a string; one
        whose default is a tuple may be given more than once.
      new_workdir: the command creates the workdir, so the config starts from the defaults instead of a snapshot.
      paths: gets the arguments that are not flags, of a command that takes paths and no config.

    Raises:
      UserError: an unknown flag or field, a value of the wrong type, neither --config nor a workdir.
    """
    flags = absl_flags.FlagValues()
    integer = functools.partial(absl_flags.DEFINE_integer, lower_bound=-INT32_MAX, upper_bound=INT32_MAX)
    define = {bool: absl_flags.DEFINE_boolean, int: integer, float: absl_flags.DEFINE_float}
    define[tuple] = absl_flags.DEFINE_multi_string
    for name, (default, text) in options.items():
        define.get(type(default), absl_flags.DEFINE_string)(name, default, text, flag_values=flags)
    given = arguments.sort(argv[1:], {name: default for name, (default, _) in options.items()}, paths is not None)
    if paths is not None:
        paths += given.paths
        if given.file or given.values:
            raise UserError("this command has no config; leave out --config")
    try:
        flags([argv[0], *given.own])
    except absl_flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if given.help == "flags":
        print(help_text.flags(doc, options, has_config=paths is None))
        raise SystemExit(0)
    workdir = flags.workdir if "workdir" in flags else None  # preprocess has none
    if workdir:
        files.resolve(workdir)  # raises if the scheme of a URL is unknown or its library is not installed
        if os.path.exists(workdir) and not os.path.isdir(workdir):
            raise UserError(f"--workdir={workdir} is a file, not a folder")
    if given.file:
        config = config_file.load(given.file)
    elif "workdir" not in flags or new_workdir or (given.help and not workdir):
        config = default_config()
    elif workdir:
        config = load_snapshot(workdir)
    else:
        raise UserError(
            "--workdir=FOLDER is missing; a new run of `train` needs --config=FILE as well, such as --config=quickstart"
        )
    for name, value in fields(config).items():
        own_file = arguments.expand(value, f"config field `{name}`", name)
        set_field(config, name, given.values.get(name, own_file))
    horizon.replace(config, given.values)
    if given.help:
        print(help_text.config(fields(config)))
        raise SystemExit(0)
    return flags, config


def given_fields(argv: list[str], options: Mapping[str, tuple]) -> frozenset[str]:
    """The config fields that the command line sets with `--config.x.y=v`, whatever their values; see `parse`."""
    return frozenset(arguments.sort(argv[1:], {name: default for name, (default, _) in options.items()}).values)
