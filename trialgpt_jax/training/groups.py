"""Groups of weights, and what each is trained with: `config.optim.groups` over the values of `config.optim`.

Pure Python: `config.py` uses it without JAX.
"""

import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.model.config import GPTConfig

GROUPS = ("matrices", "embedding", "head", "vectors")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a group is trained with; with Muon b1 is the momentum, and b2 and eps are not used."""

    optimizer: str
    learning_rate: float  # peak
    weight_decay: float
    b1: float
    b2: float
    eps: float


def group_of(names: Sequence[str]) -> str:
    """The group of the weight with the path `names`, such as ("blocks", "mlp", "c_fc", "kernel").

    Kernels of the layers are `matrices`; the embeddings of tokens and learned positions are `embedding`, and a tied
    head is the former; norm scales and biases are `vectors`. The rank does not tell them apart, because norm scales are
    stacked [layer, C].

    Raises:
      UserError: a weight of none of these kinds.
    """
    *outer, leaf = names
    if leaf == "kernel":
        return "matrices"
    if leaf == "embedding":
        return "head" if "lm_head" in outer else "embedding"
    if leaf in ("scale", "bias"):
        return "vectors"
    raise UserError(f"weight {'/'.join(names)} belongs to no group of optim.groups")


def settings(optim: ConfigDict) -> dict[str, Settings]:
    """The settings of every group: its own values, and those of `optim` for what it does not set.

    Raises:
      UserError: a value that is neither -1 nor in its range, or one that the group's optimizer does not have.
    """
    return {name: _settings(optim, name) for name in GROUPS}


def _settings(optim: ConfigDict, name: str) -> Settings:
    group, field = optim.groups[name], f"config field `optim.groups.{name}"
    optimizer = group.optimizer or (optim.name if name == "matrices" else "adamw")
    by_muon = optimizer == "muon"
    if by_muon and name != "matrices":
        raise UserError(f"{field}.optimizer` is {optimizer!r}, but only the group matrices can be trained with it")
    for key in ("b2", "eps"):
        if by_muon and group[key] != -1:
            raise UserError(f"{field}.{key}` is {group[key]}, but muon has no {key}; leave it at -1")
    values = {
        "learning_rate": optim.muon_learning_rate if by_muon else optim.learning_rate,
        "weight_decay": optim.weight_decay,
        "b1": optim.muon_momentum if by_muon else optim.b1,
        "b2": optim.b2,
        "eps": optim.eps,
    }
    for key, inherited in values.items():
        value, limit = group[key], 1 if key in ("b1", "b2") else float("inf")
        if value != -1 and not 0 <= value < limit:
            limits = "in [0, 1)" if limit == 1 else "at least 0 and finite"
            raise UserError(f"{field}.{key}` is {value}, but must be {limits}, or -1, which is {inherited} here")
        if value != -1:
            values[key] = value
    return Settings(optimizer, **values)


def check(optim: ConfigDict, default: ConfigDict, gpt: GPTConfig) -> None:
    """Refuses settings that are out of range, or of a group in which the model has no weights.

    Args:
      optim: `config.optim`.
      default: the same with every field's default.
      gpt: the model.

    Raises:
      UserError: names the field.
    """
    settings(optim)
    without = {}
    if gpt.tie_embeddings:
        without["head"] = "model.tie_embeddings=True the head is the embedding"
    if not (gpt.bias or gpt.norm_scale or gpt.qk_norm_scale):
        without["vectors"] = "model.bias=False and model.norm_scale=False the model has no vectors"
    for name, why in without.items():
        for key, value in optim.groups[name].items():
            if value != default.groups[name][key]:
                raise UserError(f"config field `optim.groups.{name}.{key}` is {value}, but with {why}")
