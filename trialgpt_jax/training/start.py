"""What a run starts from: its own newest checkpoint, the weights of a workdir or a Hugging Face folder, or the seed."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data import hf_tokenizer
from trialgpt_jax.data.token_store import TokenStore
from trialgpt_jax.model import hf
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel import processes
from trialgpt_jax.parallel.sharding import replicated
from trialgpt_jax.storage import files
from trialgpt_jax.training import workdir as workdir_lib
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.program import Program, params_layout
from trialgpt_jax.training.spikes import Window
from trialgpt_jax.training.train_step import TrainState, check_finite

# Model fields that may differ from those of the weights a run starts from: the length (cropped), and what only acts in
# training. The others decide what the weights mean.
_FREE = ("block_size", "dropout", "zero_init_proj")


class Start(NamedTuple):
    """Where a run starts.

    Attributes:
      whole: its newest whole checkpoint; None = it has none.
      init_from: workdir or Hugging Face folder of the first weights, which is its own workdir if that was made by
        `convert`; "" = `whole` with its optimizer state, or random weights.
    """

    whole: int | None
    init_from: str

    @property
    def step(self) -> int | None:
        """The checkpoint that the run resumes; None = it begins at step 0."""
        return None if self.init_from else self.whole


def is_converted(checkpoints: Checkpoints, whole: int | None) -> bool:
    """Whether `whole` is a checkpoint of `convert`: parameters that no run has trained, or none of its later
    checkpoints is whole."""
    return whole is not None and processes.from_first(lambda: checkpoints.params_only(whole))


def decide(config: ConfigDict, workdir: str, store: TokenStore, whole: int | None, converted: bool) -> Start:
    """Where the run of a workdir starts; nothing is loaded yet.

    Args:
      config: the resolved config.
      workdir: of the run.
      store: its token store.
      whole: its newest whole checkpoint.
      converted: from `is_converted`.

    Raises:
      UserError: first weights that do not fit the model or the token store.
    """
    if whole is not None and not converted:
        return Start(whole, "")
    init_from = workdir if converted else config.train.init_from
    if init_from:
        check_weights(init_from, config, store)
        if not hf.is_hf_folder(init_from):
            workdir_lib.check_tokenizer(store, init_from)
    return Start(whole, init_from)


def create_state(start: Start, program: Program, checkpoints: Checkpoints) -> TrainState:
    """The state with which the run continues or begins, on the devices.

    Raises:
      UserError: a checkpoint or weights that do not belong to the model.
    """
    if start.step is None:
        state = program.init_state()
        if start.init_from:
            state = state.replace(params=load_weights(start.init_from, program.gpt, program.mesh))
    else:
        layout, window = program.layout, program.layout.window
        if window is not None and not checkpoints.has(start.step, "window/"):
            layout = layout.replace(window=None)  # train.skip_spikes was turned on after this checkpoint
        state = checkpoints.restore(start.step, layout)
        if layout.window is not window:
            state = state.replace(window=jax.device_put(Window.empty(), replicated(program.mesh)))
        say(f"resumed from checkpoint {start.step}")
    if start.whole is not None:
        checkpoints.set_aside_after(start.whole)
    return state


def load_params(workdir: str, layout, step: int = -1, allow_nonfinite: bool = False) -> tuple[dict, int]:
    """The parameters of a checkpoint, without the optimizer state.

    Args:
      workdir: of a run.
      layout: `Program.params_layout`.
      step: of the checkpoint; -1 = the newest whole one.
      allow_nonfinite: also load parameters with NaN or infinite values.

    Returns:
      The parameters in that layout, and the step.

    Raises:
      UserError: no checkpoint, a damaged one, one of another model, or one whose parameters are not finite.
    """
    checkpoints = Checkpoints(workdir, say=say)
    while True:
        with checkpoints.reading(step) as found:
            if found is None:
                raise UserError(f"{workdir} has no checkpoints yet; train first")
            try:
                params = checkpoints.restore(found, {"params": layout})["params"]
                if not allow_nonfinite:
                    check_finite(f"checkpoint {found} of {workdir}", params)
                return params, found
            except UserError:
                # In an object store, where nothing holds it, a run beside this process may have removed the step.
                if step != -1 or jax.process_count() > 1 or found in checkpoints.steps():
                    raise


# ---- first weights: a workdir or a Hugging Face folder


def check_weights(source: str, config: ConfigDict, store: TokenStore) -> None:
    """Refuses weights that the model of `config` cannot start from, before anything is compiled or loaded.

    Args:
      source: a workdir or a Hugging Face folder (`train.init_from`).
      config: of the new run.
      store: the token store it trains on.

    Raises:
      UserError: names the fields that differ, missing positions, or the two tokenizers.
    """
    there, here = _model_of(source), GPTConfig(**config.model)
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
            say(f"train.init_from={source} has no tokenizer to compare with that of {store.folder}")
        elif not store.tokenizer_id.matches(tokenizer.id):
            raise UserError(
                f"data.dir={store.folder} was made with tokenizer {store.tokenizer_id}, but "
                f"train.init_from={source} has {tokenizer.id}; preprocess the text with that one"
            )


def load_weights(source: str, gpt: GPTConfig, mesh: Mesh) -> dict:
    """The parameters of `source` for the model `gpt`, on `mesh`; of more learned positions the first block_size.

    Args:
      source: a workdir, whose newest whole checkpoint is taken, or a Hugging Face folder; passed by `check_weights`.
      gpt: the new run's model.
      mesh: the new run's.

    Raises:
      UserError: no whole checkpoint, tensors that are not the model's, or values that are not finite.
    """
    there = dataclasses.replace(gpt, block_size=_model_of(source).block_size)
    if hf.is_hf_folder(source):
        params = hf.from_hf(hf.SafetensorsFolder(source), there)
        check_finite(f"train.init_from={source}", params)
    else:
        if not processes.from_first(Checkpoints(source, say=say).steps):
            raise UserError(f"train.init_from={source} has no checkpoints yet")
        params, step = load_params(source, params_layout(there, mesh))
        source = f"checkpoint {step} of {source}"
    if gpt.position == "learned" and gpt.block_size < there.block_size:
        params["wpe"]["embedding"] = params["wpe"]["embedding"][: gpt.block_size]
        source += f", the first {gpt.block_size} of its {there.block_size} positions"
    say(f"starting from the weights of {source}, with a fresh optimizer")
    return jax.tree.map(_place, params, params_layout(gpt, mesh))


def _place(array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A numpy array that every process has, or a jax.Array, in the sharding of `leaf`."""
    if isinstance(array, np.ndarray):
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])
    return jax.device_put(array, leaf.sharding)


def _model_of(source: str) -> GPTConfig:
    """The model whose weights `source` has."""
    if not files.exists(workdir_lib.config_path(source)):
        raise UserError(
            f"train.init_from={source} holds no config.json; it must be a workdir or a Hugging Face folder of GPT-2"
        )
    if hf.is_hf_folder(source):
        return GPTConfig(**hf.read_config(source))
    try:
        return GPTConfig(**workdir_lib.load_snapshot(source)["model"])
    except TypeError as error:  # a field that this version does not have, or a value of another type
        path = workdir_lib.config_path(source)
        raise UserError(f"{path}: the group `model` is not a GPT of this version: {error}") from None
