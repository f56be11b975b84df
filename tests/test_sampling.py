"""Penalty and limits of sampling against transformers' own logits processors, over drawn logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trialgpt_jax.model.sampling import Draw, Sampling, likeliest, limit, penalise, sample

torch = pytest.importorskip("torch")
processors = pytest.importorskip("transformers.generation.logits_process")

V = 24
ROWS = st.lists(st.floats(-8, 8, width=32, allow_subnormal=False), min_size=V, max_size=V)


@jax.jit
def ours(logits_BxV, seen_BxV, draw):
    return limit(penalise(logits_BxV, seen_BxV, draw.repetition_penalty) / draw.temperature, draw)


def assert_equal(ours, theirs, row, share):
    """Equal, but for an id whose probability is that of the limit to rounding."""
    kept = np.asarray(ours)[0] > -np.inf
    close = np.abs(row - (row.max() + np.log(max(share, 1e-30)))) < 1e-5
    np.testing.assert_array_equal(kept[~close], (theirs > -np.inf)[~close])
    both = kept & (theirs > -np.inf)
    assert both.any()
    np.testing.assert_allclose(np.asarray(ours)[0][both], theirs[both], rtol=1e-6, atol=1e-6)


@settings(max_examples=150)
@given(ROWS, st.lists(st.integers(0, V - 1), min_size=1, max_size=30), st.floats(0.25, 4, width=32))
def test_the_repetition_penalty_is_that_of_transformers(row, text, penalty):
    """Of positive and negative logits, of ids that a text has once or more often."""
    scores = torch.tensor([row])
    theirs = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([text]), scores)[0].numpy()
    seen = np.zeros((1, V), bool)
    seen[0, text] = True
    found = ours(np.array([row], np.float32), seen, Draw.of(Sampling(repetition_penalty=penalty)))
    np.testing.assert_allclose(np.asarray(found)[0], theirs, rtol=1e-6, atol=1e-37)  # XLA flushes subnormals


@settings(max_examples=150)
@given(ROWS, st.floats(0, 1, width=32))
def test_min_p_is_that_of_transformers(row, min_p):
    row = np.array(row, np.float32)
    theirs = processors.MinPLogitsWarper(min_p)(None, torch.tensor(row[None]))[0].numpy()
    found = ours(row[None], np.zeros((1, V), bool), Draw.of(Sampling(min_p=min_p)))
    assert_equal(found, theirs, row, min_p)


@settings(max_examples=150)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, V - 1), min_size=1, max_size=9),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, V),
    st.sampled_from([0.3, 0.7, 0.95, 1.0]),
    st.sampled_from([0.0, 0.02, 0.2]),
    st.sampled_from([0.7, 1.0, 1.5]),
)
def test_all_of_them_are_applied_in_the_order_of_transformers(seed, text, temperature, top_k, top_p, min_p, penalty):
    row = np.random.default_rng(seed).normal(0, 3, (1, V)).astype(np.float32)
    chain = [processors.RepetitionPenaltyLogitsProcessor(penalty), processors.TemperatureLogitsWarper(temperature)]
    chain += [processors.TopKLogitsWarper(top_k)] if top_k else []
    chain += [processors.TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = torch.tensor(row)
    for step in [*chain, processors.MinPLogitsWarper(min_p)]:
        scores = step(torch.tensor([text]), scores)
    seen = np.zeros((1, V), bool)
    seen[0, text] = True
    found = ours(row, seen, Draw.of(Sampling(temperature, top_k, top_p, min_p, penalty)))
    assert set(np.flatnonzero(found[0] > -jnp.inf)) == set(np.flatnonzero(scores[0].numpy() > -np.inf))
    np.testing.assert_allclose(np.asarray(found)[0], scores[0].numpy(), rtol=1e-5)


@given(st.lists(st.sampled_from([-jnp.inf, -1.0, 0.0, 0.5, 3.0]), min_size=V, max_size=V))
def test_of_equal_logits_the_first_id_is_the_likeliest(row):
    logits_BxV = np.array([row, row[::-1]], np.float32)
    np.testing.assert_array_equal(likeliest(logits_BxV), logits_BxV.argmax(axis=1))


def test_of_a_top_p_below_the_smallest_float32_the_likeliest_id_is_left():
    row = np.linspace(0, 1, V, dtype=np.float32)[None, ::-1]
    assert np.flatnonzero(np.isfinite(limit(jnp.asarray(row), Draw.of(Sampling(1.0, top_p=1e-40)))[0])).tolist() == [0]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_ids_are_drawn_as_jax_random_categorical_draws_them(temperature):
    logits_BxV = np.random.default_rng(0).normal(size=(64, V)).astype(np.float32)
    keys_B = jax.random.split(jax.random.key(1), len(logits_BxV))
    drawn_B = sample(jnp.asarray(logits_BxV), Draw.of(Sampling(temperature)), keys_B)
    np.testing.assert_array_equal(drawn_B, jax.vmap(jax.random.categorical)(keys_B, logits_BxV / temperature))
