"""What all commands share: flags and `--config`, exit status, and the start-up of JAX.

This module imports no JAX; `start` does.
"""

import contextlib
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from trialgpt_jax import UserError, console
from trialgpt_jax.config import default_config, enable_x64, fields, load_snapshot, unknown_field, update, validate
from trialgpt_jax.schema import INT32_MAX
from trialgpt_jax.storage import files

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved on request, the same command continues


def run(main: Callable[[list[str]], int | None]) -> None:
    """Calls `main(sys.argv)` and exits with its status.

    0 = done, 2 = the user's mistake or a fault outside the program, 75 = stopped on request after saving, 130 =
    interrupted by Ctrl-C, 141 = the reader of stdout has closed it, 1 = anything else.
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
        console.say_always(f"error: {error}")
        status = EXIT_USER_ERROR
    except console.OutputError as error:
        if error.line:
            console.say_always(error.line)
        status = error.status
    except KeyboardInterrupt:
        console.say_always("interrupted")
        status = console.EXIT_INTERRUPTED
    with contextlib.suppress(console.OutputError):
        sys.stdout.flush()  # what is left; Python's own flush at exit would turn a failure into status 120
    sys.exit(status)


@contextlib.contextmanager
def start(
    flags: absl_flags.FlagValues, config: ConfigDict, check: bool = True, reuse_memory: bool = False
) -> Iterator[None]:
    """The start-up of the commands that use JAX: process-wide settings, then the other processes of the job.

    Args:
      flags: of the command; with `processes.FLAGS`, unless the command always runs as a single process.
      config: the resolved config.
      check: refuse an invalid config, before JAX is imported.
      reuse_memory: on CPU, keep freed memory in the process, see `parallel.host_memory`.

    Raises:
      UserError: an invalid config, or flags that do not describe a job.
    """
    if check:
        validate(config)
    import jax  # late: slow to import, and not needed to refuse a wrong config

    from trialgpt_jax.parallel import accelerators, processes
    from trialgpt_jax.parallel.host_memory import MEMORY
    from trialgpt_jax.training import checkpoint

    accelerators.use_compilation_cache()
    checkpoint.report_libraries()
    enable_x64(config)
    if jax.config.jax_platforms == "cpu":
        # With asynchronous dispatch the temporaries of step k are often allocated before those of step k-1 are freed.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        if reuse_memory:
            MEMORY.reuse()
    with contextlib.ExitStack() as stack:
        if "process_id" in flags:
            stack.enter_context(processes.join(flags))
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


def parse(
    argv: list[str], doc: str, options: Mapping[str, tuple], new_workdir: bool = False
) -> tuple[absl_flags.FlagValues, ConfigDict]:
    """Parses `argv` into the command's own flags and the config.

    The config comes from `--config=FILE` if given, otherwise from the snapshot in `--workdir`; every `--config.x.y=v`
    overrides a field of it. In `--config=FILE:ARGUMENT` the argument is passed to the file's `get_config`.

    Args:
      argv: the arguments, preceded by the program's name.
      doc: what `--help` prints.
      options: flag name -> (default, help); the flag has the type of its default, None = a string.
      new_workdir: the command creates the workdir, so the config starts from the defaults instead of a snapshot.

    Raises:
      UserError: an unknown flag or field, a value of the wrong type, neither --config nor a workdir.
    """
    values = absl_flags.FlagValues()
    integer = functools.partial(absl_flags.DEFINE_integer, lower_bound=-INT32_MAX, upper_bound=INT32_MAX)
    define = {bool: absl_flags.DEFINE_boolean, int: integer, float: absl_flags.DEFINE_float}
    for name, (default, text) in options.items():
        define.get(type(default), absl_flags.DEFINE_string)(name, default, text, flag_values=values)
    absl_flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    known = fields(default_config())
    for argument in argv[1:]:
        if argument.startswith("--config."):
            name = argument[len("--config.") :].split("=")[0]
            if name not in known:
                raise unknown_field(name)
            if "=" not in argument and not isinstance(known[name], bool):
                raise UserError(f"config field `{name}` is given without a value; write --config.{name}=VALUE")
    own = [argument for argument in argv[1:] if not argument.startswith("--config")]
    try:
        left = values([argv[0], *own])
        if values.help:
            print(_help(doc, options, values))
            raise SystemExit(0)
        if len(left) > 1:
            raise UserError(f"`{left[1]}` is not a flag; flags start with --")
        if "workdir" in values and values.workdir:
            files.resolve(values.workdir)  # raises if the scheme of a URL is unknown or its library is not installed
        file = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
        config = _config_from_file(argv, file) if file else _config_from_snapshot(argv, values, new_workdir)
    except absl_flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    return values, config


def _help(doc: str, options: Mapping[str, tuple], values: absl_flags.FlagValues) -> str:
    lines = [f"{doc}\n\nflags:\n{values.main_module_help() or ''}"]
    lines += [f"  --{name}: {text} (default: {default})" for name, (default, text) in options.items()]
    return "\n".join([*lines, "  --config=FILE: a config file; --config.x.y=v overrides a field of it"])


def _config_from_file(argv: list[str], file: str) -> ConfigDict:
    path = file.split(":")[0]
    if not os.path.isfile(path):
        raise UserError(f"--config={file}: no such file; the configs that come with the project are in configs/")
    config_values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=config_values, sys_argv=argv)
    try:
        config_values([argv[0], *(a for a in argv[1:] if a.startswith("--config"))])
    except (AttributeError, KeyError) as error:  # the file assigns a field that does not exist
        message, trace = str(error.args[0] if error.args else error), traceback.format_exc()
        if field := re.search(r'Key "(\w+)" does not exist', message):
            message = str(unknown_field(field[1]))
    except absl_flags.IllegalFlagValueError as error:  # for a TypeError or ValueError in the file, with its traceback
        trace = str(error)
        if "Traceback" not in trace:
            raise
        message = trace.strip().splitlines()[-1]
    else:
        config = default_config()
        update(config, config_values.config.to_dict(), path)
        return config
    lines = re.findall(rf'{re.escape(os.path.basename(path))}", line (\d+)', trace)
    where = f"{path}:{lines[-1]}" if lines else f"--config={file}"
    raise UserError(f"{where}: {' '.join(message.split())}")


def _config_from_snapshot(argv: list[str], values: absl_flags.FlagValues, new_workdir: bool) -> ConfigDict:
    if "workdir" in values and not values.workdir and not new_workdir:
        raise UserError(
            "neither --config=FILE nor --workdir=FOLDER is given; "
            "the configs that come with the project are in configs/"
        )
    has_snapshot = "workdir" in values and not new_workdir  # preprocess has no workdir
    snapshot = load_snapshot(values.workdir) if has_snapshot else default_config()
    config_values = absl_flags.FlagValues()
    config_flags.DEFINE_config_dict("config", snapshot, flag_values=config_values, sys_argv=argv)
    config_values([argv[0], *(a for a in argv[1:] if a.startswith("--config"))])
    return config_values.config
