"""Next-token cross-entropy from hidden states and the head, without the [batch, length, vocab] logits.

The sequence is cut into chunks; each chunk's logits are made, reduced and, when a gradient is wanted, turned at once into
the gradients of the hidden states and the head (they are linear in the loss's cotangent, which is a scalar). So the head's
three matmuls run once each, as in the plain form, and only one chunk of logits ever exists.

Shapes: B batch, T length, C n_embd, V rows of the head (vocabulary and padding), N tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from trialgpt_jax.parallel.sharding import BATCH

# Elements of a chunk's logits per device. Larger chunks re-read the head's gradient less often, smaller ones need less memory.
CHUNK_ELEMENTS = 2**30


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy_sum(
    hidden_BxTxC: jax.Array, head_VxC: jax.Array, labels_BxT: jax.Array, vocab_size: int, softcap: float = 0.0
) -> jax.Array:
    """Sum over tokens of -log softmax(hidden @ head.T)[label].

    Under `jax.set_mesh` it runs per device: the batch split over data x fsdp, the head's rows over tensor.

    Args:
      hidden_BxTxC: hidden states, which set the dtype of the logits; the softmax is float32 (float64 for float64).
      head_VxC: output vectors; rows from `vocab_size` on are padding and take no part.
      labels_BxT: int32 ids; a negative label leaves its token out.
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
    """`_chunked` on each device of the mesh in use, or as it is where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _chunked(hidden_BxTxC, head_VxC, labels_BxT, vocab_size, softcap, with_gradients, on_mesh=False)
    local = functools.partial(
        _chunked, vocab_size=vocab_size, softcap=softcap, with_gradients=with_gradients, on_mesh=True
    )
    outputs = (P(), P(BATCH), P("tensor", "fsdp")) if with_gradients else P()
    # check_vma=False: the reductions are all explicit here, and the scan's zero carries would need casts to vary
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(BATCH), P("tensor"), P(BATCH)), out_specs=outputs, check_vma=False
    )  # fmt: skip
    return run(hidden_BxTxC, head_VxC, labels_BxT)


def _chunked(hidden_BxTxC, head_VxC, labels_BxT, vocab_size, softcap, with_gradients, on_mesh):
    B, T, C = hidden_BxTxC.shape
    V = head_VxC.shape[0]
    dtype = hidden_BxTxC.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    matrix_VxC = head_VxC.astype(dtype)
    first_id = jax.lax.axis_index("tensor") * V if on_mesh else 0  # the id of this device's first row
    ids_V = first_id + jnp.arange(V)

    def over_vocab(reduce, x):
        return reduce(x, "tensor") if on_mesh else x

    def chunk(hidden_NxC, labels_N):
        logits_NxV = jnp.einsum("nc,vc->nv", hidden_NxC, matrix_VxC).astype(wide)
        if softcap:
            capped = jnp.tanh(logits_NxV / softcap)
            logits_NxV = softcap * capped
        if on_mesh or V > vocab_size:  # the lowest finite number: of two infinities there is no difference
            logits_NxV = jnp.where(ids_V < vocab_size, logits_NxV, jnp.finfo(wide).min)
        is_label_NxV = ids_V == labels_N[:, None]
        if dtype == wide:  # as on CPU, where the exponentials are worth keeping for the gradient
            max_N = over_vocab(jax.lax.pmax, jnp.max(logits_NxV, axis=1))
            exp_NxV = jax.lax.optimization_barrier(jnp.exp(logits_NxV - max_N[:, None]))
            sum_N = over_vocab(jax.lax.psum, jnp.sum(exp_NxV, axis=1))
            if on_mesh:  # the label may be another device's
                label_logit_N = jax.lax.psum(_masked_sum(logits_NxV, is_label_NxV), "tensor")
            else:
                label_logit_N = jnp.take_along_axis(logits_NxV, labels_N[:, None], axis=1)[:, 0]
        else:  # beside bfloat16 they would be a float32 copy, and are made again in the pass that needs them
            local_max_N, sum_N, label_logit_N = jax.lax.platform_dependent(
                logits_NxV, is_label_NxV, cuda=_reduced_in_one_pass, default=_reduced
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
        d_logits = jnp.where(valid_N[:, None], d_logits, 0).astype(dtype)
        d_hidden_NxC = over_vocab(jax.lax.psum, jnp.einsum("nv,vc->nc", d_logits, matrix_VxC))
        return loss, d_hidden_NxC, jnp.einsum("nv,nc->vc", d_logits, hidden_NxC, preferred_element_type=wide)

    n = _n_chunks(B, T, V)
    if n == 1:
        loss, d_hidden, d_head = chunk(hidden_BxTxC.reshape(-1, C), labels_BxT.reshape(-1))
    else:

        def body(carry, i):
            loss, d_head = carry
            piece = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * (T // n), slice_size=T // n, axis=1)
            l_i, d_hidden, d_i = chunk(piece(hidden_BxTxC).reshape(-1, C), piece(labels_BxT).reshape(-1))
            return (loss + l_i, d_head + d_i if with_gradients else None), d_hidden

        zero = jnp.zeros((V, C), wide) if with_gradients else None
        (loss, d_head), d_hidden = jax.lax.scan(body, (jnp.zeros((), wide), zero), jnp.arange(n))
        if with_gradients:
            d_hidden = d_hidden.reshape(n, B, T // n, C).swapaxes(0, 1)
    loss = jax.lax.psum(loss, BATCH) if on_mesh else loss
    if not with_gradients:
        return loss
    if on_mesh:  # the head is split over fsdp along C, and so is its gradient: a reduce-scatter, once
        d_head = jax.lax.psum(jax.lax.psum_scatter(d_head, "fsdp", scatter_dimension=1, tiled=True), "data")
    return loss, d_hidden.reshape(B, T, C), d_head.astype(head_VxC.dtype)


def _masked_sum(logits_NxV: jax.Array, is_label_NxV: jax.Array) -> jax.Array:
    """The label's logit, 0 without one. On a TPU a gather would be a loop; this fuses with the reductions beside it."""
    return jnp.sum(jnp.where(is_label_NxV, logits_NxV, 0), axis=1)


def _reduced(logits_NxV: jax.Array, is_label_NxV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maximum, sum of exp(logit - maximum) and the label's logit of each row. XLA:TPU takes the maximum while it makes the
    logits, and the sums in one pass over them."""
    max_N = jnp.max(logits_NxV, axis=1)
    return max_N, jnp.sum(jnp.exp(logits_NxV - max_N[:, None]), axis=1), _masked_sum(logits_NxV, is_label_NxV)


def _reduced_in_one_pass(logits_NxV: jax.Array, is_label_NxV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `_reduced`, which XLA:GPU makes two passes of.

    The sum is kept relative to the maximum so far (Milakov and Gimelshein 2018). Of two partial sums only the one with the
    smaller maximum is scaled, so that a logit takes one exponential.
    """

    def join(a, b):
        (max_a, sum_a, label_a), (max_b, sum_b, label_b) = a, b
        scale = jnp.exp(-jnp.abs(max_a - max_b))
        sum_ab = jnp.where(max_a > max_b, sum_a + sum_b * scale, sum_a * scale + sum_b)
        return jnp.maximum(max_a, max_b), sum_ab, label_a + label_b

    zero = jnp.zeros((), logits_NxV.dtype)
    inputs = logits_NxV, jnp.ones_like(logits_NxV), jnp.where(is_label_NxV, logits_NxV, 0)
    return jax.lax.reduce(inputs, (jnp.finfo(logits_NxV.dtype).min, zero, zero), join, (1,))


def _n_chunks(B: int, T: int, V: int) -> int:
    """The fewest equal chunks of the length whose logits stay within CHUNK_ELEMENTS."""
    return next(n for n in range(1, T + 1) if T % n == 0 and (B * T // n * V <= CHUNK_ELEMENTS or n == T))
