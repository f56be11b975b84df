"""Evaluates a trained model: `python -m trialgpt_jax.evaluate --workdir=runs/quickstart`.

Loss and bits per byte over the whole validation split, every window once. With --json, stdout is one JSON object.
"""

import json
import math
import sys

import jax
from ml_collections import ConfigDict

from trialgpt_jax import UserError, cli
from trialgpt_jax import config as config_lib
from trialgpt_jax.console import say
from trialgpt_jax.data.token_store import SPLITS, open_store
from trialgpt_jax.parallel import processes
from trialgpt_jax.parallel.axes import mesh_sizes
from trialgpt_jax.parallel.sharding import make_mesh
from trialgpt_jax.training.metrics import bits_per_byte, finite
from trialgpt_jax.training.program import Program
from trialgpt_jax.training.start import load_params
from trialgpt_jax.training.workdir import check_tokenizer, find_data, require_data


def evaluate(config: ConfigDict, workdir: str, step: int = -1, batches: int = 0, split: str = "val") -> dict:
    """Evaluates one checkpoint.

    Args:
      config: the workdir's, see `config.load_snapshot`; another data.dir evaluates on other text.
      workdir: of a run.
      step: of the checkpoint; -1 = the newest whole one.
      batches: of train.batch_size sequences; 0 = the whole split.
      split: "val" or "train".

    Returns:
      step, split, loss (nats per token), perplexity, bits_per_byte (None if the store has no byte counts), tokens. None
      also stands for a loss, perplexity or bits_per_byte that is not finite.

    Raises:
      UserError: no or a damaged checkpoint, or a token store that was made with another tokenizer.
    """
    config_lib.enable_x64(config)
    store = open_store(config.data.dir)
    check_tokenizer(store, workdir)
    program = Program(config, mesh=make_mesh(_mesh_sizes(config)))
    params, step = load_params(workdir, program.params_layout, step)
    text = store.split(split)
    loss, n_tokens = program.evaluate(params, program.eval_batches(text, batches))
    per_byte = bits_per_byte(loss, text.n_tokens, text.n_bytes)
    return {
        "step": step,
        "split": split,
        "loss": finite(loss),
        "perplexity": math.exp(loss) if loss < math.log(sys.float_info.max) else None,
        "bits_per_byte": None if per_byte is None else finite(per_byte),
        "tokens": n_tokens,
    }


def _mesh_sizes(config: ConfigDict) -> dict[str, int]:
    """The run's mesh if there are devices for it, otherwise all devices along data."""
    try:
        return mesh_sizes(config.mesh, jax.device_count())
    except UserError as error:
        say(f"{error}; evaluating with mesh.data={jax.device_count()} instead")
        return {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


def format_result(result: dict) -> str:
    """One line for a reader."""
    loss, perplexity, per_byte = (result[name] for name in ("loss", "perplexity", "bits_per_byte"))
    return (
        f"checkpoint {result['step']}, {result['split']} split, {result['tokens']:,} tokens: "
        + (f"loss {loss:.4f}" if loss is not None else "the loss is not finite")
        + (f", perplexity {perplexity:.2f}" if perplexity is not None else "")
        + (f", {per_byte:.4f} bits per byte" if per_byte is not None else "")
    )


FLAGS = {
    "workdir": (None, "folder of the run"),
    "checkpoint_step": (-1, "which checkpoint; -1 = the newest whole one"),
    "batches": (0, "batches of train.batch_size sequences; 0 = the whole split"),
    "split": ("val", "val or train"),
    "json": (False, "print one JSON object on stdout"),
} | processes.FLAGS


def main(argv: list[str]) -> None:
    flags, config = cli.parse(argv, __doc__, FLAGS)
    workdir = cli.require_workdir(flags)
    if "data.dir" not in cli.given_fields(argv, FLAGS):
        config.data.dir = find_data(config.data.dir, workdir)
    require_data(config.data.dir, workdir)
    if flags.split not in SPLITS:
        raise UserError(f"--split={flags.split} is not val or train")
    if flags.batches < 0:
        raise UserError(f"--batches={flags.batches} must be at least 1, or 0 for the whole split")
    with cli.start(flags, config, reuse_memory=True):
        result = evaluate(config, workdir, flags.checkpoint_step, flags.batches, flags.split)
        if jax.process_index() == 0:
            print(json.dumps(result) if flags.json else format_result(result), flush=True)


if __name__ == "__main__":
    cli.run(main)
