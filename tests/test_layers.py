"""Norms and GELU in bfloat16 match float64 to the rounding of the result, and an unknown option is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from trialgpt_jax import UserError
from trialgpt_jax.config import Config
from trialgpt_jax.model import layers, norms
from trialgpt_jax.model.attention import ATTENTION
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.gpt import GPT
from trialgpt_jax.schema import specs

ROUNDING = 2**-8  # relative rounding error of bfloat16: half the distance between neighbours


def test_gradient_of_a_frequent_tokens_row_is_summed_in_float32():
    table = nn.Embed(8, 4, dtype=jnp.bfloat16).bind({"params": {"embedding": jnp.zeros((8, 4))}})
    ids = jnp.zeros((2, 1000), jnp.int32).at[0, 0].set(3)

    def total(embedding):
        return layers.lookup(table.clone().bind({"params": {"embedding": embedding}}), ids).astype(jnp.float32).sum()

    gradient = jax.grad(total)(table.embedding)
    np.testing.assert_array_equal(gradient[:, 0], [2000, 0, 0, 1, 0, 0, 0, 0])  # 1,999 is 2,000 in bfloat16


@pytest.mark.parametrize("platform", ["default", "cuda"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0])
def test_norm_in_bfloat16_and_its_gradients_match_float64(offset, centred, platform, monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, **forms: forms[platform](*arrays))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 768)) + offset
    x[:8, 11] = 3000.0  # outliers like those of GPT-2's residual stream
    x, dy = (jnp.asarray(a, jnp.bfloat16) for a in (x, rng.normal(size=x.shape)))
    scale, bias = jnp.asarray(rng.normal(size=768), jnp.float32), jnp.asarray(rng.normal(size=768), jnp.float32)
    norm = norms.NORMS["layernorm" if centred else "rmsnorm"]
    y, backward = jax.vjp(lambda *arrays: norm(*arrays, GPTConfig.norm_eps), x, scale, bias)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in (x, scale, bias, dy)]
        want, wide_backward = jax.vjp(plain_norm(centred), *wide[:3])
        expected = (want, *wide_backward(wide[3]))
        expected = [np.asarray(e) for e in expected]
    for got, e in zip((y, *backward(dy)), expected, strict=True):
        tolerance = ROUNDING if got.dtype == jnp.bfloat16 else 1e-4
        np.testing.assert_allclose(np.asarray(got, np.float64), e, rtol=tolerance, atol=ROUNDING / 8 * np.abs(e).max())


def plain_norm(centred):
    def norm(x, scale, bias):
        middle = x.mean(-1, keepdims=True) if centred else 0.0
        return (x - middle) / jnp.sqrt(((x - middle) ** 2).mean(-1, keepdims=True) + 1e-5) * scale + bias

    return norm


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm", "heads"])
def test_the_default_eps_is_that_of_gpt2(name):
    """Inputs with a variance of 1e-5, so that the result is 1 / sqrt(2) of the one without eps."""
    config = GPTConfig(n_head=1, n_embd=16)
    x = np.tile([1.0, -1.0], 8) * 1e-5**0.5
    with jax.enable_x64(True):
        if name == "heads":
            y = norms.HeadNorm(config).apply({}, jnp.asarray(x))
        else:
            y = norms.NORMS[name](x, np.full(16, 3.0), None, config.norm_eps) / 3
    np.testing.assert_allclose(y, np.tile([1.0, -1.0], 8) / math.sqrt(2), rtol=1e-12)


def test_gelu_of_bfloat16_is_computed_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 2, 10_000), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    want = 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    np.testing.assert_allclose(np.asarray(layers.gelu(x), np.float64), want, rtol=ROUNDING, atol=1e-6)


def test_gelu_has_the_form_that_xla_fuses_into_a_matmul_only_on_cuda():
    traced = jax.jit(layers.gelu).trace(jax.ShapeDtypeStruct((8, 16), jnp.bfloat16))
    wide = {p: "f32" in traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "tpu", "cpu")}
    assert wide == {"cuda": False, "tpu": True, "cpu": True}


REGISTRIES = {
    "model.activation": layers.ACTIVATIONS,
    "model.norm": norms.NORMS,
    "model.position": layers.POSITIONS,
    "train.remat": layers.REMAT,
    "train.attention": ATTENTION,
}


@pytest.mark.parametrize("field", REGISTRIES)
def test_choices_of_a_config_field_are_the_names_of_its_registry(field):
    choices = set(specs(Config)[field][1].choices)
    assert choices - {"auto"} == set(REGISTRIES[field])


@pytest.mark.parametrize("field", REGISTRIES)
def test_unknown_name_is_refused_without_the_check_of_the_config(field):
    """`object.__setattr__` bypasses the check of GPTConfig; the registry itself refuses the name."""
    config = GPTConfig(vocab_size=7, block_size=4, n_layer=1, n_head=2, n_embd=16)
    object.__setattr__(config, field.split(".")[1], "unknown")
    names = ", ".join(REGISTRIES[field])
    with pytest.raises(UserError, match=f"config field `{field}` is 'unknown', not one of {names}"):
        jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
