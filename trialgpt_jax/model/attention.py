"""Causal self-attention: cuDNN on GPU, Splash on TPU, plain XLA elsewhere, and the cached form for decoding.

Shapes: B batch, T query length, S key length, H query heads, K key/value heads (H = K * G), D head width.
Softmax is computed in float32 (float64 for float64 inputs) whatever the dtype of the inputs.
"""

import functools
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
    B, T, H, D = q_BxTxHxD.shape
    K = k_BxTxKxD.shape[2]
    q_BxKxGxTxD = q_BxTxHxD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k_BxKxTxD, v_BxKxTxD = k_BxTxKxD.transpose(0, 2, 1, 3), v_BxTxKxD.transpose(0, 2, 1, 3)
    out = _blocked(q_BxKxGxTxD, k_BxKxTxD, v_BxKxTxD, dropout_key, dropout if dropout_key is not None else 0.0)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q_BxKxGxTxD, k_BxKxSxD, v_BxKxSxD, dropout_key, dropout):
    """Causal attention in plain XLA, a block of M queries at a time over the S keys that it sees, [B, K, G, T, D].

    Weights are [B, K, S, G, M], keys first: XLA on CPU packs the right operand of a matmul at every call, and here that
    is a block's [M, D] or a product of it, while keys and weights stand on the left.

    The backward pass keeps the output and the softmax's logarithm of each row, and makes the weights again, as
    FlashAttention's does (Dao et al. 2022): on CPU that is quicker than reading [S, T] weights back.
    """
    return _blocked_forward(q_BxKxGxTxD, k_BxKxSxD, v_BxKxSxD, dropout_key, dropout)[0]


def _query_blocks(T: int) -> list[slice]:
    """At most eight, of at least 64 queries: an eighth of the masked half is computed, and programs stay small."""
    size = max(64, -(-T // 8))
    return [slice(begin, min(begin + size, T)) for begin in range(0, T, size)]


def _wide_einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _queries_last_but_one(x_BxKxDxGxM):
    """[B, K, G, M, D]; the barrier, as XLA on CPU would turn the operands of the matmul around, which are larger."""
    return jax.lax.optimization_barrier(x_BxKxDxGxM).transpose(0, 1, 3, 4, 2)


def _masked(scores_BxKxSxGxM, rows: slice):
    """-inf where a query comes before a key: among the block's own keys, the last ones, for it sees all others."""
    seen_MxM = jnp.triu(jnp.ones((rows.stop - rows.start,) * 2, bool))
    last = scores_BxKxSxGxM[:, :, rows.start :]
    return scores_BxKxSxGxM.at[:, :, rows.start :].set(jnp.where(seen_MxM[:, None], last, -jnp.inf))


def _kept_by_dropout(like_BxKxSxGxM, dropout_key, dropout, rows: slice):
    """What dropout multiplies the weights of a block by: 0 or 1 / (1 - rate)."""
    if not dropout:
        return 1.0
    kept = jax.random.bernoulli(jax.random.fold_in(dropout_key, rows.start), 1 - dropout, like_BxKxSxGxM.shape)
    return kept / (1 - dropout)


def _blocked_forward(q, k, v, dropout_key, dropout):
    outs, logs, scale, v_BxKxDxS = [], [], 1 / math.sqrt(q.shape[-1]), v.swapaxes(2, 3)
    for rows in _query_blocks(q.shape[3]):
        seen = slice(rows.stop)
        scores = _masked(_wide_einsum("bksd,bkgmd->bksgm", k[:, :, seen], q[:, :, :, rows]), rows)
        top = jnp.max(scores, axis=2, keepdims=True)
        # the barriers here and below: XLA on CPU would fuse exp into the sums, where it is six times as slow
        weights = jax.lax.optimization_barrier(jnp.exp((scores - top) * scale))
        total = jnp.sum(weights, axis=2, keepdims=True)
        weights = weights * _kept_by_dropout(weights, dropout_key, dropout, rows)
        out = _wide_einsum("bkds,bksgm->bkdgm", v_BxKxDxS[..., seen], weights.astype(v.dtype)) / total
        outs.append(_queries_last_but_one(out).astype(v.dtype))
        logs.append(top * scale + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), "attention")
    return out, (q, k, v, dropout_key, out, checkpoint_name(jnp.concatenate(logs, axis=4), "attention"))


def _blocked_backward(dropout, residuals, d_out):
    q, k, v, dropout_key, out, log_total_BxKx1xGxT = residuals
    wide, scale, k_BxKxDxS = log_total_BxKx1xGxT.dtype, 1 / math.sqrt(q.shape[-1]), k.swapaxes(2, 3)
    inner_BxKx1xGxT = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)[:, :, None]
    d_q, d_k, d_v = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    for rows in _query_blocks(q.shape[3]):
        q_i, d_i, seen = q[:, :, :, rows], d_out[:, :, :, rows], slice(rows.stop)
        scores = _masked(_wide_einsum("bksd,bkgmd->bksgm", k[:, :, seen], q_i), rows)
        weights = jax.lax.optimization_barrier(jnp.exp(scores * scale - log_total_BxKx1xGxT[..., rows]))
        kept = _kept_by_dropout(weights, dropout_key, dropout, rows)
        d_weights = _wide_einsum("bksd,bkgmd->bksgm", v[:, :, seen], d_i) * kept
        d_scores = weights * (d_weights - inner_BxKx1xGxT[..., rows]) * scale
        d_scores = jax.lax.optimization_barrier(d_scores.astype(q.dtype))
        d_q_i = _wide_einsum("bkds,bksgm->bkdgm", k_BxKxDxS[..., seen], d_scores)
        d_q.append(_queries_last_but_one(d_q_i).astype(q.dtype))
        d_k = d_k.at[:, :, seen].add(_wide_einsum("bksgm,bkgmd->bksd", d_scores, q_i))
        d_v = d_v.at[:, :, seen].add(_wide_einsum("bksgm,bkgmd->bksd", (weights * kept).astype(v.dtype), d_i))
    return jnp.concatenate(d_q, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


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
