"""The GPT in Flax Linen: GPT-2 exactly by default.

- pre-norm blocks: x + attention(norm(x)), x + mlp(norm(x)); a final norm; the head is the token embedding
- learned positions or RoPE; LayerNorm or RMSNorm; GELU, ReLU^2 or SwiGLU; grouped-query attention
- optionally: no biases, untied head, qk-norm, norm after the embedding, logit softcap
- layers are stacked and scanned for training; `config.decode` has one set of parameters per layer

Shapes: B batch, T length, C n_embd, H query heads, K key/value heads, D head width, S cache length, V padded ids.

Parameters (after `nn.unbox`):
  wte/embedding [V, C]   wpe/embedding [block_size, C] (learned positions)   lm_head/embedding [V, C] (untied)
  blocks/{ln_1,ln_2}/{scale,bias} [L, C]   blocks/attn/{q_norm,k_norm}/scale [L, D]   ln_f, ln_e/{scale,bias} [C]
  blocks/{attn/{c_q,c_k,c_v,c_proj},mlp/{c_fc,c_gate,c_proj}}/{kernel [L, in, out],bias}
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from trialgpt_jax.model import layers, norms
from trialgpt_jax.model.attention import Packing, cached_attention, causal_attention, packed_attention
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.layers import Dense, normal, projection_std, rows, vocabulary
from trialgpt_jax.model.weights import multiply
from trialgpt_jax.schema import choose

Cache = tuple[jax.Array, jax.Array]  # keys and values of one layer, [K * B, S, D]


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the sequence, or over a cache of earlier tokens."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BxTxC, positions, deterministic: bool, cache: Cache | None, packing: Packing | None):
        """Returns [B, T, C] and the cache with the new keys and values (None without a cache)."""
        c = self.config
        (B, T, C), (H, K, D) = x_BxTxC.shape, (c.n_head, c.n_kv_head, c.head_dim)
        # k, v before q saves a pass over dx on XLA:GPU (docs/performance.md#qkv-order)
        x_NxC = rows(x_BxTxC)
        k = Dense(c, K * D, ("embed", "kv_heads"), 0.02, name="c_k")(x_NxC)
        v = Dense(c, K * D, ("embed", "kv_heads"), 0.02, name="c_v")(x_NxC)
        q = Dense(c, H * D, ("embed", "heads"), 0.02, name="c_q")(x_BxTxC)
        # Stored before the split into heads: a TPU pads the last axis to 128, which doubles heads of 64.
        q, k, v = (checkpoint_name(y, "qkv").reshape(B, T, -1, D) for y in (q, k, v))
        if c.qk_norm:
            q, k = norms.HeadNorm(c, name="q_norm")(q), norms.HeadNorm(c, name="k_norm")(k)
        rotate = choose(layers.POSITIONS, c.position, "model.position")
        q, k = rotate(q, positions, c), rotate(k, positions, c)
        if packing is not None:
            y = packed_attention(q, k, v, packing)
        elif cache is None:
            key = None if deterministic or not c.dropout else self.make_rng("dropout")
            y = causal_attention(q, k, v, c.attention, c.dropout, key)
        else:
            y, cache = cached_attention(q, k, v, cache, positions)
        y = Dense(c, C, ("heads_in", "hidden"), projection_std(c), name="c_proj")(y.reshape(B, T, H * D))
        return nn.Dropout(c.dropout)(y, deterministic), cache


class MLP(nn.Module):
    """Two matmuls around an activation; a gated activation takes a third."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x, deterministic: bool):
        c = self.config
        names = ("c_fc", "c_gate") if c.activation in layers.GATED else ("c_fc",)
        hidden = [checkpoint_name(Dense(c, c.mlp_width, ("embed", "mlp"), 0.02, name=name)(x), "mlp") for name in names]
        h = choose(layers.ACTIVATIONS, c.activation, "model.activation")(*hidden)
        h = Dense(c, c.n_embd, ("mlp_in", "hidden"), projection_std(c), name="c_proj")(h)
        return nn.Dropout(c.dropout)(h, deterministic)


class Block(nn.Module):
    """A transformer layer."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x, positions, deterministic: bool = True, cache: Cache | None = None, packing=None):
        """[B, T, C] -> [B, T, C], and the cache."""
        c = self.config
        x = checkpoint_name(nn.with_logical_constraint(x, ("batch", "length", "hidden")), "input")
        h = norms.Norm(c, name="ln_1")(x)
        y, cache = CausalSelfAttention(c, name="attn")(h, positions, deterministic, cache, packing)
        # 2-D so that cuBLASLt can fuse the residual add (docs/performance.md#residual-rows)
        x_NxC = checkpoint_name(rows(x) + rows(y), "residual")
        x_NxC = x_NxC + MLP(c, name="mlp")(norms.Norm(c, name="ln_2")(x_NxC), deterministic)
        return x_NxC.reshape(x.shape), cache


class GPT(nn.Module):
    """Token ids to final hidden states. `logits` and `loss.py` apply the head to them."""

    config: GPTConfig

    def setup(self):
        c = self.config
        table = {"features": c.n_embd, "dtype": c.dtype, "param_dtype": c.param_dtype}
        self.wte = nn.Embed(c.padded_vocab_size, embedding_init=vocabulary(c, 0.02), **table)
        if c.position == "learned":
            self.wpe = nn.Embed(c.block_size, embedding_init=normal(0.02, "position", "embed"), **table)
        if c.embed_norm:
            self.ln_e = norms.Norm(c)
        self.drop = nn.Dropout(c.dropout)
        self.blocks = [Block(c) for _ in range(c.n_layer)] if c.decode else _scanned_blocks(c)
        self.ln_f = norms.Norm(c)
        if not c.tie_embeddings:
            std = 0.0 if c.zero_init_proj else 0.02
            self.lm_head = nn.Embed(c.padded_vocab_size, embedding_init=vocabulary(c, std), **table)

    def __call__(self, tokens_BxT, *, positions=None, deterministic: bool = True, caches=None, packing=None):
        """Hidden states of sequences, or of the next tokens of sequences whose keys and values are cached.

        Args:
          tokens_BxT: int32 ids below vocab_size; T at most block_size, unless they are packed.
          positions: int32 [T] or [B, T], below block_size: places in the sequence; None = 0 ... T-1.
          deterministic: False = dropout, from the "dropout" rng.
          caches: a `Cache` per layer (`config.decode` only); the call adds the new keys and values at `positions`.
          packing: an `attention.Packing` of rows that hold several sequences.

        Returns:
          [B, T, C] of `config.dtype` after the final norm; with caches a pair of that and the new caches.
        """
        c = self.config
        positions = jnp.arange(tokens_BxT.shape[1]) if positions is None else positions
        x = layers.lookup(self.wte, tokens_BxT)
        if c.position == "learned":
            table = nn.with_logical_constraint(self.wpe.embedding.astype(c.dtype), ("position", "hidden"))
            x = x + jnp.take(table, positions, axis=0)
        if c.embed_norm:
            x = self.ln_e(x)
        x = nn.with_logical_constraint(self.drop(x, deterministic), ("batch", "length", "hidden"))
        if c.decode:
            new = []
            for block, cache in zip(self.blocks, caches or [None] * c.n_layer, strict=True):
                x, cache = block(x, positions, deterministic, cache)
                new.append(cache)
            caches = caches and tuple(new)
        else:
            x, _ = self.blocks(x, positions, deterministic, None, packing)
        if self.is_initializing() and not c.tie_embeddings:
            self.lm_head(tokens_BxT[:, :1])
        return (self.ln_f(x), caches) if caches else self.ln_f(x)


def _scanned_blocks(c: GPTConfig) -> nn.Module:
    """n_layer blocks with stacked parameters [L, ...], run by `lax.scan`."""
    block = Block
    if c.remat != "none" or c.scan_unroll < c.n_layer:
        # Fully unrolled layers take no remat: XLA would merge the recomputation (docs/performance.md#scan-unroll).
        # prevent_cse=False: inside a scan the forward and the backward loop are separate
        policy = choose(layers.REMAT, c.remat, "train.remat")
        block = nn.remat(Block, policy=policy, prevent_cse=False, static_argnums=(3,))
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * 4,
        length=c.n_layer,
        unroll=c.scan_unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(c)


def cast_matrices(params, dtype):
    """Kernels and embeddings in `dtype`; biases and norm scales unchanged, because norms run in float32."""

    def cast(path, p):
        return p.astype(dtype) if path[-1].key in ("kernel", "embedding") else p

    return jax.tree_util.tree_map_with_path(cast, params)


def head(params, config: GPTConfig) -> jax.Array:
    """[V, C], one output vector per id: the token embedding when tied."""
    return params["wte" if config.tie_embeddings else "lm_head"]["embedding"]


def logits(params, config: GPTConfig, hidden_BxTxC: jax.Array) -> jax.Array:
    """[B, T, vocab_size] of float32 (float64 for float64), without the padding. `loss.py` never stores this array."""
    table, dtype = params["wte" if config.tie_embeddings else "lm_head"], jnp.promote_types(config.dtype, jnp.float32)
    # Slicing the logits, not the head: a slice of the head would be a copy of it.
    out = multiply(table, "embedding", hidden_BxTxC, config.dtype, dtype)[..., : config.vocab_size]
    return config.logit_softcap * jnp.tanh(out / config.logit_softcap) if config.logit_softcap else out
