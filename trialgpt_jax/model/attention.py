"""Causal self-attention: cuDNN on GPU, Splash on TPU, XLA elsewhere; the cached form for decoding and the packed form
for scoring.

Shapes: B batch, T query length, S cache length, H query heads, K key/value heads (H = K * G), D head width, N = K * B.
Softmax runs in float32 (float64 for float64 inputs) whatever the dtype of the inputs.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trialgpt_jax.model.attention_cpu import blocked_attention
from trialgpt_jax.parallel.sharding import spec
from trialgpt_jax.schema import choose


def causal_attention(
    q_BxTxHxD: jax.Array,
    k_BxTxKxD: jax.Array,
    v_BxTxKxD: jax.Array,
    kernel: str,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, where token t attends to tokens 0..t.

    Args:
      q_BxTxHxD, k_BxTxKxD, v_BxTxKxD: queries, keys and values of one dtype.
      kernel: a key of `ATTENTION`, from `accelerators.attention_kernel`.
      dropout: rate at which attention weights are dropped ("xla" only).
      dropout_key: PRNG key; None = no dropout.

    Returns:
      [B, T, H, D] in the dtype of the inputs.

    Raises:
      UserError: no such kernel.
    """
    rate = 0.0 if dropout_key is None else dropout
    return choose(ATTENTION, kernel, "train.attention")(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, rate, dropout_key)


def reference_attention(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD):
    """`causal_attention` as its formula, with the [T, T] weights in memory: for readers and tests."""
    T, H, D = q_BxTxHxD.shape[1:]
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k_BxTxKxD, v_BxTxKxD))
    dtype = jnp.promote_types(q_BxTxHxD.dtype, jnp.float32)
    scores_BxHxTxT = jnp.einsum("bthd,bshd->bhts", q_BxTxHxD, k, preferred_element_type=dtype) / math.sqrt(D)
    causal_TxT = jnp.tril(jnp.ones((T, T), bool))
    weights = jax.nn.softmax(jnp.where(causal_TxT, scores_BxHxTxT, -jnp.inf))
    return jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)


class Packing(NamedTuple):
    """Which tokens of a row belong together: a row has several trees, each a trunk with branches.

    Attributes:
      tree_BxT: int32 number of the tree.
      branch_BxT: int32 number of the branch within the tree; 0 = the trunk, which all its branches continue.
    """

    tree_BxT: jax.Array
    branch_BxT: jax.Array


def packed_attention(q_BxTxHxD: jax.Array, k_BxTxKxD: jax.Array, v_BxTxKxD: jax.Array, packing: Packing) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, where a token attends to itself and to the earlier tokens of its trunk and branch.

    The weights [B, H, T, T] are in memory. Positions within a tree are the caller's.

    Returns:
      [B, T, H, D] in the dtype of the inputs.
    """
    B, T, H, D = q_BxTxHxD.shape
    K = k_BxTxKxD.shape[2]
    tree, branch = packing
    same_tree = tree[:, :, None] == tree[:, None, :]
    continues = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    visible_BxTxT = same_tree & continues & jnp.tril(jnp.ones((T, T), bool))
    q_BxTxKxGxD = q_BxTxHxD.reshape(B, T, K, H // K, D)
    dtype = jnp.promote_types(q_BxTxHxD.dtype, jnp.float32)
    scores = jnp.einsum("btkgd,bskd->bkgts", q_BxTxKxGxD, k_BxTxKxD, preferred_element_type=dtype) / math.sqrt(D)
    weights_BxKxGxTxT = jax.nn.softmax(jnp.where(visible_BxTxT[:, None, None], scores, jnp.finfo(dtype).min))
    out = jnp.einsum("bkgts,bskd->btkgd", weights_BxKxGxTxT.astype(v_BxTxKxD.dtype), v_BxTxKxD)
    return out.reshape(B, T, H, D)


def cached_attention(
    q_BxTxHxD: jax.Array,
    k_BxTxKxD: jax.Array,
    v_BxTxKxD: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    positions: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention of T new tokens over a cache, after their keys and values are written to it.

    Args:
      q_BxTxHxD, k_BxTxKxD, v_BxTxKxD: of the tokens at `positions`.
      cache: keys and values [K * B, S, D]; the token at position p has slot p % S, so from S tokens on it replaces the
        oldest one. Slots past a query's position are masked; they may hold anything finite.
        The keys of one head of one sample are contiguous, so that XLA on CPU does not copy the cache at every token
        (docs/performance.md#decode-layout).
      positions: int32 [T], consecutive positions of the new tokens; [B, T] where rows differ. From S on T is 1.

    Returns:
      [B, T, H, D] in the dtype of q, and the cache.
    """
    B, T, H, D = q_BxTxHxD.shape
    K, S = k_BxTxKxD.shape[2], cache[0].shape[1]
    G = H // K
    first = positions[..., 0] % S

    def write(old_NxSxD, new_BxTxKxD):
        new_NxTxD = new_BxTxKxD.transpose(2, 0, 1, 3).reshape(K * B, T, D)
        if positions.ndim == 1:
            return jax.lax.dynamic_update_slice_in_dim(old_NxSxD, new_NxTxD, first, axis=1)
        return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(
            old_NxSxD, new_NxTxD, jnp.tile(first, K), 0
        )

    k_NxSxD, v_NxSxD = (write(old, new) for old, new in zip(cache, (k_BxTxKxD, v_BxTxKxD), strict=True))
    q_NxMxD = q_BxTxHxD.reshape(B, T, K, G, D).transpose(2, 0, 3, 1, 4).reshape(K * B, G * T, D)
    dtype = jnp.promote_types(q_BxTxHxD.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)

    def keys_first(q_NxMxD, k_NxSxD):  # the barrier keeps XLA from swapping them (docs/performance.md#decode-layout)
        return jax.lax.optimization_barrier(product("nsd,nmd->nsm", k_NxSxD, q_NxMxD)).swapaxes(1, 2)

    def queries_first(q_NxMxD, k_NxSxD):
        return product("nmd,nsd->nms", q_NxMxD, k_NxSxD)

    scores_NxMxS = jax.lax.platform_dependent(q_NxMxD, k_NxSxD, cpu=keys_first, default=queries_first)
    # [M, S], or [N, M, S] where rows differ
    query_positions = jnp.tile(positions, G if positions.ndim == 1 else (K, G))
    visible = jnp.arange(S) <= query_positions[..., None]  # from position S on, all
    weights = jax.nn.softmax(jnp.where(visible, scores_NxMxS / math.sqrt(D), -jnp.inf), axis=-1)
    out_NxMxD = jnp.einsum("nms,nsd->nmd", weights.astype(q_BxTxHxD.dtype), v_NxSxD)
    out = out_NxMxD.reshape(K, B, G, T, D).transpose(1, 3, 0, 2, 4).reshape(B, T, H, D)
    return out, (k_NxSxD, v_NxSxD)


def _cudnn(q, k, v, dropout, dropout_key):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _splash(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, dropout, dropout_key):
    """JAX's Splash kernel, per device under `shard_map`: batch over data x fsdp, heads over tensor."""
    mesh = jax.sharding.get_abstract_mesh()

    def local(q_BxHxTxD, k_BxKxTxD, v_BxKxTxD):
        H, T, D = q_BxHxTxD.shape[1:]
        K = k_BxKxTxD.shape[1]
        kernel = _splash_kernel(H // K, T)
        q_BxKxGxTxD = (q_BxHxTxD / math.sqrt(D)).astype(q_BxHxTxD.dtype).reshape(-1, K, H // K, T, D)
        return jax.vmap(jax.vmap(kernel))(q_BxKxGxTxD, k_BxKxTxD, v_BxKxTxD).reshape(q_BxHxTxD.shape)

    if not mesh.empty:
        heads, kv_heads = spec("batch", "heads", "length", None), spec("batch", "kv_heads", "length", None)
        # check_vma=False: the kernel's outputs carry no varying-axes types
        specs = {"in_specs": (heads, kv_heads, kv_heads), "out_specs": heads}
        local = jax.shard_map(local, mesh=mesh, **specs, check_vma=False)
    out_BxHxTxD = local(*(x.transpose(0, 2, 1, 3) for x in (q_BxTxHxD, k_BxTxKxD, v_BxTxKxD)))
    return out_BxHxTxD.transpose(0, 2, 1, 3)


def _splash_kernel(queries_per_kv: int, length: int):
    """The kernel for one key/value head and its group of queries: [G, T, D], [T, D], [T, D] -> [G, T, D]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * queries_per_kv)
    block = min(512, length)
    while length % block:
        block -= 128
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names}, use_fused_bwd_kernel=True)
    return splash.make_splash_mqa_single_device(mask, block_sizes=sizes, residual_checkpoint_name="attention")


ATTENTION = {"cudnn": _cudnn, "splash": _splash, "xla": blocked_attention}
