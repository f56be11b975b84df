"""How a config field is declared: default, meaning, and range or choices together, in one place of a dataclass.

Pure Python, so that both `config.py` and `model/config.py` use it without JAX.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from trialgpt_jax import UserError

INT32_MAX = 2**31 - 1  # JAX's default integers are int32
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a field means and which values it takes; `None` = no such limit."""

    doc: str
    choices: tuple[str, ...] | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None


def field(default: Any, doc: str, **limits) -> Any:
    """A dataclass field with a `Spec`; `limits` are the `Spec`'s other attributes."""
    return dataclasses.field(default=default, metadata={"spec": Spec(doc, **limits)})


def specs(cls: type, prefix: str = "") -> dict[str, tuple[Any, Spec]]:
    """Name -> (default, Spec) of the fields declared with `field`; a nested dataclass contributes `group.name`."""
    found = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            found |= specs(f.type, f"{prefix}{f.name}.")
        elif "spec" in f.metadata:
            found[prefix + f.name] = (f.default, f.metadata["spec"])
    return found


def check(name: str, value: Any, spec: Spec) -> None:
    """Raises UserError if `value` is outside the limits of config field `name`. NaN is outside every range."""
    if spec.choices is not None and value not in spec.choices:
        raise _not_one_of(name, value, spec.choices)
    if type(value) is int and value > INT32_MAX:
        raise UserError(f"config field `{name}` is {value!r:.40}, but must be at most {INT32_MAX}")
    if spec.at_least is None:
        return
    if spec.at_most is not None or spec.below is not None:
        upper, bracket = (spec.at_most, "]") if spec.below is None else (spec.below, ")")
        if not (spec.at_least <= value < upper or (bracket == "]" and value == upper)):
            raise UserError(f"config field `{name}` is {value}, outside [{spec.at_least}, {upper}{bracket}")
    elif not spec.at_least <= value < float("inf"):
        raise UserError(f"config field `{name}` is {value}, but must be at least {spec.at_least} and finite")


def like(value: object, old: object) -> object:
    """`value` in the type of `old`: a number if that does not change it, a tuple of a list or of texts separated by
    `|`; otherwise unchanged."""
    if type(old) is tuple and isinstance(value, str):
        return tuple(value.split("|")) if value else ()
    if type(old) is tuple and isinstance(value, list):
        return tuple(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if type(old) is int and type(value) is float and value.is_integer():
        return int(value)
    if type(old) is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    return value


def parse_value(name: str, text: str, default: object) -> object:
    """The value of a config field as the command line gives it, in the type of `default`: `1e3` and `1_000` are
    integers too.

    Raises:
      UserError: it has no such value.
    """
    if isinstance(default, bool):
        if text.lower() not in ("true", "t", "1", "false", "f", "0"):
            raise UserError(f"config field `{name}` is {text!r}, but should be true or false")
        return text.lower() in ("true", "t", "1")
    if isinstance(default, (str, tuple)):
        if text == "None":
            raise UserError(f"config field `{name}` is the text 'None'; for none write --config.{name}= with no value")
        return like(text, default)
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            value = like(kind(text), default)
            if type(value) is type(default):
                return value
    wanted = "an integer" if isinstance(default, int) else "a number"
    raise UserError(f"config field `{name}` is {text!r:.50}, but should be {wanted} such as {default}")


def choose(registry: Mapping[str, _T], name: str, field_name: str) -> _T:
    """The entry `name` of a registry such as `OPTIMIZERS`.

    Raises:
      UserError: no such entry; names the config field `field_name` and the entries there are.
    """
    if name not in registry:
        raise _not_one_of(field_name, name, registry)
    return registry[name]


def _not_one_of(name: str, value: Any, choices: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(str(value), choices, 1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return UserError(f"config field `{name}` is {value!r}, not one of {', '.join(choices)}{hint}")
