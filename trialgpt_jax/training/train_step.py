"""The training state and the two functions that are compiled over it: one optimizer step, one evaluation batch.

Shapes: B sequences of a batch, U = T + 1 ids of a window, T block_size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from trialgpt_jax import UserError
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.gpt import GPT, cast_matrices, head
from trialgpt_jax.model.loss import cross_entropy_sum
from trialgpt_jax.training import spikes


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and the content of a checkpoint."""

    step: jax.Array  # int32: batches consumed; step k consumes batch k
    skipped: jax.Array  # int32: steps whose update was skipped: not finite, or a spike
    skipped_in_a_row: jax.Array  # int32
    params: Any
    opt_state: Any
    window: spikes.Window | None = None  # only with train.skip_spikes


def init_params(config: GPTConfig, seed: int):
    """Random parameters, boxed with their logical axis names."""
    # One token initialises every parameter, but fused attention kernels do not take it.
    gpt = GPT(dataclasses.replace(config, attention="xla"))
    return gpt.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


def new_state(params, optimizer: optax.GradientTransformation, skip_spikes: float = 0.0) -> TrainState:
    """The state before step 0 for these parameters; with `skip_spikes` it has the window of `spikes`."""
    zero = jnp.zeros((), jnp.int32)
    window = spikes.Window.empty() if skip_spikes else None
    return TrainState(zero, zero, zero, params, optimizer.init(params), window)


def init_state(
    config: GPTConfig, optimizer: optax.GradientTransformation, seed: int, skip_spikes: float = 0.0
) -> TrainState:
    """The state before step 0 with random parameters, unboxed."""
    return nn.unbox(new_state(init_params(config, seed), optimizer, skip_spikes))


def mean_loss(params, config: GPTConfig, tokens_BxU: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy, in nats, of tokens 1..T given the tokens before them.

    Args:
      params: the parameters, unboxed.
      config: the model.
      tokens_BxU: int32 [B, T + 1].
      dropout_key: PRNG key; None = no dropout.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    hidden = GPT(config).apply({"params": params}, tokens_BxU[:, :-1], deterministic=dropout_key is None, rngs=rngs)
    labels = tokens_BxU[:, 1:]
    total = cross_entropy_sum(hidden, head(params, config), labels, config.vocab_size, config.logit_softcap)
    return total / labels.size


def train_step(
    state: TrainState,
    tokens_BxU: jax.Array,
    *,
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    accumulate_steps: int,
    seed: int,
    skip_spikes: float = 0.0,
    learning_rates: Mapping[str, optax.Schedule] | None = None,
    check_update: bool = True,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step: gradients averaged over the microbatches, clipped, and applied if they are good.

    A step is good if loss, gradients, new parameters and new optimizer state are finite, and if it is not a spike.
    Any other step changes neither parameters nor optimizer state.

    Args:
      state: donated by the compiled step.
      tokens_BxU: int32 [B, T + 1], the global batch of step `state.step`.
      config, optimizer: the model and its optimizer.
      accumulate_steps: sequential microbatches of B / accumulate_steps sequences.
      seed: of the dropout; the key of a step follows from it and the step alone.
      skip_spikes: skip updates that exceed this many standard deviations, see `spikes`; 0 = off.
      learning_rates: metric -> schedule, see `optimizer.learning_rates`.
      check_update: look at new parameters and optimizer state, 3% more traffic; see `optimizer.always_finite`.

    Returns:
      The next state, and scalars: loss (mean over tokens, nats), grad_norm (before clipping), update_finite (whether
      the new parameters and optimizer state are), skipped, skipped_in_a_row, and the learning rates.
    """
    B = tokens_BxU.shape[0]
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)
    # Matrices are cast once per step instead of once per microbatch. Vectors stay: norms run in float32.
    compute_params = cast_matrices(state.params, config.dtype)

    def loss_and_gradients(tokens, rows):
        key = jax.random.fold_in(step_key, rows[0]) if config.dropout else None
        loss, gradients = jax.value_and_grad(mean_loss)(compute_params, config, tokens, key)
        return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, state.params)

    mean = optax.microbatching.AccumulationType.MEAN
    size = B // accumulate_steps if accumulate_steps > 1 else None  # None: no loop around a single microbatch
    accumulated = optax.microbatching.microbatch(loss_and_gradients, (0, 1), size, mean)
    loss, gradients = accumulated(tokens_BxU, jnp.arange(B))

    grad_norm = optax.global_norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Finite gradients can give an update that is not: 0 / 0 in the optimizer, or p + u overflows.
    update_finite = all_finite((params, opt_state)) if check_update else jnp.array(True)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & update_finite
    window = state.window
    if skip_spikes:
        good &= ~spikes.is_spike(window, loss, grad_norm, skip_spikes)
        window = spikes.push(window, loss, grad_norm, good)

    def keep(new, old):
        return jnp.where(good, new, old)

    skipped_in_a_row = jnp.where(good, 0, state.skipped_in_a_row + 1)
    next_state = TrainState(
        step=state.step + 1,
        skipped=state.skipped + ~good,
        skipped_in_a_row=skipped_in_a_row,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        window=window,
    )
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "update_finite": update_finite,
        "skipped": next_state.skipped,
        "skipped_in_a_row": skipped_in_a_row,
    }
    n_updates = state.step - state.skipped
    metrics |= {name: rate(n_updates) for name, rate in (learning_rates or {}).items()}
    return next_state, metrics


def eval_step(params, tokens_BxU: jax.Array, valid_B: jax.Array, *, config: GPTConfig) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy in nats, and number of tokens, over the rows of a batch that are `valid_B`."""
    hidden = GPT(config).apply({"params": params}, tokens_BxU[:, :-1])
    labels = jnp.where(valid_B[:, None], tokens_BxU[:, 1:], -1)
    total = cross_entropy_sum(hidden, head(params, config), labels, config.vocab_size, config.logit_softcap)
    return total, jnp.sum(labels >= 0)


def all_finite(tree) -> jax.Array:
    """Whether no float in `tree` is NaN or infinite, bool []; for compiled code."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    # not isfinite(max(x)): XLA's maximum loses NaNs on CPU
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def nonfinite(tree) -> dict[str, int]:
    """The arrays of a state or of parameters that have NaN or infinite values: name -> number of such values.

    Every process of the job calls it, because the arrays may be split over all of them. It compiles once per layout.

    Args:
      tree: of arrays; those that are not of floating point are ignored.

    Returns:
      Names such as `params/wte/embedding`; {} = all values are finite.
    """
    named = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}
    arrays = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    # On CPU the counts of GPT-2 124M's state take 0.9 s, and the question whether all values are finite takes 0.36 s.
    if not arrays or _all_finite(arrays):
        return {}
    return {name: int(n) for name, n in jax.device_get(_count_nonfinite(arrays)).items() if n}


def check_finite(source: str, tree, way_out: str = "") -> None:
    """Refuses weights with NaN or infinite values; called by every process, as `nonfinite`.

    Args:
      source: the checkpoint or folder that the weights are from, for the message.
      tree: of arrays.
      way_out: what the message ends with.

    Raises:
      UserError: with the number of values, and the names of the first three arrays.
    """
    if counts := nonfinite(tree):
        raise UserError(f"{source} has {describe_nonfinite(counts)}{way_out}")


def describe_nonfinite(counts: Mapping[str, int]) -> str:
    """A phrase for a result of `nonfinite`: the number of values, and the names of the first three arrays."""
    names = ", ".join(f"{name} ({n:,})" for name, n in list(counts.items())[:3])
    more = f" and {len(counts) - 3} more arrays" if len(counts) > 3 else ""
    return f"{sum(counts.values()):,} values that are not finite, in {names}{more}"


_all_finite = jax.jit(all_finite)


@jax.jit
def _count_nonfinite(arrays):
    return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32), arrays)
