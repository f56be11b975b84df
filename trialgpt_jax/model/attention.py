"""Causal self-attention: cuDNN on GPU, Splash on TPU, plain XLA elsewhere, and the cached form for decoding.

Shapes: B batch, T query length, S key length, H query heads, K key/value heads (H = K * G), D head width.
Softmax is computed in float32 (float64 for float64 inputs) whatever the dtype of the inputs.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from trialgpt_jax.parallel.sharding import BATCH


def causal_attention(
    q_BxTxHxD: jax.Array,
    k_BxTxKxD: jax.Array,
    v_BxTxKxD: jax.Array,
    kernel: str,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, where token t sees tokens 0..t.

    Args:
      q_BxTxHxD, k_BxTxKxD, v_BxTxKxD: queries, keys and values of one dtype.
      kernel: "cudnn", "splash" or "xla", from `accelerators.attention_kernel`.
      dropout: rate at which attention weights are dropped ("xla" only).
      dropout_key: PRNG key for it; None = no dropout.

    Returns:
      [B, T, H, D] in the dtype of the inputs.
    """
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, is_causal=True, implementation="cudnn")
    if kernel == "splash":
        return _splash(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD)
    T = q_BxTxHxD.shape[1]
    mask_TxS = jnp.tril(jnp.ones((T, T), bool))
    return _attend(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, mask_TxS, dropout, dropout_key)


def cached_attention(
    q_BxTxHxD: jax.Array,
    k_BxTxKxD: jax.Array,
    v_BxTxKxD: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    positions_T: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention of T new tokens over a cache, which takes up their keys and values first.

    Args:
      q_BxTxHxD, k_BxTxKxD, v_BxTxKxD: of the tokens at `positions_T`.
      cache: keys and values [K * B, S, D], the batch within the heads; slots past a query's position may hold anything
        finite. What a head of a sample reads is so in one piece, whatever the batch: laid out in another way, XLA on CPU
        copies the whole cache at every token.
      positions_T: int32, slot of each new token, ascending by one.

    Returns:
      [B, T, H, D] in the dtype of q, and the cache.
    """
    B, T, H, D = q_BxTxHxD.shape
    K = k_BxTxKxD.shape[2]
    k_NxSxD, v_NxSxD = (
        jax.lax.dynamic_update_slice_in_dim(old, new.transpose(2, 0, 1, 3).reshape(K * B, T, D), positions_T[0], axis=1)
        for old, new in zip(cache, (k_BxTxKxD, v_BxTxKxD), strict=True)
    )
    G = H // K
    q_NxMxD = q_BxTxHxD.reshape(B, T, K, G, D).transpose(2, 0, 3, 1, 4).reshape(K * B, G * T, D)
    wide = jnp.promote_types(q_BxTxHxD.dtype, jnp.float32)
    scores_NxMxS = jnp.einsum("nmd,nsd->nms", q_NxMxD, k_NxSxD, preferred_element_type=wide)
    seen_MxS = jnp.arange(k_NxSxD.shape[1]) <= jnp.tile(positions_T, G)[:, None]
    weights = jax.nn.softmax(jnp.where(seen_MxS, scores_NxMxS / math.sqrt(D), -jnp.inf), axis=-1)
    out_NxMxD = jnp.einsum("nms,nsd->nmd", weights.astype(q_BxTxHxD.dtype), v_NxSxD)
    out = out_NxMxD.reshape(K, B, G, T, D).transpose(1, 3, 0, 2, 4).reshape(B, T, H, D)
    return out, (k_NxSxD, v_NxSxD)


def _attend(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, mask_TxS, dropout=0.0, dropout_key=None):
    B, T, H, D = q_BxTxHxD.shape
    K = k_BxSxKxD.shape[2]
    q_BxTxKxGxD = q_BxTxHxD.reshape(B, T, K, H // K, D)
    wide = jnp.promote_types(q_BxTxHxD.dtype, jnp.float32)
    scores = jnp.einsum("btkgd,bskd->bkgts", q_BxTxKxGxD, k_BxSxKxD, preferred_element_type=wide)
    weights = jax.nn.softmax(jnp.where(mask_TxS, scores / math.sqrt(D), -jnp.inf), axis=-1)
    weights = checkpoint_name(weights, "attention")
    if dropout_key is not None and dropout > 0:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout), 0)
    out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(q_BxTxHxD.dtype), v_BxSxKxD)
    return out.reshape(B, T, H, D)


def _splash(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD):
    """JAX's Splash kernel, per device under shard_map: batch over data x fsdp, heads over tensor."""
    mesh = jax.sharding.get_abstract_mesh()
    heads_first = P(BATCH, "tensor", None, None) if not mesh.empty else None

    def local(q_BxHxTxD, k_BxKxTxD, v_BxKxTxD):
        H, T, D = q_BxHxTxD.shape[1:]
        K = k_BxKxTxD.shape[1]
        kernel = _splash_kernel(H // K, T)
        q_BxKxGxTxD = (q_BxHxTxD / math.sqrt(D)).astype(q_BxHxTxD.dtype).reshape(-1, K, H // K, T, D)
        return jax.vmap(jax.vmap(kernel))(q_BxKxGxTxD, k_BxKxTxD, v_BxKxTxD).reshape(q_BxHxTxD.shape)

    if heads_first is not None:
        # check_vma=False: the kernel's outputs carry no varying-axes types
        local = jax.shard_map(
            local, mesh=mesh, in_specs=(heads_first,) * 3, out_specs=heads_first, check_vma=False
        )  # fmt: skip
    out_BxHxTxD = local(*(x.transpose(0, 2, 1, 3) for x in (q_BxTxHxD, k_BxTxKxD, v_BxTxKxD)))
    return out_BxHxTxD.transpose(0, 2, 1, 3)


def _splash_kernel(queries_per_kv: int, length: int):
    """The kernel for one key/value head and its group of queries: [G, T, D], [T, D], [T, D] -> [G, T, D]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * queries_per_kv)
    block = min(512, length)
    while length % block:
        block -= 128
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    return splash.make_splash_mqa_single_device(mask, block_sizes=sizes, residual_checkpoint_name="attention")
