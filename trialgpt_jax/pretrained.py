"""Where the first weights of a run come from when they are not random: another workdir, or a Hugging Face folder."""

import dataclasses
import os

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trialgpt_jax import UserError, files
from trialgpt_jax import config as config_lib
from trialgpt_jax.data import hf_tokenizer
from trialgpt_jax.data.token_store import TokenStore
from trialgpt_jax.model import hf
from trialgpt_jax.model.gpt import GPTConfig
from trialgpt_jax.training import train_step as steps_lib
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.metrics import say

# Fields of GPTConfig that may differ between the model that was trained and the one that goes on from its weights:
# the length (cropped), and what acts in training alone. The rest decides what the weights mean.
_FREE = ("block_size", "dropout", "zero_init_proj")


def check(source: str, config: ConfigDict, store: TokenStore) -> None:
    """Refuses weights that the model of `config` cannot start from, before anything is compiled or loaded.

    Args:
      source: a workdir or a Hugging Face folder (`train.init_from`).
      config: of the new run.
      store: the token store it trains on.

    Raises:
      UserError: names the fields that differ, the positions that were not learned, or the two tokenizers.
    """
    there, here = GPTConfig(**_model_fields(source)), GPTConfig(**config.model.to_dict())
    differences = [
        f"model.{name} is {getattr(there, name)} there and {getattr(here, name)} here"
        for name in config.model
        if name not in _FREE and getattr(there, name) != getattr(here, name)
    ]
    if differences:
        raise UserError(f"train.init_from={source} has another model: {'; '.join(differences)}")
    if here.position == "learned" and here.block_size > there.block_size:
        raise UserError(
            f"train.init_from={source} has learned {there.block_size} positions, fewer than "
            f"model.block_size={here.block_size}; set model.block_size={there.block_size} or less"
        )
    if hf.is_hf_folder(source):
        tokenizer = hf_tokenizer.read(source)
        if tokenizer is None:
            say(f"train.init_from={source} has no tokenizer; that the ids of {store.folder} are its own is not checked")
        elif tokenizer.name != store.tokenizer or store.tokenizer_hash not in (None, tokenizer.hash):
            raise UserError(
                f"data.dir={store.folder} was made with tokenizer {store.tokenizer} ({store.tokenizer_hash}), but "
                f"train.init_from={source} has {tokenizer.name} ({tokenizer.hash}); preprocess the text with that one"
            )


def load(source: str, gpt: GPTConfig, mesh: Mesh):
    """The parameters of `source` for the model `gpt`, laid out on `mesh`; of more positions than it has, the first.

    Args:
      source: a workdir, whose newest whole checkpoint is taken, or a Hugging Face folder; passed by `check`.
      gpt: the new run's model.
      mesh: the new run's.

    Raises:
      UserError: no whole checkpoint, or tensors that are not the model's.
    """
    there = dataclasses.replace(gpt, block_size=_model_fields(source)["block_size"])
    if hf.is_hf_folder(source):
        params = hf.from_hf(hf.SafetensorsFolder(source), there)
    else:
        checkpoints = Checkpoints(source, say=say)
        step = checkpoints.newest_whole()
        if step is None:
            raise UserError(f"train.init_from={source} has no checkpoints yet")
        source = f"checkpoint {step} of {source}"
        params = checkpoints.restore(step, {"params": steps_lib.params_layout(there, mesh)})["params"]
    if gpt.position == "learned" and gpt.block_size < there.block_size:
        params["wpe"]["embedding"] = params["wpe"]["embedding"][: gpt.block_size]
        source += f", the first {gpt.block_size} of its {there.block_size} positions"
    say(f"starting from the weights of {source}, with a fresh optimizer")
    return jax.tree.map(_place, params, steps_lib.params_layout(gpt, mesh))


def _place(array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """An array, on the devices already or whole in every process, as `leaf` lies on them."""
    if isinstance(array, np.ndarray):
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])
    return jax.device_put(array, leaf.sharding)


def _model_fields(source: str) -> dict:
    """The fields of `config.model` with which the weights of `source` were made."""
    if not files.exists(os.path.join(source, "config.json")):
        raise UserError(
            f"train.init_from={source} holds no config.json; it must be a workdir or a Hugging Face folder of GPT-2"
        )
    return hf.read_config(source) if hf.is_hf_folder(source) else config_lib.load_snapshot(source).model.to_dict()
