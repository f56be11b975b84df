"""Muon: momentum whose matrices are orthogonalised, divided among the devices of a mesh.

Shapes: L layers of a stack, I inputs and O outputs of a kernel.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

# The odd polynomials p(x) = a x + b x^3 + c x^5 of Polar Express (Amsel et al. 2025, arXiv 2505.16932, Algorithm 1).
# Each is the best for the interval in which the ones before it leave the singular values; the first starts at
# [0.001, 1]. They are the first five rows of the paper's table. Rounding may leave the interval, therefore the paper
# divides the singular values by _SAFETY before each product, which is part of the coefficients here.
_SAFETY = 1.01
_PUBLISHED = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
POLAR_EXPRESS = tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _PUBLISHED)

_ROWS = ("fsdp", "tensor")  # the mesh axes over which kernels are split


class MuonState(NamedTuple):
    """The state of `scale_by_muon`."""

    momentum: Any  # like the parameters


def orthogonalise(x: jax.Array) -> jax.Array:
    """The nearest matrices with orthonormal rows or columns, U V^T of x = U S V^T, to within a few per cent.

    Five steps of Polar Express. They run in bfloat16 on accelerators and in float32 on CPU; float64 stays float64.
    The scale of a matrix does not matter; a matrix of zeros stays zero. Under a mesh the matrices of a stack [L, I, O]
    are divided among the devices.

    Args:
      x: matrices [..., I, O].

    Returns:
      The same shape and dtype.
    """

    def run(dtype):
        return lambda x: _divided(x.astype(dtype)).astype(x.dtype)

    if x.dtype == jnp.float64:
        return run(x.dtype)(x)
    return jax.lax.platform_dependent(x, cpu=run(jnp.float32), default=run(jnp.bfloat16))


def _divided(x: jax.Array) -> jax.Array:
    """`_newton_schulz` for which each device has some whole matrices of the stack, and no device has all of them.

    The devices exchange some rows of all matrices for all rows of some matrices, and back. Along data, where every
    device has the same rows, each takes its part of the stack, and the results are gathered. The stack is padded with
    zeros to a multiple of the devices (docs/performance.md#muon-mesh).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.ndim != 3:
        return _newton_schulz(x)
    n_rows = mesh.shape["fsdp"] * mesh.shape["tensor"]
    n_data = mesh.shape["data"] if n_rows < x.shape[0] else 1  # more devices than matrices would only add traffic
    if x.shape[1] % n_rows:
        return _newton_schulz(x)

    def local(x):
        part = jnp.pad(x, ((0, -len(x) % (n_rows * n_data)), (0, 0), (0, 0)))
        if n_data > 1:
            size = len(part) // n_data
            part = jax.lax.dynamic_slice_in_dim(part, jax.lax.axis_index("data") * size, size)
        part = jax.lax.all_to_all(part, _ROWS, split_axis=0, concat_axis=1, tiled=True)
        part = _newton_schulz(part)
        part = jax.lax.all_to_all(part, _ROWS, split_axis=1, concat_axis=0, tiled=True)
        if n_data > 1:
            part = jax.lax.all_gather(part, "data", tiled=True)
        return part[: len(x)]

    return jax.shard_map(local, in_specs=P(None, _ROWS), out_specs=P(None, _ROWS), check_vma=False)(x)


def _newton_schulz(x: jax.Array) -> jax.Array:
    tall = x.shape[-2] > x.shape[-1]
    x = _unit_norm(x.mT if tall else x)
    if x.shape[-1] >= 2 * x.shape[-2] and x.dtype != jnp.bfloat16:
        x = _product(x) @ x
    else:
        for a, b, c in POLAR_EXPRESS:
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def _product(x: jax.Array) -> jax.Array:
    """The product of the steps' polynomials of the Gram matrix x x^T, by which `_newton_schulz` multiplies `x`.

    All factors are square, so for matrices of 1:4 it takes 45% less time on CPU (docs/performance.md#muon-mesh). In
    bfloat16 the small eigenvalues of the Gram matrix are lost.
    """
    gram, product = x @ x.mT, None
    for a, b, c in POLAR_EXPRESS:
        factor = a * jnp.eye(gram.shape[-1], dtype=x.dtype) + b * gram + c * (gram @ gram)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    return product


def _unit_norm(x: jax.Array) -> jax.Array:
    """Matrices whose Frobenius norm is slightly below 1. Squares of elements divided by the largest cannot overflow."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jnp.abs(wide).max((-2, -1), keepdims=True)
    wide = wide / jnp.where(largest > 0, largest, 1)
    norm = _SAFETY * jnp.sqrt(jnp.square(wide).sum((-2, -1), keepdims=True))
    return (wide / jnp.where(norm > 0, norm, 1)).astype(x.dtype)


def scale_by_muon(momentum: float, nesterov: bool = True) -> optax.GradientTransformation:
    """Replaces gradients by orthogonalised momentum (Jordan 2024).

    Every leaf is a stack of kernels [L, I, O]. The momentum has no bias correction, as in Jordan's code, because the
    orthogonalisation removes the scale.

    Args:
      momentum: share of the old momentum that stays.
      nesterov: orthogonalise the momentum after one more step along this gradient.
    """

    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None):
        del params

        def mix(m, g):
            return momentum * m + (1 - momentum) * g

        m = jax.tree.map(mix, state.momentum, gradients)
        return jax.tree.map(orthogonalise, jax.tree.map(mix, m, gradients) if nesterov else m), MuonState(m)

    return optax.GradientTransformation(init, update)


def scale_by_shape(updates, params=None):
    """Scales the update of kernels [..., I, O] by sqrt(max(1, O / I)): the same effect at every width."""
    return jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)
