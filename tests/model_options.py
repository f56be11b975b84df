"""Hypothesis strategies for the model's options, and an independent implementation of the model in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from hypothesis import strategies as st

from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.gpt import GPT


@st.composite
def configs(draw, **fixed):
    """Draws a float64 GPTConfig of a tiny model; `fixed` fields are not drawn."""
    n_head = draw(st.sampled_from([1, 2, 4]))
    options = {
        "vocab_size": draw(st.sampled_from([7, 128, 131])),
        "block_size": draw(st.integers(3, 9)),
        "n_layer": draw(st.integers(1, 3)),
        "n_head": n_head,
        "n_kv_head": draw(st.sampled_from([k for k in (0, 1, 2, 4) if k == 0 or n_head % k == 0])),
        "head_dim": draw(st.sampled_from([0, 2, 6])),
        "n_embd": 16,
        "bias": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "position": draw(st.sampled_from(["learned", "rope"])),
        "norm": draw(st.sampled_from(["layernorm", "rmsnorm"])),
        "activation": draw(st.sampled_from(["gelu", "relu2", "swiglu"])),
        "norm_scale": draw(st.booleans()),
        "norm_eps": draw(st.sampled_from([1e-5, 0.03])),
        "mlp_width": draw(st.sampled_from([0, 24])),
        "rope_base": draw(st.sampled_from([10_000.0, 30.0])),
        "embed_norm": draw(st.booleans()),
        "logit_softcap": draw(st.sampled_from([0.0, 1.5])),
        "zero_init_proj": draw(st.booleans()),
        "scan_unroll": draw(st.sampled_from([1, 2])),
        "remat": draw(st.sampled_from(["none", "dots", "block"])),
        "dtype": "float64",
        "param_dtype": "float64",
    }
    options["qk_norm"], options["qk_norm_scale"] = draw(st.sampled_from([(False, False), (True, False), (True, True)]))
    return GPTConfig(**(options | fixed))


def random_params(config, seed=0, scale=0.3):
    """Random parameters N(0, scale), with norm scales around 1. Biases and padding rows are random too, not zero."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda: nn.unbox(GPT(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))))

    def draw(path, leaf):
        return (rng.normal(0, scale, leaf.shape) + (path[-1].key == "scale")).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def reference_logits(params, c: GPTConfig, tokens_BxT, window: int = 10**9) -> np.ndarray:
    """float64 logits [B, T, vocab_size], with loops over sequences, heads and positions.

    A token attends to itself and to the `window` - 1 tokens before it.
    """

    def dense(x, p):
        return x @ p["kernel"] + p.get("bias", 0.0)

    def norm(x, p):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * p.get("scale", 1.0) + p.get("bias", 0.0)

    def rotate(x_TxD):  # as complex numbers: dimension i is the real part, i + D/2 the imaginary one
        half = x_TxD.shape[1] // 2
        z = x_TxD[:, :half] + 1j * x_TxD[:, half:]
        z = z * np.exp(1j * np.arange(len(z))[:, None] * c.rope_base ** (-np.arange(half) / half))
        return np.concatenate([z.real, z.imag], 1)

    def attention(x_TxC, p):
        D, group = c.head_dim, c.n_head // c.n_kv_head
        heads = []
        for h in range(c.n_head):
            g = h // group
            q = dense(x_TxC, p["c_q"])[:, h * D : (h + 1) * D]
            k, v = (dense(x_TxC, p[name])[:, g * D : (g + 1) * D] for name in ("c_k", "c_v"))
            if c.qk_norm:
                q, k = (y / np.sqrt((y**2).mean(-1, keepdims=True) + c.norm_eps) for y in (q, k))
                if c.qk_norm_scale:
                    q, k = q * p["q_norm"]["scale"], k * p["k_norm"]["scale"]
            if c.position == "rope":
                q, k = rotate(q), rotate(k)
            rows = []
            for t in range(len(x_TxC)):
                seen = slice(max(0, t + 1 - window), t + 1)
                weights = np.exp(k[seen] @ q[t] / np.sqrt(D))
                rows.append(weights @ v[seen] / weights.sum())
            heads.append(np.stack(rows))
        return dense(np.concatenate(heads, 1), p["c_proj"])

    def mlp(x, p):
        h = dense(x, p["c_fc"])
        if c.activation == "gelu":
            h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        elif c.activation == "relu2":
            h = np.maximum(h, 0) ** 2
        else:
            gate = dense(x, p["c_gate"])
            h = h * gate / (1 + np.exp(-gate))
        return dense(h, p["c_proj"])

    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    out = []
    for tokens in np.asarray(tokens_BxT):
        x = params["wte"]["embedding"][tokens]
        if c.position == "learned":
            x = x + params["wpe"]["embedding"][: len(tokens)]
        if c.embed_norm:
            x = norm(x, params.get("ln_e", {}))
        for i in range(c.n_layer):
            layer = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
            x = x + attention(norm(x, layer.get("ln_1", {})), layer["attn"])
            x = x + mlp(norm(x, layer.get("ln_2", {})), layer["mlp"])
        table = params["wte" if c.tie_embeddings else "lm_head"]["embedding"][: c.vocab_size]
        logits = norm(x, params.get("ln_f", {})) @ table.T
        out.append(c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits)
    return np.stack(out)
