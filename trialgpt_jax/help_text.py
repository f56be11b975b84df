"""What `--help` and `--help=config` print, in lines as wide as the terminal."""

import shutil
import textwrap
from collections.abc import Mapping

from trialgpt_jax.config_fields import Config
from trialgpt_jax.schema import Spec, specs

FLAGS = (  # of every command that has a config
    ("--config=NAME", "a config of the package, NAME:ARGUMENT, or a Python file with get_config()"),
    ("--config.x.y=VALUE", "instead of the value that the config has for field x.y"),
    ("--help=config", "every field with its meaning; with --config or --workdir the values of that config"),
)
_INDENT = 30  # columns before the text of a flag


def flags(doc: str, options: Mapping[str, tuple], has_config: bool = True) -> str:
    """The flags of a command.

    Args:
      doc: of its module; indented paragraphs keep their lines.
      options: flag name -> (default, text).
      has_config: whether the command takes a config.
    """
    paragraphs = [text if text.startswith(" ") else _fill(text) for text in doc.strip("\n").split("\n\n")]
    lines = [_entry(_flag(name, default), text) for name, (default, text) in options.items()]
    lines += [_entry(*each) for each in FLAGS if has_config]
    return "\n\n".join([*paragraphs, "\n".join(["flags, with their defaults:", *lines])])


def config(values: Mapping[str, object]) -> str:
    """Every config field as a flag with its value and meaning.

    Args:
      values: field -> value, see `config.fields`.
    """
    lines, group = [], ""
    for name, (default, spec) in specs(Config).items():
        before, group = group, name.partition(".")[0]
        lines += [""] if before not in ("", group) else []
        changed = "" if values[name] == default else f"  (default {_text(default) or 'empty'})"
        meaning = f"{spec.doc}{_limits(spec)}"
        lines.append(f"--config.{name}={_text(values[name])}{changed}\n{_fill(meaning, ' ' * 4)}")
    return "\n".join(lines)


def _flag(name: str, default: object) -> str:
    if isinstance(default, bool):
        return f"--no{name}" if default else f"--{name}"
    return f"--{name}={'VALUE' if default in (None, '') else default}"


def _entry(flag: str, text: str) -> str:
    first = f"  {flag}"
    if len(first) > _INDENT - 2:
        return f"{first}\n{_fill(text, ' ' * _INDENT)}"
    return _fill(text, " " * _INDENT, first.ljust(_INDENT))


def _text(value: object) -> str:
    """A value as the command line takes it."""
    return "|".join(value) if isinstance(value, tuple) else str(value)


def _limits(spec: Spec) -> str:
    """`; one of a, b`, `; at least 0`, `; 0 to 1`, or nothing."""
    if spec.choices is not None:
        return f"; one of {', '.join(choice or '(empty)' for choice in spec.choices)}"
    if spec.at_least is None:
        return ""
    if spec.below is not None:
        return f"; at least {spec.at_least:g}, below {spec.below:g}"
    return f"; at least {spec.at_least:g}" + (f", at most {spec.at_most:,}" if spec.at_most is not None else "")


def _fill(text: str, indent: str = "", first: str | None = None) -> str:
    """`text` in lines of at most 100 columns; a word is not broken, so that flags and paths can be copied."""
    width = min(shutil.get_terminal_size((80, 24)).columns, 100)
    return textwrap.fill(
        " ".join(text.split()),
        max(width, 2 * _INDENT),
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
