"""Next-token cross-entropy from hidden states and the head, without the [batch, length, vocab] logits.

The sequence is processed in chunks. The forward pass also computes the gradients of the hidden states and the head,
because they are linear in the loss's cotangent, a scalar. So each of the head's three matmuls runs once, as in the
plain form, and only one chunk of logits is in memory (docs/performance.md#loss).

Shapes: B batch, T length, C n_embd, V rows of the head on a device (vocabulary and padding), N tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp

from trialgpt_jax.parallel.sharding import mesh_axis, spec

# Logits of a chunk per device. Larger chunks read the head's gradient less often, smaller ones need less memory.
CHUNK_ELEMENTS = 2**30


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy_sum(
    hidden_BxTxC: jax.Array, head_VxC: jax.Array, labels_BxT: jax.Array, vocab_size: int, softcap: float = 0.0
) -> jax.Array:
    """Sum over tokens of -log softmax(hidden @ head.T)[label].

    Under `jax.set_mesh` it runs per device: batch split over data x fsdp, rows of the head over tensor.

    Args:
      hidden_BxTxC: hidden states; their dtype is that of the logits. The softmax is float32 (float64 for float64).
      head_VxC: output vectors; rows from `vocab_size` on are padding and are masked.
      labels_BxT: int32 ids; tokens with a negative label are ignored.
      vocab_size: number of real ids.
      softcap: s > 0 makes the logits s * tanh(logits / s).

    Returns:
      Scalar of float32 (float64 for float64), nats.
    """
    return _run(hidden_BxTxC, head_VxC, labels_BxT, vocab_size, softcap, with_gradients=False)


def _forward(hidden_BxTxC, head_VxC, labels_BxT, vocab_size, softcap):
    loss, d_hidden, d_head = _run(hidden_BxTxC, head_VxC, labels_BxT, vocab_size, softcap, with_gradients=True)
    return loss, (d_hidden, d_head)


def _backward(vocab_size, softcap, gradients, cotangent):
    d_hidden, d_head = gradients
    return (d_hidden * cotangent).astype(d_hidden.dtype), (d_head * cotangent).astype(d_head.dtype), None


cross_entropy_sum.defvjp(_forward, _backward)


def _run(hidden_BxTxC, head_VxC, labels_BxT, vocab_size, softcap, with_gradients):
    """`_chunked` on each device of the mesh in use, or directly on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _chunked(hidden_BxTxC, head_VxC, labels_BxT, vocab_size, softcap, with_gradients, on_mesh=False)
    local = functools.partial(
        _chunked, vocab_size=vocab_size, softcap=softcap, with_gradients=with_gradients, on_mesh=True
    )
    outputs = (spec(), spec("batch"), spec("vocab", "embed")) if with_gradients else spec()
    specs = {"in_specs": (spec("batch"), spec("vocab"), spec("batch")), "out_specs": outputs}
    # check_vma=False: all reductions are explicit, and the scan's zero carries would need casts to vary
    return jax.shard_map(local, mesh=mesh, **specs, check_vma=False)(hidden_BxTxC, head_VxC, labels_BxT)


def _chunked(hidden_BxTxC, head_VxC, labels_BxT, vocab_size, softcap, with_gradients, on_mesh):
    """Loss, and with gradients those of the hidden states and of this device's rows of the head."""
    B, T, C = hidden_BxTxC.shape
    V = head_VxC.shape[0]
    dtype = jnp.promote_types(hidden_BxTxC.dtype, jnp.float32)
    cast_head_VxC = head_VxC.astype(hidden_BxTxC.dtype)
    options = {"vocab_size": vocab_size, "softcap": softcap, "with_gradients": with_gradients, "on_mesh": on_mesh}
    chunk = functools.partial(_one_chunk, head_VxC=cast_head_VxC, **options)

    n = _n_chunks(B, T, V)
    if n == 1:
        loss, d_hidden, d_head = chunk(hidden_BxTxC.reshape(-1, C), labels_BxT.reshape(-1))
    else:

        def body(carry, i):
            loss, d_head = carry
            piece = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * (T // n), slice_size=T // n, axis=1)
            l_i, d_hidden, d_i = chunk(piece(hidden_BxTxC).reshape(-1, C), piece(labels_BxT).reshape(-1))
            return (loss + l_i, d_head + d_i if with_gradients else None), d_hidden

        zero = jnp.zeros((V, C), dtype) if with_gradients else None
        (loss, d_head), d_hidden = jax.lax.scan(body, (jnp.zeros((), dtype), zero), jnp.arange(n))
        if with_gradients:
            d_hidden = d_hidden.reshape(n, B, T // n, C).swapaxes(0, 1)
    data, fsdp = mesh_axis("batch")
    loss = jax.lax.psum(loss, (data, fsdp)) if on_mesh else loss
    if not with_gradients:
        return loss
    if on_mesh:  # fsdp splits the head along C, so its gradient takes one reduce-scatter
        d_head = jax.lax.psum(jax.lax.psum_scatter(d_head, fsdp, scatter_dimension=1, tiled=True), data)
    return loss, d_hidden.reshape(B, T, C), d_head.astype(head_VxC.dtype)


def _one_chunk(hidden_NxC, labels_N, head_VxC, vocab_size, softcap, with_gradients, on_mesh):
    """Summed loss of N tokens, and the gradients of the hidden states [N, C] and the head [V, C] or None."""
    V, dtype = head_VxC.shape[0], jnp.promote_types(hidden_NxC.dtype, jnp.float32)
    tensor = mesh_axis("vocab")
    first_id = jax.lax.axis_index(tensor) * V if on_mesh else 0  # the id of this device's first row
    ids_V = first_id + jnp.arange(V)

    def over_vocab(reduce, x):
        return reduce(x, tensor) if on_mesh else x

    logits_NxV = jnp.einsum("nc,vc->nv", hidden_NxC, head_VxC).astype(dtype)
    if softcap:
        capped = jnp.tanh(logits_NxV / softcap)
        logits_NxV = softcap * capped
    if on_mesh or V > vocab_size:  # finfo.min, not -inf: (-inf) - (-inf) is NaN
        logits_NxV = jnp.where(ids_V < vocab_size, logits_NxV, jnp.finfo(dtype).min)
    is_label_NxV = ids_V == labels_N[:, None]
    if hidden_NxC.dtype == dtype:  # float32: the exponentials are stored for the gradient
        max_N = over_vocab(jax.lax.pmax, jnp.max(logits_NxV, axis=1))
        exp_NxV = jax.lax.optimization_barrier(jnp.exp(logits_NxV - max_N[:, None]))
        sum_N = over_vocab(jax.lax.psum, jnp.sum(exp_NxV, axis=1))
        if on_mesh:  # another device may have the label
            label_logit_N = jax.lax.psum(_masked_sum(logits_NxV, is_label_NxV), tensor)
        else:
            label_logit_N = jnp.take_along_axis(logits_NxV, labels_N[:, None], axis=1)[:, 0]
    else:  # bfloat16: exp is recomputed for the gradient instead of storing a float32 copy
        local_max_N, sum_N, label_logit_N = jax.lax.platform_dependent(
            logits_NxV, is_label_NxV, cuda=_row_statistics_one_pass, default=_row_statistics
        )
        max_N = over_vocab(jax.lax.pmax, local_max_N)
        sum_N = over_vocab(jax.lax.psum, sum_N * jnp.exp(local_max_N - max_N))
        label_logit_N = over_vocab(jax.lax.psum, label_logit_N)
        exp_NxV = jnp.exp(logits_NxV - max_N[:, None])
    log_normaliser_N = max_N + jnp.log(sum_N)
    valid_N = labels_N >= 0
    loss = jnp.sum(jnp.where(valid_N, log_normaliser_N - label_logit_N, 0))
    if not with_gradients:
        return loss, None, None
    d_logits = exp_NxV / sum_N[:, None] - is_label_NxV
    if softcap:
        d_logits = d_logits * (1 - capped**2)
    d_logits = jnp.where(valid_N[:, None], d_logits, 0).astype(hidden_NxC.dtype)
    d_hidden_NxC = over_vocab(jax.lax.psum, jnp.einsum("nv,vc->nc", d_logits, head_VxC))
    return loss, d_hidden_NxC, jnp.einsum("nv,nc->vc", d_logits, hidden_NxC, preferred_element_type=dtype)


def _masked_sum(logits_NxV: jax.Array, is_label_NxV: jax.Array) -> jax.Array:
    """The label's logit [N], 0 without one. It fuses with other reductions; a gather would be a loop on TPU."""
    return jnp.sum(jnp.where(is_label_NxV, logits_NxV, 0), axis=1)


def _row_statistics(logits_NxV: jax.Array, is_label_NxV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maximum, sum of exp(logit - maximum) and the label's logit of each row, [N] each."""
    max_N = jnp.max(logits_NxV, axis=1)
    return max_N, jnp.sum(jnp.exp(logits_NxV - max_N[:, None]), axis=1), _masked_sum(logits_NxV, is_label_NxV)


def _row_statistics_one_pass(logits_NxV: jax.Array, is_label_NxV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_row_statistics` as one reduction, because XLA:GPU makes two passes of it (docs/performance.md#loss).

    The sum is relative to the maximum so far (Milakov and Gimelshein 2018). Only the partial sum with the smaller
    maximum is rescaled, so that a logit takes one exponential.
    """

    def combine(a, b):
        (max_a, sum_a, label_a), (max_b, sum_b, label_b) = a, b
        scale = jnp.exp(-jnp.abs(max_a - max_b))
        sum_ab = jnp.where(max_a > max_b, sum_a + sum_b * scale, sum_a * scale + sum_b)
        return jnp.maximum(max_a, max_b), sum_ab, label_a + label_b

    zero = jnp.zeros((), logits_NxV.dtype)
    inputs = logits_NxV, jnp.ones_like(logits_NxV), jnp.where(is_label_NxV, logits_NxV, 0)
    return jax.lax.reduce(inputs, (jnp.finfo(logits_NxV.dtype).min, zero, zero), combine, (1,))


def _n_chunks(B: int, T: int, V: int) -> int:
    """The smallest number of equal chunks of the length whose logits stay within CHUNK_ELEMENTS."""
    return next(n for n in range(1, T + 1) if T % n == 0 and (B * T // n * V <= CHUNK_ELEMENTS or n == T))
