"""The optimizer: schedules, clipping, AdamW or Muon, and which parameters decay."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def schedule(optim: ConfigDict, steps: int, peak: float) -> optax.Schedule:
    """Learning rate as a function of the number of updates made so far.

    The warmup is nanoGPT's: update n (from 0) uses peak * (n + 1) / (warmup_steps + 1), so that none is wasted at zero.
    After it comes a cosine or a line down to peak * min_lr_ratio at `steps`, the peak with a line down over the last
    decay_fraction of the steps ("wsd"), or the peak ("constant").

    Args:
      optim: `config.optim`.
      steps: total number of updates.
      peak: largest learning rate.
    """
    warmup, last = optim.warmup_steps, steps - optim.warmup_steps
    decay = round(optim.decay_fraction * steps) if optim.schedule == "wsd" else last
    decay = max(1, min(decay, last))
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay, alpha=optim.min_lr_ratio),
        "linear": lambda: optax.linear_schedule(peak, peak * optim.min_lr_ratio, decay),
        "wsd": lambda: optax.linear_schedule(peak, peak * optim.min_lr_ratio, decay, transition_begin=last - decay),
        "constant": lambda: optax.constant_schedule(peak),
    }[optim.schedule]()
    if warmup:
        after = optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])
    # optax counts in int32, whose quotients are float32 even where parameters are float64
    return lambda n_updates: after(jnp.asarray(n_updates, float))


def make_optimizer(optim: ConfigDict, steps: int) -> optax.GradientTransformation:
    """The optax chain: clip by the global norm, then AdamW, or Muon on the hidden matrices and AdamW on the rest.

    Weight decay is decoupled and falls on matrices only (kernels and embeddings, not biases and norms), as nanoGPT's.
    Muon's update is scaled by sqrt(max(1, fan_out / fan_in)) (Jordan 2024); layers are orthogonalised each on its own.
    """
    adamw = optax.adamw(
        schedule(optim, steps, optim.learning_rate),
        optim.b1,
        optim.b2,
        optim.eps,
        weight_decay=optim.weight_decay,
        mask=lambda params: _by_path(params, _is_matrix),
    )
    if optim.name == "muon":
        muon = optax.chain(
            optax.contrib.scale_by_muon(beta=optim.muon_momentum, weight_dimension_numbers=_layer_matrices),
            optax.stateless(_scale_by_shape),
            optax.add_decayed_weights(optim.weight_decay),
            optax.scale_by_learning_rate(schedule(optim, steps, optim.muon_learning_rate)),
        )
        update = optax.partition(
            {"muon": muon, "adamw": adamw},
            lambda params: _by_path(params, lambda names: "muon" if _is_hidden_matrix(names) else "adamw"),
        )
    else:
        update = adamw
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), update) if optim.clip_norm else update


def _scale_by_shape(updates, params):
    """Makes the update of a matrix [.., in, out] act alike on vectors of any width."""
    return jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)


def _layer_matrices(params):
    """Every leaf is a stack [layer, in, out] of matrices."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), params)


def _is_matrix(names: list[str]) -> bool:
    return names[-1] in ("kernel", "embedding")


def _is_hidden_matrix(names: list[str]) -> bool:
    return "blocks" in names and names[-1] == "kernel"


def _by_path(params, function):
    """Maps every leaf to function(its names). By name, not by rank: a norm's scale is [layer, C], a matrix by rank."""

    def names(path):
        return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]  # skips the boxes of axis names

    return jax.tree_util.tree_map_with_path(lambda path, _: function(names(path)), params)
