"""Reads `--config=FILE`: a Python file whose `get_config()` returns a config. The file is executed.

`--config=NAME` is the file NAME.py of the package's folder `configs/`.

Every error in the file is the user's: one line with file, line and reason.
"""

import glob
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import traceback
from types import ModuleType

from ml_collections import ConfigDict

from trialgpt_jax import UserError, aliases
from trialgpt_jax.config import default_config, fields, unknown_field, update

_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")
_NAME = "trialgpt_jax_config_file"  # in sys.modules, where dataclasses of the file look up their annotations
# Of ml_collections.
_WRONG_TYPE = re.compile(r"field '(\w+)' \(reference\)\. (.*) is of original type <class '(.*?)'>.*'([\w.]+)'>$")
_UNKNOWN = re.compile(r'Key "(\w+)" does not exist|Did you mean "\w+" instead of "(\w+)"')
_DATA = (".json", ".toml", ".yaml", ".yml")


def names() -> list[str]:
    """What NAME may be in `--config=NAME`."""
    return sorted(os.path.basename(path).removesuffix(".py") for path in glob.glob(os.path.join(_FOLDER, "*.py")))


def load(text: str) -> ConfigDict:
    """The config of `--config=text`.

    Args:
      text: the path of a file, or the name of a config of the package; in `FILE:ARGUMENT` and `NAME:ARGUMENT` the
        argument is passed to `get_config` as a string. A name is not taken for a folder of that name.

    Raises:
      UserError: no such file, a file that does not compile or import, that defines no `get_config`, or whose
        `get_config` raises or returns anything but a config with our fields.
    """
    path, colon, argument = (text, "", "") if os.path.exists(text) else text.partition(":")
    if not os.path.isfile(path) and path in names():
        path = os.path.join(_FOLDER, f"{path}.py")
    if os.path.isdir(path):
        raise UserError(f"--config={text} is a folder, not a Python file that defines get_config()")
    if not os.path.isfile(path):
        raise UserError(f"--config={text}: no such file; {_proposal(path, colon + argument)}")
    if path.endswith(_DATA):
        raise UserError(
            f"--config={text} is not a Python file that defines get_config(); the config.json of a "
            "workdir is read with --workdir"
        )
    module = _execute(path, text)
    function = getattr(module, "get_config", None)
    if not callable(function):
        raise UserError(_no_function(path, module))
    _check_argument(function, path, text, bool(colon))
    try:
        result = function(argument) if colon else function()
    except (UserError, KeyboardInterrupt):
        raise  # for example a size that the config gpt2 does not have
    except BaseException as error:  # noqa: BLE001 - whatever the user's file raises
        raise UserError(_reason(error, path)) from None
    if not isinstance(result, ConfigDict):
        found = "nothing" if result is None else type(result).__name__
        raise UserError(f"{path}: get_config() returns {found}, not the config that default_config() has made")
    config = default_config()
    update(config, result.to_dict(), path)
    return config


def _proposal(path: str, argument: str) -> str:
    """What to write instead of a path that does not exist."""
    name = os.path.basename(path).removesuffix(".py")
    if name in names():
        return f"write --config={name}{argument} for that of the package"
    return f"the package has the configs {', '.join(names())}"


def _execute(path: str, text: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(_NAME, path)
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(_NAME, loader, origin=path))
    module.__file__ = path
    sys.modules[_NAME] = module
    try:
        loader.exec_module(module)
    except (UserError, KeyboardInterrupt):
        raise
    except OSError as error:
        if error.filename != path:
            raise UserError(_reason(error, path)) from None
        raise UserError(f"--config={text} cannot be read: {error.strerror}") from None
    except BaseException as error:  # noqa: BLE001 - whatever the user's file raises
        raise UserError(_reason(error, path)) from None
    finally:
        del sys.modules[_NAME]
    return module


def _reason(error: BaseException, path: str) -> str:
    """`file:line: why` for an error in a config file."""
    message = " ".join(str(error).split())
    if isinstance(error, SyntaxError) and (error.filename in (path, None) or "utf-8" in message):
        where = f"{path}:{error.lineno}" if error.lineno else path
        return f"{where}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"{path}:{frames[-1].lineno}" if frames else path
    if isinstance(error, (AttributeError, KeyError)) and (field := _UNKNOWN.search(message)):
        return f"{where}: {unknown_field(field[1] or field[2])}"
    if isinstance(error, TypeError) and (wrong := _WRONG_TYPE.search(message)):
        wanted = "a group of fields" if wrong[4].endswith("._Fields") else f"of type {wrong[4]}"
        return f"{where}: config field `{wrong[1]}` is {wrong[2]} ({wrong[3]}), but should be {wanted}"
    if isinstance(error, SystemExit):
        return f"{where}: the file ends the program; it may only define get_config()"
    return f"{where}: {type(error).__name__}: {message}" if message else f"{where}: {type(error).__name__}"


def _no_function(path: str, module: ModuleType) -> str:
    message = f"{path} defines no get_config()"
    names = [name for name in vars(module) if not name.startswith("_")]
    if hint := aliases.assignments(names, fields(default_config())):
        message += f"; plain assignments, as in nanoGPT's files, belong in get_config() as in configs/gpt2.py: {hint}"
    return message


def _check_argument(function: object, path: str, text: str, given: bool) -> None:
    """Refuses an argument that `get_config` does not take, or its absence where it must have one."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in
        return
    try:
        signature.bind(*[""] * given)
    except TypeError:
        needed = [p for p in signature.parameters.values() if p.default is p.empty]
        if given and not signature.parameters:
            raise UserError(f"--config={text}: get_config() of {path} takes no argument after the colon") from None
        if len(needed) == 1 and not given:
            raise UserError(
                f"--config={text}: get_config({needed[0].name}) needs a value after a colon: --config={path}:VALUE"
            ) from None
        raise UserError(f"{path}: get_config{signature} must take no argument or one") from None
