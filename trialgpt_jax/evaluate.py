"""Evaluates a trained model: `trialgpt evaluate --workdir=runs/quickstart`.

Loss and bits per byte over the whole validation split, every window once. With --tasks=hellaswag,lambada_openai the
model is also scored on these tasks, see docs/evaluation.md. With --json, stdout is one JSON object.
"""

import json
import math
import sys

import jax
from ml_collections import ConfigDict

from trialgpt_jax import UserError, cli
from trialgpt_jax import config as config_lib
from trialgpt_jax.console import print_result, say
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.batches import eval_batches
from trialgpt_jax.data.token_store import SPLITS, TokenStore, open_store
from trialgpt_jax.evaluation import report, suite
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.live_line import terminal_width
from trialgpt_jax.model import weights as weights_lib
from trialgpt_jax.parallel import processes
from trialgpt_jax.training.metrics import bits_per_byte, finite
from trialgpt_jax.training.program import Program, run_mesh
from trialgpt_jax.training.start import load_params
from trialgpt_jax.training.workdir import check_tokenizer, find_data, require_data


def evaluate(
    config: ConfigDict,
    workdir: str,
    step: int | str = -1,
    batches: int = 0,
    split: str = "val",
    weights: str = "auto",
) -> dict:
    """Evaluates one checkpoint.

    Args:
      config: the workdir's, see `config.load_snapshot`; another data.dir evaluates on other text.
      workdir: of a run.
      step: of the checkpoint; -1 = the newest whole one, "best" = that with the lowest validation loss.
      batches: of train.batch_size sequences; 0 = the whole split.
      split: "val" or "train".
      weights: "bfloat16" or "int8" round the matrices as `infer` stores them; "auto" = as they are.

    Returns:
      step, split, loss (nats per token), perplexity, bits_per_byte (None if the store has no byte counts), tokens. None
      also stands for a loss, perplexity or bits_per_byte that is not finite.

    Raises:
      UserError: no or a damaged checkpoint, or a token store that was made with another tokenizer.
    """
    store = _open_store(config, workdir)
    program, params, step = _load(config, workdir, step, weights)
    return {"step": step, **_loss(program, params, store, batches, split)}


def _open_store(config: ConfigDict, workdir: str) -> TokenStore:
    store = open_store(config.data.dir)
    check_tokenizer(store, workdir)
    return store


def _load(config: ConfigDict, workdir: str, step: int | str, weights: str) -> tuple[Program, dict, int]:
    weights_lib.check(weights)
    config_lib.set_precision(config)
    program = Program(config, mesh=run_mesh(config))
    params, step = load_params(workdir, program.params_layout, step)
    return program, weights_lib.rounded(params, weights), step


def _loss(program: Program, params, store: TokenStore, batches: int, split: str) -> dict:
    text = store.split(split)
    total = program.count_eval_batches(text, batches)
    loss, n_tokens = program.evaluate(params, program.eval_batches(text, batches), total)
    per_byte = bits_per_byte(loss, text.n_tokens, text.n_bytes)
    return {
        "split": split,
        "loss": finite(loss),
        "perplexity": math.exp(loss) if loss < math.log(sys.float_info.max) else None,
        "bits_per_byte": None if per_byte is None else finite(per_byte),
        "tokens": n_tokens,
    }


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
    "checkpoint_step": cli.CHECKPOINT_STEP,
    "batches": (0, "batches of train.batch_size sequences; 0 = the whole split"),
    "split": ("val", "val or train"),
    "weights": ("auto", "round the matrices to bfloat16 or int8, as infer stores them; auto = as they are"),
    "json": (False, "print one JSON object on stdout"),
} | (suite.FLAGS | processes.FLAGS)


def _find_data(config: ConfigDict, workdir: str, given: bool) -> None:
    if not given:
        config.data.dir = find_data(config.data.dir, workdir)
    require_data(config.data.dir, workdir)


def _why_no_data(config: ConfigDict, workdir: str, split: str) -> str | None:
    """Why the loss cannot be computed, for a command that has not asked for it."""
    try:
        _find_data(config, workdir, given=False)
        text = _open_store(config, workdir).split(split)
        next(eval_batches(text, block_size=config.model.block_size, batch_size=1))
    except UserError as error:
        return str(error)
    return None


def main(argv: list[str]) -> None:
    flags, config = cli.parse(argv, __doc__, FLAGS)
    workdir, step = cli.require_workdir(flags), cli.checkpoint_step(flags)
    if flags.split not in SPLITS:
        raise UserError(f"--split={flags.split} is not val or train")
    if flags.batches < 0:
        raise UserError(f"--batches={flags.batches} must be at least 1, or 0 for the whole split")
    weights_lib.check(flags.weights)
    specs, options = suite.from_flags(flags)
    given = "data.dir" in cli.given_fields(argv, FLAGS)
    asked = not specs or given or flags["split"].present or flags["batches"].present
    if asked:
        _find_data(config, workdir, given)
    with cli.start(flags, config, reuse_memory=True):
        first = jax.process_index() == 0
        tasks = suite.load(specs, **options)
        why = None if asked else processes.from_first(lambda: _why_no_data(config, workdir, flags.split))
        if why is None:
            if not asked:
                _find_data(config, workdir, given)
            store = _open_store(config, workdir)
        if specs:
            tokenizer = tokenizer_lib.from_workdir(workdir, config.data.tokenizer)
        program, params, step = _load(config, workdir, step, flags.weights)
        result = {"step": step, **dict.fromkeys(("split", "loss", "perplexity", "bits_per_byte", "tokens"))}
        if why is None:
            result |= _loss(program, params, store, flags.batches, flags.split)
        line = format_result(result) if why is None else f"checkpoint {step}, no loss: {why}"
        dtype = str(program.gpt.dtype)
        if flags.weights != "auto":
            line, dtype = f"{line}, weights in {flags.weights}", f"{dtype}, weights in {flags.weights}"
            result["weights"] = flags.weights
        if flags.json and why is not None:
            say(line)
        elif first and not flags.json:
            print_result(line)
        if specs:
            # the report has no place for the weights of a loss
            made = report.empty(step)
            if why is None and flags.weights == "auto":
                made["loss"] = report.loss_part(result, store)

            def done(i: int, outcome: suite.Outcome) -> None:
                nonlocal made
                limit = specs[i].limit or options["limit"]
                made = report.add(made, outcome, limit, dtype)
                report.save(workdir, made, last=i + 1 == len(tasks))  # after each, because a set can take hours

            suite.run_each(LanguageModel(params, program.gpt, tokenizer, program.mesh, step), tasks, done)
            result["tasks"] = made["tasks"]
            if first and not flags.json:
                print(f"\n{report.table(made, terminal_width(sys.stdout))}", flush=True)
        if first and flags.json:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    cli.run(main)
