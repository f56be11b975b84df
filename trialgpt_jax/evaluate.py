"""Evaluates a trained model: `python -m trialgpt_jax.evaluate --workdir=runs/quickstart`.

Loss and bits per byte over the whole validation split, every window once. With --json, stdout is one JSON object.
"""

import json
import math

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax import config as config_lib
from trialgpt_jax.data.batches import eval_batches
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.model.gpt import GPTConfig
from trialgpt_jax.parallel import accelerators, processes
from trialgpt_jax.parallel.sharding import batch_sharding, local_blocks, make_mesh
from trialgpt_jax.training import train_step as steps_lib
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.metrics import bits_per_byte, say
from trialgpt_jax.workdir import check_tokenizer


def evaluate(config: ConfigDict, workdir: str, step: int = -1, batches: int = 0, split: str = "val") -> dict:
    """Evaluates one checkpoint.

    Args:
      config: the workdir's, see `config.load_snapshot`; another data.dir evaluates on other text.
      workdir: of a run.
      step: of the checkpoint; -1 = the newest whole one.
      batches: of train.batch_size sequences; 0 = the whole split.
      split: "val" or "train".

    Returns:
      step, split, loss (nats per token), perplexity, bits_per_byte (None where the store has no byte counts), tokens.

    Raises:
      UserError: no or a damaged checkpoint, a token store that is not the model's.
    """
    store = open_store(config.data.dir)
    check_tokenizer(store, workdir)
    mesh = make_mesh(_mesh_sizes(config))
    gpt, params, step = load_params(config, workdir, step, mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-config.train.batch_size // config.train.accumulate_steps // rows) * rows
    compiled = steps_lib.compile_eval_step(gpt, mesh, steps_lib.params_layout(gpt, mesh), batch_size=batch_size)
    loss, n_tokens = steps_lib.evaluate(
        compiled,
        params,
        eval_batches(
            store.split(split),
            block_size=gpt.block_size,
            batch_size=batch_size,
            n_batches=-(-batches * config.train.batch_size // batch_size),
            blocks=local_blocks(batch_sharding(mesh)),
        ),
        mesh,
    )
    return {
        "step": step,
        "split": split,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits_per_byte(loss, store.split(split).n_tokens, store.split(split).n_bytes),
        "tokens": n_tokens,
    }


def load_params(config: ConfigDict, workdir: str, step: int, mesh: Mesh) -> tuple[GPTConfig, dict, int]:
    """The parameters of a checkpoint, and nothing else of it, laid out on `mesh`.

    Args:
      step: of the checkpoint; -1 = the newest whole one.

    Returns:
      The model for this mesh's platform, its parameters, and the step.

    Raises:
      UserError: no checkpoint, a damaged one, or one of another model.
    """
    gpt = config_lib.gpt_config(config, mesh.devices.flat[0].platform)
    checkpoints = Checkpoints(workdir, say=say)
    if step == -1:
        step = checkpoints.newest_whole()
        if step is None:
            raise UserError(f"{workdir} has no checkpoints yet; train first")
    else:
        checkpoints.check(step)
    return gpt, checkpoints.restore(step, {"params": steps_lib.params_layout(gpt, mesh)})["params"], step


def _mesh_sizes(config: ConfigDict) -> dict[str, int]:
    """The run's mesh where these devices can form it, otherwise all of them along data."""
    try:
        return config_lib.mesh_sizes(config.mesh, jax.device_count())
    except UserError as error:
        say(f"{error}; evaluating with mesh.data={jax.device_count()} instead")
        return {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


FLAGS = {
    "workdir": (None, "folder of the run"),
    "checkpoint_step": (-1, "which checkpoint; -1 = the newest whole one"),
    "batches": (0, "batches of train.batch_size sequences; 0 = the whole split"),
    "split": ("val", "val or train"),
    "json": (False, "print one JSON object on stdout"),
} | processes.FLAGS


def main(argv: list[str]) -> None:
    flags, config = config_lib.parse_command_line(argv, __doc__, FLAGS)
    if not flags.workdir:
        raise UserError("--workdir=FOLDER is missing: the folder of a run")
    if flags.split not in ("val", "train"):
        raise UserError(f"--split={flags.split} is not val or train")
    if flags.batches < 0:
        raise UserError(f"--batches={flags.batches} must be at least 1, or 0 for the whole split")
    config_lib.validate(config)
    accelerators.use_compilation_cache()
    accelerators.keep_freed_memory()
    with processes.joined(flags):
        result = evaluate(config, flags.workdir, flags.checkpoint_step, flags.batches, flags.split)
        if jax.process_index() == 0:
            tell(result, flags.json)


def tell(result: dict, as_json: bool) -> None:
    """Prints what `evaluate` found."""
    if as_json:
        print(json.dumps(result), flush=True)
        return
    per_byte = result["bits_per_byte"]
    print(
        f"checkpoint {result['step']}, {result['split']} split, {result['tokens']:,} tokens: loss {result['loss']:.4f}, "
        f"perplexity {result['perplexity']:.2f}" + (f", {per_byte:.4f} bits per byte" if per_byte is not None else "")
    )


if __name__ == "__main__":
    config_lib.run(main)
