"""The chunked cross-entropy against the plain formula: value in numpy float64, gradients by autodiff."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command

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


@pytest.fixture(params=["_relative_to_maximum", "_relative_to_label"])
def form(request, monkeypatch):
    """One form of the softmax on every platform and for every dtype."""
    monkeypatch.setattr(loss_lib, "_relative_to_maximum", getattr(loss_lib, request.param))


@pytest.mark.parametrize("softcap", [0.0, 2.5])
def test_value_and_gradients_in_float64(chunks, form, softcap):
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


def test_value_in_float32_is_exact_to_rounding(chunks, form):
    hidden, head, labels = inputs()
    want = plain(hidden.astype(np.float64), head.astype(np.float64), labels)
    np.testing.assert_allclose(cross_entropy_sum(hidden, head, labels, VOCAB), want, rtol=1e-6)


def test_padding_and_ignored_labels_have_no_effect(chunks, form):
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


def test_a_confident_token_keeps_its_gradient_in_bfloat16(form):
    # p(label) = 1 - 1e-3: the gradient of its logit is a difference of two numbers close to 1
    hidden, head = np.zeros((1, 1, C)), np.zeros((V, C))
    hidden[0, 0, 0], head[3, 0] = 1.0, np.log(VOCAB / 1e-3)
    hidden, head, labels = jnp.bfloat16(hidden), jnp.bfloat16(head), np.int32([[3]])
    gradient = jax.grad(lambda h, w: cross_entropy_sum(h, w, labels, VOCAB), 1)(hidden, head)
    want = jax.grad(lambda h, w: plain(h, w, labels, xp=jnp), 1)(np.float32(hidden), np.float32(head))
    np.testing.assert_allclose(np.float32(gradient), want, rtol=2**-6)


@pytest.mark.parametrize(("nats", "found"), [(20, 20), (100, 100), (loss_lib.LARGEST, None), (1e4, None)])
def test_unlikely_labels_are_exact_up_to_a_limit_and_finite_above(nats, found, monkeypatch):
    monkeypatch.setattr(loss_lib, "_relative_to_maximum", loss_lib._relative_to_label)
    hidden, head, labels = np.zeros((1, 1, C), np.float32), np.zeros((V, C), np.float32), np.int32([[3]])
    hidden[0, 0, 0], head[5, 0] = 1.0, nats  # one other id has all of the probability
    f = jax.value_and_grad(lambda h, w: cross_entropy_sum(h, w, labels, VOCAB), (0, 1))
    loss, (d_hidden, d_head) = f(hidden, head)
    np.testing.assert_allclose(loss, found or loss_lib.LARGEST, rtol=1e-6)
    np.testing.assert_allclose(d_head[[3, 5], 0], [-1, 1], rtol=1e-6)
    np.testing.assert_allclose(d_hidden[0, 0, 0], nats, rtol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 2.5])
def test_both_forms_agree_in_bfloat16(chunks, monkeypatch, softcap):
    hidden, head, labels = inputs()
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head)]
    want, exact = jax.value_and_grad(lambda *x: plain(*x, labels, softcap, jnp), (0, 1))(*map(np.float32, narrow))
    for form in (loss_lib._relative_to_maximum, loss_lib._relative_to_label):
        monkeypatch.setattr(loss_lib, "_relative_to_maximum", form)
        f = jax.value_and_grad(lambda *x: cross_entropy_sum(*x, labels, VOCAB, softcap), (0, 1))
        loss, gradients = jax.jit(f)(*narrow)
        np.testing.assert_allclose(loss, want, rtol=1e-3)
        for gradient, w in zip(gradients, exact, strict=True):
            assert np.linalg.norm(np.float32(gradient) - w) < 2**-6 * np.linalg.norm(w)


_MESHES = """
import jax, numpy as np
from test_loss import VOCAB, inputs
from trialgpt_jax.model import loss as loss_lib
from trialgpt_jax.parallel.sharding import AXES, make_mesh

jax.config.update("jax_enable_x64", True)
hidden, head, labels = inputs(np.float64)
hidden, labels = np.concatenate([hidden, hidden[:1]]), np.concatenate([labels, labels[:1]])
for form in (loss_lib._relative_to_maximum, loss_lib._relative_to_label):
    loss_lib._relative_to_maximum = form
    for sizes, softcap in (((1, 1, 4), 0.0), ((1, 4, 1), 0.0), ((2, 2, 2), 2.5)):
        f = jax.value_and_grad(lambda h, w: loss_lib.cross_entropy_sum(h, w, labels, VOCAB, softcap), (0, 1))
        want = jax.jit(f)(hidden, head)
        with jax.set_mesh(make_mesh(dict(zip(AXES, sizes)), jax.devices()[: np.prod(sizes)])):
            found = jax.jit(f)(hidden, head)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
"""


def test_on_a_mesh_it_is_that_of_one_device():
    _, env = command("train", devices=8)
    env["PYTHONPATH"] += f"{os.pathsep}{os.path.dirname(__file__)}"
    script = subprocess.run([sys.executable, "-c", _MESHES], env=env, capture_output=True, text=True, check=False)
    assert script.returncode == 0, script.stderr[-2000:]


def test_only_cuda_scatters_the_labels_gradient():
    hidden, head, labels = inputs()
    traced = jax.jit(jax.grad(lambda h, w: cross_entropy_sum(h, w, labels, VOCAB), (0, 1))).trace(
        hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    )
    lowered = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "tpu", "cpu")}
    assert {p: text.count('"stablehlo.scatter"(') for p, text in lowered.items()} == {"cuda": 1, "tpu": 0, "cpu": 0}
