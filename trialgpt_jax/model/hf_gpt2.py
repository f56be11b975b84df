"""transformers' GPT2LMHeadModel.

Its Conv1D weights are [in, out] like our kernels, so nothing is transposed. One `c_attn` = q|k|v where ours are three
kernels. It has biases always.

Shapes: C n_embd, F mlp_width, V vocab_size.
"""

from typing import Any, ClassVar, TypedDict

from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.hf_family import Family, Tensor, number, their_name


class _Config(TypedDict, total=False):
    """What is read of a config.json."""

    activation_function: str
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    add_cross_attention: bool
    vocab_size: int
    n_positions: int
    max_position_embeddings: int
    n_embd: int
    hidden_size: int
    n_layer: int
    num_hidden_layers: int
    n_head: int
    num_attention_heads: int
    n_inner: int | None
    tie_word_embeddings: bool | None
    quantization_config: dict[str, Any] | None


# Their options that change the function, with the one value that is read.
_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


class GPT2(Family):
    """See the module."""

    architecture = "GPT2LMHeadModel"
    model_type = "gpt2"
    base = "transformer."
    buffers = r"h\.\d+\.attn\.(masked_)?bias"  # the causal mask
    options: ClassVar = {"activation": ("gelu", "relu2")}
    keys = _Config
    sizes: ClassVar = {
        "vocab_size": ("vocab_size", 50257, None),
        "n_positions": ("block_size", 1024, "max_position_embeddings"),
        "n_embd": ("n_embd", 768, "hidden_size"),
        "n_layer": ("n_layer", 12, "num_hidden_layers"),
        "n_head": ("n_head", 12, "num_attention_heads"),
        "n_inner": ("mlp_width", None, None),
    }
    activations: ClassVar = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu2": "relu2"}  # `gelu` is that by erf

    def obstacles(self, config):
        found = super().obstacles(config)
        if config.n_kv_head != config.n_head:
            found.append(f"model.n_kv_head={config.n_kv_head} (n_head is {config.n_head})")
        if config.head_dim * config.n_head != config.n_embd:
            found.append(f"model.head_dim={config.head_dim} (n_embd / n_head is {config.n_embd / config.n_head:g})")
        return found

    def write_config(self, config):
        return {
            "activation_function": their_name(self.activations, config.activation),
            "layer_norm_epsilon": config.norm_eps,
            **_FIXED,
            "n_positions": config.block_size,
            "n_ctx": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": None if config.mlp_width == 4 * config.n_embd else config.mlp_width,
            "attn_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
        }

    def read_options(self, theirs, refuse):
        for name, value in _FIXED.items():
            if theirs.get(name, value) != value:
                raise refuse(name, theirs[name], repr(value))
        return {
            "activation": theirs.get("activation_function", "gelu_new"),
            "norm_eps": number("layer_norm_epsilon", theirs.get("layer_norm_epsilon", 1e-5), "norm_eps", refuse),
            "tie_embeddings": theirs.get("tie_word_embeddings") is not False,  # null as if it were left out
        }

    def tensors(self, config: GPTConfig, biases):
        C, F, V = config.n_embd, config.mlp_width, config.vocab_size
        shapes = {"h.{}.ln_1": (C,), "h.{}.attn.c_attn": (C, 3 * C), "h.{}.attn.c_proj": (C, C), "h.{}.ln_2": (C,)}
        shapes |= {"h.{}.mlp.c_fc": (C, F), "h.{}.mlp.c_proj": (F, C), "ln_f": (C,)}
        found = {
            "wte.weight": Tensor((V, C), ("wte/embedding",)),
            "wpe.weight": Tensor((config.block_size, C), ("wpe/embedding",)),
        }
        for name, shape in shapes.items():
            path = name.replace("h.{}", "blocks").replace(".", "/")
            paths = [path.replace("c_attn", part) for part in ("c_q", "c_k", "c_v")] if "c_attn" in path else [path]
            leaf = "kernel" if len(shape) == 2 else "scale"
            found[f"{name}.weight"] = Tensor(shape, tuple(f"{path}/{leaf}" for path in paths))
            found[f"{name}.bias"] = Tensor(shape[-1:], tuple(f"{path}/bias" for path in paths))
        if not config.tie_embeddings:
            found["lm_head.weight"] = Tensor((V, C), ("lm_head/embedding",))
        return found
