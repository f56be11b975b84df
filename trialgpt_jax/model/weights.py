"""Matrices of a model for decoding in fewer bytes: bfloat16, or int8 with a scale per output channel.

A decoded token reads every matrix once, so its time is that of their bytes. A matrix in int8 is round(w / scale) with
scale = max|w| / 127 over the inputs of an output channel; the matmul multiplies by the scale after its sum. Biases,
norms and learned positions stay as they are.

Shapes: V ids, C n_embd, I inputs, O output channels, N rows.
"""

import functools
import math

import jax
import jax.numpy as jnp

from trialgpt_jax import UserError

WEIGHTS = ("auto", "bfloat16", "int8")  # auto = the dtype of the model's matmuls
SCALE = "channel_scale"  # beside a kernel or embedding in int8: float32 [O] or [V]
_MANY_ROWS = 128  # from which on x @ matrix.T is faster on CPU than matrix @ x
_TILE = 64  # output channels that are converted at a time: 64 x 3,072 float32 fit into the L2 cache
_OUTPUTS = {"kernel": -1, "embedding": -2}  # the axis of output channels in the layout for training


def check(weights: str) -> None:
    """Raises UserError unless `weights` is one of WEIGHTS."""
    if weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}, not one of {', '.join(WEIGHTS)}")


def _quantised(matrix: jax.Array, outputs: int) -> tuple[jax.Array, jax.Array]:
    """int8 of the matrix's shape, and float32 scales that broadcast to it."""
    inputs = -1 if outputs == -2 else -2
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    scale = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True) / 127
    scale = jnp.where(scale > 0, scale, 1)  # a channel of zeros
    return jnp.round(wide / scale).astype(jnp.int8), scale.astype(jnp.float32)


def _is_matrix(path: tuple) -> bool:
    return path[-1].key in _OUTPUTS and path[0].key != "wpe"


def rounded(params: dict, weights: str) -> dict:
    """Parameters in the layout for training whose matrices have the values that they have as `weights`."""
    return params if weights == "auto" else _rounded(params, weights)


@functools.partial(jax.jit, static_argnums=1)
def _rounded(params: dict, weights: str) -> dict:
    def one(path, matrix):
        if not _is_matrix(path):
            return matrix
        if weights == "bfloat16":
            return matrix.astype(jnp.bfloat16).astype(matrix.dtype)
        integers, scale = _quantised(matrix, _OUTPUTS[path[-1].key])
        return (integers * scale).astype(matrix.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def stored(params: dict, weights: str, dtype: str) -> dict:
    """Parameters in the layout for training with matrices as decoding reads them: of `dtype`, or in fewer bytes.

    bfloat16 is kept as its bits in uint16 where `dtype` is another: XLA on CPU converts these at memory speed, and
    bfloat16 itself element by element. An int8 matrix has its scales beside it as SCALE.
    """

    def inside(path: str, node: dict) -> dict:
        made = {}
        for name, value in node.items():
            if isinstance(value, dict):
                made[name] = inside(path or name, value)
            elif name not in _OUTPUTS or path == "wpe":
                made[name] = value.astype(dtype) if name in _OUTPUTS else value
            elif weights == "int8":
                made[name], scale = _quantised(value, _OUTPUTS[name])
                made[SCALE] = scale.squeeze(-1 if name == "embedding" else -2)
            elif weights == "bfloat16" and dtype != weights:
                made[name] = jax.lax.bitcast_convert_type(value.astype(jnp.bfloat16), jnp.uint16)
            else:
                made[name] = value.astype(dtype)
        return made

    return inside("", params)


def converted(matrix: jax.Array, dtype: str) -> jax.Array:
    """The elements of a stored matrix in `dtype`; those of an int8 one without their scales."""
    if matrix.dtype == jnp.uint16:  # the upper half of a float32
        return jax.lax.bitcast_convert_type(matrix.astype(jnp.uint32) << 16, jnp.float32).astype(dtype)
    return matrix.astype(dtype)


def multiply(table: dict, name: str, x: jax.Array, dtype: str, out_dtype: str) -> jax.Array:
    """matrix @ x for every row of x.

    Args:
      table: a module's parameters as `stored` gives them.
      name: of the matrix in it, [O, I].
      x: [..., I] of `dtype`.
      dtype: of the operands.
      out_dtype: of the sums.

    Returns:
      [..., O] of `out_dtype`.
    """
    matrix_OxI, scale_O = table[name], table.get(SCALE)
    x_NxI, O = x.reshape(-1, x.shape[-1]), matrix_OxI.shape[0]
    N = x_NxI.shape[0]

    def dot(tile_OxI):
        """[O, N, 1]: without the last axis XLA on CPU swaps the operands (docs/performance.md#decode-layout)."""
        if N < _MANY_ROWS:
            return jnp.einsum("oi,nti->ont", tile_OxI, x_NxI[:, None], preferred_element_type=out_dtype)
        return jnp.einsum("ni,oi->no", x_NxI, tile_OxI, preferred_element_type=out_dtype).T[..., None]

    def whole():
        return dot(converted(matrix_OxI, dtype))

    def tiled():
        # XLA on CPU either converts inside its matmul, one element at a time, or writes the converted matrix to memory
        # (docs/performance.md#weights). The barrier keeps a converted tile in the cache.
        def body(i, out_OxNx1):
            tile = jax.lax.dynamic_slice_in_dim(matrix_OxI, i * size, size)
            tile = jax.lax.optimization_barrier(converted(tile, dtype))
            return jax.lax.dynamic_update_slice_in_dim(out_OxNx1, dot(tile), i * size, 0)

        return jax.lax.fori_loop(0, O // size, body, jnp.zeros((O, N, 1), out_dtype))

    size = math.gcd(O, _TILE)
    fewer_bytes = jnp.issubdtype(matrix_OxI.dtype, jnp.integer)
    out_OxNx1 = jax.lax.platform_dependent(cpu=tiled, default=whole) if fewer_bytes else whole()
    if scale_O is not None:
        out_OxNx1 = (out_OxNx1 * scale_O[:, None, None]).astype(out_dtype)
    return out_OxNx1.transpose(1, 2, 0).reshape(*x.shape[:-1], O)


def rows(table: dict, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows [..., C] in `dtype` of an embedding that `stored` keeps in fewer bytes."""
    found = converted(jnp.take(table["embedding"], ids, axis=0), dtype)
    return found if table.get(SCALE) is None else (found * jnp.take(table[SCALE], ids, axis=0)[..., None]).astype(dtype)
