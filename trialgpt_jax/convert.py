"""Converts models between a workdir and Hugging Face's GPT-2 files, and verifies the checkpoints of a workdir.

    python -m trialgpt_jax.convert --workdir=runs/x --to_hf=out/      a folder for transformers' GPT2LMHeadModel
    python -m trialgpt_jax.convert --from_hf=dir/ --workdir=runs/y    a workdir for infer, evaluate and train
    python -m trialgpt_jax.convert --workdir=runs/x --verify          every byte of every checkpoint; status 1 if damaged

With --from_hf, --config=FILE and --config.x.y=v give the new workdir's config, but for the model, which the folder
describes. `train` on that workdir starts at step 0 with a fresh optimizer, and may still change all but the model.
"""

import os

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from trialgpt_jax import UserError, files
from trialgpt_jax import config as config_lib
from trialgpt_jax.data import hf_tokenizer
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.evaluate import load_params
from trialgpt_jax.model import hf
from trialgpt_jax.model.gpt import GPTConfig
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.parallel.sharding import make_mesh
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.metrics import say


def to_hf(config: ConfigDict, workdir: str, folder: str, step: int = -1) -> int:
    """Writes a checkpoint and its tokenizer as files that transformers' GPT-2 loads, the vocabulary without padding.

    Args:
      config: the workdir's.
      workdir: of a run.
      folder: new or empty.
      step: of the checkpoint; -1 = the newest whole one.

    Returns:
      The step.

    Raises:
      UserError: options that GPT-2 lacks, no such or a damaged checkpoint, a folder with something in it.
    """
    config = config.copy_and_resolve_references()
    config.train.attention, config.train.dtype = "xla", "auto"  # nothing is computed here, so no kernel can be missing
    hf.check_expressible(GPTConfig(**config.model.to_dict()))
    _check_empty(folder, "--to_hf")
    tokenizer = tokenizer_lib.load(config.data.tokenizer, workdir)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.local_devices()[:1])
    gpt, params, step = load_params(config, workdir, step, mesh)
    _make_empty(folder, "--to_hf")
    hf_tokenizer.write(tokenizer, folder, gpt.block_size)
    hf.write(folder, params, gpt, tokenizer.eot_id)
    return step


def from_hf(config: ConfigDict, folder: str, workdir: str) -> ConfigDict:
    """Makes a workdir whose checkpoint 0 holds the parameters of a Hugging Face folder.

    Args:
      config: of the new workdir; its `model`, and `data.tokenizer` where the folder has one, follow from the folder.
      folder: with config.json and safetensors.
      workdir: new or empty.

    Returns:
      The config as it lies in the workdir.

    Raises:
      UserError: not a GPT-2, tensors that are not its own, a pickle, or a workdir with something in it.
    """
    config = config.copy_and_resolve_references()
    config.model.update(hf.read_config(folder))
    tokenizer = hf_tokenizer.read(folder)
    if tokenizer is None:
        say(_no_tokenizer(folder, config))
    elif tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, the model {config.model.vocab_size}")
    else:
        config.data.tokenizer = tokenizer.name
    if "float64" == config.train.param_dtype:
        jax.config.update("jax_enable_x64", True)
    gpt = GPTConfig(**config.model.to_dict(), param_dtype=config.train.param_dtype)
    params = hf.from_hf(hf.SafetensorsFolder(folder), gpt)
    _make_empty(workdir, "--workdir")
    config_lib.save_snapshot(config, workdir)
    if tokenizer is not None:
        tokenizer.save(workdir)
        files.write_json(os.path.join(workdir, "tokenizer.json"), {"name": tokenizer.name, "hash": tokenizer.hash})
    checkpoints = Checkpoints(workdir)
    checkpoints.save(0, {"params": jax.tree.map(jnp.asarray, params)})
    checkpoints.wait()
    return config


def verify(workdir: str) -> list[tuple[int, str | None]]:
    """Every step that has a checkpoint, with what is wrong with it (None = whole); reads every byte.

    Raises:
      UserError: there are none.
    """
    checkpoints = Checkpoints(workdir)
    if not checkpoints.steps():
        raise UserError(f"{workdir} has no checkpoints")
    return [(step, checkpoints.problem(step)) for step in checkpoints.steps()]


def _no_tokenizer(folder: str, config: ConfigDict) -> str:
    """Sets `data.tokenizer` to what the number of ids says, and tells it."""
    vocab_size = config.model.vocab_size
    config.data.tokenizer = "gpt2" if vocab_size >= 50257 or vocab_size <= 256 else f"bpe:{vocab_size}"
    return (
        f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); with its {vocab_size} ids it is taken "
        f"for data.tokenizer={config.data.tokenizer}"
    )


def _check_empty(folder: str, flag: str) -> None:
    """What is in a folder is never overwritten."""
    if found := files.names(folder):
        raise UserError(f"{flag}={folder} already holds {found[0]}; name a new or an empty folder")


def _make_empty(folder: str, flag: str) -> None:
    """Makes `folder` where it is not there."""
    _check_empty(folder, flag)
    try:
        files.make_folder(folder)
    except OSError as error:
        raise UserError(f"{flag}={folder} cannot be written: {error.strerror}; choose another folder") from None


FLAGS = {
    "workdir": (None, "folder of a run; the one to make with --from_hf"),
    "to_hf": (None, "new folder for Hugging Face files"),
    "from_hf": (None, "folder of Hugging Face files"),
    "checkpoint_step": (-1, "with --to_hf: which checkpoint; -1 = the newest whole one"),
    "step": (-1, "short for --checkpoint_step"),
    "verify": (False, "check every checkpoint against its checksums"),
}


def main(argv: list[str]) -> int:
    importing = any(argument.startswith("--from_hf") for argument in argv)
    flags, config = config_lib.parse_command_line(argv, __doc__, FLAGS, new_workdir=importing)
    if not flags.workdir:
        raise UserError("--workdir=FOLDER is missing: the folder of a run, or the one to make")
    if bool(flags.to_hf) + bool(flags.from_hf) + flags.verify != 1:
        raise UserError("give one of --to_hf=FOLDER, --from_hf=FOLDER and --verify")
    if -1 not in (flags.step, flags.checkpoint_step) and flags.step != flags.checkpoint_step:
        raise UserError(f"--step={flags.step} and --checkpoint_step={flags.checkpoint_step} name two checkpoints")
    accelerators.use_compilation_cache()
    if flags.verify:
        results = verify(flags.workdir)
        for step, problem in results:
            print(f"checkpoint {step}: " + (f"damaged: {problem}" if problem else "whole"))
        return int(any(problem for _, problem in results))
    if flags.from_hf:
        model = from_hf(config, flags.from_hf, flags.workdir).model
        print(f"{flags.workdir}: checkpoint 0, n_layer={model.n_layer}, n_head={model.n_head}, n_embd={model.n_embd}, "
              f"block_size={model.block_size}, vocab_size={model.vocab_size}")  # fmt: skip
        return 0
    step = to_hf(config, flags.workdir, flags.to_hf, max(flags.step, flags.checkpoint_step))
    print(f"{flags.to_hf}: checkpoint {step} for transformers' GPT2LMHeadModel and GPT2TokenizerFast")
    return 0


if __name__ == "__main__":
    config_lib.run(main)
