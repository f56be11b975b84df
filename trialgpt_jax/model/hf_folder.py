"""A folder of Hugging Face files: its config.json, its tensors by header, and what it holds in their place.

Sizes are compared with limits, and dtypes and shapes are taken from the headers of the files, so that a wrong or huge
tensor is refused before it is read.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypedDict

import numpy as np
from safetensors import SafetensorError, safe_open

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.storage import files, json_files

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


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


def read_raw_config(folder: str) -> dict:
    """The config.json of a Hugging Face folder, whatever the model.

    Raises:
      UserError: there is none, it is not JSON, or it is that of a workdir.
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
        config = json_files.read(path, dict)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the configuration of a model: {error}") from None
    if isinstance(config.get("model"), dict):
        raise UserError(f"{folder} is a workdir of trialgpt_jax, not a Hugging Face folder")
    return config


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
                f"{_loader(folder)}.from_pretrained({folder!r}).save_pretrained(NEW_FOLDER)"
            )
        return clause
    for name in names:
        kind = _FORMATS.get(os.path.splitext(name)[1])
        if kind and name != INDEX:
            return f"{name} is in {kind}, and only safetensors are read"
    return ""


def _loader(folder: str) -> str:
    """The class of transformers that loads a folder; without a model_type it is taken for a GPT-2."""
    with contextlib.suppress(UserError):
        if read_raw_config(folder).get("model_type"):
            return "AutoModelForCausalLM"
    return "GPT2LMHeadModel"


# ---- tensors

_LONGEST_HEADER = 16 << 20  # bytes; a tensor takes about 100, and 10,000 layers have 120,000 tensors
_FLOATS = ("F64", "F32", "F16", "BF16")
_WRAPPERS = r"_orig_mod\.|module\.|model\."  # torch.compile, DistributedDataParallel, a trainer's attribute


def plain_names(names: Iterable[str], base: str, buffers: str) -> dict[str, str]:
    """Tensors' names without known prefixes -> their full names.

    Args:
      names: full names.
      base: the prefix of the class, `transformer.` or `model.`.
      buffers: pattern of plain names that are left out.

    Raises:
      UserError: some names have a prefix and others do not, or two names differ only in it.
    """
    pattern = re.compile(f"((?:{_WRAPPERS})*?)({re.escape(base)})?((?!{_WRAPPERS}).+)", re.DOTALL)

    def split(full: str) -> tuple[str, str, str]:
        match = pattern.fullmatch(full)
        return (match[1], match[2] or "", match[3]) if match else ("", "", full)

    plain, first = {}, {}
    for full in names:
        outer, inner, name = split(full)
        if re.fullmatch(buffers, name):
            continue
        prefix = outer + inner
        # A head stands beside the base, and without one it says nothing about the names of the body.
        kind = "head" if name.startswith(("lm_head.", "score.")) else "body"
        other, example = first.setdefault(kind, (prefix, full))
        if name in plain or prefix != other:
            raise UserError(f"tensors `{plain.get(name, example)}` and `{full}` have different prefixes")
        plain[name] = full
    body, head = first.get("body"), first.get("head")
    if body and head and split(body[1])[0] != head[0]:
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
    """Refuses a header that no such model has: the library takes seconds per million tensors."""
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
