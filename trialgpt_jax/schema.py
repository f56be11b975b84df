"""How a config field is declared: default, meaning, and range or choices together, in one place of a dataclass.

Pure Python, so that both `config.py` and `model/config.py` use it without JAX.
"""

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
        raise UserError(f"config field `{name}` is {value}, but must be at most {INT32_MAX}")
    if spec.at_least is None:
        return
    if spec.at_most is not None or spec.below is not None:
        upper, bracket = (spec.at_most, "]") if spec.below is None else (spec.below, ")")
        if not (spec.at_least <= value < upper or (bracket == "]" and value == upper)):
            raise UserError(f"config field `{name}` is {value}, outside [{spec.at_least}, {upper}{bracket}")
    elif not spec.at_least <= value < float("inf"):
        raise UserError(f"config field `{name}` is {value}, but must be at least {spec.at_least} and finite")


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
