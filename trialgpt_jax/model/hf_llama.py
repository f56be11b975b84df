"""transformers' LlamaForCausalLM, Qwen3ForCausalLM and NanoChatForCausalLM.

Their weights are of torch.nn.Linear, [out, in]. Qwen3 is a Llama with norms of queries and keys.

NanoChat has no scales in its norms, and the norm after the embedding always. Its `rotate_half` has the other sign: it
rotates (b, a) as our rope rotates (a, b). The halves of each head are therefore exchanged in queries and keys, which
leaves their products unchanged. It normalises queries and keys after the rotation, which keeps their norm.

Shapes: C n_embd, D head width, F mlp_width, V vocab_size.
"""

from typing import Any, ClassVar, TypedDict

from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.hf_family import Family, Tensor, number, their_name


class _Rope(TypedDict, total=False):
    """`rope_parameters` of transformers 5, or `rope_scaling` of earlier versions, with `type` as an older name."""

    rope_type: str
    type: str
    rope_theta: float | None
    partial_rotary_factor: float | None


class _Config(TypedDict, total=False):
    """What is read of a config.json."""

    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    head_dim: int | None
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float | None
    rope_parameters: _Rope | None
    rope_scaling: _Rope | None
    partial_rotary_factor: float | None
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool | None
    final_logit_softcapping: float | None
    use_sliding_window: bool
    sliding_window: int | None
    max_window_layers: int
    layer_types: list[str] | None
    quantization_config: dict[str, Any] | None


class Llama(Family):
    """See the module."""

    architecture = "LlamaForCausalLM"
    model_type = "llama"
    base = "model."
    buffers = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    options: ClassVar = {"position": ("rope",), "norm": ("rmsnorm",), "activation": ("swiglu",)}
    keys = _Config
    sizes: ClassVar = {
        "vocab_size": ("vocab_size", 32000, None),
        "max_position_embeddings": ("block_size", 2048, None),
        "hidden_size": ("n_embd", 4096, None),
        "intermediate_size": ("mlp_width", 11008, None),
        "num_hidden_layers": ("n_layer", 32, None),
        "num_attention_heads": ("n_head", 32, None),
        "num_key_value_heads": ("n_kv_head", None, None),
        "head_dim": ("head_dim", None, None),
    }
    activations: ClassVar = {"silu": "swiglu", "swish": "swiglu"}
    biases: ClassVar = {"attention_bias": "self_attn", "mlp_bias": "mlp"}
    mlp: ClassVar = {"up_proj": "c_fc", "gate_proj": "c_gate", "down_proj": "c_proj"}  # their name -> ours

    def obstacles(self, config):
        found = super().obstacles(config)
        if self.model_type == "llama" and config.n_embd % config.n_head:  # the class refuses it
            found.append(f"model.n_head={config.n_head} (n_embd={config.n_embd} is not divisible by it)")
        return found

    def write_config(self, config):
        return {
            "hidden_act": their_name(self.activations, config.activation),
            "max_position_embeddings": config.block_size,
            "hidden_size": config.n_embd,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_kv_head,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "rope_theta": config.rope_base,  # its place before transformers 5
            "attention_dropout": config.dropout,  # they have no dropout elsewhere
            "pad_token_id": None,  # NanoChat's default is a token
            **dict.fromkeys(self.biases, config.bias),
        }

    def read_options(self, theirs, refuse):
        place = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
        rope = theirs.get(place) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or any(isinstance(value, dict) for value in rope.values()):  # one for each layer type
            raise refuse(place, rope, "one rope of type 'default'")
        for where in (theirs, rope):
            if where.get("partial_rotary_factor") not in (None, 1):
                raise refuse("partial_rotary_factor", where["partial_rotary_factor"], "1.0")
        base = rope.get("rope_theta") or theirs.get("rope_theta") or 10_000
        return {
            "position": "rope",
            "norm": "rmsnorm",
            "activation": theirs.get("hidden_act", next(iter(self.activations))),
            "norm_eps": number("rms_norm_eps", theirs.get("rms_norm_eps", 1e-6), "norm_eps", refuse),
            "rope_base": number("rope_theta", base, "rope_base", refuse),
            "bias": any(theirs.get(name, False) for name in self.biases),
            "tie_embeddings": bool(theirs.get("tie_word_embeddings")),
        }

    def tensors(self, config: GPTConfig, biases):
        C, D, F, V = config.n_embd, config.head_dim, config.mlp_width, config.vocab_size
        q, kv = config.n_head * D, config.n_kv_head * D
        linear = {
            "q_proj": ("c_q", C, q),
            "k_proj": ("c_k", C, kv),
            "v_proj": ("c_v", C, kv),
            "o_proj": ("c_proj", q, C),
        }
        linear = {f"self_attn.{name}": (f"attn/{path}", *sizes) for name, (path, *sizes) in linear.items()}
        for name, path in self.mlp.items():
            linear[f"mlp.{name}"] = (f"mlp/{path}", *((F, C) if path == "c_proj" else (C, F)))
        found = {"embed_tokens.weight": Tensor((V, C), ("wte/embedding",))}
        for name, (path, n_in, n_out) in linear.items():
            found[f"layers.{{}}.{name}.weight"] = Tensor((n_out, n_in), (f"blocks/{path}/kernel",), transposed=True)
            if name.split(".")[0] in biases:
                found[f"layers.{{}}.{name}.bias"] = Tensor((n_out,), (f"blocks/{path}/bias",))
        if not config.tie_embeddings:
            found["lm_head.weight"] = Tensor((V, C), ("lm_head/embedding",))
        return found | self.norms(C, D)

    def norms(self, C: int, D: int) -> dict[str, Tensor]:
        """The tensors of its norms."""
        return {
            "layers.{}.input_layernorm.weight": Tensor((C,), ("blocks/ln_1/scale",)),
            "layers.{}.post_attention_layernorm.weight": Tensor((C,), ("blocks/ln_2/scale",)),
            "norm.weight": Tensor((C,), ("ln_f/scale",)),
        }


class Qwen3(Llama):
    """See the module."""

    architecture = "Qwen3ForCausalLM"
    model_type = "qwen3"
    free = ("qk_norm_scale",)
    options: ClassVar = Llama.options | {"qk_norm": (True,)}
    sizes: ClassVar = Llama.sizes | {
        "vocab_size": ("vocab_size", 151936, None),
        "max_position_embeddings": ("block_size", 32768, None),
        "intermediate_size": ("mlp_width", 22016, None),
        "num_key_value_heads": ("n_kv_head", 32, None),
        "head_dim": ("head_dim", 128, None),
    }
    biases: ClassVar = {"attention_bias": "self_attn"}

    def write_config(self, config):
        return super().write_config(config) | {"use_sliding_window": False}

    def read_options(self, theirs, refuse):
        types, window = theirs.get("layer_types"), theirs.get("sliding_window", 4096)
        if types and set(types) != {"full_attention"}:
            raise refuse("layer_types", sorted(set(types)), "'full_attention'")
        slides = theirs.get("use_sliding_window", False) and window is not None
        if slides and not types and theirs.get("max_window_layers", 28) < theirs.get("num_hidden_layers", 32):
            raise refuse("sliding_window", window, "attention without a window")
        return super().read_options(theirs, refuse) | {"qk_norm": True, "qk_norm_scale": True}

    def norms(self, C, D):
        return super().norms(C, D) | {
            f"layers.{{}}.self_attn.{name}.weight": Tensor((D,), (f"blocks/attn/{name}/scale",))
            for name in ("q_norm", "k_norm")
        }


class NanoChat(Llama):
    """See the module."""

    architecture = "NanoChatForCausalLM"
    model_type = "nanochat"
    free = ("logit_softcap",)
    options: ClassVar = Llama.options | {"activation": ("relu2", "gelu"), "qk_norm": (True,), "embed_norm": (True,)}
    sizes: ClassVar = Llama.sizes | {
        "vocab_size": ("vocab_size", 50304, None),
        "hidden_size": ("n_embd", 768, None),
        "intermediate_size": ("mlp_width", 8192, None),
        "num_hidden_layers": ("n_layer", 12, None),
        "num_attention_heads": ("n_head", 6, None),
    }
    activations: ClassVar = {"relu2": "relu2", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
    biases: ClassVar = {"attention_bias": "self_attn"}
    mlp: ClassVar = {"fc1": "c_fc", "fc2": "c_proj"}

    def write_config(self, config):
        return super().write_config(config) | {"final_logit_softcapping": config.logit_softcap or None}

    def read_options(self, theirs, refuse):
        softcap = theirs.get("final_logit_softcapping", 15.0)
        if softcap is not None and not softcap > 0:
            raise refuse("final_logit_softcapping", softcap, "a number above 0, or null")
        softcap = number("final_logit_softcapping", softcap or 0, "logit_softcap", refuse)
        options = {"qk_norm": True, "embed_norm": True, "norm_scale": False, "logit_softcap": softcap}
        return super().read_options(theirs, refuse) | options

    def tensors(self, config, biases):
        return {
            name: tensor._replace(rotary="q_proj" in name or "k_proj" in name)
            for name, tensor in super().tensors(config, biases).items()
        }

    def norms(self, C, D):
        return {}
