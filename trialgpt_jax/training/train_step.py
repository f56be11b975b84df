"""The training state and the two functions that are compiled over it: one optimizer step, one evaluation batch.

Shapes: B sequences of a batch, U = T + 1 ids of a window, T block_size.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

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
    learning_rate: optax.Schedule | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step: gradients averaged over the microbatches, clipped, and applied if they are good.

    Args:
      state: donated by the compiled step.
      tokens_BxU: int32 [B, T + 1], the global batch of step `state.step`.
      config, optimizer: the model and its optimizer.
      accumulate_steps: sequential microbatches of B / accumulate_steps sequences.
      seed: of the dropout; the key of a step follows from it and the step alone.
      skip_spikes: skip updates that exceed this many standard deviations, see `spikes`; 0 = off.
      learning_rate: the optimizer's schedule, for the metric `lr`; None = no such metric.

    Returns:
      The next state, and float32/int32 scalars: loss (mean over tokens, nats), grad_norm (before clipping), skipped,
      skipped_in_a_row, lr.
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
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    window = state.window
    if skip_spikes:
        good &= ~spikes.is_spike(window, loss, grad_norm, skip_spikes)
        window = spikes.push(window, loss, grad_norm, good)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

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
        "skipped": next_state.skipped,
        "skipped_in_a_row": skipped_in_a_row,
    }
    if learning_rate:
        metrics["lr"] = learning_rate(state.step - state.skipped)
    return next_state, metrics


def eval_step(params, tokens_BxU: jax.Array, valid_B: jax.Array, *, config: GPTConfig) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy in nats, and number of tokens, over the rows of a batch that are `valid_B`."""
    hidden = GPT(config).apply({"params": params}, tokens_BxU[:, :-1])
    labels = jnp.where(valid_B[:, None], tokens_BxU[:, 1:], -1)
    total = cross_entropy_sum(hidden, head(params, config), labels, config.vocab_size, config.logit_softcap)
    return total, jnp.sum(labels >= 0)
