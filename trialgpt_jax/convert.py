"""Converts models between a workdir and Hugging Face's files, and verifies every byte of a workdir's checkpoints.

    trialgpt convert --workdir=runs/x --to_hf=out/    # for AutoModelForCausalLM
    trialgpt convert --from_hf=dir/ --workdir=runs/y  # or hf:owner/name
    trialgpt convert --workdir=runs/x --verify        # status 1 if damaged

--to_hf writes the class of transformers that computes exactly the same function, the first of GPT2LMHeadModel,
NanoChatForCausalLM, LlamaForCausalLM and Qwen3ForCausalLM, or names the options that none has. --from_hf reads them.

With --from_hf, the model comes from the folder, and the other config fields from --config=FILE and --config.x.y=v.
`train` on that workdir starts at step 0 with a fresh optimizer and may change every field but the model's.
"""

import contextlib
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from trialgpt_jax import UserError, cli
from trialgpt_jax import config as config_lib
from trialgpt_jax.console import print_result
from trialgpt_jax.data import hf_tokenizer
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.model import hf, hf_folder
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.storage import files, lock
from trialgpt_jax.training import hub_model
from trialgpt_jax.training import workdir as workdir_lib
from trialgpt_jax.training.checkpoint import Checkpoints, state_bytes
from trialgpt_jax.training.program import Program
from trialgpt_jax.training.start import check_memory, load_params
from trialgpt_jax.training.train_step import check_finite, describe_nonfinite


def to_hf(config: ConfigDict, workdir: str, folder: str, step: int | str = -1, allow_nonfinite: bool = False) -> int:
    """Writes a checkpoint and its tokenizer in the format of transformers, without the vocabulary's padding.

    Args:
      config: the workdir's.
      workdir: of a run.
      folder: new or empty.
      step: of the checkpoint; -1 = the newest whole one, "best" = the one with the lowest validation loss.
      allow_nonfinite: also convert NaN and infinite values.

    Returns:
      The step.

    Raises:
      UserError: options that no class has, no such or a damaged checkpoint, values that are not finite, a folder
        that is not empty.
    """
    config_lib.validate(config)
    config = config.copy_and_resolve_references()
    config.train.update({"attention": "xla", "dtype": "auto", "remat": "none"})  # nothing is computed here
    config_lib.set_precision(config)
    hf.check_expressible(GPTConfig(**config.model))
    _check_empty(folder, "--to_hf")
    tokenizer = tokenizer_lib.from_workdir(workdir, config.data.tokenizer)
    program = Program(config, mesh=single_device())
    params, step = load_params(workdir, program.params_layout, step, allow_nonfinite=True)
    if not allow_nonfinite:
        check_finite(f"checkpoint {step} of {workdir}", params, _WAY_OUT)
    hf.check_expressible(program.gpt, params)
    with _new_folder(folder, "--to_hf", keep_lock=False):
        hf_tokenizer.write(tokenizer, folder, program.gpt.block_size)
        hf.write(folder, params, program.gpt, tokenizer.eot_id)
    return step


def from_hf(config: ConfigDict, folder: str, workdir: str, allow_nonfinite: bool = False) -> ConfigDict:
    """Creates a workdir whose checkpoint 0 has the parameters of a Hugging Face folder.

    Args:
      config: of the new workdir; `model` and `data.tokenizer` are taken from the folder. A data.tokenizer of
        `from:FOLDER` or `file:PATH` is for a folder without a tokenizer.
      folder: with config.json and safetensors, or `hf:owner/name`.
      workdir: new or empty.
      allow_nonfinite: also convert NaN and infinite values.

    Returns:
      The config that the workdir now has.

    Raises:
      UserError: another class, unexpected tensors, a pickle, values that are not finite, a workdir that is not empty.
    """
    config = config.copy_and_resolve_references()
    _check_empty(workdir, "--workdir")
    folder = hub_model.local_folder(folder, "--from_hf")
    config.model.update(hf.read_config(folder))
    config_lib.set_precision(config)
    gpt = GPTConfig(**config.model, param_dtype=config.train.param_dtype)
    tensors = hf_folder.SafetensorsFolder(folder)
    names = hf.check_tensors(tensors, gpt).values()
    check_memory(folder, hf.parameter_bytes(gpt))
    identity, tokenizer = hub_model.decide_tokenizer(folder, gpt.vocab_size, config.data.tokenizer)
    config.data.tokenizer = identity.name
    params = hf.from_hf(tensors, gpt)
    if not allow_nonfinite:
        counts = {name: int(np.sum(~np.isfinite(tensors[name]))) for name in names}
        if counts := {name: n for name, n in counts.items() if n}:
            raise UserError(f"{folder} has {describe_nonfinite(counts)}{_WAY_OUT}")
    checkpoints = Checkpoints(workdir)
    checkpoints.check_before_saving(state_bytes(params))
    with _new_folder(workdir, "--workdir"):
        workdir_lib.save_snapshot(config, workdir)
        if tokenizer is not None:
            tokenizer.save(workdir)
        tokenizer_lib.write_identity(identity, workdir)
        checkpoints.save(0, {"params": jax.tree.map(jnp.asarray, params)}, allow_nonfinite=allow_nonfinite)
        checkpoints.wait()
    return config


def verify(workdir: str) -> list[tuple[int, str | None]]:
    """Every step that has a checkpoint, and its problem (None = whole); reads every byte. Steps that a run beside this
    process removes meanwhile are left out.

    Raises:
      UserError: there are none.
    """
    checkpoints = Checkpoints(workdir)
    if not checkpoints.steps():
        raise UserError(f"{workdir} has no checkpoints")
    results = [(step, checkpoints.problem(step)) for step in checkpoints.steps()]
    there = checkpoints.steps()
    return [(step, problem) for step, problem in results if problem is None or step in there]


def _check_empty(folder: str, flag: str) -> None:
    """Refuses a folder that is not empty, because nothing is overwritten, and for --to_hf one of another machine."""
    if flag == "--to_hf" and (files.is_remote(folder) or folder.startswith(hub_model.PREFIX)):
        raise UserError(f"{flag}={folder} is not a folder on this machine")
    if os.path.isfile(folder):
        raise UserError(f"{flag}={folder} is a file; name a new or an empty folder")
    if found := [name for name in files.names(folder) if name != "lock" and not name.endswith(".part")]:
        raise UserError(f"{flag}={folder} already holds {found[0]}; name a new or an empty folder")


@contextlib.contextmanager
def _new_folder(folder: str, flag: str, keep_lock: bool = True) -> Iterator[None]:
    """Creates `folder` if it does not exist, refuses one that is not empty, and holds its lock."""
    _check_empty(folder, flag)
    with lock.hold(folder, flag=flag, keep_file=keep_lock):
        files.remove_parts(folder)
        _check_empty(folder, flag)  # another process may have filled it meanwhile
        yield


_WAY_OUT = "; --allow_nonfinite converts them anyway"
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")

FLAGS = {
    "workdir": (None, "folder of a run; with --from_hf the one to create"),
    "to_hf": (None, "new folder for Hugging Face files"),
    "from_hf": (None, "folder of Hugging Face files, or hf:owner/name@revision on the hub"),
    "checkpoint_step": cli.CHECKPOINT_STEP,
    "step": ("-1", "short for --checkpoint_step"),
    "allow_nonfinite": (False, "also convert weights that have NaN or infinite values"),
    "verify": (False, "check every checkpoint against its checksums"),
}


def main(argv: list[str]) -> int:
    importing = any(argument.startswith("--from_hf") for argument in argv)
    flags, config = cli.parse(argv, __doc__, FLAGS, new_workdir=importing)
    workdir = cli.require_workdir(flags, "the folder of a run, or the one to create")
    if bool(flags.to_hf) + bool(flags.from_hf) + flags.verify != 1:
        raise UserError("give one of --to_hf=FOLDER, --from_hf=FOLDER and --verify")
    chosen = {cli.checkpoint_step(flags, name) for name in ("step", "checkpoint_step")} - {-1}
    if chosen and not flags.to_hf:
        raise UserError("--step and --checkpoint_step choose a checkpoint for --to_hf")
    if flags.from_hf and (set_ := [name for name in cli.given_fields(argv, FLAGS) if name.startswith("model.")]):
        raise UserError(f"config field `{min(set_)}` comes from the folder of --from_hf and cannot be set")
    if len(chosen) > 1:
        raise UserError(f"--step={flags.step} and --checkpoint_step={flags.checkpoint_step} name two checkpoints")
    with cli.start(flags, config, check=False):
        if flags.verify:
            results = verify(workdir)
            for step, problem in results:
                print(f"checkpoint {step}: " + (f"damaged: {problem}" if problem else "whole"))
            return int(any(problem for _, problem in results))
        if flags.from_hf:
            model = from_hf(config, flags.from_hf, workdir, flags.allow_nonfinite).model
            sizes = ", ".join(f"{name}={model[name]}" for name in _SIZES)
            print_result(f"{workdir}: checkpoint 0, {sizes}")
            return 0
        step = to_hf(config, workdir, flags.to_hf, chosen.pop() if chosen else -1, flags.allow_nonfinite)
        name = hf.family_of(GPTConfig(**config.model)).architecture
        print_result(f"{flags.to_hf}: checkpoint {step} for transformers' {name} and AutoTokenizer")
        return 0


if __name__ == "__main__":
    cli.run(main)
