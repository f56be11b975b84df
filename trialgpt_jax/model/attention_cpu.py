"""Causal attention in plain XLA, laid out for XLA's CPU matmuls; the kernel "xla" of `attention.py`.

FlashAttention's scheme (Dao et al. 2022) with blocks over queries only: the backward pass recomputes the weights from
the stored logarithm of the softmax's normaliser. Layouts and barriers follow measurements on CPU
(docs/performance.md#attention-cpu).

Shapes: B batch, T length, S visible keys, K key/value heads, G queries per key/value head, D head width, M queries in
a block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def blocked_attention(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, dropout: float, dropout_key):
    """`attention.causal_attention`, with dropout of the attention weights."""
    B, T, H, D = q_BxTxHxD.shape
    K = k_BxTxKxD.shape[2]
    q_BxKxGxTxD = q_BxTxHxD.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k_BxKxTxD, v_BxKxTxD = k_BxTxKxD.transpose(0, 2, 1, 3), v_BxTxKxD.transpose(0, 2, 1, 3)
    out = _blocked(q_BxKxGxTxD, k_BxKxTxD, v_BxKxTxD, dropout_key, dropout)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q_BxKxGxTxD, k_BxKxTxD, v_BxKxTxD, dropout_key, dropout):
    """[B, K, G, T, D]. Weights of a block are [B, K, S, G, M], keys first, as XLA packs a matmul's right operand."""
    return _forward(q_BxKxGxTxD, k_BxKxTxD, v_BxKxTxD, dropout_key, dropout)[0]


def _query_blocks(T: int) -> list[slice]:
    """At most eight blocks of at least 64 queries: an eighth of the masked half is computed; programs stay small."""
    size = max(64, -(-T // 8))
    return [slice(begin, min(begin + size, T)) for begin in range(0, T, size)]


def _einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum that accumulates and returns at least float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _head_width_last(x_BxKxDxGxM):
    """[B, K, G, M, D]. The barrier keeps XLA from transposing the operands of the matmul, which are larger."""
    return jax.lax.optimization_barrier(x_BxKxDxGxM).transpose(0, 1, 3, 4, 2)


def _masked(scores_BxKxSxGxM, rows: slice):
    """-inf where the key comes after the query, which happens only in the last keys, those of the block itself."""
    causal_MxM = jnp.triu(jnp.ones((rows.stop - rows.start,) * 2, bool))
    last = scores_BxKxSxGxM[:, :, rows.start :]
    return scores_BxKxSxGxM.at[:, :, rows.start :].set(jnp.where(causal_MxM[:, None], last, -jnp.inf))


def _dropout_factor(like_BxKxSxGxM, dropout_key, dropout, rows: slice):
    """0 or 1 / (1 - rate) for each weight of a block."""
    if not dropout:
        return 1.0
    kept = jax.random.bernoulli(jax.random.fold_in(dropout_key, rows.start), 1 - dropout, like_BxKxSxGxM.shape)
    return kept / (1 - dropout)


def _forward(q, k, v, dropout_key, dropout):
    outs, logs, scale, v_BxKxDxT = [], [], 1 / math.sqrt(q.shape[-1]), v.swapaxes(2, 3)
    for rows in _query_blocks(q.shape[3]):
        seen = slice(rows.stop)
        scores = _masked(_einsum("bksd,bkgmd->bksgm", k[:, :, seen], q[:, :, :, rows]), rows)
        top = jnp.max(scores, axis=2, keepdims=True)
        # Barriers, here and below: XLA on CPU fuses exp into the sums, where it is six times as slow.
        weights = jax.lax.optimization_barrier(jnp.exp((scores - top) * scale))
        total = jnp.sum(weights, axis=2, keepdims=True)
        weights = weights * _dropout_factor(weights, dropout_key, dropout, rows)
        out = _einsum("bkds,bksgm->bkdgm", v_BxKxDxT[..., seen], weights.astype(v.dtype)) / total
        outs.append(_head_width_last(out).astype(v.dtype))
        logs.append(top * scale + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), "attention")
    return out, (q, k, v, dropout_key, out, checkpoint_name(jnp.concatenate(logs, axis=4), "attention"))


def _backward(dropout, residuals, d_out):
    q, k, v, dropout_key, out, log_total_BxKx1xGxT = residuals
    dtype, scale, k_BxKxDxT = log_total_BxKx1xGxT.dtype, 1 / math.sqrt(q.shape[-1]), k.swapaxes(2, 3)
    inner_BxKx1xGxT = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1)[:, :, None]
    d_q, d_k, d_v = [], jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)
    for rows in _query_blocks(q.shape[3]):
        q_i, d_i, seen = q[:, :, :, rows], d_out[:, :, :, rows], slice(rows.stop)
        scores = _masked(_einsum("bksd,bkgmd->bksgm", k[:, :, seen], q_i), rows)
        weights = jax.lax.optimization_barrier(jnp.exp(scores * scale - log_total_BxKx1xGxT[..., rows]))
        factor = _dropout_factor(weights, dropout_key, dropout, rows)
        d_weights = _einsum("bksd,bkgmd->bksgm", v[:, :, seen], d_i) * factor
        d_scores = weights * (d_weights - inner_BxKx1xGxT[..., rows]) * scale
        d_scores = jax.lax.optimization_barrier(d_scores.astype(q.dtype))
        d_q_i = _einsum("bkds,bksgm->bkdgm", k_BxKxDxT[..., seen], d_scores)
        d_q.append(_head_width_last(d_q_i).astype(q.dtype))
        d_k = d_k.at[:, :, seen].add(_einsum("bksgm,bkgmd->bksd", d_scores, q_i))
        d_v = d_v.at[:, :, seen].add(_einsum("bksgm,bkgmd->bksd", (weights * factor).astype(v.dtype), d_i))
    return jnp.concatenate(d_q, axis=3), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_blocked.defvjp(_forward, _backward)
