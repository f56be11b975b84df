"""The chunked cross-entropy against the plain formula: value in numpy float64, gradients by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trialgpt_jax.model import loss as loss_lib
from trialgpt_jax.model.loss import cross_entropy_sum

B, T, C, VOCAB, V = 3, 8, 16, 61, 128


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, C)).astype(dtype)
    head = rng.normal(size=(V, C)).astype(dtype)
    labels = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    labels[0, :2] = 0, VOCAB - 1  # the first and the last id
    labels[1, 3:] = -1  # ignored
    return hidden, head, labels


def plain(hidden, head, labels, softcap=0.0, xp=np):
    """The formula with all logits in memory, over the real ids only."""
    logits = hidden @ head[:VOCAB].T
    if softcap:
        logits = softcap * xp.tanh(logits / softcap)
    logits = logits - logits.max(-1, keepdims=True)
    log_p = logits - xp.log(xp.exp(logits).sum(-1, keepdims=True))
    picked = xp.take_along_axis(log_p, xp.maximum(labels, 0)[..., None], -1)[..., 0]
    return -xp.where(labels >= 0, picked, 0).sum()


@pytest.fixture(params=[2**30, B * 2 * V, 1], ids=["one chunk", "chunks of two", "chunks of one"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(loss_lib, "CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("softcap", [0.0, 2.5])
def test_value_and_gradients_in_float64(chunks, softcap):
    with jax.enable_x64(True):
        hidden, head, labels = inputs(np.float64)
        got, gradients = jax.value_and_grad(lambda *x: 0.3 * cross_entropy_sum(*x, labels, VOCAB, softcap), (0, 1))(
            hidden, head
        )
        np.testing.assert_allclose(got, 0.3 * plain(hidden, head, labels, softcap), rtol=1e-13)
        want = jax.grad(lambda h, w: 0.3 * plain(h, w, labels, softcap, jnp), (0, 1))(hidden, head)
        for g, w in zip(gradients, want):
            np.testing.assert_allclose(g, w, rtol=1e-11, atol=1e-13)
        assert not np.asarray(gradients[1][VOCAB:]).any()  # padding rows get no gradient


def test_value_in_float32_is_exact_to_rounding(chunks):
    hidden, head, labels = inputs()
    want = plain(hidden.astype(np.float64), head.astype(np.float64), labels)
    np.testing.assert_allclose(cross_entropy_sum(hidden, head, labels, VOCAB), want, rtol=1e-6)


def test_padding_and_ignored_labels_have_no_effect(chunks):
    hidden, head, labels = inputs()
    padded = head.copy()
    padded[VOCAB:] = 1e4
    other = hidden.copy()
    other[1, 3:] = 100.0
    f = jax.value_and_grad(lambda h, w: cross_entropy_sum(h, w, labels, VOCAB), 0)
    loss, gradient = f(hidden, head)
    assert f(hidden, padded)[0] == loss
    np.testing.assert_array_equal(f(hidden, padded)[1], gradient)
    assert f(other, head)[0] == loss
    assert not np.asarray(gradient[1, 3:]).any()


def test_logits_of_the_whole_batch_are_never_materialised(monkeypatch):
    monkeypatch.setattr(loss_lib, "CHUNK_ELEMENTS", B * 2 * V)
    hidden, head, labels = inputs()
    f = jax.jit(jax.value_and_grad(lambda h, w: cross_entropy_sum(h, w, labels, VOCAB), (0, 1)))
    text = f.lower(hidden, head).compile().as_text()
    assert f"[{B * 2},{V}]" in text  # a chunk's logits
    assert f"[{B * T},{V}]" not in text and f"[{B},{T},{V}]" not in text


def test_row_statistics_in_one_pass_match_those_in_two():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(64, 501)) * np.exp(rng.uniform(-3, 5, (64, 1)))  # from nearly uniform to one-hot
    logits[5], logits[6, 7] = 3.0, 1e4
    logits[:, 400:] = np.finfo(np.float32).min  # padding
    is_label = np.zeros(logits.shape, bool)
    is_label[np.arange(60), rng.integers(0, 400, 60)] = True  # the last four rows have no label
    largest = logits.max(1)
    want = largest, np.exp(logits - largest[:, None]).sum(1), np.where(is_label, logits, 0).sum(1)
    for statistics in (loss_lib._row_statistics, loss_lib._row_statistics_one_pass):
        for got, expected in zip(jax.jit(statistics)(logits.astype(np.float32), is_label), want, strict=True):
            np.testing.assert_allclose(got, expected.astype(np.float32), rtol=1e-5)
    with jax.enable_x64(True):
        for got, expected in zip(loss_lib._row_statistics_one_pass(logits, is_label), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_both_row_statistics_give_the_same_loss_in_bfloat16(chunks, monkeypatch):
    hidden, head, labels = inputs()
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head)]
    found = []
    for statistics in (loss_lib._row_statistics, loss_lib._row_statistics_one_pass):
        monkeypatch.setattr(loss_lib, "_row_statistics", statistics)
        found.append(jax.value_and_grad(lambda *x: cross_entropy_sum(*x, labels, VOCAB), (0, 1))(*narrow))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    np.testing.assert_allclose(found[0][0], plain(*(np.asarray(x, np.float64) for x in narrow), labels), rtol=1e-3)
    for mine, other in zip(*(gradients for _, gradients in found), strict=True):
        np.testing.assert_allclose(np.float32(mine), np.float32(other), rtol=2**-7, atol=1e-6)


def test_only_cuda_uses_the_one_pass_reduction():
    hidden, head, labels = inputs()
    traced = jax.jit(lambda h, w: cross_entropy_sum(h, w, labels, VOCAB)).trace(
        hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    )
    lowered = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "tpu", "cpu")}
    assert {p: text.count("stablehlo.abs") for p, text in lowered.items()} == {"cuda": 1, "tpu": 0, "cpu": 0}
