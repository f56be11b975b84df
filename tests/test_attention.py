"""Attention against numpy in float64; which kernel a platform gets; Splash in a program compiled for TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trialgpt_jax import UserError
from trialgpt_jax.model.attention import cached_attention, causal_attention, reference_attention
from trialgpt_jax.parallel.accelerators import attention_kernel


def by_loops(q, k, v):
    """The formula in numpy, one query at a time, with keys and values repeated for grouped queries."""
    B, T, H, D = q.shape
    k, v = (np.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    out = np.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                scores = k[b, : t + 1, h] @ q[b, t, h] / np.sqrt(D)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ v[b, : t + 1, h] / weights.sum()
    return out


def inputs(heads, kv_heads, dtype=np.float64):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(2, 7, n, 8)).astype(dtype) for n in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_causal_and_cached_attention_match_numpy_in_float64(heads, kv_heads):
    with jax.enable_x64(True):
        q, k, v = inputs(heads, kv_heads)
        want = by_loops(q, k, v)
        np.testing.assert_allclose(causal_attention(q, k, v, "xla"), want, rtol=1e-12)
        cache = (jnp.full((kv_heads * 2, 10, 8), 9.0),) * 2  # slots that are not written yet
        one_by_one = []
        for t in range(7):
            y, cache = cached_attention(*(x[:, t : t + 1] for x in (q, k, v)), cache, jnp.array([t]))
            one_by_one.append(y)
        np.testing.assert_allclose(np.concatenate(one_by_one, axis=1), want, rtol=1e-12)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_reference_attention_matches_numpy_in_float64(heads, kv_heads):
    with jax.enable_x64(True):
        q, k, v = inputs(heads, kv_heads)
        out = reference_attention(q, k, v)
        assert out.dtype == np.float64
        np.testing.assert_allclose(out, by_loops(q, k, v), rtol=1e-12)


def test_reference_attention_keeps_bfloat16_and_computes_the_softmax_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(4, 2))
    out = reference_attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    want = by_loops(*(np.asarray(x, np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize(("length", "kv_heads"), [(128, 4), (300, 2), (1100, 1)])  # 2, 5 and 8 blocks of queries
def test_blocked_attention_and_its_gradients_match_the_reference_in_float64(length, kv_heads):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        q, k, v, d_out = (jnp.asarray(rng.normal(size=(2, length, n, 8))) for n in (4, kv_heads, kv_heads, 4))

        @functools.partial(jax.jit, static_argnums=0)
        def with_gradients(attention, q, k, v, d_out):
            out, pull = jax.vjp(attention, q, k, v)
            return out, pull(d_out)

        want, want_gradients = with_gradients(reference_attention, q, k, v, d_out)
        got, gradients = with_gradients(lambda *x: causal_attention(*x, "xla"), q, k, v, d_out)
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)
        for mine, theirs in zip(gradients, want_gradients, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_gradient_under_dropout_uses_the_weights_kept_in_the_forward_pass():
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        q, k, v, *directions = (jnp.asarray(rng.normal(size=(1, 200, 2, 4))) for _ in range(6))

        @jax.jit
        def f(step):
            moved = (x + step * d for x, d in zip((q, k, v), directions, strict=True))
            return jnp.sum(jnp.sin(causal_attention(*moved, "xla", 0.4, jax.random.key(3))))

        numeric = (f(1e-5) - f(-1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(f)(0.0), numeric, rtol=1e-7)


def test_dropout_drops_the_rate_and_keeps_the_mean():
    q, k, _ = inputs(4, 4, np.float32)
    v = np.ones_like(k)
    attend = jax.jit(lambda i: causal_attention(q, k, v, "xla", 0.25, jax.random.key(i)))
    outs = np.stack([attend(i) for i in range(400)])
    assert outs.std() > 0.05  # dropout has an effect
    np.testing.assert_allclose(outs.mean(0), 1.0, atol=0.12)


def test_dropout_drops_each_weight_with_its_rate_independently_of_the_others():
    """With equal scores and the identity for v, row t of the output holds the weights: 0, or 1 / 0.75 / (t + 1)."""
    T = 192  # three blocks of queries
    q, v = np.zeros((1, T, 2, T), np.float32), np.tile(np.eye(T, dtype=np.float32)[None, :, None], (1, 1, 2, 1))
    out = np.asarray(causal_attention(q, q, v, "xla", 0.25, jax.random.key(0)))[0] * np.arange(1, T + 1)[:, None, None]
    heads = [out[:, head][np.tril_indices(T)] for head in (0, 1)]
    for weights in heads:
        kept = weights > 0
        np.testing.assert_allclose(weights[kept], 1 / 0.75, rtol=1e-5)
        assert abs(kept.mean() - 0.75) < 5 * (0.25 * 0.75 / kept.size) ** 0.5
    assert 0.5 < ((heads[0] > 0) == (heads[1] > 0)).mean() < 0.75  # 0.625 if independent
    for first, second in ((0, 64), (0, 128), (64, 128)):  # the same place in two blocks
        pair = [out[block : block + 64, 0, : first + 64] > 0 for block in (first, second)]
        rows = np.tril(np.ones((64, first + 64), bool), first)  # what both see
        assert 0.5 < (pair[0] == pair[1])[rows].mean() < 0.75


SETTING = {"dtype": "bfloat16", "head_dim": 64, "block_size": 1024, "dropout": 0.0}


def test_auto_is_the_fused_kernel_of_the_platform():
    assert [attention_kernel("auto", p, **SETTING) for p in ("gpu", "tpu", "cpu")] == ["cudnn", "splash", "xla"]


@pytest.mark.parametrize(
    ("requested", "platform", "change", "words"),
    [
        ("auto", "gpu", {"dtype": "float32"}, ("cudnn", "bfloat16", "train.attention=xla")),
        ("auto", "gpu", {"head_dim": 20}, ("cudnn", "head width", "model.head_dim")),
        ("auto", "tpu", {"block_size": 100}, ("splash", "block_size", "128")),
        ("auto", "tpu", {"dropout": 0.1}, ("splash", "model.dropout")),
        ("cudnn", "cpu", {}, ("cudnn", "gpu", "cpu")),
    ],
)
def test_a_kernel_that_cannot_be_used_is_an_error_that_names_the_option(requested, platform, change, words):
    with pytest.raises(UserError) as error:
        attention_kernel(requested, platform, **(SETTING | change))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_splash_compiles_for_tpu_with_its_gradient(kv_heads):
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the `test` extra")
    from jax.experimental import topologies

    from trialgpt_jax.parallel.sharding import batch_sharding, make_mesh

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, topology.devices)
    shapes = [
        jax.ShapeDtypeStruct((4, 256, n, 64), jnp.bfloat16, sharding=batch_sharding(mesh))
        for n in (4, kv_heads, kv_heads)
    ]

    def gradients(q, k, v):
        return jax.grad(lambda *x: causal_attention(*x, "splash").astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    with jax.set_mesh(mesh):
        text = jax.jit(gradients).lower(*shapes).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 2  # forward and backward
