"""The model against transformers' GPT-2 and Qwen3 and torch's gradients, and one property per option.

test_generate.py compares combinations of the options with an independent implementation in numpy.
"""

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import linen as nn
from model_options import random_params

from trialgpt_jax.model import hf
from trialgpt_jax.model.attention import causal_attention
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.gpt import GPT, head, logits
from trialgpt_jax.model.layers import Dense, rope
from trialgpt_jax.training.train_step import mean_loss

FLOAT64 = {"dtype": "float64", "param_dtype": "float64"}
# layers, heads, width, vocabulary, block size, sequence length
SHAPES = [(2, 2, 32, 101, 16, 16), (1, 4, 24, 128, 12, 5), (3, 1, 16, 257, 9, 9), (4, 3, 48, 50, 20, 1)]


def gpt2(shape, seed=0, **changes):
    """transformers' GPT-2 in float64 with every weight and bias perturbed by N(0, 0.1), and our config for it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    L, H, C, V, T, _ = shape
    config = GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C, **FLOAT64, **changes)
    theirs = transformers.GPT2Config(**hf.hf_config(config, 0), attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(theirs).to(torch.float64).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.from_numpy(rng.normal(0, 0.1, parameter.shape))
    return model, config


def from_torch(named, config):
    return hf.from_hf({name: value.detach().numpy() for name, value in named}, config)


@functools.partial(jax.jit, static_argnums=1)
def apply(params, config, tokens_BxT):
    return logits(params, config, GPT(config).apply({"params": params}, tokens_BxT))


@functools.partial(jax.jit, static_argnums=1)
def loss_and_gradients(params, config, tokens_BxU):
    return jax.value_and_grad(mean_loss)(params, config, tokens_BxU)


def tokens(config, shape, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


@pytest.mark.parametrize(("shape", "tied"), [*((shape, True) for shape in SHAPES), (SHAPES[0], False)])
def test_logits_match_transformers_gpt2_in_float64(shape, tied):
    model, config = gpt2(shape, tie_embeddings=tied)
    torch = pytest.importorskip("torch")
    ids = tokens(config, (3, shape[-1]))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    with jax.enable_x64(True):
        ours = np.asarray(apply(from_torch(model.named_parameters(), config), config, ids))
    assert ours.dtype == np.float64 and ours.shape == expected.shape
    assert expected.std() > 0.1, "the perturbed weights must matter"
    assert np.abs(ours - expected).max() < 1e-10


def test_logits_match_transformers_gpt2_in_float32():
    torch = pytest.importorskip("torch")
    model, config = gpt2(SHAPES[0])
    config = dataclasses.replace(config, dtype="float32", param_dtype="float32")
    ids = tokens(config, (4, 16))
    with torch.no_grad():
        expected = model.to(torch.float32)(torch.from_numpy(ids)).logits.numpy()
    ours = np.asarray(apply(from_torch(model.named_parameters(), config), config, ids))
    assert ours.dtype == np.float32
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("shape", "tied"), [(SHAPES[0], True), (SHAPES[1], False), (SHAPES[2], True)])
def test_gradients_of_every_parameter_match_torch(shape, tied):
    torch = pytest.importorskip("torch")
    model, config = gpt2(shape, tie_embeddings=tied)
    ids = tokens(config, (3, shape[-1] + 1))
    theirs = model(torch.from_numpy(ids[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten())
    loss.backward()
    expected = from_torch([(name, p.grad) for name, p in model.named_parameters()], config)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, from_torch(model.named_parameters(), config))
        value, gradients = loss_and_gradients(params, config, ids)
    assert abs(float(value) - loss.item()) < 1e-12
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    for (path, ours), want in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected)):
        name = jax.tree_util.keystr(path)
        difference = np.abs(np.asarray(ours) - want).max()
        if "c_k" in name and "bias" in name:  # the softmax cancels it, so it is zero up to rounding
            assert np.abs(want).max() < 1e-14 and np.abs(np.asarray(ours)).max() < 1e-14
        else:
            assert np.abs(want).max() > 1e-6, f"{name}: no gradient"
            assert difference < 1e-8 * np.abs(want).max(), f"{name}: {difference}"


def test_modern_options_together_match_transformers_qwen3():
    """rope, rmsnorm, swiglu, grouped queries, qk_norm, head_dim; in float32, because Qwen3 computes its norms in it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 101, "block_size": 24, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 24}
    options = {"head_dim": 10, "position": "rope", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": True}
    config = GPTConfig(**sizes, **options, bias=False, tie_embeddings=False)
    params = random_params(config)
    theirs = transformers.Qwen3Config(
        vocab_size=101,
        hidden_size=24,
        intermediate_size=params["blocks"]["mlp"]["c_fc"]["kernel"].shape[-1],
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=24,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.Qwen3ForCausalLM(theirs).eval()
    state = {  # without the padding rows of the vocabulary
        "model.embed_tokens.weight": params["wte"]["embedding"][:101],
        "lm_head.weight": head(params, config)[:101],
        "model.norm.weight": params["ln_f"]["scale"],
    }
    names = {
        "self_attn.q_proj": ("attn", "c_q"),
        "self_attn.k_proj": ("attn", "c_k"),
        "self_attn.v_proj": ("attn", "c_v"),
        "self_attn.o_proj": ("attn", "c_proj"),
        "mlp.up_proj": ("mlp", "c_fc"),
        "mlp.gate_proj": ("mlp", "c_gate"),
        "mlp.down_proj": ("mlp", "c_proj"),
    }
    for i in range(2):
        layer, blocks = f"model.layers.{i}", params["blocks"]
        for name, (part, module) in names.items():
            state[f"{layer}.{name}.weight"] = blocks[part][module]["kernel"][i].T
        for name, norm in (("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")):
            state[f"{layer}.{name}.weight"] = blocks[norm]["scale"][i]
        for name in ("q_norm", "k_norm"):
            state[f"{layer}.self_attn.{name}.weight"] = np.ones(10, np.float32)
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}
    model.load_state_dict(state, strict=True)
    ids = tokens(config, (2, 24))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    ours = np.asarray(apply(params, config, ids))
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def test_rope_makes_scores_depend_only_on_the_distance():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k = (jnp.asarray(np.tile(rng.normal(size=(1, 1, 2, 8)), (1, 6, 1, 1))) for _ in range(2))
        positions = jnp.array([0, 3, 17, 100, 511, 1023])
        for distance in (0, 1, 9):
            rotated_q, rotated_k = rope(q, positions + distance), rope(k, positions)
            scores = np.asarray(jnp.sum(rotated_q * rotated_k, -1))
            assert np.abs(scores - scores[:, :1]).max() < 1e-12
        assert np.allclose(jnp.linalg.norm(rope(q, positions), axis=-1), jnp.linalg.norm(q, axis=-1), atol=1e-12)


def test_padding_rows_have_no_effect_and_stay_zero():
    config = GPTConfig(vocab_size=101, block_size=8, n_layer=1, n_head=2, n_embd=16, **FLOAT64)
    ids = tokens(config, (2, 9))
    with jax.enable_x64(True):
        params = random_params(config)
        other = jax.tree.map(np.array, params)
        other["wte"]["embedding"][101:] = 1e3
        (loss, gradients), (same, _) = (loss_and_gradients(p, config, ids) for p in (params, other))
        out = apply(params, config, ids[:, :-1])
        assert float(loss) == float(same)
        assert np.array_equal(out, apply(other, config, ids[:, :-1])) and out.shape == (2, 8, 101)
        assert not np.any(gradients["wte"]["embedding"][101:])
        initial = nn.unbox(GPT(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
        assert not np.any(head(initial, config)[101:]) and np.all(np.any(head(initial, config)[:101], axis=1))


def initial_params(config):
    return nn.unbox(jax.jit(GPT(config).init)(jax.random.key(5), jnp.zeros((1, 1), jnp.int32)))["params"]


def test_initial_standard_deviations_match_gpt2():
    config = GPTConfig(vocab_size=512, block_size=256, n_layer=5, n_head=4, n_embd=128, tie_embeddings=False)
    projections = 0.02 / math.sqrt(2 * 5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(initial_params(config)):
        name, value = jax.tree_util.keystr(path), np.asarray(leaf)
        if "bias" in name:
            assert not value.any(), name
        elif "scale" in name:
            assert (value == 1).all(), name
        else:
            expected = projections if "c_proj" in name else 0.02
            # stacked kernels layer by layer; the standard error of a standard deviation is std / sqrt(2n)
            for part in value if "blocks" in name else [value]:
                assert abs(part.std() / expected - 1) < 5 / math.sqrt(2 * part.size), name
                assert abs(part.mean()) < 5 * expected / math.sqrt(part.size), name


def test_zero_init_proj_starts_with_uniform_logits_and_learns():
    sizes = {"vocab_size": 101, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
    config = GPTConfig(**sizes, tie_embeddings=False, zero_init_proj=True)
    params = initial_params(config)
    assert not any(np.any(params["blocks"][part]["c_proj"]["kernel"]) for part in ("attn", "mlp"))
    ids = jnp.asarray(tokens(config, (2, 9)))
    loss, gradients = loss_and_gradients(params, config, ids)
    assert abs(float(loss) - math.log(101)) < 1e-5
    assert np.any(gradients["lm_head"]["embedding"])


def test_logit_softcap_bounds_the_logits_and_those_of_the_loss():
    config = GPTConfig(vocab_size=101, block_size=8, n_layer=1, n_head=2, n_embd=16, logit_softcap=2.0, **FLOAT64)
    with jax.enable_x64(True):
        params = random_params(config, scale=3.0)
        ids = tokens(config, (4, 9))
        out = np.asarray(apply(params, config, ids[:, :-1]))
        assert 1.9 < np.abs(out).max() <= 2.0
        expected = np.log(np.exp(out).sum(-1)) - np.take_along_axis(out, ids[:, 1:, None], 2)[..., 0]
        assert abs(float(mean_loss(params, config, jnp.asarray(ids))) - expected.mean()) < 1e-12


def stored_for_backward(config: GPTConfig, capsys) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of the activations that a layer stores for the backward pass, for a batch of 2 x 16."""
    params = random_params(config)
    capsys.readouterr()
    jax.ad_checkpoint.print_saved_residuals(lambda p: mean_loss(p, config, jnp.zeros((2, 17), jnp.int32)), params)
    arrays = re.findall(r"^(\w+)\[([\d,]+)\] output of", capsys.readouterr().out, re.MULTILINE)
    shapes = [(dtype, tuple(map(int, dims.split(",")))) for dtype, dims in arrays]
    return sorted((dtype, shape[1:]) for dtype, shape in shapes if shape[0] == 3 and shape[1] in (2, 2 * 16))


def test_backward_stores_matmul_outputs_once_in_the_dtype_of_the_matmuls(capsys):
    config = GPTConfig(vocab_size=101, block_size=16, n_layer=3, n_head=2, n_embd=8, dtype=jnp.bfloat16)
    # [B, T, C]: input and q. Rows [B * T, ...]: k, v, the residual after attention, the MLP's hidden layer.
    # Nothing of norms and GELU, nothing in float32.
    matmuls = [("bf16", (2, 16, 8))] * 2 + [("bf16", (32, 8))] * 3 + [("bf16", (32, 32))]
    # attention: the output and the log of the normaliser per query, but not the weights
    attention = [("bf16", (2, 2, 1, 16, 4)), ("f32", (2, 2, 1, 1, 16))]
    assert stored_for_backward(config, capsys) == sorted(matmuls + attention)
    assert stored_for_backward(dataclasses.replace(config, remat="block"), capsys) == [("bf16", (2, 16, 8))]


@pytest.mark.parametrize(("remat", "unroll"), [("none", 3), ("dots", 2), ("block", 3)])
def test_remat_and_unrolling_change_no_gradient(remat, unroll):
    config = GPTConfig(vocab_size=101, block_size=8, n_layer=3, n_head=2, n_embd=16, **FLOAT64)
    changed = dataclasses.replace(config, remat=remat, scan_unroll=unroll)
    with jax.enable_x64(True):
        params, ids = random_params(config), tokens(config, (2, 9))
        _, ours = loss_and_gradients(params, changed, ids)
        _, expected = loss_and_gradients(params, config, ids)
        for mine, want in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
            assert np.abs(np.asarray(mine - want)).max() < 1e-13


def test_dropout_depends_only_on_its_key_and_is_off_in_evaluation():
    config = GPTConfig(vocab_size=101, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.3)
    params, ids = random_params(config), jnp.asarray(tokens(config, (2, 8)))

    @jax.jit
    def run(seed=None):
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}
        return GPT(config).apply({"params": params}, ids, deterministic=seed is None, rngs=rngs)

    plain = np.asarray(GPT(dataclasses.replace(config, dropout=0.0)).apply({"params": params}, ids))
    assert np.allclose(run(), plain, atol=1e-6)
    assert np.array_equal(run(1), run(1)) and not np.allclose(run(1), run(2)) and not np.allclose(run(1), plain)


def test_dropout_acts_on_the_embeddings_both_outputs_of_a_layer_and_the_attention_weights():
    """Where GPT-2 has it. Each of the places alone changes the output."""
    config = GPTConfig(vocab_size=101, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.3)
    params, ids = random_params(config), jnp.asarray(tokens(config, (2, 8)))
    seen = {}

    def run(place):
        def only_at_place(function, args, kwargs, context):
            if not isinstance(context.module, nn.Dropout):
                return function(*args, **kwargs)
            path = "/".join(name for name in context.module.path if not name.startswith("Dropout"))
            seen[path] = args[0].shape[-1]
            return function(*args, **kwargs) if path == place else args[0]

        with nn.intercept_methods(only_at_place), pytest.MonkeyPatch.context() as patch:
            if place != "weights":
                patch.setattr("trialgpt_jax.model.gpt.causal_attention", lambda *args: causal_attention(*args[:4]))
            rngs = {"dropout": jax.random.key(1)}
            apply = jax.jit(lambda: GPT(config).apply({"params": params}, ids, deterministic=False, rngs=rngs))
            return np.asarray(apply())

    plain = run("nowhere")
    np.testing.assert_allclose(plain, GPT(config).apply({"params": params}, ids), atol=1e-6)
    assert set(seen) == {"drop", "blocks/attn", "blocks/mlp"} and set(seen.values()) == {16}
    for place in (*seen, "weights"):
        assert np.abs(run(place) - plain).max() > 0.01, place


def test_every_layer_has_its_own_dropout():
    """Both layers add a vector of ones to zero: with dropout of 1/2 each value is 0, 2 or 4 before the final norm."""
    config = GPTConfig(vocab_size=101, block_size=8, n_layer=2, n_head=2, n_embd=64, dropout=0.5)
    params = jax.tree.map(np.zeros_like, random_params(config))
    params["blocks"]["mlp"]["c_proj"]["bias"][:] = params["ln_f"]["scale"][:] = 1
    rngs = {"dropout": jax.random.key(1)}
    hidden = GPT(config).apply({"params": params}, jnp.zeros((1, 8), jnp.int32), deterministic=False, rngs=rngs)
    assert [len(set(row)) for row in np.asarray(hidden[0]).round(4).tolist()] == [3] * 8


def test_a_later_token_changes_no_earlier_logit():
    config = GPTConfig(vocab_size=101, block_size=8, n_layer=2, n_head=2, n_embd=16, **FLOAT64)
    with jax.enable_x64(True):
        params, ids = random_params(config), tokens(config, (1, 8))
        out = np.asarray(apply(params, config, ids))
        for t in range(1, 8):
            changed = ids.copy()
            changed[0, t] = (ids[0, t] + 1) % 101
            other = np.asarray(apply(params, config, changed))
            assert np.array_equal(other[:, :t], out[:, :t]) and not np.allclose(other[:, t:], out[:, t:])


def test_backward_of_dense_copies_and_transposes_nothing_on_cpu():
    """XLA on CPU transposes the output's gradient in memory if the kernel's gradient contracts two axes, B and T."""
    config = GPTConfig(n_head=4, n_embd=256, bias=True)
    dense = Dense(config, 1024, ("embed", "mlp"), 0.02)
    x, d = jnp.zeros((2, 128, 256)), jnp.zeros((2, 128, 1024))
    params = nn.unbox(dense.init(jax.random.key(0), x))
    backward = jax.jit(lambda params, x, d: jax.vjp(dense.apply, params, x)[1](d))
    program = backward.lower(params, x, d).compile().as_text()
    assert program.count(" dot(") == 2 and not re.search(r" (copy|transpose)\(", program)


def test_config_of_the_model_imports_without_jax():
    program = "import sys, trialgpt_jax.model.config; sys.exit('jax' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=env, check=False).returncode == 0
