"""The program `trialgpt`, also `python -m trialgpt_jax`: runs a command, as in `trialgpt train --help`.

The module of a command is imported when it is called, because importing JAX takes seconds.
"""

import difflib
import importlib
import sys

import trialgpt_jax
from trialgpt_jax import console

COMMANDS = {  # module -> what it does
    "preprocess": "makes a token store of text",
    "train": "trains a model; on a run that was stopped, continues it",
    "evaluate": "computes loss, bits per byte and the scores of tasks",
    "infer": "continues a prompt",
    "convert": "exchanges models with Hugging Face; verifies checkpoints",
    "plot": "draws the curves of runs",
}


def main() -> int:
    """Runs the command that `sys.argv` names; returns or exits with its status."""
    trialgpt_jax.begin_command()
    name, *rest = sys.argv[1:] or [""]
    if name in COMMANDS:
        from trialgpt_jax import cli  # late: --help and --version need none of its libraries

        sys.argv = [f"trialgpt {name}", *rest]
        cli.run(importlib.import_module(f"trialgpt_jax.{name}").main)
    try:
        if name in ("-h", "--help", "--version"):
            print(f"trialgpt_jax {trialgpt_jax.__version__}" if name == "--version" else _help(), flush=True)
            return 0
    except console.OutputError as error:
        if error.line:
            console.say_always(error.line)
        return error.status
    console.say_always(f"error: {_mistake(name, rest)}" if name else _help())
    return 2


def _help() -> str:
    lines = [f"  {name:12} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            f"trialgpt {trialgpt_jax.__version__}: trains GPTs with JAX and generates text with them.",
            "",
            "usage: trialgpt COMMAND [--flag=value ...] [--config=NAME] [--config.x.y=v ...]",
            "",
            *lines,
            "",
            "`trialgpt COMMAND --help` lists its flags, `--help=config` the config's fields.",
        ]
    )


def _mistake(name: str, rest: list[str]) -> str:
    """Why `name` is not a command, and what is meant."""
    if name.startswith("-"):
        command = next((each for each in rest if each in COMMANDS), "COMMAND")
        return f"{name} comes before the command; write `trialgpt {command} {name}`"
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean `{near[0]}`?" if near else f"the commands are {', '.join(COMMANDS)}"
    return f"{console.one_line(name)!r} is not a command; {hint}"


if __name__ == "__main__":
    sys.exit(main())
