"""The shape and numerics of a GPT, as plain Python: no JAX is imported here."""

import dataclasses

from trialgpt_jax import UserError
from trialgpt_jax.schema import check, field, specs

TILE = 128  # vocabulary and MLP widths are rounded up to this: the tile of TPU and GPU matmuls


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """A GPT; the defaults are GPT-2 124M.

    The fields declared with `field` are the group `model` of the config (`trialgpt_jax/config.py`). The others follow
    from the group `train` and the platform, see `training/program.py`. The upper limits of the sizes are beyond every
    published model; they refuse a size that would take all memory before anything is allocated.

    Raises:
      UserError: a value out of range, or values that do not fit together.
    """

    vocab_size: int = field(
        50257, "ids; tables are padded to a multiple of 128. 0 = the token store's", at_least=0, at_most=2**24
    )
    block_size: int = field(1024, "context length, tokens", at_least=1, at_most=2**24)
    n_layer: int = field(12, "transformer blocks", at_least=1, at_most=10_000)
    n_head: int = field(12, "query heads", at_least=1, at_most=2**14)
    n_kv_head: int = field(0, "key/value heads (grouped-query attention); 0 = n_head", at_least=0, at_most=2**14)
    head_dim: int = field(0, "width of a head; 0 = n_embd / n_head", at_least=0, at_most=2**14)
    n_embd: int = field(768, "width of the residual stream", at_least=1, at_most=2**17)
    bias: bool = field(True, "biases in linear layers and LayerNorms")
    dropout: float = field(0.0, "rate, on attention weights, residual branches and embeddings", at_least=0, below=1)
    tie_embeddings: bool = field(True, "the head is the token embedding")
    position: str = field("learned", "position encoding", choices=("learned", "rope"))
    rope_base: float = field(10_000.0, "of rope's frequencies, base^(-2i / head width)", at_least=1)
    norm: str = field("layernorm", "normalisation", choices=("layernorm", "rmsnorm"))
    norm_scale: bool = field(True, "norms have a learned scale")
    norm_eps: float = field(1e-5, "added to the variance in all norms", at_least=1e-12, at_most=1)
    activation: str = field("gelu", "of the MLP; gelu is the tanh form", choices=("gelu", "relu2", "swiglu"))
    mlp_width: int = field(
        0, "hidden units of the MLP; 0 = 4 * n_embd, 8/3 * n_embd for swiglu", at_least=0, at_most=2**20
    )
    qk_norm: bool = field(False, "RMS-normalise queries and keys per head")
    qk_norm_scale: bool = field(False, "qk_norm has learned scales, one per channel of a head")
    embed_norm: bool = field(False, "normalise the embeddings before the first block")
    logit_softcap: float = field(0.0, "s > 0: logits become s * tanh(logits / s)", at_least=0)
    zero_init_proj: bool = field(False, "residual projections (and an untied head) start at zero")

    dtype: str = "float32"  # of matmuls and activations
    param_dtype: str = "float32"
    attention: str = "xla"  # a key of attention.ATTENTION
    remat: str = "none"  # a key of layers.REMAT
    scan_unroll: int = 1  # layers per iteration of the scan over layers
    decode: bool = False  # parameters in the layout of `generate.split_layers`: layers apart, kernels [out, in]

    def __post_init__(self):
        for name, (_, spec) in specs(type(self)).items():
            check(f"model.{name}", getattr(self, name), spec)
        for name in ("dtype", "param_dtype"):  # also accepts jnp.float32 and numpy dtypes
            value = getattr(self, name)
            object.__setattr__(self, name, getattr(value, "__name__", None) or str(value))
        if self.head_dim == 0 and self.n_embd % self.n_head:
            raise UserError(f"model.n_embd={self.n_embd} is not divisible by model.n_head={self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise UserError(f"model.n_head={self.n_head} is not divisible by model.n_kv_head={self.n_kv_head}")
        object.__setattr__(self, "n_kv_head", self.n_kv_head or self.n_head)
        object.__setattr__(self, "head_dim", self.head_dim or self.n_embd // self.n_head)
        object.__setattr__(self, "mlp_width", self.mlp_width or self.default_mlp_width)
        if self.qk_norm_scale and not self.qk_norm:
            raise UserError("model.qk_norm_scale=True needs model.qk_norm=True")
        if self.position == "rope" and self.head_dim % 2:
            raise UserError("model.position=rope rotates pairs and needs an even head width; set model.head_dim")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head."""
        return -(-self.vocab_size // TILE) * TILE

    @property
    def default_mlp_width(self) -> int:
        """4 * n_embd; 8/3 * n_embd for swiglu, whose three matrices then have as many parameters as two."""
        if self.activation == "swiglu":
            return -(-8 * self.n_embd // (3 * TILE)) * TILE
        return 4 * self.n_embd
