"""A folder of Hugging Face files: its configuration, its tensors by header, and what it holds in their place.

Sizes are compared with limits, and dtypes and shapes are taken from the headers of the files, so that a wrong or huge
tensor is refused before it is read.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

import numpy as np
from safetensors import SafetensorError, safe_open

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.layers import EPS
from trialgpt_jax.schema import specs
from trialgpt_jax.storage import files, json_files

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

# Their options that change the function: name -> GPT-2's values, the default first.
OPTIONS = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (EPS,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
# Their name of a size -> ours, its default in transformers, and the second name that transformers accepts for it.
_SIZES = {
    "vocab_size": ("vocab_size", 50257, None),
    "n_positions": ("block_size", 1024, "max_position_embeddings"),
    "n_embd": ("n_embd", 768, "hidden_size"),
    "n_layer": ("n_layer", 12, "num_hidden_layers"),
    "n_head": ("n_head", 12, "num_attention_heads"),
}


class _Config(TypedDict, total=False):
    """What is read of a config.json."""

    model_type: str
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


class _Index(TypedDict):
    """A model.safetensors.index.json: tensor -> file."""

    weight_map: dict[str, str]


def is_hf_folder(folder: str) -> bool:
    """Whether a folder's config.json describes a Hugging Face model, and not a workdir."""
    try:
        config = json_files.read(os.path.join(folder, "config.json"), dict)
    except (OSError, ValueError):
        return False
    return not isinstance(config.get("model"), dict)


def read_config(folder: str) -> dict:
    """The fields of `config.model` for the model of an HF folder: its sizes, and GPT-2's options.

    Dropout is 0. Their default of 0.1 is what GPT-2 was trained with from scratch.

    Raises:
      UserError: no config.json, another architecture, a size beyond the limits of `GPTConfig`, or an option that our
        GPT does not have.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; it must hold config.json and {WEIGHTS}")
    if not os.path.exists(path):
        raise UserError(
            f"{folder} has no config.json{instead_of_config(folder)}; a Hugging Face model is config.json and {WEIGHTS}"
        )
    refuse_pointer(path)
    try:
        any_model = json_files.read(path, dict)
        if isinstance(any_model.get("model"), dict):
            raise UserError(f"{folder} is a workdir of trialgpt_jax, not a Hugging Face folder")
        if any_model.get("model_type", "gpt2") != "gpt2":  # before the types, which are those of GPT-2
            raise UserError(
                f"{path}: model_type is {any_model['model_type']!r}, but only GPT-2's 'gpt2' can be converted"
            )
        theirs = json_files.read(path, _Config)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the configuration of a GPT-2: {error}") from None
    if method := theirs.get("quantization_config"):
        raise UserError(
            f"{path}: the weights are quantised (quantization_config {method.get('quant_method', '')!r}); "
            "only float weights can be converted"
        )
    for name, values in OPTIONS.items():
        if theirs.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} is {theirs[name]!r}, but only GPT-2's {values[0]!r} can be converted")
    declared, sizes = specs(GPTConfig), {}
    for name, (ours, default, second) in _SIZES.items():
        size, limit = theirs.get(name, theirs.get(second, default)), declared[ours][1].at_most
        if not 1 <= size <= limit:
            raise UserError(f"{path}: {name} is {size}, but must be at least 1 and at most {limit}")
        sizes[ours] = size
    if sizes["n_embd"] % sizes["n_head"]:
        raise UserError(f"{path}: n_embd={sizes['n_embd']} is not divisible by n_head={sizes['n_head']}")
    if theirs.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise UserError(f"{path}: n_inner is {theirs['n_inner']}, but only 4 * n_embd can be converted")
    tied = theirs.get("tie_word_embeddings")  # null as if left out: `from_hf` refuses a head that differs
    return {name: default for name, (default, _) in declared.items()} | sizes | {"tie_embeddings": tied is not False}


def instead_of_config(folder: str) -> str:
    """A clause about what a folder without config.json holds; "" if it is nothing known."""
    names = files.names(folder)
    if "adapter_config.json" in names:
        return " but adapter_config.json (a PEFT adapter, without the weights of its base model)"
    if "manifest.json" in names:
        return " (it is a token store)"
    if found := other_format(names):
        return f" ({found})"
    if "tokenizer.json" in names or "vocab.json" in names:
        return ", only a tokenizer"
    return ""


def refuse_pointer(path: str) -> None:
    """Raises UserError if Git LFS left a pointer in place of a file."""
    with open(path, "rb") as file:
        if files.is_lfs_pointer(file.read(100)):
            raise UserError(
                f"{path} is a pointer of Git LFS, not the file; run `git lfs pull` in {os.path.dirname(path)}"
            )


_PICKLE = re.compile(r"(pytorch_|adapter_)?model.*\.bin|.*\.(pt|pth|ckpt)")
# Ending -> what such a file is.
_FORMATS = {
    ".gguf": "llama.cpp's format",
    ".msgpack": "flax's format",
    ".h5": "TensorFlow's format",
    ".onnx": "ONNX",
    ".npz": "numpy's format",
    ".index": "a TensorFlow checkpoint",
}


def other_format(names: list[str], folder: str = "") -> str:
    """A clause about the first file whose weights are not read, with the reason; "" if there is none."""
    if pickles := [name for name in names if _PICKLE.fullmatch(name)]:
        file = "pytorch_model.bin" if "pytorch_model.bin" in pickles else pickles[0]
        clause = f"{file} is a pickle and is not read, because unpickling executes code"
        if file.startswith("pytorch_model") and folder:
            clause += (
                ". If you trust it, convert it with transformers: "
                f"GPT2LMHeadModel.from_pretrained({folder!r}).save_pretrained(NEW_FOLDER)"
            )
        return clause
    for name in names:
        kind = _FORMATS.get(os.path.splitext(name)[1])
        if kind and name != INDEX:
            return f"{name} is in {kind}, and only safetensors are read"
    return ""


# ---- tensors

_LONGEST_HEADER = 16 << 20  # bytes; a tensor takes about 100, and 10,000 layers have 120,000 tensors
_FLOATS = ("F64", "F32", "F16", "BF16")
# A wrapper's prefix: torch.compile, DistributedDataParallel, a trainer's attribute. `transformer.` is transformers'.
_NAME = re.compile(r"((?:_orig_mod\.|module\.|model\.)*)(transformer\.)?(.+)", re.DOTALL)
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, which old files contain


def plain_names(names) -> dict[str, str]:
    """Tensors' names without known prefixes -> their full names; without the causal masks of old files.

    Raises:
      UserError: some names have a prefix and others do not, or two names differ only in it.
    """
    plain, first = {}, {}
    for full in names:
        outer, inner, name = _NAME.fullmatch(full).groups() if full else ("", "", "")
        if _BUFFER.fullmatch(name):
            continue
        prefix = outer + (inner or "")
        # A head stands beside `transformer`, and without one it says nothing about the names of the body.
        kind = "head" if name.startswith(("lm_head.", "score.")) else "body"
        other, example = first.setdefault(kind, (prefix, full))
        if name in plain or prefix != other:
            raise UserError(f"tensors `{plain.get(name, example)}` and `{full}` have different prefixes")
        plain[name] = full
    body, head = first.get("body"), first.get("head")
    if body and head and _NAME.fullmatch(body[1])[1] != head[0]:
        raise UserError(f"tensors `{body[1]}` and `{head[1]}` have different prefixes")
    return plain


class SafetensorsFolder(Mapping):
    """The tensors of `model.safetensors`, or of the shards in `model.safetensors.index.json`, read on access.

    Raises:
      UserError: there is neither (another format is named, a pickle with the way to convert it), a file is damaged or a
        pointer of Git LFS, or a tensor is not of floats.
    """

    def __init__(self, folder: str):
        self.folder = folder
        names = files.names(folder)
        if WEIGHTS in names:
            shards = [WEIGHTS]
            if INDEX in names:
                say(f"{folder} has {WEIGHTS} and {INDEX}; the first is read, as transformers does")
        elif INDEX in names:
            shards = _read_index(os.path.join(folder, INDEX), names)
        else:
            instead = other_format(names, folder)
            raise UserError(f"{folder} has no {WEIGHTS}" + (f"; {instead}" if instead else ""))
        self._file_of = {}
        for name in shards:
            path = os.path.join(folder, name)
            try:
                refuse_pointer(path)
                _check_header(path)
                opened = safe_open(path, framework="numpy")
                self._file_of |= dict.fromkeys(opened.keys(), opened)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read as safetensors: {error}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header of the file.

        Raises:
          UserError: its numbers are not floats.
        """
        header = self._file_of[name].get_slice(name)
        if (dtype := header.get_dtype()) not in _FLOATS:
            raise UserError(
                f"{self.folder}: tensor `{name}` is of {dtype}, as quantised weights are; only the floats "
                f"{', '.join(_FLOATS)} can be converted"
            )
        return tuple(header.get_shape())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _check_header(path: str) -> None:
    """Refuses a header that no GPT-2 has: the library takes seconds per million tensors."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER and length < os.path.getsize(path):  # the library names a length beyond the file
        raise UserError(f"{path}: its header has {length} bytes, but must have at most {_LONGEST_HEADER}")


def _read_index(path: str, names: list[str]) -> list[str]:
    """The files that an index of shards names."""
    refuse_pointer(path)
    try:
        shards = sorted(set(json_files.read(path, _Index)["weight_map"].values()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an index of shards: {error}") from None
    for name in shards:
        if not files.is_plain_name(name):
            raise UserError(f"{path}: the shard {name!r} is not a plain file name inside the folder")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise UserError(f"{path} names the shard {name}, which is not there" + (f", but {near[0]}" if near else ""))
    if not shards:
        raise UserError(f"{path} names no shards")
    return shards
