"""trialgpt_jax: train GPT-2 style language models from scratch on TPUs and GPUs, and generate text with them."""

import importlib
import sys

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake in the input, described in one line: the field or file, what is wrong, and what would be right.

    Commands print the message without a traceback and exit with status 2.
    """


def load(workdir: str, step: int | str = -1, weights: str = "auto"):
    """A trained model as an object: `language_model.LanguageModel.load`, imported on the first call."""
    module = importlib.import_module("trialgpt_jax.language_model")
    return module.LanguageModel.load(workdir, step, weights=weights)


def begin_command() -> None:
    """Sets up Ctrl-C, stdout, stderr and errors of this process for a command, before it imports its libraries.

    Importing JAX takes seconds, in which Ctrl-C would print a traceback.
    """
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
