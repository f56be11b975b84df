"""What describes one class of transformers: its options, its configuration and its tensors, in our names."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trialgpt_jax import UserError
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.schema import specs

# Fields of `GPTConfig` that every class expresses, or that change nothing: initial values, rope's base without rope.
_FREE = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "mlp_width", "bias")
_FREE += ("dropout", "tie_embeddings", "norm_scale", "norm_eps", "rope_base", "zero_init_proj")


class Tensor(NamedTuple):
    """One of their tensors.

    Attributes:
      shape: theirs.
      ours: our parameters in it, side by side on the last axis.
      transposed: theirs is [out, in], as of torch.nn.Linear.
      rotary: our last axis is that of queries or keys whose halves of each head are exchanged in theirs.
    """

    shape: tuple[int, ...]
    ours: tuple[str, ...]
    transposed: bool = False
    rotary: bool = False


class Family:
    """A class of transformers.

    Attributes:
      architecture: its name, `architectures` of a config.json.
      model_type: of a config.json.
      base: what precedes the names of all tensors but the head's.
      buffers: pattern of the tensors in old files that are no weights.
      free: fields of `GPTConfig` that it expresses with any value, beside those that all classes express.
      options: fields that it expresses with these values only. Any other field must have its default.
      keys: a TypedDict, what is read of a config.json.
      sizes: their name -> ours, their default, a second name. A value of None = ours follows from other sizes.
      activations: their name -> ours.
      biases: their option -> the module that has biases if it is set; empty = all linear layers have biases.
    """

    architecture: str
    model_type: str
    base: str
    buffers: str
    free: tuple[str, ...] = ()
    options: Mapping[str, tuple]
    keys: type
    sizes: Mapping[str, tuple[str, int | None, str | None]]
    activations: Mapping[str, str]
    biases: Mapping[str, str] = {}

    def obstacles(self, config: GPTConfig) -> list[str]:
        """The options of a model that this class does not express, `model.norm=layernorm (only rmsnorm)`."""
        found = []
        for name, (default, _) in specs(type(config)).items():
            value, allowed = getattr(config, name), self.options.get(name, (default,))
            if name not in _FREE + self.free and value not in allowed:
                found.append(f"model.{name}={value} (only {' or '.join(map(str, allowed))})")
        return found

    def write_config(self, config: GPTConfig) -> dict:
        """The fields of config.json, without those that all classes have."""
        raise NotImplementedError

    def read_options(self, theirs: Mapping, refuse: Callable[[str, Any, str], UserError]) -> dict:
        """The fields of `GPTConfig` beside sizes and activation.

        Args:
          theirs: config.json, of the type `keys`.
          refuse: makes the error for an option from its name, its value and what can be converted.
        """
        raise NotImplementedError

    def tensors(self, config: GPTConfig, biases: tuple[str, ...]) -> dict[str, Tensor]:
        """All tensors by name without `base`, with `{}` for the number of the layer.

        Args:
          config: of the model.
          biases: the modules with biases, values of the attribute `biases`.
        """
        raise NotImplementedError

    def shapes(self, config: GPTConfig, biases: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name, without `base`."""
        found = {}
        for name, tensor in self.tensors(config, biases).items():
            found |= dict.fromkeys(names_of(name, config), tensor.shape)
        return found


def names_of(name: str, config: GPTConfig) -> list[str]:
    """The names that a key of `Family.tensors` stands for, in the order of the layers."""
    return [name.format(i) for i in range(config.n_layer)] if "{}" in name else [name]


def their_name(activations: Mapping[str, str], ours: str) -> str:
    """The first of their names of an activation."""
    return next(theirs for theirs, mine in activations.items() if mine == ours)


def number(name: str, value: float, ours: str, refuse: Callable[[str, Any, str], UserError]) -> float:
    """Their number `name` as a value of the field `ours` of `GPTConfig`; refuses one beyond its limits."""
    spec = specs(GPTConfig)[ours][1]
    upper = float("inf") if spec.at_most is None else spec.at_most
    if not (spec.at_least <= value <= upper and value < float("inf")):
        raise refuse(
            name, value, f"{spec.at_least:g} or more" + ("" if spec.at_most is None else f", up to {upper:g},")
        )
    return float(value)
