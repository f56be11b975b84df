"""The training state, and the two compiled programs that run over it: one optimizer step, one evaluation batch."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from trialgpt_jax.model.gpt import GPT, GPTConfig, cast_matrices, head
from trialgpt_jax.model.loss import cross_entropy_sum
from trialgpt_jax.parallel.accelerators import compiler_options
from trialgpt_jax.parallel.sharding import RULES, batch_sharding, lay_out, put_batch, replicated
from trialgpt_jax.training import spikes


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and all that a checkpoint holds."""

    step: jax.Array  # int32: batches consumed; batch k is the one consumed at step k
    skipped: jax.Array  # int32: steps, of those, whose update was left out: not finite, or a spike
    skipped_in_a_row: jax.Array  # int32
    params: Any
    opt_state: Any
    window: spikes.Window | None = None  # with train.skip_spikes alone


def init_state(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    boxed: bool = False,
    skip_spikes: float = 0.0,
) -> TrainState:
    """The state before step 0, with random parameters.

    Args:
      config: the model.
      optimizer: whose state is made for the parameters.
      seed: of the initial parameters.
      boxed: leave the leaves boxed with their logical axis names.
      skip_spikes: not 0 = with the window of `spikes`.
    """
    params = init_params(config, seed)
    zero = jnp.zeros((), jnp.int32)
    window = spikes.Window.empty() if skip_spikes else None
    state = TrainState(zero, zero, zero, params, optimizer.init(params), window)
    return state if boxed else nn.unbox(state)


def init_params(config: GPTConfig, seed: int):
    """Random parameters, boxed with their logical axis names."""
    # one token is enough to make them, but not for a fused attention kernel
    return GPT(dataclasses.replace(config, attention="xla")).init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))[
        "params"
    ]


@functools.lru_cache(maxsize=1)
def state_layout(
    config: GPTConfig, optimizer: optax.GradientTransformation, mesh: Mesh, skip_spikes: float = 0.0
) -> TrainState:
    """Shapes, dtypes and shardings of the state on `mesh`, as a tree of ShapeDtypeStructs; nothing is allocated.

    Kept, since a run asks for it three times and tracing it takes a fifth of a second.
    """
    return lay_out(jax.eval_shape(lambda: init_state(config, optimizer, 0, True, skip_spikes)), mesh)


def params_layout(config: GPTConfig, mesh: Mesh):
    """Shapes, dtypes and shardings of the parameters alone, as `state_layout`."""
    return lay_out(jax.eval_shape(lambda: init_params(config, 0)), mesh)


def create_state(
    config: GPTConfig, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh, skip_spikes: float = 0.0
) -> TrainState:
    """The state before step 0, made on the devices where its parts belong."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_layout(config, optimizer, mesh, skip_spikes))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        make = functools.partial(init_state, config, optimizer, seed, skip_spikes=skip_spikes)
        return jax.jit(make, out_shardings=shardings)()


def mean_loss(params, config: GPTConfig, tokens_BxU: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy in nats of tokens 1..T given those before them.

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
    """One optimizer step: gradients averaged over the microbatches, clipped, applied where they are good.

    Args:
      state: donated by `compile_train_step`.
      tokens_BxU: int32 [B, T + 1], the global batch of step `state.step`.
      config, optimizer: the model and its optimizer.
      accumulate_steps: microbatches of B / accumulate_steps sequences, one after the other.
      seed: of the dropout; a step's key follows from it and the step alone.
      skip_spikes: leave out a step so many standard deviations beyond the last ones, see `spikes`; 0 = never.
      learning_rate: the optimizer's schedule, to be told among the metrics; None = not told.

    Returns:
      The next state, and float32/int32 scalars: loss (mean over tokens, nats), grad_norm (before clipping), skipped,
      skipped_in_a_row, and lr.
    """
    B = tokens_BxU.shape[0]
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)
    # Matrices are cast once per step rather than once per microbatch. Vectors stay as they are: norms run in float32.
    compute_params = cast_matrices(state.params, config.dtype)

    def loss_and_gradients(tokens, rows):
        key = jax.random.fold_in(step_key, rows[0]) if config.dropout else None
        loss, gradients = jax.value_and_grad(mean_loss)(compute_params, config, tokens, key)
        return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, state.params)

    mean = optax.microbatching.AccumulationType.MEAN
    size = B // accumulate_steps if accumulate_steps > 1 else None  # None: no loop around the one microbatch
    accumulated = optax.microbatching.microbatch(loss_and_gradients, (0, 1), size, mean)
    loss, gradients = accumulated(tokens_BxU, jnp.arange(B))

    grad_norm = optax.global_norm(gradients)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    window = state.window
    if skip_spikes:
        good &= ~spikes.stands_out(window, loss, grad_norm, skip_spikes)
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
    """Sum of the cross-entropy in nats, and number of tokens, over the rows of a batch that are `valid_B`."""
    hidden = GPT(config).apply({"params": params}, tokens_BxU[:, :-1])
    labels = jnp.where(valid_B[:, None], tokens_BxU[:, 1:], -1)
    total = cross_entropy_sum(hidden, head(params, config), labels, config.vocab_size, config.logit_softcap)
    return total, jnp.sum(labels >= 0)


def compile_train_step(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    batch_size: int,
    accumulate_steps: int,
    seed: int,
    skip_spikes: float = 0.0,
    learning_rate: optax.Schedule | None = None,
) -> jax.stages.Compiled:
    """Compiles `train_step` for `mesh`, whose devices may be of a chip that is not attached.

    Returns:
      (state, tokens [batch_size, block_size + 1]) -> (state, metrics); the state is donated.
    """
    layout = state_layout(config, optimizer, mesh, skip_spikes)
    tokens = _tokens(config, mesh, batch_size)

    step = functools.partial(
        train_step,
        config=config,
        optimizer=optimizer,
        accumulate_steps=accumulate_steps,
        seed=seed,
        skip_spikes=skip_spikes,
        learning_rate=learning_rate,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        return jitted.lower(layout, tokens).compile(compiler_options(mesh))


def compile_eval_step(config: GPTConfig, mesh: Mesh, params_layout, *, batch_size: int) -> jax.stages.Compiled:
    """Compiles `eval_step` for `mesh`: (params, tokens [B, T + 1], valid [B]) -> (sum of nats, number of tokens)."""
    valid = jax.ShapeDtypeStruct((batch_size,), jnp.bool_, sharding=batch_sharding(mesh))

    step = functools.partial(eval_step, config=config)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        jitted = jax.jit(step, out_shardings=replicated(mesh))
        return jitted.lower(params_layout, _tokens(config, mesh, batch_size), valid).compile(compiler_options(mesh))


def evaluate(compiled: jax.stages.Compiled, params, batches: Iterable, mesh: Mesh) -> tuple[float, int]:
    """Mean loss over the valid rows of `batches`.

    Args:
      compiled: of `compile_eval_step`.
      params: the parameters.
      batches: pairs of this process's int32 [local_batch, block_size + 1] tokens and bool [local_batch] valid rows.
      mesh: that of `compiled`.

    Returns:
      Nats per token and the number of tokens, over all processes.
    """
    sharding = batch_sharding(mesh)
    totals, pending = np.zeros(2), None
    for tokens, valid in batches:
        sums = compiled(params, put_batch(tokens, sharding), put_batch(valid, sharding))
        if pending:  # one batch late: the device does not wait, and no more than two batches lie on it
            totals += jax.device_get(pending)
        pending = sums
    totals += jax.device_get(pending)
    return float(totals[0] / totals[1]), int(totals[1])


def _tokens(config: GPTConfig, mesh: Mesh, batch_size: int) -> jax.ShapeDtypeStruct:
    shape = (batch_size, config.block_size + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
