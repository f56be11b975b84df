"""Optimizers and learning rate schedules by name, the settings of each group of weights, and gradient clipping."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from trialgpt_jax.schema import choose
from trialgpt_jax.training import muon
from trialgpt_jax.training.groups import GROUPS, Settings, group_of, settings

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


# ---- groups of weights


def learning_rates(optim: ConfigDict, steps: int, groups: Iterable[str] = GROUPS) -> dict[str, optax.Schedule]:
    """What is logged, by name: `lr`, and `lr/GROUP` of `groups` where one of them has another peak than `lr`."""
    peaks = {name: each.learning_rate for name, each in settings(optim).items() if name in groups}
    rates = {"lr": optim.learning_rate}
    if set(peaks.values()) != {optim.learning_rate}:
        rates |= {f"lr/{name}": peak for name, peak in peaks.items()}
    return {name: schedule(optim, steps, peak) for name, peak in rates.items()}


def groups_of(params) -> tuple[str, ...]:
    """The groups that have weights in `params`."""
    found = set(jax.tree.leaves(_labels(params)))
    return tuple(name for name in GROUPS if name in found)


# ---- optimizers: Settings -> optax.GradientTransformation, without learning rate and weight decay

# AdamW's eps is at least this. Squares of smaller gradients underflow to 0 in float32. With eps=0 the update of a row
# that never had a gradient, such as the padding of the vocabulary, would be 0 / 0, and that of a tiny one infinite.
_LEAST_EPS = float(jnp.finfo(jnp.float32).tiny) ** 0.5  # 1.1e-19


def _adamw(group: Settings):
    return optax.scale_by_adam(group.b1, group.b2, max(group.eps, _LEAST_EPS))


def _muon(group: Settings):
    return optax.chain(muon.scale_by_muon(group.b1), optax.stateless(muon.scale_by_shape))


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def make_optimizer(optim: ConfigDict, steps: int) -> optax.GradientTransformation:
    """The optimizers of all groups, after clipping by the global norm where `optim.clip_norm` is not 0.

    Weight decay is decoupled.

    Args:
      optim: `config.optim`.
      steps: number of updates in all.

    Raises:
      UserError: no optimizer or schedule of that name, settings that are refused by `settings`.
    """
    update = optax.partition(
        {name: _group_optimizer(optim, each, steps) for name, each in settings(optim).items()}, _labels
    )
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), update) if optim.clip_norm else update


def _group_optimizer(optim: ConfigDict, group: Settings, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        choose(OPTIMIZERS, group.optimizer, "optim.name")(group),
        optax.add_decayed_weights(group.weight_decay),
        optax.scale_by_learning_rate(schedule(optim, steps, group.learning_rate)),
    )


def always_finite(optim: ConfigDict) -> bool:
    """Whether finite gradients always give finite parameters and optimizer state, so that no step has to check them.

    AdamW's update is at most (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) learning rates, by the Cauchy-Schwarz
    inequality; singular values of Muon's matrices are about 1. At rates up to 1 the parameters are then below 1e15
    after 2^31 steps, and the largest float32 is 3e38. False for other optimizers and settings.
    """
    if optim.name not in OPTIMIZERS:
        return False

    def bounded(group: Settings) -> bool:
        moments_forget = group.optimizer == "muon" or min(1 - group.b1, 1 - group.b2, group.b2 - group.b1**2) > 1e-5
        return group.learning_rate * max(1.0, group.weight_decay) <= 1 and moments_forget

    return all(bounded(group) for group in settings(optim).values())


def _labels(params):
    """Every leaf's group."""

    def label(path, _):  # boxes of axis names have no key of their own
        return group_of([key.key for key in path if isinstance(key, jax.tree_util.DictKey)])

    return jax.tree_util.tree_map_with_path(label, params)
