"""Matrices in bfloat16 and int8: the same function as the rounded model, and how far that is from float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_options import random_params

from trialgpt_jax import UserError
from trialgpt_jax.model import weights as weights_lib
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.decode import split_layers
from trialgpt_jax.model.generate import generate
from trialgpt_jax.model.sampling import Sampling

CONFIG = GPTConfig(vocab_size=131, block_size=16, n_layer=1, n_head=2, n_embd=24, tie_embeddings=False)


def test_int8_rounds_each_output_channel_by_its_own_scale():
    kernel = np.random.default_rng(0).normal(size=(2, 24, 5)).astype(np.float32) * np.array([1e-3, 1, 50, 1, 0])
    table = np.random.default_rng(1).normal(size=(7, 24)) * 10.0 ** np.arange(-3, 4)[:, None]
    table = table.astype(np.float32)
    params = {
        "blocks": {"c_fc": {"kernel": jnp.asarray(kernel, jnp.float32)}},
        "wte": {"embedding": jnp.asarray(table)},
    }
    params["wpe"] = {"embedding": jnp.asarray(table)}
    rounded = weights_lib.rounded(params, "int8")
    for new, old, axis in ((rounded["blocks"]["c_fc"]["kernel"], kernel, 1), (rounded["wte"]["embedding"], table, 1)):
        step = np.abs(old).max(axis=axis, keepdims=True) / 127
        assert (np.abs(new - old) <= step * 0.501).all() and np.abs(new - old).max() > 0
    np.testing.assert_array_equal(rounded["wpe"]["embedding"], table)
    stored = weights_lib.stored(params, "int8", "float32")
    assert stored["blocks"]["c_fc"]["kernel"].dtype == jnp.int8 and stored["blocks"]["c_fc"]["channel_scale"].shape == (
        2,
        5,
    )
    assert stored["wte"]["channel_scale"].shape == (7,) and stored["wpe"]["embedding"].dtype == jnp.float32


@pytest.mark.parametrize(("weights", "tied"), [pytest.param("bfloat16", False, marks=pytest.mark.slow), ("int8", True)])
def test_decoding_with_stored_matrices_is_that_of_the_rounded_model(weights, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = jax.tree.map(jnp.asarray, random_params(config))
    rounded = weights_lib.rounded(params, weights)
    layers = split_layers(params, config, weights)
    narrow = {"bfloat16": jnp.uint16, "int8": jnp.int8}[weights]
    assert layers["blocks_0"]["mlp"]["c_fc"]["kernel"].dtype == narrow == layers["wte"]["embedding"].dtype

    def run(layers):
        options = {"max_new_tokens": 12, "sampling": Sampling(0.0), "log_probs": True}
        pieces = list(generate(layers, config, [[3, 1, 4], [5]], **options))
        return [np.concatenate(parts, axis=1) for parts in zip(*pieces)]

    tokens, log_probs = run(layers)
    expected, expected_log_probs = run(split_layers(rounded, config))
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(log_probs, expected_log_probs, atol=2e-5)
    assert not np.allclose(log_probs, run(split_layers(params, config))[1], atol=1e-4), "nothing was rounded"


@pytest.mark.parametrize("weights", weights_lib.WEIGHTS)
@pytest.mark.parametrize("shape", [(1,), (8, 1), (127,), (128,), (4, 50)])  # few rows and many have forms of their own
def test_multiply_is_a_matrix_product_of_the_last_axis(weights, shape):
    rng = np.random.default_rng(0)
    matrix_IxO, x = (rng.normal(size=size).astype(np.float32) for size in ((24, 192), (*shape, 24)))
    params = {"blocks": {"kernel": jnp.asarray(matrix_IxO)}}
    table = weights_lib.stored(params, weights, "float32")["blocks"]
    table["kernel"] = table["kernel"].T
    rounded = weights_lib.rounded(params, weights)["blocks"]["kernel"]
    made = weights_lib.multiply(table, "kernel", jnp.asarray(x), "float32", "float32")
    np.testing.assert_allclose(made, x @ np.asarray(rounded), rtol=1e-5, atol=1e-5)


def test_other_weights_are_refused():
    with pytest.raises(UserError, match="weights is 'int4', not one of auto, bfloat16, int8"):
        weights_lib.check("int4")
