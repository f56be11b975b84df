"""trialgpt_jax: train GPT-2 style language models from scratch on TPUs and GPUs, and generate text with them."""

from __future__ import annotations

import gc
import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow to import
    from collections.abc import Mapping

    from ml_collections import ConfigDict

    from trialgpt_jax.language_model import LanguageModel

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake in the input, described in one line: the field or file, what is wrong, and what would be right.

    Commands print the message without a traceback and exit with status 2.
    """


def load(workdir: str, step: int | str = -1, weights: str = "auto") -> LanguageModel:
    """A trained model as an object: `language_model.LanguageModel.load`, imported on the first call."""
    module = importlib.import_module("trialgpt_jax.language_model")
    return module.LanguageModel.load(workdir, step, weights=weights)


def _train(config: ConfigDict | str, workdir: str, changes: Mapping[str, object] | None = None) -> int:
    """Trains as the command does: `trialgpt train --config=CONFIG --workdir=WORKDIR`.

    Args:
      config: a config, or what `--config` takes: the name of one of the package, or the path of a file.
      workdir: folder of the run; one that has checkpoints is resumed.
      changes: field -> value, such as {"train.steps": 100}.

    Returns:
      0 when the last step is done and saved, 75 when stopped by SIGTERM or Ctrl-C after saving.

    Raises:
      UserError: a config, token store or workdir that cannot be used.
    """
    names = ("cli", "config", "config_file", "train")  # imported on the first call, as in `load`
    cli, config_lib, config_file, command = (importlib.import_module(f"trialgpt_jax.{name}") for name in names)
    config = config_file.load(config) if isinstance(config, str) else config.copy_and_resolve_references()
    config_lib.change(config, changes or {})
    with cli.start({}, config, reuse_memory=True):
        return command.train(config, workdir)


class CallableModule(types.ModuleType):
    """The type of the module `trialgpt_jax.train`, which is also the function of that name."""

    __call__ = staticmethod(_train)

    @property
    def __signature__(self):
        """For `inspect.signature`, which before Python 3.13 drops the first parameter of a static `__call__`."""
        return importlib.import_module("inspect").signature(_train)


if TYPE_CHECKING:
    train = _train


def __getattr__(name: str) -> types.ModuleType:
    if name == "train":  # imported when it is first used
        return importlib.import_module("trialgpt_jax.train")
    raise AttributeError(f"module 'trialgpt_jax' has no attribute {name!r}")


def begin_command() -> None:
    """Sets up Ctrl-C, stdout, stderr and errors of this process for a command, before it imports its libraries.

    Importing JAX takes seconds, in which Ctrl-C would print a traceback.
    """
    gc.set_threshold(100_000)  # 700, the default, costs 10% of the time to import libraries and trace programs
    import _signal  # built in; importing `signal` takes 50 ms

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from trialgpt_jax import console, faults, live_line

    console.guard()
    live_line.starting()
    console.leave_on_interrupt()
    sys.excepthook = faults.excepthook


if sys.argv[:1] == ["-m"]:  # Python is looking for the module of `python -m trialgpt_jax.train`: this is a command
    begin_command()
