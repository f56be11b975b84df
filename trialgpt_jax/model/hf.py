"""Exchange with Hugging Face's GPT-2 through safetensors: names, shapes and configuration, both ways.

Their Conv1D weights are [in, out] like our kernels, so nothing is transposed. Three things differ: they have one tensor
per layer where ours are stacked, one `c_attn` = q|k|v where ours are three kernels, and no padding of the vocabulary.
Pickles (`pytorch_model.bin`) are never read, because unpickling executes code. `hf_folder.py` reads the files.

Shapes: C n_embd, L n_layer, T block_size, V vocab_size.
"""

import json
import math
import os
import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from trialgpt_jax import UserError
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.hf_folder import OPTIONS, WEIGHTS, SafetensorsFolder, plain_names
from trialgpt_jax.schema import specs
from trialgpt_jax.storage import files

# The allow-list of the export: the fields of `GPTConfig` that their configuration expresses. Every other field of the
# group `model` must have its default, which is GPT-2's, so an option that this module does not know is refused.
_EXPRESSED = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias", "dropout", "tie_embeddings")
_INITIAL = ("zero_init_proj",)  # acts on initial values only


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
        **{name: values[0] for name, values in OPTIONS.items()},
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
        with open(part, "wb") as file:
            mode = os.stat(file.fileno()).st_mode  # by the umask
        save_file(to_hf(params, config), part, metadata={"format": "pt"})
        os.chmod(part, mode)  # save_file makes a file of mode 0600
    files.sync_tree(folder)  # the tokenizer's files
    generation = {"bos_token_id": eot_id, "eos_token_id": eot_id}
    for name, value in (("generation_config.json", generation), ("config.json", hf_config(config, eot_id))):
        files.write(os.path.join(folder, name), json.dumps(value, indent=2) + "\n")


# ---- theirs -> ours


def check_tensors(tensors: Mapping[str, np.ndarray], config: GPTConfig) -> dict[str, str]:
    """Compares names, dtypes and shapes with those of the model; of a `SafetensorsFolder` reads headers only.

    Args:
      tensors: by name; `transformer.` and the prefixes of torch.compile and DistributedDataParallel may precede names.
      config: of the model.

    Returns:
      Name as in `shapes` -> name in `tensors`; `lm_head.weight` too if there is one.

    Raises:
      UserError: names a tensor that is missing, not GPT-2's, of another shape, or not of floats.
    """
    wanted = shapes(config)
    given = plain_names(tensors)
    head = {"lm_head.weight"} if config.tie_embeddings else set()  # a copy of the embedding, compared in `from_hf`
    where = f"{tensors.folder}: " if isinstance(tensors, SafetensorsFolder) else ""
    for what, names in (("has no", wanted.keys() - given), ("has an unknown", given.keys() - wanted - head)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"{where}the model {what} tensor `{min(names)}`{more}, for a GPT-2 of {config.n_layer} layers"
            )
    shape_of = tensors.shape if isinstance(tensors, SafetensorsFolder) else lambda name: np.shape(tensors[name])
    for name, full in given.items():
        shape, want = shape_of(full), wanted.get(name) or wanted["wte.weight"]
        if shape != want:
            why = "; it is transposed, as torch.nn.Linear and nanoGPT save it" if shape == want[::-1] else ""
            raise UserError(f"{where}tensor `{full}` has shape {shape}, but config.json asks for {want}{why}")
    return given


def parameter_bytes(config: GPTConfig) -> int:
    """Bytes of the parameters that `from_hf` returns, without the padding of the vocabulary."""
    return sum(math.prod(shape) for shape in shapes(config).values()) * np.dtype(config.param_dtype).itemsize


def from_hf(tensors: Mapping[str, np.ndarray], config: GPTConfig) -> dict:
    """Our parameters from their tensors; the vocabulary is padded with zeros, as in a new model.

    Args:
      tensors: see `check_tensors`; of any float dtype.
      config: of the model.

    Returns:
      Numpy arrays of `config.param_dtype`.

    Raises:
      UserError: as `check_tensors`, or a head that differs from the embedding that it is tied to.
    """
    wanted, given = shapes(config), check_tensors(tensors, config)
    head = given.get("lm_head.weight") if config.tie_embeddings else None

    def get(name):
        return np.asarray(tensors[given[name]]).astype(config.param_dtype)

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


def _our_path(name: str) -> str:
    """Our name for theirs, without `h.<layer>`: `mlp.c_fc.weight` -> `mlp/c_fc/kernel`."""
    module, leaf = name.rsplit(".", 1)
    if leaf == "weight":
        leaf = "scale" if module.startswith("ln_") else "embedding" if module in ("wte", "wpe", "lm_head") else "kernel"
    return f"{module.replace('.', '/')}/{leaf}"
