"""Norms and GELU whose backward passes keep their inputs alone, in the dtype in which they came.

Automatic differentiation keeps float32 copies of what lies between: on an H200 (32 x 1,024 tokens, GPT-2 124M, bfloat16)
that is a third of the memory that a step needs besides its state. Here a backward pass computes them again from the input,
inside the same fused loop. The barriers keep the compiler from noticing that it has seen these values before, and from
storing them after all.
"""

import functools
import math

import jax
import jax.numpy as jnp

EPS = 1e-5  # GPT-2's; Flax's LayerNorm defaults to 1e-6


def _wide(x: jax.Array) -> jax.Array:
    """`x` in float32, or float64 if it is that already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, centred: bool) -> jax.Array:
    """LayerNorm or RMSNorm over the last axis, eps 1e-5, statistics in float32.

    Args:
      x: [..., C].
      scale: [C].
      bias: [C] or None.
      centred: subtract the mean (LayerNorm, Ba et al. 2016); otherwise RMSNorm (Zhang and Sennrich 2019).

    Returns:
      [..., C] in the dtype of `x`.
    """
    return _norm_forward(x, scale, bias, centred)[0]


def _statistics(x: jax.Array, centred: bool) -> tuple[jax.Array, jax.Array]:
    """Mean (0 unless centred) and 1 / standard deviation, [..., 1], in float32 or float64."""
    wide = _wide(x)
    if not centred:
        return jnp.zeros((), wide.dtype), jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + EPS)
    mean = jnp.mean(wide, -1, keepdims=True)
    if x.dtype == wide.dtype:  # E[x^2] - mean^2 would lose digits
        variance = jnp.mean(jnp.square(wide - mean), -1, keepdims=True)
    else:  # far fewer than the rounding of x has cost already, and both sums take one pass over x
        variance = jnp.maximum(jnp.mean(jnp.square(wide), -1, keepdims=True) - jnp.square(mean), 0)
    return mean, jax.lax.rsqrt(variance + EPS)


def rms(x: jax.Array) -> jax.Array:
    """x / RMS(x) over the last axis, in the dtype of `x`: the parameter-free norm of queries and keys."""
    return (_wide(x) * _statistics(x, centred=False)[1]).astype(x.dtype)


def _norm_forward(x, scale, bias, centred):
    mean, inverse = _statistics(x, centred)
    y = (_wide(x) - mean) * inverse * scale
    # the statistics are kept, at 8 bytes a row: without them the sums over rows below would need a pass of their own
    return (y if bias is None else y + bias).astype(x.dtype), (x, scale, bias, mean, inverse)


def _norm_backward(centred, kept, dy):
    x, scale, bias, mean, inverse = kept
    wide, dy = _wide(jax.lax.optimization_barrier(x)), _wide(dy)
    normal = (wide - mean) * inverse
    g = dy * scale
    dx = g - normal * jnp.mean(g * normal, -1, keepdims=True)
    if centred:
        dx = dx - jnp.mean(g, -1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    d_scale = jnp.sum(dy * normal, rows).astype(scale.dtype)
    d_bias = None if bias is None else jnp.sum(dy, rows).astype(bias.dtype)
    return (dx * inverse).astype(x.dtype), d_scale, d_bias


norm.defvjp(_norm_forward, _norm_backward)

_A, _B = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU in the tanh form that GPT-2 uses (Hendrycks and Gimpel 2016), in float32.

    XLA:GPU takes it into the matmul before it, where cuBLAS computes it in float32, but knows it by its form in the dtype
    of `x` alone; where it stays outside (in a loop over layers, in training) its error is a third larger than rounding alone.

    Args:
      x: [..., C], a matmul's output. It is what the backward pass reads.

    Returns:
      [..., C] in the dtype of `x`.
    """
    return jax.lax.platform_dependent(x, cuda=_gelu, default=lambda x: _gelu(_wide(x)).astype(x.dtype))


_gelu = functools.partial(jax.nn.gelu, approximate=True)


def _gelu_backward(x, dy):
    wide = _wide(jax.lax.optimization_barrier(x))
    tanh = jnp.tanh(_A * (wide + _B * wide**3))
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh**2) * _A * (1 + 3 * _B * wide**2)
    return ((_wide(dy) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
