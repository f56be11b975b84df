"""The length of a run and of its warmup: as steps, or in another way from which the steps follow.

Pure Python: `config.py` uses it without JAX.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.schema import INT32_MAX

# Each line has fields that say the same in different ways, so that at most one of them is not 0. The first is what a
# run, its snapshot and its schedule use; `resolve` computes it from the others and sets them to 0.
_LENGTH = ("train.steps", "train.tokens", "train.tokens_per_parameter")
_WARMUP = ("optim.warmup_steps", "optim.warmup_fraction")
DERIVED = (_LENGTH[0], _WARMUP[0])  # may follow from others


def replace(config: ConfigDict, given: Mapping[str, object]) -> None:
    """Sets the fields to 0 that a field of the command line replaces, unless the command line has them too.

    Without this, `--config.train.tokens=1e9` would need `--config.train.steps=0` beside it, as it does in a file.

    Args:
      config: the fields of the config file, with those of the command line over them.
      given: field -> value of the command line.
    """
    for names in (_LENGTH, _WARMUP):
        if any(given.get(name) for name in names):
            for name in set(names) - set(given):
                config[name.split(".")[0]][name.split(".")[1]] = 0


def check(config: ConfigDict, given: ConfigDict | None = None) -> None:
    """Refuses a length that is given twice or not at all, and a warmup that is given twice or leaves no other step.

    Args:
      config: before or after `resolve`; before it, a warmup is not compared with a number of steps that is not known.
      given: after `resolve`: the config before it, for the message.

    Raises:
      UserError: names the fields.
    """
    for names in (_LENGTH, _WARMUP):
        used = [name for name in names if _value(config, name)]
        if len(used) > 1:
            both = " and ".join(f"{name}={_text(config, name)}" for name in used[:2])
            raise UserError(f"{both} exclude each other; set {used[0]}=0 to use {used[1]}")
    if not any(_value(config, name) for name in _LENGTH):
        raise UserError(f"config field `train.steps` is 0; set one of {', '.join(_LENGTH)} above 0")
    steps, warmup = config.train.steps, config.optim.warmup_steps
    if 0 < steps <= warmup:
        raise UserError(
            f"optim.warmup_steps={warmup} leaves nothing of train.steps={steps}{origin('train.steps', given)}; make it "
            "smaller than the number of steps"
        )


def resolve(config: ConfigDict, count_parameters: Callable[[], int]) -> ConfigDict:
    """The config with `train.steps` and `optim.warmup_steps` in place of the fields that may be given instead.

    Steps are rounded up and steps of warmup down, without errors of floating-point arithmetic: 0.7 tokens per parameter
    of 10 parameters are 7 tokens, not 7.000000000000001.

    Args:
      config: passed by `check`.
      count_parameters: the model's parameters as `metrics.parameter_count` counts them; called if the length depends on
        them.

    Returns:
      A copy, or `config` itself if it has both already.

    Raises:
      UserError: more steps than an int32 counts.
    """
    train, optim = config.train, config.optim
    if train.steps and not optim.warmup_fraction:
        return config
    config = config.copy_and_resolve_references()
    if not train.steps:
        name = "train.tokens_per_parameter" if train.tokens_per_parameter else "train.tokens"
        tokens = Fraction(str(_value(config, name)))
        if train.tokens_per_parameter:
            tokens *= count_parameters()
        tokens_per_step = train.batch_size * config.model.block_size
        steps = math.ceil(tokens / tokens_per_step)
        if steps > INT32_MAX:
            raise UserError(
                f"{name}={_text(config, name)} takes {steps:.3g} steps of {tokens_per_step:,} tokens, more than "
                f"{INT32_MAX}; make it smaller, or raise train.batch_size"
            )
        config.train.update({"steps": steps, "tokens": 0.0, "tokens_per_parameter": 0.0})
    if optim.warmup_fraction:
        warmup = math.floor(Fraction(str(optim.warmup_fraction)) * config.train.steps)
        config.optim.update({"warmup_steps": warmup, "warmup_fraction": 0.0})
    return config


def origin(name: str, given: ConfigDict | None) -> str:
    """` (from train.tokens=1000000000)` if the field `name` follows from another one of the config `given`, or ""."""
    for names in (_LENGTH, _WARMUP) if given is not None else ():
        for other in names[1:] if name == names[0] else ():
            if _value(given, other):
                return f" (from {other}={_text(given, other)})"
    return ""


def _value(config: ConfigDict, name: str) -> float:
    group, _, leaf = name.partition(".")
    return config[group][leaf]


def _text(config: ConfigDict, name: str) -> str:
    """The value as a user writes it: 600000, 1e+15, 0.05."""
    return f"{_value(config, name):.12g}"
