"""How the next token is drawn from logits: greedy, temperature, top-k, top-p.

Shapes: B samples, V vocab_size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trialgpt_jax import UserError


class Sampling(NamedTuple):
    """The order is temperature, top-k, top-p, as in Hugging Face's `generate`.

    Attributes:
      temperature: divides the logits; 0 = greedy.
      top_k: sample from the k likeliest tokens; 0 = all.
      top_p: sample from the smallest set of likeliest tokens whose probabilities add up to p; 1 = all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def validate(self) -> None:
        """Raises UserError for a value out of range; NaN is outside every range."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}, but must be at least 0 (0 = greedy) and finite")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, but must be at least 1, or 0 for no limit")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, outside (0, 1]")


DEFAULT_SAMPLING = Sampling()


class Draw(NamedTuple):
    """`Sampling` as arrays, so that every setting runs the same compiled program."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array

    @classmethod
    def of(cls, sampling: Sampling) -> "Draw":
        """float32, int32 and float32 scalars."""
        return cls(jnp.float32(sampling.temperature), jnp.int32(sampling.top_k), jnp.float32(sampling.top_p))


def sample(logits_BxV: jax.Array, draw: Draw, keys_B: jax.Array) -> jax.Array:
    """One id per row, int32 [B]; `keys_B` are PRNG keys."""

    def greedy():
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)

    def sampled():
        scaled_BxV = logits_BxV / draw.temperature
        limited = (draw.top_k > 0) | (draw.top_p < 1)
        # The sort costs more than the head's matmul, so it runs only where a limit needs it.
        kept_BxV = jax.lax.cond(limited, lambda: _limit(scaled_BxV, draw.top_k, draw.top_p), lambda: scaled_BxV)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BxV).astype(jnp.int32)

    return jax.lax.cond(draw.temperature == 0, greedy, sampled)


def _limit(logits_BxV, top_k, top_p):
    """-inf for what top-k and then top-p exclude; ties with the last token kept are kept."""
    V = logits_BxV.shape[-1]
    sorted_BxV = -jnp.sort(-logits_BxV, axis=-1)
    sorted_BxV = jnp.where(jnp.arange(V) < jnp.where(top_k > 0, top_k, V), sorted_BxV, -jnp.inf)
    probabilities = jax.nn.softmax(sorted_BxV, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # top_p >= 1: the rounded sum reaches 1 before the last token, which is kept anyway
    keep = ((before < top_p) | (top_p >= 1)) & (sorted_BxV > -jnp.inf)
    threshold_Bx1 = jnp.min(jnp.where(keep, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BxV < threshold_Bx1, -jnp.inf, logits_BxV)
