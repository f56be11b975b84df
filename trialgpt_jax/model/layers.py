"""Building blocks of the GPT: linear layers, embedding lookup, activations, rotary positions, remat policies.

GELU has a backward pass of its own, which recomputes from the input instead of storing float32 intermediates
(docs/performance.md#norm-gelu-vjp).

Shapes: B batch, T length, C n_embd, H heads, D head width, V padded vocabulary, N rows (B * T), I inputs, O outputs.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from trialgpt_jax.model import weights
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel.sharding import mesh_axis, spec


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32, or float64 if it is float64 already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rows(x: jax.Array) -> jax.Array:
    """[..., C] -> [N, C]."""
    return x.reshape(-1, x.shape[-1])


# ---- initial values


def normal(std: float, *axes: str):
    """Initializer N(0, std) that records the logical axis names."""
    init = nn.initializers.normal(std) if std else nn.initializers.zeros
    return nn.with_logical_partitioning(init, axes)


def ones(*axes: str):
    """Initializer of ones that records the logical axis names."""
    return nn.with_logical_partitioning(nn.initializers.ones, axes)


def vocabulary(config: GPTConfig, std: float):
    """Initializer N(0, std) for the rows of real ids. Padding rows are zero and stay zero: they receive no gradient."""
    init = nn.initializers.normal(std)

    def masked(key, shape, dtype):
        return jnp.where(jnp.arange(shape[0])[:, None] < config.vocab_size, init(key, shape, dtype), 0)

    return nn.with_logical_partitioning(masked, ("vocab", "embed"))


def projection_std(config: GPTConfig) -> float:
    """GPT-2's scale of residual projections: 2 * n_layer of them add up to the variance of one with std 0.02."""
    return 0.0 if config.zero_init_proj else 0.02 / math.sqrt(2 * config.n_layer)


# ---- linear layers and embeddings


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_kernel(kernel_IxO: jax.Array, axes: tuple[str, str]) -> jax.Array:
    """All-gathers a kernel along fsdp once per pass and reduce-scatters its gradient.

    Without it XLA gathers attention kernels again for the recomputation and for the input's gradient
    (docs/performance.md#fsdp-gather).
    """
    gathered = {"embed": "hidden", "heads_in": "heads", "mlp_in": "mlp"}
    return nn.with_logical_constraint(kernel_IxO, tuple(gathered.get(axis, axis) for axis in axes))


gather_kernel.defvjp(
    lambda kernel, axes: (gather_kernel(kernel, axes), None),
    lambda axes, _, d_kernel: (nn.with_logical_constraint(d_kernel, axes),),
)


class Dense(nn.Module):
    """x @ kernel + bias.

    Attributes:
      config: the model.
      features: O.
      axes: logical names of the kernel's axes.
      std: of the initial kernel.
    """

    config: GPTConfig
    features: int
    axes: tuple[str, str]
    std: float

    @nn.compact
    def __call__(self, x):
        """[..., I] -> [..., O] of `config.dtype`."""
        c = self.config
        x_NxI, shape = rows(x), (x.shape[-1], self.features)
        if c.decode:  # kernel [O, I] is read at memory speed for a few rows (docs/performance.md#decode-layout)
            kernel_OxI = self.param("kernel", normal(self.std, *self.axes[::-1]), shape[::-1], c.param_dtype)
            table = {"kernel": kernel_OxI, weights.SCALE: self.get_variable("params", weights.SCALE)}
            y_NxO = weights.multiply(table, "kernel", x_NxI, c.dtype, c.dtype)
        else:  # 2-D operands: faster kernel gradients on CPU (docs/performance.md#dense-rows)
            kernel_IxO = self.param("kernel", normal(self.std, *self.axes), shape, c.param_dtype)
            y_NxO = x_NxI @ gather_kernel(kernel_IxO.astype(c.dtype), self.axes)
        if c.bias:
            y_NxO = y_NxO + self.param("bias", normal(0, self.axes[1]), shape[1:], c.param_dtype).astype(c.dtype)
        return y_NxO.reshape(*x.shape[:-1], self.features)


def lookup(table: nn.Embed, ids_BxT: jax.Array) -> jax.Array:
    """Rows [B, T, C] of an embedding table.

    Under fsdp each device gathers the columns and looks up its own sequences inside `shard_map`: the gradient of the
    table is then a reduce-scatter, and not the all-reduce that XLA chooses (docs/performance.md#fsdp-gather).
    """
    if jnp.issubdtype(table.embedding.dtype, jnp.integer):
        return weights.rows(table.variables["params"], ids_BxT, table.dtype)
    matrix_VxC = table.embedding.astype(table.dtype)
    mesh, fsdp, tensor = jax.sharding.get_abstract_mesh(), mesh_axis("embed"), mesh_axis("vocab")
    # `init` runs on one token, which no mesh divides
    if mesh.empty or mesh.shape[fsdp] == 1 or table.is_initializing():
        return _take(matrix_VxC, ids_BxT)

    def local(matrix_VxC, ids_BxT):
        matrix_VxC = jax.lax.all_gather(matrix_VxC, fsdp, axis=1, tiled=True)
        rows_BxT = ids_BxT - jax.lax.axis_index(tensor) * matrix_VxC.shape[0]
        here = (rows_BxT >= 0) & (rows_BxT < matrix_VxC.shape[0])
        found = _take(matrix_VxC, jnp.where(here, rows_BxT, 0))
        return jax.lax.psum(jnp.where(here[..., None], found, 0), tensor)

    specs = {"in_specs": (spec("vocab", "embed"), spec("batch")), "out_specs": spec("batch")}
    return jax.shard_map(local, mesh=mesh, **specs, check_vma=False)(matrix_VxC, ids_BxT)


@jax.custom_vjp
def _take(matrix_VxC: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [..., C] of a matrix, whose gradient is summed in float32: in bfloat16 a sum of equal terms stops at 256 of
    them, and a frequent token has thousands in a batch."""
    return jnp.take(matrix_VxC, ids, axis=0)


def _take_backward(residuals, cotangent):
    matrix_VxC, ids = residuals  # the matrix for its shape
    total_VxC = jnp.zeros_like(wide(matrix_VxC)).at[ids].add(wide(cotangent))
    # the barrier: libtpu cannot compile some meshes without it (docs/performance.md#fsdp-gather)
    return jax.lax.optimization_barrier(total_VxC.astype(matrix_VxC.dtype)), None


_take.defvjp(lambda matrix_VxC, ids: (jnp.take(matrix_VxC, ids, axis=0), (matrix_VxC, ids)), _take_backward)


# ---- activations

_gelu = functools.partial(jax.nn.gelu, approximate=True)
_A, _B = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU in the tanh form that GPT-2 uses (Hendrycks and Gimpel 2016), computed in float32.

    Args:
      x: [..., C], the output of a matmul; the only array that the backward pass reads.

    Returns:
      [..., C] in the dtype of `x`.
    """
    # XLA:GPU recognises the form in the dtype of x as a cuBLASLt epilogue (docs/performance.md#gelu-epilogue).
    return jax.lax.platform_dependent(x, cuda=_gelu, default=lambda x: _gelu(wide(x)).astype(x.dtype))


def _gelu_backward(x, dy):
    x_wide = wide(jax.lax.optimization_barrier(x))
    tanh = jnp.tanh(_A * (x_wide + _B * x_wide**3))
    slope = 0.5 * (1 + tanh) + 0.5 * x_wide * (1 - tanh**2) * _A * (1 + 3 * _B * x_wide**2)
    return ((wide(dy) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def relu2(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (So et al. 2021)."""
    return jnp.square(jax.nn.relu(x))


def swiglu(x: jax.Array, gate: jax.Array) -> jax.Array:
    """silu(gate) * x (Shazeer 2020)."""
    return jax.nn.silu(gate) * x


ACTIVATIONS = {"gelu": gelu, "relu2": relu2, "swiglu": swiglu}
GATED = ("swiglu",)  # activations of two matmul outputs


# ---- positions


def rope(x_BxTxHxD: jax.Array, positions: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary position embedding; dimension i pairs with i + D/2 (Su et al. 2021; GPT-NeoX's pairing).

    `positions` is [T], or [B, T] where rows differ.
    """
    half = x_BxTxHxD.shape[-1] // 2
    dtype = jnp.promote_types(x_BxTxHxD.dtype, jnp.float32)
    frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions.astype(dtype)[..., None, None] * frequency  # [T, 1, D/2] or [B, T, 1, D/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BxTxHxD.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxHxD.dtype)


# What a position encoding does to queries and keys; learned positions are added to the embeddings instead.
POSITIONS = {
    "learned": lambda x, positions, c: x,
    "rope": lambda x, positions, c: rope(x, positions, c.rope_base),
}


# ---- rematerialisation: what of a layer, besides its input, is stored for the backward pass


def _kernel_outputs(primitive, *args, **params):
    """Stores the outputs of matmuls and attention kernels; norms and activations are recomputed."""
    named = jax.checkpoint_policies.save_only_these_names("qkv", "attention", "residual", "mlp")
    # cuDNN's attention has no checkpoint names, so its output and statistics are matched by primitive.
    return primitive.name.startswith("dot_product_attention_fwd") or named(primitive, *args, **params)


REMAT = {
    "none": _kernel_outputs,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
