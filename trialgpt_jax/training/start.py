"""What a run starts from: its own newest checkpoint, the weights of a workdir or a Hugging Face folder, or the seed."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data import tokenizer_source
from trialgpt_jax.data.token_store import TokenStore
from trialgpt_jax.live_line import task
from trialgpt_jax.model import hf, hf_folder
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel import accelerators, processes
from trialgpt_jax.parallel.sharding import replicated
from trialgpt_jax.schema import specs
from trialgpt_jax.storage import files
from trialgpt_jax.training import hub_model
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
    return Start(whole, init_from)


def create_state(start: Start, program: Program, checkpoints: Checkpoints) -> TrainState:
    """The state with which the run continues or begins, on the devices.

    Raises:
      UserError: a checkpoint or weights that do not belong to the model.
    """
    if start.step is None:
        with task("initial weights"):
            state = jax.block_until_ready(program.init_state())
        if start.init_from:
            step = "-1" if start.whole is not None else program.config.train.init_from_step
            state = state.replace(params=load_weights(start.init_from, program.gpt, program.mesh, step))
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


def load_params(workdir: str, layout, step: int | str = -1, allow_nonfinite: bool = False) -> tuple[dict, int]:
    """The parameters of a checkpoint, without the optimizer state.

    Args:
      workdir: of a run.
      layout: `Program.params_layout`.
      step: of the checkpoint; -1 = the newest whole one, "best" = the one with the lowest validation loss.
      allow_nonfinite: also load parameters with NaN or infinite values.

    Returns:
      The parameters in that layout, and the step.

    Raises:
      UserError: no checkpoint, a damaged one, one of another model, or one whose parameters are not finite.
    """
    checkpoints = Checkpoints(workdir, say=say)
    while True:
        wanted = processes.from_first(checkpoints.best) if step == "best" else step
        with checkpoints.reading(wanted) as found:
            if found is None:
                raise UserError(f"{workdir} has no checkpoints yet")
            try:
                params = checkpoints.restore(found, {"params": layout})["params"]
                if not allow_nonfinite:
                    check_finite(f"checkpoint {found} of {workdir}", params)
                return params, found
            except UserError:
                # In an object store, where nothing holds it, a run beside this process may have removed the step.
                if wanted != -1 or jax.process_count() > 1 or found in checkpoints.steps():
                    raise


# ---- first weights: a workdir or a Hugging Face folder


def adopt_model(config: ConfigDict, workdir: str, given: frozenset[str] = frozenset()) -> ConfigDict:
    """The config of a run with `train.init_from`: the model is that of the weights, except for what the user has set.

    The fields come from the workdir's snapshot if the run has one, so that it continues without the folder of its first
    weights.

    Args:
      config: with a value other than the default in every field that the user has set, or the field's name in `given`.
      workdir: of the run.
      given: fields given on the command line, `model.n_layer`.

    Returns:
      A copy, or `config` itself if it has no `train.init_from`.

    Raises:
      UserError: no such weights, or the fields that the user has set against them.
    """
    source = config.train.init_from
    if not source:
        return config
    config = config.copy_and_resolve_references()
    defaults = {name: default for name, (default, _) in specs(GPTConfig).items()}
    chosen = {
        name: value for name, value in config.model.items() if f"model.{name}" in given or value != defaults[name]
    }
    if chosen.get("vocab_size") == 0:  # "the token store's": its tokenizer is compared with that of the weights
        del chosen["vocab_size"]
    if files.exists(workdir_lib.config_path(workdir)) and not hf_folder.is_hf_folder(workdir):
        config.model.update(_fields_of(workdir) | chosen)  # `config.check_resumable` refuses what differs
        return config
    theirs = _fields_of(source)
    _check_model(source, GPTConfig(**theirs), chosen)
    config.model.update(theirs | chosen)
    if taken := [f"{name}={value}" for name, value in theirs.items() if value != defaults[name] and name not in chosen]:
        say(f"the model is that of train.init_from={source}: {', '.join(taken)}")
    return config


def check_weights(source: str, config: ConfigDict, store: TokenStore) -> None:
    """Refuses weights that the model of `config` cannot start from, before anything is compiled or loaded.

    Args:
      source: a workdir or a Hugging Face folder (`train.init_from`).
      config: of the new run.
      store: the token store it trains on.

    Raises:
      UserError: names the fields that differ, missing positions, or the two tokenizers.
    """
    _check_model(source, _model_of(source), config.model)
    folder = hub_model.local_folder(source, "train.init_from")
    if not hf_folder.is_hf_folder(folder):
        workdir_lib.check_tokenizer(store, folder)
        return
    vocab_size = _model_of(source).vocab_size
    tokenizer = hub_model.tokenizer_of(folder, vocab_size)
    identity = tokenizer.id if tokenizer else tokenizer_source.guess(vocab_size)
    if tokenizer is None and (identity.name != "gpt2" or vocab_size < 256):
        say(f"train.init_from={source} has no tokenizer to compare with that of {store.folder}")
    elif not store.tokenizer_id.matches(identity):
        raise UserError(
            f"data.dir={store.folder} was made with tokenizer {store.tokenizer_id}, but train.init_from={source} has "
            f"{identity}; preprocess the text with --config.data.tokenizer={f'from:{folder}' if tokenizer else 'gpt2'}"
        )


def _check_model(source: str, there: GPTConfig, chosen: Mapping[str, object]) -> None:
    """Refuses fields of `model` that differ from the model of the weights, and more positions than that has learned."""
    derived = {  # what 0 stands for
        "n_kv_head": there.n_head,
        "head_dim": there.n_embd // there.n_head,
        "mlp_width": there.default_mlp_width,
    }
    differences = [
        f"model.{name} is {getattr(there, name)} there and {value} here"
        for name, value in chosen.items()
        if name not in _FREE and getattr(there, name) != (value or derived.get(name, value))
    ]
    if differences:
        raise UserError(
            f"train.init_from={source} has another model: {'; '.join(differences)}. A field of `model` that is not set "
            "has the value there"
        )
    block_size = chosen.get("block_size", 0)
    if there.position == "learned" and block_size > there.block_size:
        raise UserError(
            f"train.init_from={source} has learned {there.block_size} positions, fewer than "
            f"model.block_size={block_size}; set model.block_size={there.block_size} or less"
        )


def check_memory(folder: str, needed: int) -> None:
    """Refuses parameters that exceed the memory of this machine or of the device that holds them.

    Args:
      folder: of the weights.
      needed: bytes.
    """
    for device in (jax.devices("cpu")[0], jax.local_devices()[0]):
        has = accelerators.memory_bytes(device)
        if has is not None and needed > has:
            raise UserError(
                f"{folder}: the parameters take {needed / 2**30:,.1f} GiB, but the {device.platform.upper()} of this "
                f"machine has {has / 2**30:,.1f} GiB of memory"
            )


def load_weights(source: str, gpt: GPTConfig, mesh: Mesh, step: str = "-1") -> dict:
    """The parameters of `source` for the model `gpt`, on `mesh`; of more learned positions the first block_size.

    Args:
      source: a workdir or a Hugging Face folder; passed by `check_weights`.
      gpt: the new run's model.
      mesh: the new run's.
      step: of a workdir's checkpoint, see `train.init_from_step`.

    Raises:
      UserError: no whole checkpoint, tensors that are not the model's, or values that are not finite.
    """
    there = dataclasses.replace(gpt, block_size=_model_of(source).block_size)
    folder = hub_model.local_folder(source, "train.init_from")
    if hf_folder.is_hf_folder(folder):
        check_memory(folder, hf.parameter_bytes(there))
        params = hf.from_hf(hf_folder.SafetensorsFolder(folder), there)
        check_finite(f"train.init_from={source}", params)
    else:
        if not processes.from_first(Checkpoints(folder, say=say).steps):
            raise UserError(f"train.init_from={source} has no checkpoints yet")
        chosen = step if step == "best" else int(step)
        params, found = load_params(folder, params_layout(there, mesh), chosen)
        source = f"checkpoint {found} of {source}"
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
    return GPTConfig(**_fields_of(source))


def _fields_of(source: str) -> dict:
    """The fields of `config.model` in a workdir, or for the model of a Hugging Face folder."""
    folder = hub_model.local_folder(source, "train.init_from")
    path = workdir_lib.config_path(folder)
    if not files.exists(path):
        found = "" if files.is_remote(folder) else hf_folder.instead_of_config(folder)
        raise UserError(
            f"train.init_from={source} has no config.json{found}; it must be a workdir or a Hugging Face folder"
        )
    if hf_folder.is_hf_folder(folder):
        return hf.read_config(folder)
    if not files.is_remote(folder):
        hf_folder.refuse_pointer(path)
    model = workdir_lib.load_snapshot(folder)["model"]
    try:
        GPTConfig(**model)
    except (TypeError, UserError) as error:  # a field that this version does not have, or a value of another type
        raise UserError(f"{path}: the group `model` is not a GPT of this version: {error}") from None
    return {name: model.get(name, default) for name, (default, _) in specs(GPTConfig).items()}
