"""Exchange with Hugging Face's GPT-2 through safetensors: names, shapes and configuration, both ways.

Their Conv1D weights are [in, out] like our kernels, so nothing is transposed. Three things differ: they have one tensor
per layer where ours are stacked, one `c_attn` = q|k|v where ours are three kernels, and no padding of the vocabulary.
Pickles (`pytorch_model.bin`) are never read, because unpickling executes code.

Shapes: C n_embd, L n_layer, T block_size, V vocab_size.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trialgpt_jax import UserError
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.layers import EPS
from trialgpt_jax.schema import specs
from trialgpt_jax.storage import files, json_files

WEIGHTS = "model.safetensors"

# The allow-list of the export: the fields of `GPTConfig` that their configuration expresses. Every other field of the
# group `model` must have its default, which is GPT-2's, so an option that this module does not know is refused.
_EXPRESSED = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias", "dropout", "tie_embeddings")
_INITIAL = ("zero_init_proj",)  # acts on initial values only
# Their options that change the function: name -> GPT-2's values, the default first.
_THEIR_OPTIONS = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (EPS,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_THEIR_SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}  # defaults
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, which old files contain


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of their tensors by name, without the prefix `transformer.`; `lm_head.weight` only if it is untied."""
    C, V = config.n_embd, config.vocab_size
    kernels = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    layer = {}
    for name, shape in {"ln_1": (C,), "ln_2": (C,), **kernels}.items():
        layer |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    outer = {"wte.weight": (V, C), "wpe.weight": (config.block_size, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    if not config.tie_embeddings:
        outer["lm_head.weight"] = (V, C)
    return outer | {f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in layer.items()}


# ---- ours -> theirs


def to_hf(params, config: GPTConfig) -> dict[str, np.ndarray]:
    """Their state dict, as `GPT2LMHeadModel` saves it: `transformer.*`, and `lm_head.weight` only if it is untied.

    A model without biases becomes one with biases of zero.

    Args:
      params: our parameters.
      config: of the model.

    Raises:
      UserError: names the options that GPT-2 does not have.
    """
    check_expressible(config)
    ours = {name: np.asarray(value) for name, value in traverse_util.flatten_dict(params, sep="/").items()}
    dtype = ours["wte/embedding"].dtype
    tensors = {}
    for name, shape in shapes(config).items():
        prefix, layer, rest = re.fullmatch(r"(?:(h)\.(\d+)\.)?(.*)", name).groups()
        path = _our_path(rest)
        parts = [path.replace("c_attn", each) for each in ("c_q", "c_k", "c_v")] if "c_attn" in path else [path]
        if prefix:
            values = [ours[f"blocks/{part}"][int(layer)] for part in parts if f"blocks/{part}" in ours]
        else:
            values = [ours[part] for part in parts if part in ours]
        value = np.concatenate(values, -1) if values else np.zeros(shape, dtype)
        if path.endswith("embedding"):
            value = value[: shape[0]]  # removes the padding of the vocabulary
        tensors[name if name.startswith("lm_head") else f"transformer.{name}"] = np.ascontiguousarray(value)
    return tensors


def check_expressible(config: GPTConfig) -> None:
    """Raises UserError, naming the options, for a model that is not a GPT-2."""
    defaults = GPTConfig()
    free = (*_EXPRESSED, *_INITIAL, "n_kv_head", "head_dim")  # the last two depend on n_head and n_embd
    wrong = [
        f"model.{name}={getattr(config, name)}"
        for name in specs(GPTConfig)
        if name not in free and getattr(config, name) != getattr(defaults, name)
    ]
    if config.n_kv_head != config.n_head:
        wrong.append(f"model.n_kv_head={config.n_kv_head} (n_head is {config.n_head})")
    if config.head_dim * config.n_head != config.n_embd:
        wrong.append(f"model.head_dim={config.head_dim} (n_embd / n_head is {config.n_embd / config.n_head:g})")
    if wrong:
        raise UserError(f"Hugging Face's GPT-2 cannot express {', '.join(wrong)}; only GPT-2's options can be exported")


def hf_config(config: GPTConfig, eot_id: int | None) -> dict:
    """The contents of their `config.json`. `eot_id`: the end-of-text id, their bos and eos; None = unknown."""
    check_expressible(config)
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{name: values[0] for name, values in _THEIR_OPTIONS.items()},
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": str(config.param_dtype),
    }


def write(folder: str, params, config: GPTConfig, eot_id: int | None) -> None:
    """Writes `model.safetensors`, `generation_config.json` and `config.json` into an existing folder.

    They and all other files in the folder are durable when it returns. config.json is last, so that no loader takes an
    unfinished folder for a model.

    Raises:
      UserError: as `to_hf`.
      OSError: the folder cannot be written.
    """
    with files.replacing(os.path.join(folder, WEIGHTS)) as part:
        save_file(to_hf(params, config), part, metadata={"format": "pt"})
    files.sync_tree(folder)  # the tokenizer's files
    generation = {"bos_token_id": eot_id, "eos_token_id": eot_id}
    for name, value in (("generation_config.json", generation), ("config.json", hf_config(config, eot_id))):
        files.write(os.path.join(folder, name), json.dumps(value, indent=2) + "\n")


# ---- theirs -> ours


def read_config(folder: str) -> dict:
    """The fields of `config.model` for the model of an HF folder: its sizes, and GPT-2's options.

    Dropout is 0. Their default of 0.1 is what GPT-2 was trained with from scratch.

    Raises:
      UserError: no config.json, another architecture, or an option that our GPT does not have.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; it must hold config.json and {WEIGHTS}")
    try:
        theirs = json_files.read(path)
        if not isinstance(theirs, dict):
            raise TypeError("it does not hold an object")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the configuration of a model: {error}") from None
    for name, values in _THEIR_OPTIONS.items():
        if theirs.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} is {theirs[name]!r}, but only GPT-2's {values[0]!r} can be converted")
    sizes = {name: theirs.get(name, default) for name, default in _THEIR_SIZES.items()}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise UserError(f"{path}: {name} is {size!r}, but must be a whole number of at least 1")
    if sizes["n_embd"] % sizes["n_head"]:
        raise UserError(f"{path}: n_embd={sizes['n_embd']} is not divisible by n_head={sizes['n_head']}")
    if theirs.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise UserError(f"{path}: n_inner is {theirs['n_inner']}, but only 4 * n_embd can be converted")
    sizes["block_size"] = sizes.pop("n_positions")
    tied = bool(theirs.get("tie_word_embeddings", True))
    return {name: default for name, (default, _) in specs(GPTConfig).items()} | sizes | {"tie_embeddings": tied}


def is_hf_folder(folder: str) -> bool:
    """Whether a folder's config.json describes a Hugging Face model, and not a workdir."""
    try:
        return not isinstance(json_files.read(os.path.join(folder, "config.json")).get("model"), dict)
    except (OSError, ValueError, AttributeError):
        return False


def from_hf(tensors: Mapping[str, np.ndarray], config: GPTConfig) -> dict:
    """Our parameters from their tensors; the vocabulary is padded with zeros, as in a new model.

    Args:
      tensors: by name, with or without the prefix `transformer.`; of any float dtype.
      config: of the model.

    Returns:
      Numpy arrays of `config.param_dtype`.

    Raises:
      UserError: names a tensor that is missing, not GPT-2's, or of another shape.
    """
    wanted = shapes(config)
    given = {name.removeprefix("transformer."): name for name in tensors}
    given = {name: full for name, full in given.items() if not _BUFFER.fullmatch(name)}
    head = given.pop("lm_head.weight", None) if config.tie_embeddings else None
    for what, names in (("has no", wanted.keys() - given), ("has an unknown", given.keys() - wanted)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"the model {what} tensor `{min(names)}`{more}, for a GPT-2 of {config.n_layer} layers")

    def get(name):
        value = np.asarray(tensors[given[name]])
        if value.shape != wanted[name]:
            raise UserError(f"tensor `{given[name]}` has shape {value.shape}, but config.json asks for {wanted[name]}")
        return value.astype(config.param_dtype)

    ours = {}
    for name in wanted:
        prefix, layer, rest = re.fullmatch(r"(?:(h)\.(\d+)\.)?(.*)", name).groups()
        path = _our_path(rest)
        if path.endswith("embedding") and path != "wpe/embedding":
            ours[path] = np.pad(get(name), ((0, config.padded_vocab_size - config.vocab_size), (0, 0)))
        elif not prefix:
            ours[path] = get(name)
        elif layer == "0":
            stacked = np.stack([get(f"h.{i}.{rest}") for i in range(config.n_layer)])
            if "c_attn" in path:
                for each, part in zip(("c_q", "c_k", "c_v"), np.split(stacked, 3, axis=-1)):
                    ours[f"blocks/{path.replace('c_attn', each)}"] = part
            else:
                ours[f"blocks/{path}"] = stacked
    if head and not np.array_equal(np.asarray(tensors[head]), np.asarray(tensors[given["wte.weight"]])):
        raise UserError(
            f"tensor `{head}` differs from `{given['wte.weight']}`, though config.json ties them; "
            "set tie_word_embeddings=false"
        )
    return traverse_util.unflatten_dict(ours, sep="/")


class SafetensorsFolder(Mapping):
    """The tensors of `model.safetensors`, or of the shards in `model.safetensors.index.json`, read on access.

    Raises:
      UserError: there is neither (a pickle is refused with the way to convert it), or a file is damaged.
    """

    def __init__(self, folder: str):
        index = os.path.join(folder, f"{WEIGHTS}.index.json")
        if os.path.exists(os.path.join(folder, WEIGHTS)):
            shards = [WEIGHTS]
        elif os.path.exists(index):
            try:
                shards = sorted(set(json_files.read(index)["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} cannot be read as an index of shards: {error!r}") from None
            if outside := [name for name in shards if not files.is_plain_name(name)]:
                raise UserError(f"{index}: the shard {outside[0]!r} is not a plain file name inside the folder")
        else:
            pickles = [name for name in sorted(os.listdir(folder)) if name.endswith((".bin", ".pt", ".pth"))]
            raise UserError(f"{folder} has no {WEIGHTS}" + (_pickle_advice(folder, pickles[0]) if pickles else ""))
        self._file_of = {}
        for name in shards:
            path = os.path.join(folder, name)
            try:
                opened = safe_open(path, framework="numpy")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read as safetensors: {error}") from None
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _pickle_advice(folder: str, file: str) -> str:
    return (
        f"; {file} is a pickle and is not read, because unpickling executes code. If you trust it, convert it with "
        f"transformers: GPT2LMHeadModel.from_pretrained({folder!r}).save_pretrained(NEW_FOLDER)"
    )


def _our_path(name: str) -> str:
    """Our name for theirs, without `h.<layer>`: `mlp.c_fc.weight` -> `mlp/c_fc/kernel`."""
    module, leaf = name.rsplit(".", 1)
    if leaf == "weight":
        leaf = "scale" if module.startswith("ln_") else "embedding" if module in ("wte", "wpe", "lm_head") else "kernel"
    return f"{module.replace('.', '/')}/{leaf}"
