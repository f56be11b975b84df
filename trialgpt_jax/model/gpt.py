"""The GPT: GPT-2 exactly by default, in Flax Linen, its layers scanned.

Shapes: B batch, T length, C n_embd, H query heads, K key/value heads, D head width, V vocabulary padded to 128.

Parameters (after `nn.unbox`), the leading axis of everything under `blocks` being the layer:
  wte/embedding [V, C]   wpe/embedding [block_size, C] (learned positions)   lm_head/embedding [V, C] (untied)
  blocks/{ln_1,ln_2}/{scale,bias} [L, C]   ln_f/{scale,bias} [C]
  blocks/attn/{c_q,c_k,c_v,c_proj}/{kernel,bias}   blocks/mlp/{c_fc,c_gate,c_proj}/{kernel,bias}, kernels [L, in, out]
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from trialgpt_jax.model import layers
from trialgpt_jax.model.attention import cached_attention, causal_attention
from trialgpt_jax.parallel.sharding import BATCH


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Shape and numerics of a GPT; the fields up to `zero_init_proj` are those of `config.model`, explained there."""

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0
    head_dim: int = 0
    n_embd: int = 768
    bias: bool = True
    dropout: float = 0.0
    tie_embeddings: bool = True
    position: str = "learned"
    norm: str = "layernorm"
    activation: str = "gelu"
    qk_norm: bool = False
    embed_norm: bool = False
    logit_softcap: float = 0.0
    zero_init_proj: bool = False
    dtype: jnp.dtype = jnp.float32  # of the matmuls and activations
    param_dtype: jnp.dtype = jnp.float32
    attention: str = "xla"  # kernel, from accelerators.attention_kernel
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        object.__setattr__(self, "n_kv_head", self.n_kv_head or self.n_head)
        object.__setattr__(self, "head_dim", self.head_dim or self.n_embd // self.n_head)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head: vocab_size rounded up to a multiple of 128, the chips' tile."""
        return -(-self.vocab_size // 128) * 128


def _normal(std: float, *axes: str):
    """N(0, std) with logical axis names."""
    init = nn.initializers.normal(std) if std else nn.initializers.zeros
    return nn.with_logical_partitioning(init, axes)


def _vocabulary(config: GPTConfig, std: float):
    """N(0, std) for the rows of real ids. Padding rows are zeros, and stay so: no gradient reaches them."""
    normal = nn.initializers.normal(std)

    def init(key, shape, dtype):
        return jnp.where(jnp.arange(shape[0])[:, None] < config.vocab_size, normal(key, shape, dtype), 0)

    return nn.with_logical_partitioning(init, ("vocab", "embed"))


def _proj_std(config: GPTConfig) -> float:
    """Residual projections start smaller, so that the sum over 2 * n_layer of them keeps the residual's scale (GPT-2)."""
    return 0.0 if config.zero_init_proj else 0.02 / math.sqrt(2 * config.n_layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(kernel: jax.Array, axes: tuple[str, str]) -> jax.Array:
    """The kernel whole along fsdp, gathered once for all that reads it in a pass, and its gradient split again. Left to XLA,
    the recomputation of a layer and the input's gradient each gather the attention's kernels for themselves."""
    whole = {"embed": "hidden", "heads_in": "heads", "mlp_in": "mlp"}
    return nn.with_logical_constraint(kernel, tuple(whole.get(axis, axis) for axis in axes))


_gathered.defvjp(
    lambda kernel, axes: (_gathered(kernel, axes), None), lambda axes, _, d: (nn.with_logical_constraint(d, axes),)
)


class Dense(nn.Module):
    """x @ kernel + bias."""

    config: GPTConfig
    features: int
    axes: tuple[str, str]  # logical names of the kernel's two
    std: float  # of the kernel's first values

    @nn.compact
    def __call__(self, x):
        """Returns [..., features] of `config.dtype`."""
        c = self.config
        kernel = self.param("kernel", _normal(self.std, *self.axes), (x.shape[-1], self.features), c.param_dtype)
        # as one matrix of rows: of [B, T, C], XLA on CPU turns the gradient around, and the kernel's takes twice as long
        y_NxF = x.reshape(-1, x.shape[-1]) @ _gathered(kernel.astype(c.dtype), self.axes)
        if c.bias:
            bias = self.param("bias", _normal(0, self.axes[1]), (self.features,), c.param_dtype)
            y_NxF = y_NxF + bias.astype(c.dtype)
        return y_NxF.reshape(*x.shape[:-1], self.features)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over C."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale = self.param("scale", ones, (c.n_embd,), c.param_dtype)
        centred = c.norm == "layernorm"
        bias = self.param("bias", _normal(0, "embed"), (c.n_embd,), c.param_dtype) if centred and c.bias else None
        return layers.norm(x, scale, bias, centred)


def rope(x_BxTxHxD: jax.Array, positions_T: jax.Array) -> jax.Array:
    """Rotary position embedding, base 10,000, dimension i paired with i + D/2 (Su et al. 2021; GPT-NeoX's pairing)."""
    half = x_BxTxHxD.shape[-1] // 2
    wide = jnp.promote_types(x_BxTxHxD.dtype, jnp.float32)
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=wide) / half)
    angle_Tx1xD = positions_T.astype(wide)[:, None, None] * frequency
    cos, sin = jnp.cos(angle_Tx1xD), jnp.sin(angle_Tx1xD)
    a, b = jnp.split(x_BxTxHxD.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxHxD.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the sequence, or over a cache of it."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BxTxC, positions_T, deterministic: bool, cache=None):
        """Returns the output [B, T, C] and the cache (keys, values) [K * B, S, D], updated at `positions_T`, or None."""
        c = self.config
        H, K, D = c.n_head, c.n_kv_head, c.head_dim
        B, T, C = x_BxTxC.shape
        # k and v share a reshape, and come first: of a sum of two matmuls XLA:GPU has the left one add the other, and only
        # as q + (k + v) is the left one of x's gradient not a matmul that adds already
        x_NxC = x_BxTxC.reshape(-1, C)
        k = Dense(c, K * D, ("embed", "kv_heads"), 0.02, name="c_k")(x_NxC)
        v = Dense(c, K * D, ("embed", "kv_heads"), 0.02, name="c_v")(x_NxC)
        q = Dense(c, H * D, ("embed", "heads"), 0.02, name="c_q")(x_BxTxC)
        # named before the heads are cut out: a TPU pads the last axis to 128, which would double heads of 64
        q, k, v = (checkpoint_name(x, "qkv").reshape(B, T, -1, D) for x in (q, k, v))
        if c.qk_norm:
            q, k = layers.rms(q), layers.rms(k)
        if c.position == "rope":
            q, k = rope(q, positions_T), rope(k, positions_T)
        if cache is None:
            key = None if deterministic or not c.dropout else self.make_rng("dropout")
            y = causal_attention(q, k, v, c.attention, c.dropout, key)
        else:
            y, cache = cached_attention(q, k, v, cache, positions_T)
        y = Dense(c, C, ("heads_in", "hidden"), _proj_std(c), name="c_proj")(y.reshape(B, T, H * D))
        return nn.Dropout(c.dropout)(y, deterministic), cache


def mlp_width(n_embd: int, activation: str) -> int:
    """4 * n_embd; 8/3 of it, rounded up to 128, keeps swiglu's three matrices at the parameters of the other forms' two."""
    return 4 * n_embd if activation != "swiglu" else -(-8 * n_embd // (3 * 128)) * 128


class MLP(nn.Module):
    """Two matmuls around an activation; four times as wide as the residual, 8/3 for the gated swiglu."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x, deterministic: bool):
        c = self.config
        width = mlp_width(c.n_embd, c.activation)
        h = checkpoint_name(Dense(c, width, ("embed", "mlp"), 0.02, name="c_fc")(x), "mlp")
        if c.activation == "gelu":
            h = layers.gelu(h)
        elif c.activation == "relu2":
            h = jnp.square(jax.nn.relu(h))
        else:
            gate = Dense(c, width, ("embed", "mlp"), 0.02, name="c_gate")(x)
            h = jax.nn.silu(checkpoint_name(gate, "mlp")) * h
        h = Dense(c, c.n_embd, ("mlp_in", "hidden"), _proj_std(c), name="c_proj")(h)
        return nn.Dropout(c.dropout)(h, deterministic)


class Block(nn.Module):
    """A pre-norm transformer layer."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BxTxC, positions_T, deterministic: bool = True, cache=None):
        """Returns the residual [B, T, C] and the updated cache (None without one)."""
        x_BxTxC = checkpoint_name(nn.with_logical_constraint(x_BxTxC, ("batch", "length", "hidden")), "input")
        y, cache = CausalSelfAttention(self.config, name="attn")(
            Norm(self.config, name="ln_1")(x_BxTxC), positions_T, deterministic, cache
        )
        # as rows, which is what matmuls give: then XLA:GPU adds the residual within them, and copies it for no one
        x_NxC, y_NxC = (array.reshape(-1, array.shape[-1]) for array in (x_BxTxC, y))
        x_NxC = checkpoint_name(x_NxC + y_NxC, "residual")
        x_NxC = x_NxC + MLP(self.config, name="mlp")(Norm(self.config, name="ln_2")(x_NxC), deterministic)
        return x_NxC.reshape(x_BxTxC.shape), cache


def _saved_by_design(primitive, *arguments, **parameters):
    """What every layer keeps for its backward pass: matmul and kernel outputs. Norms and activations are computed again."""
    named = jax.checkpoint_policies.save_only_these_names("qkv", "attention", "residual", "mlp")
    # cuDNN's kernel names nothing, so its output and statistics are known by the primitive
    return primitive.name.startswith("dot_product_attention_fwd") or named(primitive, *arguments, **parameters)


# train.remat -> what is kept of a layer besides its input
_REMAT_POLICIES = {
    "none": _saved_by_design,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _rows(table: nn.Embed, ids_BxT: jax.Array) -> jax.Array:
    """The table's rows for `ids_BxT`. Where fsdp splits the columns, each device gathers those of the ids it holds and looks
    its own sequences up, so that the table's gradient is asked for as a reduce-scatter; left to XLA it is an all-reduce."""
    matrix_VxC = table.embedding.astype(table.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    # nothing to gather; or one token, which no mesh divides
    if mesh.empty or mesh.shape["fsdp"] == 1 or table.is_initializing():
        return jnp.take(matrix_VxC, ids_BxT, axis=0)

    def local(matrix_VxC, ids_BxT):
        matrix_VxC = jax.lax.all_gather(matrix_VxC, "fsdp", axis=1, tiled=True)
        rows_BxT = ids_BxT - jax.lax.axis_index("tensor") * matrix_VxC.shape[0]
        here = (rows_BxT >= 0) & (rows_BxT < matrix_VxC.shape[0])
        found = jnp.take(matrix_VxC, jnp.where(here, rows_BxT, 0), axis=0)
        return jax.lax.psum(jnp.where(here[..., None], found, 0), "tensor")

    split = {"in_specs": (P("tensor", "fsdp"), P(BATCH)), "out_specs": P(BATCH)}
    return jax.shard_map(local, mesh=mesh, **split, check_vma=False)(matrix_VxC, ids_BxT)


class GPT(nn.Module):
    """Token ids -> final hidden states; `loss.py` and `logits` apply the head to them."""

    config: GPTConfig

    def setup(self):
        c = self.config
        table = {"features": c.n_embd, "dtype": c.dtype, "param_dtype": c.param_dtype}
        self.wte = nn.Embed(c.padded_vocab_size, embedding_init=_vocabulary(c, 0.02), **table)
        if c.position == "learned":
            self.wpe = nn.Embed(c.block_size, embedding_init=_normal(0.02, "position", "embed"), **table)
        if c.embed_norm:
            self.ln_e = Norm(c)
        self.drop = nn.Dropout(c.dropout)
        block = Block
        if c.remat != "none" or c.scan_unroll < c.n_layer:
            # prevent_cse=False: inside a scan the forward and backward loops are apart, there is nothing to merge. Of
            # layers in one piece XLA would merge everything, and `_saved_by_design` would only be in the way of its fusions.
            block = nn.remat(Block, policy=_REMAT_POLICIES[c.remat], prevent_cse=False, static_argnums=(3,))
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.n_layer,
            unroll=c.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.ln_f = Norm(c)
        if not c.tie_embeddings:
            head_std = 0.0 if c.zero_init_proj else 0.02
            self.lm_head = nn.Embed(c.padded_vocab_size, embedding_init=_vocabulary(c, head_std), **table)

    def __call__(self, tokens_BxT: jax.Array, deterministic: bool = True) -> jax.Array:
        """Hidden states of whole sequences.

        Args:
          tokens_BxT: int32 ids below vocab_size; T at most block_size.
          deterministic: False = dropout, from the "dropout" rng.

        Returns:
          [B, T, C] of `config.dtype`, after the final norm.
        """
        positions_T = jnp.arange(tokens_BxT.shape[1])
        x, _ = self.blocks(self.embed(tokens_BxT, positions_T, deterministic), positions_T, deterministic)
        if self.is_initializing() and not self.config.tie_embeddings:
            self.lm_head(tokens_BxT[:, :1])
        return self.ln_f(x)

    def embed(self, tokens_BxT: jax.Array, positions_T: jax.Array, deterministic: bool = True) -> jax.Array:
        """The residual stream's start, [B, T, C]."""
        c = self.config
        x = _rows(self.wte, tokens_BxT)
        if c.position == "learned":
            whole = nn.with_logical_constraint(self.wpe.embedding.astype(c.dtype), ("position", "hidden"))
            x = x + jnp.take(whole, positions_T, axis=0)
        if c.embed_norm:
            x = self.ln_e(x)
        return nn.with_logical_constraint(self.drop(x, deterministic), ("batch", "length", "hidden"))

    def final_norm(self, x_BxTxC: jax.Array) -> jax.Array:
        """The norm between the last block and the head."""
        return self.ln_f(x_BxTxC)


def cast_matrices(params, dtype: jnp.dtype):
    """Kernels and embeddings in the matmuls' dtype; biases and norm scales as they are (a norm's scale acts in float32)."""

    def cast(path, p):
        return p.astype(dtype) if path[-1].key in ("kernel", "embedding") else p

    return jax.tree_util.tree_map_with_path(cast, params)


def head(params, config: GPTConfig) -> jax.Array:
    """The [V, C] matrix whose rows are the ids' output vectors: the token embedding when tied."""
    return params["wte" if config.tie_embeddings else "lm_head"]["embedding"]


def logits(params, config: GPTConfig, hidden_BxTxC: jax.Array) -> jax.Array:
    """Logits [B, T, vocab_size] of float32 (float64 for float64), padding cut off. For whole batches see `loss.py`."""
    wide = jnp.promote_types(config.dtype, jnp.float32)
    matrix_VxC = head(params, config).astype(config.dtype)
    out_VxBxT = jnp.einsum("vc,btc->vbt", matrix_VxC, hidden_BxTxC, preferred_element_type=wide)
    # the padding is cut off the logits, not off the matrix: a slice of the matrix would be a copy of it
    out = out_VxBxT[: config.vocab_size].transpose(1, 2, 0)
    return config.logit_softcap * jnp.tanh(out / config.logit_softcap) if config.logit_softcap else out
