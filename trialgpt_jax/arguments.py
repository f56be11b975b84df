"""Sorts the arguments of a command: its own flags, `--config=FILE`, and `--config.x.y=v` for fields.

A flag is written with one dash or two, and its value after `=` or as the next argument.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trialgpt_jax import UserError, aliases, config_file
from trialgpt_jax.config import default_config, fields, unknown_field
from trialgpt_jax.schema import parse_value

_FLAG = re.compile(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_PATH_FIELDS = ("data.source_options.path", "train.init_from", "eval.core_bundle", "eval.include_path")
_PATH_FLAGS = ("workdir", "to_hf", "from_hf", "include_path", "core_bundle", "prompts", "out")


class Arguments(NamedTuple):
    """The arguments of a command.

    Attributes:
      own: flags of the command, each as `--name=value`.
      file: of `--config`; None if it is not given.
      values: config field -> its new value.
      help: what --help asks for, `flags` or `config`; None if it is not given.
      paths: arguments that are not flags, of a command that takes paths.
    """

    own: list[str]
    file: str | None
    values: dict[str, object]
    help: str | None
    paths: list[str]


def sort(arguments: Sequence[str], flags: Mapping[str, object], takes_paths: bool = False) -> Arguments:
    """Sorts the arguments of a command.

    Args:
      arguments: without the program's name.
      flags: name -> default of the command's own flags.
      takes_paths: arguments that are not flags are paths, instead of mistakes.

    Raises:
      UserError: an argument that is no flag or field of ours (the message says how to write it), a flag without its
        value, `--config` twice, or a value that is not of its field's type.
    """
    own, file, values, wanted, paths = [], None, {}, None, []
    known, rest, previous = fields(default_config()), list(arguments), ""
    while rest:
        argument = rest.pop(0)
        match = _FLAG.fullmatch(argument)
        if not match and takes_paths and not argument.startswith("-"):
            paths.append(str(_home(argument, argument)))
            continue
        if not match:
            meant = _meant(argument, previous, flags, known)
            raise UserError(f"`{argument}` is not a flag; flags start with --{meant}")
        name, value = match[1], match[2]
        if name.startswith("config."):
            field = name.removeprefix("config.")
            if value is None:
                value = _next(rest, isinstance(known.get(field), bool))
            if field not in known:
                if any(each.startswith(f"{field}.") for each in known):
                    raise UserError(f"config field `{field}` is a group of fields; name one of them")
                raise unknown_field(field)
            if value is None:
                raise UserError(f"config field `{field}` is given without a value; write --config.{field}=VALUE")
            values[field] = expand(parse_value(field, value, known[field]), f"--config.{field}", field)
        elif name == "config":
            value = _next(rest) if value is None else value
            if not value:
                raise UserError("--config is given without a file; write --config=FILE")
            if file is not None:
                raise UserError(f"--config is given twice, as {file} and {value}; only one file can be used")
            file = expand(value, "--config")
        elif name in ("h", "help"):
            wanted = "flags" if value is None else value
            if wanted not in ("flags", "config"):
                raise UserError(f"{argument} is neither --help nor --help=config")
        elif name in flags or (name.startswith("no") and isinstance(flags.get(name[2:]), bool)):
            if value is None and not isinstance(flags.get(name, True), bool):
                value = _next(rest)
                if value is None:
                    raise UserError(f"--{name} is given without a value; write --{name}=VALUE")
            if name in _PATH_FLAGS or name == "prompt":
                value = expand(value, f"--{name}", name)
            own.append(f"--{name}" if value is None else f"--{name}={value}")
        else:
            raise UserError(f"--{name} is not a flag{aliases.flag(name, value, flags, known)}")
        previous = name
    return Arguments(own, file, values, wanted, paths)


def _next(rest: list[str], on_or_off: bool = False) -> str | None:
    """Takes the next argument as the value of a flag, unless it is a flag; of an `on_or_off` field it may be absent."""
    is_value = rest and not rest[0].startswith("--")
    if on_or_off and not (is_value and rest[0].lower() in ("true", "false")):
        return "true"
    return rest.pop(0) if is_value else None


def _meant(argument: str, previous: str, flags: Mapping[str, object], known: Mapping[str, object]) -> str:
    """For an argument without dashes: `, as in ...`, or nothing."""
    name, equals, value = argument.partition("=")
    if argument.endswith(".py") or ".py:" in argument or name.partition(":")[0] in config_file.names():
        return f", as in --config={argument}"
    if equals and (name in flags or name == "config" or name.removeprefix("config.") in known):
        dotted = "config." if name in known else ""
        return f", as in --{dotted}{argument}"
    if equals:
        return aliases.flag(name, value, flags, known)
    if isinstance(flags.get(previous), bool) and argument.lower() in ("true", "false"):
        return f", as in --{previous}={argument}"
    if previous == "prompt":
        return "; a prompt with spaces needs quotes"
    return f", as in --workdir={argument}" if "workdir" in flags and os.path.isdir(argument) else ""


def expand(value: object, where: str, name: str = "") -> object:
    """A path of the command line or a config field with `~` replaced by the home folder.

    Args:
      value: a path; other types are returned unchanged.
      where: for the message.
      name: of the flag or field. `data.dir` may be a mixture, `data.tokenizer` and `prompt` have a path after a
        prefix; a field that is no path is returned unchanged.

    Raises:
      UserError: there is no such home folder.
    """
    if not isinstance(value, str) or "~" not in value:
        return value
    if name == "data.dir":
        return ",".join(_home(member.strip(), where) for member in value.split(","))
    if name in ("prompt", "data.tokenizer"):
        prefix, colon, path = value.partition(":")
        has_path = prefix in (("FILE",) if name == "prompt" else ("from", "file"))
        return f"{prefix}{colon}{_home(path, where)}" if has_path else value
    if name in ("", *_PATH_FLAGS, *_PATH_FIELDS):
        return _home(value, where)
    return value


def _home(path: str, where: str) -> str:
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    own = path == "~" or path.startswith("~/")
    if (own and not os.path.isabs(os.environ.get("HOME", found))) or not os.path.isabs(found):
        why = " (HOME is not set)" if own else ""
        raise UserError(f"{where}: the home folder of {path} is not known{why}; name it without ~")
    return found
