"""Exchange with Hugging Face's transformers through safetensors: names, shapes and configuration, both ways.

A model is exported for the first class of `FAMILIES` that computes exactly the same function, and the same classes are
read. They have one tensor per layer where ours are stacked, and no padding of the vocabulary; `hf_gpt2.py` and
`hf_llama.py` say what else differs. Pickles (`pytorch_model.bin`) are never read, because unpickling executes code.
`hf_folder.py` reads the files.
"""

import json
import math
import os
from collections.abc import Mapping

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from trialgpt_jax import UserError
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.hf_family import Family, Tensor, names_of
from trialgpt_jax.model.hf_folder import WEIGHTS, SafetensorsFolder, plain_names, read_raw_config
from trialgpt_jax.model.hf_gpt2 import GPT2
from trialgpt_jax.model.hf_llama import Llama, NanoChat, Qwen3
from trialgpt_jax.schema import specs
from trialgpt_jax.storage import files, json_files

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
FAMILIES: tuple[Family, ...] = (GPT2(), NanoChat(), Llama(), Qwen3())  # in the order of preference


def family_of(config: GPTConfig) -> Family:
    """The first class that expresses the options of a model.

    Raises:
      UserError: there is none; names the options that the nearest class does not have.
    """
    obstacles = [family.obstacles(config) for family in FAMILIES]
    found = min(range(len(FAMILIES)), key=lambda i: len(obstacles[i]))
    if obstacles[found]:
        raise _inexpressible(FAMILIES[found], ", ".join(obstacles[found]))
    return FAMILIES[found]


def _inexpressible(nearest: Family, what: str) -> UserError:
    return UserError(
        f"no class of transformers computes this model; the nearest, {nearest.architecture}, cannot express {what}"
    )


# ---- ours -> theirs


def check_expressible(config: GPTConfig, params=None) -> None:
    """Refuses a model that no class computes.

    Args:
      config: of the model.
      params: our parameters. With them a scale or bias that the class does not have is compared with 1 or 0.

    Raises:
      UserError: names the options.
    """
    family = family_of(config)
    if params is not None:
        _prepared(params, config, family)


def to_hf(params, config: GPTConfig) -> dict[str, np.ndarray]:
    """Their state dict, as the class of `family_of` saves it; `lm_head.weight` only if it is untied.

    Biases and scales that the class has and ours has not are zeros and ones.

    Args:
      params: our parameters.
      config: of the model.

    Raises:
      UserError: names the options that no class has.
    """
    family = family_of(config)
    ours = _prepared(params, config, family)
    dtype, tensors = ours["wte/embedding"].dtype, {}
    for key, tensor in family.tensors(config, _biases(family, config)).items():
        for i, name in enumerate(names_of(key, config)):
            parts = [ours[path][i] if "{}" in key else ours[path] for path in tensor.ours if path in ours]
            neutral = 0 if name.endswith("bias") else 1
            value = np.concatenate(parts, -1) if parts else np.full(tensor.shape, neutral, dtype)
            if tensor.rotary:
                value = _exchange_halves(value, config.head_dim)
            value = value.T if tensor.transposed else value[: tensor.shape[0]]  # removes the vocabulary's padding
            tensors[name if name.startswith("lm_head") else family.base + name] = np.ascontiguousarray(value)
    return tensors


def hf_config(config: GPTConfig, eot_id: int | None) -> dict:
    """The contents of their `config.json`. `eot_id`: the end-of-text id, their bos and eos; None = unknown."""
    family = family_of(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        **family.write_config(config),
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
    generation = dict.fromkeys(_SPECIAL_IDS, eot_id)
    for name, value in (("generation_config.json", generation), ("config.json", hf_config(config, eot_id))):
        files.write(os.path.join(folder, name), json.dumps(value, indent=2) + "\n")


def _prepared(params, config: GPTConfig, family: Family) -> dict[str, np.ndarray]:
    """Our parameters by path, those that the class does not have multiplied into others.

    Raises:
      UserError: one of them is not neutral and belongs to no other.
    """
    ours = {path: np.asarray(value) for path, value in traverse_util.flatten_dict(params, sep="/").items()}
    held = {path for tensor in family.tensors(config, _biases(family, config)).values() for path in tensor.ours}
    readers = {"blocks/ln_1": ["attn/c_q", "attn/c_k", "attn/c_v"], "blocks/ln_2": ["mlp/c_fc", "mlp/c_gate"]}
    for norm, modules in readers.items():
        if f"{norm}/scale" in ours.keys() - held:
            scale_LxC = ours.pop(f"{norm}/scale")
            for kernel in (f"blocks/{module}/kernel" for module in modules):
                if kernel in ours:
                    ours[kernel] = scale_LxC[:, :, None] * ours[kernel]
    if "lm_head/embedding" in ours and "ln_f/scale" in ours.keys() - held:
        ours["lm_head/embedding"] = ours["lm_head/embedding"] * ours.pop("ln_f/scale")
    for path in sorted(ours.keys() - held):
        option, neutral = ("bias", 0) if path.endswith("bias") else ("norm_scale", 1)
        if np.any(ours[path] != neutral):
            why = f"because it has nothing for {path}, whose values are not all {neutral}"
            raise _inexpressible(family, f"model.{option}=True, {why}")
    return ours


def _exchange_halves(array: np.ndarray, head_dim: int) -> np.ndarray:
    """[..., heads * D] with (b, a) in place of the halves (a, b) of each head; its own inverse."""
    halves = array.reshape(*array.shape[:-1], -1, 2, head_dim // 2)
    return halves[..., ::-1, :].reshape(array.shape)


# ---- theirs -> ours


def read_config(folder: str) -> dict:
    """The fields of `config.model` for the model of a Hugging Face folder.

    Dropout is 0. GPT-2's default of 0.1 is what it was trained with from scratch.

    Raises:
      UserError: no config.json, another architecture, a size beyond the limits of `GPTConfig`, or an option that our
        GPT does not have.
    """
    path = os.path.join(folder, "config.json")
    any_model = read_raw_config(folder)
    kind = any_model.get("model_type", GPT2.model_type)

    def refuse(name, value, what):
        return UserError(f"{path}: {name} is {value!r:.200}, but only {what} can be converted")

    family = next((family for family in FAMILIES if family.model_type == kind), None)
    if family is None:  # before the types, which are those of the class
        raise refuse("model_type", kind, " or ".join(repr(family.model_type) for family in FAMILIES))
    try:
        theirs = json_files.check(any_model, family.keys)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as the configuration of a {family.architecture}: {error}") from None
    if method := theirs.get("quantization_config"):
        raise UserError(
            f"{path}: the weights are quantised (quantization_config {method.get('quant_method', '')!r}); "
            "only float weights can be converted"
        )
    declared, sizes = specs(GPTConfig), {}
    for name, (ours, default, second) in family.sizes.items():
        size, limit = theirs.get(name, theirs.get(second, default)), declared[ours][1].at_most
        if size is not None and not 1 <= size <= limit:
            raise UserError(f"{path}: {name} is {size}, but must be at least 1 and at most {limit}")
        sizes[ours] = size or 0
    options = family.read_options(theirs, refuse)
    if options["activation"] not in family.activations:
        name = "hidden_act" if "hidden_act" in theirs else "activation_function"
        raise refuse(name, options["activation"], " or ".join(map(repr, family.activations)))
    options["activation"] = family.activations[options["activation"]]
    _check_sizes(path, family, sizes)
    head_dim = sizes.get("head_dim") or sizes["n_embd"] // sizes["n_head"]
    if options.get("position") == "rope" and head_dim % 2:
        raise refuse("head_dim", head_dim, "an even number")
    fields = {name: default for name, (default, _) in declared.items()} | sizes | options
    try:
        GPTConfig(**fields)
    except UserError as error:
        raise UserError(f"{path} has a model that cannot be converted: {error}") from None
    return fields


def _check_sizes(path: str, family: Family, sizes: Mapping[str, int]) -> None:
    """Refuses sizes that do not divide each other, by their names."""
    theirs = {ours: name for name, (ours, _, _) in family.sizes.items()}
    for whole, part in (("n_embd", "n_head"), ("n_head", "n_kv_head")):
        if part == "n_head" and sizes.get("head_dim"):
            continue
        if sizes.get(part) and sizes[whole] % sizes[part]:
            raise UserError(f"{path}: {theirs[whole]}={sizes[whole]} is not divisible by {theirs[part]}={sizes[part]}")


def check_tensors(tensors: Mapping[str, np.ndarray], config: GPTConfig) -> dict[str, str]:
    """Compares names, dtypes and shapes with those of the model; of a `SafetensorsFolder` reads headers only.

    Args:
      tensors: by name; the class's prefix (`transformer.`, `model.`) and those of torch.compile and
        DistributedDataParallel may precede names.
      config: of the model.

    Returns:
      Name without prefixes -> name in `tensors`; `lm_head.weight` too if there is one.

    Raises:
      UserError: names a tensor that is missing, unknown, of another shape, or not of floats.
    """
    family = family_of(config)
    folder = tensors.folder if isinstance(tensors, SafetensorsFolder) else None
    wanted = family.shapes(config, _biases(family, config, folder))
    given = plain_names(tensors, family.base, family.buffers)
    head = {"lm_head.weight"} if config.tie_embeddings else set()  # a copy of the embedding, compared in `from_hf`
    where = f"{folder}: " if folder else ""
    for what, names in (("has no", wanted.keys() - given), ("has an unknown", given.keys() - wanted - head)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"{where}the model {what} tensor `{min(names)}`{more}, for a {family.architecture} of "
                f"{config.n_layer} layers"
            )
    shape_of = tensors.shape if folder else lambda name: np.shape(tensors[name])
    for name, full in given.items():
        shape, want = shape_of(full), wanted.get(name) or (config.vocab_size, config.n_embd)
        if shape != want:
            usual = "torch.nn.Linear and nanoGPT save it" if family.model_type == "gpt2" else "[in, out]"
            why = f"; it is transposed, as {usual}" if shape == want[::-1] else ""
            raise UserError(f"{where}tensor `{full}` has shape {shape}, but config.json asks for {want}{why}")
    return given


def parameter_bytes(config: GPTConfig) -> int:
    """Bytes of the parameters that `from_hf` returns, without the padding of the vocabulary."""
    family = family_of(config)
    shapes = family.shapes(config, _biases(family, config)).values()
    return sum(math.prod(shape) for shape in shapes) * np.dtype(config.param_dtype).itemsize


def from_hf(tensors: Mapping[str, np.ndarray], config: GPTConfig) -> dict:
    """Our parameters from their tensors; the vocabulary is padded with zeros, as in a new model.

    Args:
      tensors: see `check_tensors`; of any float dtype.
      config: of the model, with the fields of `read_config`.

    Returns:
      Numpy arrays of `config.param_dtype`.

    Raises:
      UserError: as `check_tensors`, or a head that differs from the embedding that it is tied to.
    """
    family, given = family_of(config), check_tensors(tensors, config)

    def get(name: str, tensor: Tensor) -> np.ndarray:
        value = np.asarray(tensors[given[name]]).astype(config.param_dtype)
        value = value.T if tensor.transposed else value
        return _exchange_halves(value, config.head_dim) if tensor.rotary else value

    ours, table = {}, None
    for key, tensor in family.tensors(config, _biases(family, config)).items():
        if tensor.ours == ("wte/embedding",):
            table = given[key]
        if names_of(key, config)[0] not in given:
            continue  # biases that their configuration has not
        values = [get(name, tensor) for name in names_of(key, config)]
        value = np.stack(values) if "{}" in key else values[0]
        if tensor.ours in (("wte/embedding",), ("lm_head/embedding",)):
            value = np.pad(value, ((0, config.padded_vocab_size - config.vocab_size), (0, 0)))
        ours |= zip(tensor.ours, np.split(value, len(tensor.ours), axis=-1))
    if config.bias:
        for path in [path for path in ours if path.endswith("kernel")]:
            bias = np.zeros(np.delete(ours[path].shape, 1), config.param_dtype)
            ours.setdefault(path.replace("kernel", "bias"), bias)
    head = given.get("lm_head.weight") if config.tie_embeddings else None
    if head and not np.array_equal(np.asarray(tensors[head]), np.asarray(tensors[table])):
        raise UserError(
            f"tensor `{head}` differs from `{table}`, though config.json ties them; set tie_word_embeddings=false"
        )
    return traverse_util.unflatten_dict(ours, sep="/")


def _biases(family: Family, config: GPTConfig, folder: str | None = None) -> tuple[str, ...]:
    """The modules that have biases in a model of the class, or as the config.json of a folder says."""
    theirs = read_raw_config(folder) if folder else {}
    return tuple(module for option, module in family.biases.items() if theirs.get(option, config.bias and not folder))
