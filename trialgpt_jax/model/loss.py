"""Next-token cross-entropy from hidden states and the head, without the [batch, length, vocab] logits.

The sequence is processed in chunks. The forward pass also computes the gradients of the hidden states and the head,
because they are linear in the loss's cotangent, a scalar. So each of the head's three matmuls runs once, as in the
plain form, and only one chunk of logits is in memory (docs/performance.md#loss).

Shapes: B batch, T length, C n_embd, V rows of the head on a device (vocabulary and padding), N tokens of a chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp

from trialgpt_jax.parallel.sharding import mesh_axis, spec

# Logits of a chunk per device. Larger chunks read the head's gradient less often, smaller ones need less memory.
CHUNK_ELEMENTS = 2**30
# Nats, of `_relative_to_label`. A logit counts at most LARGEST above the label's, so that no float32 sum overflows; one
# that is 87 - SHIFT below it underflows, and e^-37 changes nothing.
SHIFT, LARGEST = 50.0, 110.0


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
      Scalar of float32 (float64 for float64), nats. Of bfloat16 on CUDA, the loss of a token is exact up to `LARGEST`
      nats, and never more than `LARGEST` + log(vocab_size).
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


def _one_chunk(hidden_NxC, labels_N, head_VxC, **options):
    """Summed loss of N tokens, and the gradients of the hidden states [N, C] and the head [V, C] or None."""
    if hidden_NxC.dtype == jnp.promote_types(hidden_NxC.dtype, jnp.float32):
        return _relative_to_maximum(hidden_NxC, labels_N, head_VxC, **options)
    forms = {"cuda": _relative_to_label, "default": _relative_to_maximum}
    forms = {platform: functools.partial(form, **options) for platform, form in forms.items()}
    return jax.lax.platform_dependent(hidden_NxC, labels_N, head_VxC, **forms)


def _relative_to_maximum(hidden_NxC, labels_N, head_VxC, vocab_size, softcap, with_gradients, on_mesh):
    """`_one_chunk` by the softmax relative to the largest logit."""
    dtype, over_vocab = jnp.promote_types(hidden_NxC.dtype, jnp.float32), _over_vocab(on_mesh)
    ids_V = _ids(head_VxC, on_mesh)
    logits_NxV = jnp.einsum("nc,vc->nv", hidden_NxC, head_VxC).astype(dtype)
    logits_NxV, slope_NxV = _softcap(logits_NxV, softcap)
    if on_mesh or len(ids_V) > vocab_size:  # finfo.min, not -inf: (-inf) - (-inf) is NaN
        logits_NxV = jnp.where(ids_V < vocab_size, logits_NxV, jnp.finfo(dtype).min)
    is_label_NxV = ids_V == labels_N[:, None]
    max_N = over_vocab(jax.lax.pmax, jnp.max(logits_NxV, axis=1))
    exp_NxV = jnp.exp(logits_NxV - max_N[:, None])
    if hidden_NxC.dtype == dtype:  # stored for the gradient; bfloat16 computes it again instead of storing float32
        exp_NxV = jax.lax.optimization_barrier(exp_NxV)
    sum_N = over_vocab(jax.lax.psum, jnp.sum(exp_NxV, axis=1))
    if on_mesh or hidden_NxC.dtype != dtype:  # another device may have the label; a gather would be a loop on TPU
        label_logit_N = over_vocab(jax.lax.psum, jnp.sum(jnp.where(is_label_NxV, logits_NxV, 0), axis=1))
    else:
        label_logit_N = jnp.take_along_axis(logits_NxV, labels_N[:, None], axis=1)[:, 0]
    valid_N = labels_N >= 0
    loss = jnp.sum(jnp.where(valid_N, max_N + jnp.log(sum_N) - label_logit_N, 0))
    if not with_gradients:
        return loss, None, None
    d_logits = (exp_NxV / sum_N[:, None] - is_label_NxV) * slope_NxV
    d_logits = jnp.where(valid_N[:, None], d_logits, 0).astype(hidden_NxC.dtype)
    d_hidden_NxC = over_vocab(jax.lax.psum, jnp.einsum("nv,vc->nc", d_logits, head_VxC))
    return loss, d_hidden_NxC, jnp.einsum("nv,nc->vc", d_logits, hidden_NxC, preferred_element_type=dtype)


def _relative_to_label(hidden_NxC, labels_N, head_VxC, vocab_size, softcap, with_gradients, on_mesh):
    """`_one_chunk` by exponentials relative to the label's logit, in one pass over the logits.

    That logit is known before the pass, so the pass that sums the exponentials also stores them for the gradient's
    matmuls, not normalised (docs/performance.md#loss). The rows of the matmuls' operands and results are normalised
    instead. The label's own part of the gradient is added by a gather and a scatter.

    With r_v = exp(logit_v - logit_label - SHIFT) for v != label, R = sum of r_v, and Z = exp(-SHIFT) + R:
    loss = log(Z) + SHIFT, d_logit_v = r_v / Z, d_logit_label = -R / Z.
    """
    dtype, over_vocab = jnp.promote_types(hidden_NxC.dtype, jnp.float32), _over_vocab(on_mesh)
    ids_V, valid_N = _ids(head_VxC, on_mesh), labels_N >= 0
    row_N = jnp.clip(labels_N - ids_V[0], 0, len(ids_V) - 1)
    here_Nx1 = (ids_V[0] + row_N == labels_N)[:, None]  # False without a label, and for the label of another device
    label_NxC = jnp.where(here_Nx1, jnp.take(head_VxC, row_N, axis=0).astype(dtype), 0)
    label_logit_N = over_vocab(jax.lax.psum, jnp.sum(hidden_NxC.astype(dtype) * label_NxC, axis=1))
    label_logit_N, label_slope_N = _softcap(label_logit_N, softcap)
    others = ids_V != labels_N[:, None]
    if on_mesh or len(ids_V) > vocab_size:
        others &= ids_V < vocab_size

    def exponentials(logits_NxV):
        logits_NxV, slope_NxV = _softcap(logits_NxV.astype(dtype), softcap)
        relative_NxV = jnp.minimum(logits_NxV - label_logit_N[:, None], LARGEST) - SHIFT
        return jnp.where(others, jnp.exp(relative_NxV), 0), slope_NxV

    logits_NxV = jnp.einsum("nc,vc->nv", hidden_NxC, head_VxC)
    exp_NxV, _ = exponentials(logits_NxV)
    sum_N = over_vocab(jax.lax.psum, jnp.sum(exp_NxV, axis=1))
    total_N = math.exp(-SHIFT) + sum_N
    loss = jnp.sum(jnp.where(valid_N, jnp.log(total_N) + SHIFT, 0))
    if not with_gradients:
        return loss, None, None
    # the barrier: one kernel reads the logits for both uses (docs/performance.md#loss)
    exp_NxV, slope_NxV = exponentials(jax.lax.optimization_barrier(logits_NxV))
    stored_NxV = (exp_NxV * slope_NxV).astype(hidden_NxC.dtype)
    scale_Nx1 = (valid_N / total_N)[:, None]
    label_scale_Nx1 = scale_Nx1 * (sum_N * label_slope_N)[:, None]
    d_hidden_NxC = jnp.einsum("nv,vc->nc", stored_NxV, head_VxC, preferred_element_type=dtype)
    d_hidden_NxC = (scale_Nx1 * d_hidden_NxC - label_scale_Nx1 * label_NxC).astype(hidden_NxC.dtype)
    d_hidden_NxC = over_vocab(jax.lax.psum, d_hidden_NxC)
    scaled_hidden_NxC = (scale_Nx1 * hidden_NxC).astype(hidden_NxC.dtype)
    d_head_VxC = jnp.einsum("nv,nc->vc", stored_NxV, scaled_hidden_NxC, preferred_element_type=dtype)
    d_head_VxC = d_head_VxC.at[row_N].add(-jnp.where(here_Nx1, label_scale_Nx1 * hidden_NxC, 0))
    return loss, d_hidden_NxC, d_head_VxC


def _softcap(logits: jax.Array, softcap: float) -> tuple[jax.Array, jax.Array | float]:
    """softcap * tanh(logits / softcap) and its derivative; the logits and 1 without a softcap."""
    if not softcap:
        return logits, 1.0
    capped = jnp.tanh(logits / softcap)
    return softcap * capped, 1 - capped**2


def _ids(head_VxC: jax.Array, on_mesh: bool) -> jax.Array:
    """The ids [V] of this device's rows of the head."""
    V = head_VxC.shape[0]
    return (jax.lax.axis_index(mesh_axis("vocab")) * V if on_mesh else 0) + jnp.arange(V)


def _over_vocab(on_mesh: bool):
    """A function that applies a collective over the devices that share the vocabulary."""
    return lambda reduce, x: reduce(x, mesh_axis("vocab")) if on_mesh else x


def _n_chunks(B: int, T: int, V: int) -> int:
    """The smallest number of equal chunks of the length whose logits stay within CHUNK_ELEMENTS."""
    return next(n for n in range(1, T + 1) if T % n == 0 and (B * T // n * V <= CHUNK_ELEMENTS or n == T))
