"""Optimizers and learning rate schedules by name, gradient clipping, and which parameters decay."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from trialgpt_jax.schema import choose

# ---- schedules after the warmup: (config.optim, peak, updates after the warmup, updates in all) -> optax.Schedule


def _cosine(optim, peak, updates, total):
    return optax.cosine_decay_schedule(peak, updates, alpha=optim.min_lr_ratio)


def _linear(optim, peak, updates, total):
    return optax.linear_schedule(peak, peak * optim.min_lr_ratio, updates)


def _wsd(optim, peak, updates, total):
    """Warmup, stable, decay: linear over the last `decay_fraction` of all updates."""
    decay = max(1, min(round(optim.decay_fraction * total), updates))
    return optax.linear_schedule(peak, peak * optim.min_lr_ratio, decay, transition_begin=updates - decay)


def _constant(optim, peak, updates, total):
    return optax.constant_schedule(peak)


SCHEDULES = {"cosine": _cosine, "linear": _linear, "wsd": _wsd, "constant": _constant}


def schedule(optim: ConfigDict, steps: int, peak: float) -> optax.Schedule:
    """Learning rate as a function of the number of updates made so far.

    The warmup is nanoGPT's: update n (from 0) uses peak * (n + 1) / (warmup_steps + 1), so that no update is wasted at
    rate zero. The decay ends at peak * min_lr_ratio.

    Args:
      optim: `config.optim`.
      steps: number of updates in all.
      peak: largest learning rate.

    Raises:
      UserError: no schedule of that name.
    """
    warmup = optim.warmup_steps
    after = choose(SCHEDULES, optim.schedule, "optim.schedule")(optim, peak, max(1, steps - warmup), steps)
    if warmup:
        after = optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])
    # optax counts in int32; its quotients are then float32 even for float64 parameters
    return lambda n_updates: after(jnp.asarray(n_updates, float))


# ---- optimizers: (config.optim, steps) -> optax.GradientTransformation, without clipping

# AdamW's eps is at least this. Squares of smaller gradients underflow to 0 in float32. With eps=0 the update of a row
# that never had a gradient, such as the padding of the vocabulary, would be 0 / 0, and that of a tiny one infinite.
_LEAST_EPS = float(jnp.finfo(jnp.float32).tiny) ** 0.5  # 1.1e-19


def _adamw(optim, steps):
    rate = schedule(optim, steps, optim.learning_rate)
    decays = {"weight_decay": optim.weight_decay, "mask": lambda params: _by_path(params, _is_matrix)}
    return optax.adamw(rate, optim.b1, optim.b2, max(optim.eps, _LEAST_EPS), **decays)


def _muon(optim, steps):
    """Muon (Jordan 2024) for the hidden matrices of each layer, AdamW for everything else."""
    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=optim.muon_momentum, weight_dimension_numbers=_layer_matrices),
        optax.stateless(_scale_by_shape),
        optax.add_decayed_weights(optim.weight_decay),
        optax.scale_by_learning_rate(schedule(optim, steps, optim.muon_learning_rate)),
    )
    return optax.partition(
        {"muon": muon, "adamw": _adamw(optim, steps)},
        lambda params: _by_path(params, lambda names: "muon" if _is_hidden_matrix(names) else "adamw"),
    )


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def make_optimizer(optim: ConfigDict, steps: int) -> optax.GradientTransformation:
    """The optimizer `optim.name`, after clipping by the global norm where `optim.clip_norm` is not 0.

    Weight decay is decoupled and applies to matrices only (kernels and embeddings), as in nanoGPT.

    Args:
      optim: `config.optim`.
      steps: number of updates in all.

    Raises:
      UserError: no optimizer or schedule of that name.
    """
    update = choose(OPTIMIZERS, optim.name, "optim.name")(optim, steps)
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), update) if optim.clip_norm else update


def always_finite(optim: ConfigDict) -> bool:
    """Whether finite gradients always give finite parameters and optimizer state, so that no step has to check them.

    AdamW's update is at most (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) learning rates, by the Cauchy-Schwarz
    inequality; singular values of Muon's matrices are about 1. At rates up to 1 the parameters are then below 1e15
    after 2^31 steps, and the largest float32 is 3e38. False for other optimizers and settings.
    """
    rate, b1, b2 = max(optim.learning_rate, optim.muon_learning_rate), optim.b1, optim.b2
    moments_forget = min(1 - b1, 1 - b2, b2 - b1**2) > 1e-5
    return optim.name in ("adamw", "muon") and rate * max(1.0, optim.weight_decay) <= 1 and moments_forget


def _scale_by_shape(updates, params):
    """Scales the update of a matrix [..., in, out] by sqrt(max(1, out / in)): the same effect at every width."""
    return jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)


def _layer_matrices(params):
    """Every leaf is a stack [layer, in, out] of matrices, each orthogonalised separately."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), params)


def _is_matrix(names: list[str]) -> bool:
    return names[-1] in ("kernel", "embedding")


def _is_hidden_matrix(names: list[str]) -> bool:
    return "blocks" in names and names[-1] == "kernel"


def _by_path(params, function):
    """Maps every leaf to function(its names). Not by rank: stacked norm scales [layer, C] look like matrices."""

    def names(path):
        return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]  # skips boxes of axis names

    return jax.tree_util.tree_map_with_path(lambda path, _: function(names(path)), params)
