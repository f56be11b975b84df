"""How the next token is drawn from logits: repetition penalty, greedy or temperature, top-k, top-p, min-p.

Shapes: B samples, V vocab_size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trialgpt_jax import UserError

_LARGEST = float(np.finfo(np.float32).max)


class Sampling(NamedTuple):
    """The order is repetition penalty, temperature, top-k, top-p, min-p, as in Hugging Face's `generate`.

    Attributes:
      temperature: divides the logits; 0 = greedy.
      top_k: sample from the k likeliest tokens; 0 = all.
      top_p: sample from the smallest set of likeliest tokens whose probabilities add up to p; 1 = all.
      min_p: sample from the tokens that are at least min_p times as likely as the likeliest one; 0 = all.
      repetition_penalty: logits of ids that the prompt or the new text has are divided by it where they are positive
        and multiplied where they are negative (Keskar et al. 2019); 1 = none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def validate(self) -> None:
        """Raises UserError for a value out of range; NaN is outside every range."""
        if not 0 <= self.temperature <= _LARGEST:
            raise UserError(f"temperature is {self.temperature}, but must be at least 0 (0 = greedy) and finite")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k is {self.top_k}, but must be at least 1, or 0 for no limit")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, outside (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}, outside [0, 1]")
        if not 0 < self.repetition_penalty <= _LARGEST:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}, but must be above 0 (1 = none) and finite"
            )


DEFAULT_SAMPLING = Sampling()


class Draw(NamedTuple):
    """`Sampling` as arrays, so that every setting runs the same compiled program."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array

    @classmethod
    def of(cls, sampling: Sampling) -> "Draw":
        """int32 for top_k, float32 for the others; scalars."""
        return cls(**(jax.tree.map(np.float32, sampling)._asdict() | {"top_k": np.int32(sampling.top_k)}))


def penalise(logits_BxV: jax.Array, seen_BxV: jax.Array, penalty: jax.Array) -> jax.Array:
    """The logits after the repetition penalty; `seen_BxV`: bool, the ids that each text has."""
    penalised_BxV = jnp.where(logits_BxV < 0, logits_BxV * penalty, logits_BxV / penalty)
    return jnp.where(seen_BxV, penalised_BxV, logits_BxV)


def sample(logits_BxV: jax.Array, draw: Draw, keys_B: jax.Array) -> jax.Array:
    """One id per row, int32 [B]; `keys_B` are PRNG keys. The repetition penalty is the caller's."""

    def greedy():
        return likeliest(logits_BxV)

    def sampled():
        # the ids of jax.random.categorical, which takes the argmax of the same sum
        noise_BxV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BxV.shape[1:], logits_BxV.dtype))(keys_B)
        return likeliest(limit(logits_BxV / draw.temperature, draw) + noise_BxV)

    return jax.lax.cond(draw.temperature == 0, greedy, sampled)


def likeliest(logits_BxV: jax.Array) -> jax.Array:
    """The first id with the largest logit, int32 [B]."""

    def two_passes():  # XLA on CPU runs argmax element by element (docs/performance.md#decode-layout)
        V = logits_BxV.shape[-1]
        top_Bx1 = jax.lax.optimization_barrier(jnp.max(logits_BxV, axis=-1, keepdims=True))
        return jnp.min(jnp.where(logits_BxV == top_Bx1, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)

    def one_pass():
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)

    return jax.lax.platform_dependent(cpu=two_passes, default=one_pass)


def limit(scaled_BxV: jax.Array, draw: Draw) -> jax.Array:
    """-inf for what top-k, then top-p, then min-p exclude from logits that are divided by the temperature."""
    sorts = (draw.top_k > 0) | (draw.top_p < 1)
    # The sort costs more than the head's matmul, so it runs only where a limit needs it.
    kept_BxV = jax.lax.cond(sorts, lambda: _limit_sorted(scaled_BxV, draw.top_k, draw.top_p), lambda: scaled_BxV)
    # p >= min_p * max(p) as logits: no softmax is needed. log(0) is -inf, and keeps all.
    least_Bx1 = jnp.max(kept_BxV, axis=-1, keepdims=True) + jnp.log(draw.min_p)
    return jnp.where(kept_BxV < least_Bx1, -jnp.inf, kept_BxV)


def _limit_sorted(logits_BxV, top_k, top_p):
    """-inf for what top-k and then top-p exclude; ties with the last token kept are kept."""
    V = logits_BxV.shape[-1]
    sorted_BxV = -jnp.sort(-logits_BxV, axis=-1)
    sorted_BxV = jnp.where(jnp.arange(V) < jnp.where(top_k > 0, top_k, V), sorted_BxV, -jnp.inf)
    probabilities = jax.nn.softmax(sorted_BxV, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # top_p >= 1: the rounded sum reaches 1 before the last token, which is kept anyway. The likeliest one is kept where
    # top_p is so small that XLA takes it for 0.
    keep = ((before < top_p) | (top_p >= 1) | (jnp.arange(V) == 0)) & (sorted_BxV > -jnp.inf)
    threshold_Bx1 = jnp.min(jnp.where(keep, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BxV < threshold_Bx1, -jnp.inf, logits_BxV)
