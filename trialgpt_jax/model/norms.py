"""LayerNorm and RMSNorm, of hidden states and of the heads of queries and keys.

They have a backward pass of their own, which recomputes from the input instead of storing float32 intermediates. These
take a third of the memory of a bfloat16 step (docs/performance.md#norm-gelu-vjp).

Shapes: B batch, T length, C n_embd, H heads, D head width.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.layers import normal, ones, wide
from trialgpt_jax.schema import choose


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def norm(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, eps: float, centred: bool, kept: bool = False
) -> jax.Array:
    """LayerNorm or RMSNorm over the last axis, statistics in float32 (float64 for float64).

    Args:
      x: [..., C].
      scale: [C], or None for no scale.
      bias: [C] or None.
      eps: added to the variance. GPT-2's is 1e-5; Flax's LayerNorm defaults to 1e-6.
      centred: subtract the mean (LayerNorm, Ba et al. 2016); otherwise RMSNorm (Zhang and Sennrich 2019).
      kept: keep the statistics for the backward pass on CUDA too, where a bfloat16 norm moves fewer bytes without.

    Returns:
      [..., C] in the dtype of `x`.
    """
    return _norm_forward(x, scale, bias, eps, centred, kept)[0]


NORMS = {"layernorm": functools.partial(norm, centred=True), "rmsnorm": functools.partial(norm, centred=False)}


def _statistics(x: jax.Array, eps: float, centred: bool) -> tuple[jax.Array, jax.Array]:
    """Mean (0 unless centred) and 1 / standard deviation, [..., 1], in float32 or float64."""
    x_wide = wide(x)
    if not centred:
        return jnp.zeros((), x_wide.dtype), jax.lax.rsqrt(jnp.mean(jnp.square(x_wide), -1, keepdims=True) + eps)

    def two_passes(x_wide):
        mean = jnp.mean(x_wide, -1, keepdims=True)
        return mean, jax.lax.rsqrt(jnp.mean(jnp.square(x_wide - mean), -1, keepdims=True) + eps)

    def one_pass(x_wide):  # E[x^2] - mean^2 cancels, which loses less than the rounding of bfloat16
        mean = jnp.mean(x_wide, -1, keepdims=True)
        variance = jnp.mean(jnp.square(x_wide), -1, keepdims=True) - jnp.square(mean)
        return mean, jax.lax.rsqrt(jnp.maximum(variance, 0) + eps)

    if x.dtype == x_wide.dtype:
        return two_passes(x_wide)
    if x.size == x.shape[-1]:
        return one_pass(x_wide)
    # XLA:GPU makes a norm of several rows one kernel in this form (docs/performance.md#norm-gelu-vjp)
    return jax.lax.platform_dependent(x_wide, cuda=two_passes, default=one_pass)


def _norm_forward(x, scale, bias, eps, centred, kept):
    mean, inverse = _statistics(x, eps, centred)
    y = (wide(x) - mean) * inverse
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(x.dtype), (x, scale, bias, mean, inverse)


def _norm_backward(eps, centred, kept, residuals, dy):
    x, scale, bias, mean, inverse = residuals
    # optimization_barrier: XLA would otherwise store the forward pass's float32 copy of x
    x_wide, dy = wide(jax.lax.optimization_barrier(x)), wide(dy)
    g = dy if scale is None else dy * scale

    def with_kept_statistics(x_wide, g, mean, inverse):  # 8 bytes a row; then both means take one pass over x
        mean_of_product = jnp.mean(g * (x_wide - mean) * inverse, -1, keepdims=True)
        return mean, inverse, jnp.mean(g, -1, keepdims=True), mean_of_product

    def with_statistics_again(x_wide, g, *_):  # four means in one pass; the kept statistics are never computed
        means = (jnp.mean(y, -1, keepdims=True) for y in (x_wide, jnp.square(x_wide), g, g * x_wide))
        mean_x, mean_square, mean_g, mean_gx = jax.lax.optimization_barrier(tuple(means))
        mean = mean_x if centred else jnp.zeros((), x_wide.dtype)
        inverse = jax.lax.rsqrt(jnp.maximum(mean_square - jnp.square(mean), 0) + eps)
        return mean, inverse, mean_g, (mean_gx - mean * mean_g) * inverse

    if kept or x.dtype == x_wide.dtype:
        statistics = with_kept_statistics(x_wide, g, mean, inverse)
    else:
        forms = {"cuda": with_statistics_again, "default": with_kept_statistics}
        statistics = jax.lax.platform_dependent(x_wide, g, mean, inverse, **forms)
    mean, inverse, mean_of_g, mean_of_product = statistics
    normalised = (x_wide - mean) * inverse
    dx = g - normalised * mean_of_product
    if centred:
        dx = dx - mean_of_g
    others = tuple(range(x.ndim - 1))
    d_scale = None if scale is None else jnp.sum(dy * normalised, others).astype(scale.dtype)
    d_bias = None if bias is None else jnp.sum(dy, others).astype(bias.dtype)
    return (dx * inverse).astype(x.dtype), d_scale, d_bias


norm.defvjp(_norm_forward, _norm_backward)


class Norm(nn.Module):
    """The config's norm over C, with the scale and bias that it has."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        scale = self.param("scale", ones("embed"), (c.n_embd,), c.param_dtype) if c.norm_scale else None
        has_bias = c.bias and c.norm == "layernorm"
        bias = self.param("bias", normal(0, "embed"), (c.n_embd,), c.param_dtype) if has_bias else None
        return choose(NORMS, c.norm, "model.norm")(x, scale, bias, c.norm_eps)


class HeadNorm(nn.Module):
    """RMSNorm over the channels of each head, of queries and keys; with one scale for all heads or none."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BxTxHxD):
        c = self.config
        scale = self.param("scale", ones("channel"), (c.head_dim,), c.param_dtype) if c.qk_norm_scale else None
        return norm(x_BxTxHxD, scale, None, c.norm_eps, centred=False, kept=True)  # XLA:GPU fuses it with rope
