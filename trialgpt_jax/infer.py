"""Generates text: `python -m trialgpt_jax.infer --workdir=runs/quickstart --prompt="The people"`.

Text streams to stdout while it is generated. With --json, stdout is one JSON object at the end.
"""

import json
import math
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trialgpt_jax import UserError, cli
from trialgpt_jax.console import say
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.vocabulary import Vocabulary
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.model.sampling import DEFAULT_SAMPLING, Sampling
from trialgpt_jax.parallel import processes
from trialgpt_jax.parallel.sharding import make_mesh

_LONGEST_PROMPT = 16 << 20  # bytes; no model has so long a context


def infer(
    config: ConfigDict,
    workdir: str,
    prompt: str | None = None,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    sampling: Sampling = DEFAULT_SAMPLING,
    seed: int = 0,
    step: int | str = -1,
    on_text: Callable[[str], None] = lambda text: None,
) -> dict:
    """Continues a prompt with the model of a workdir, with its heads split over the devices if they divide them.

    Args:
      config: the workdir's.
      workdir: of a run.
      prompt: text; None starts a document: the end-of-text id, or a newline if the tokenizer has none.
      num_samples: continuations, generated as one batch.
      max_new_tokens: tokens of each; end-of-text, if the tokenizer has it, ends a continuation earlier.
      sampling: temperature, top-k, top-p.
      seed: sample i of a seed does not depend on num_samples.
      step: of the checkpoint; -1 = the newest whole one, "best" = the one with the lowest validation loss.
      on_text: called with the prompt and then with pieces of the first sample's text.

    Returns:
      step, prompt, and samples: a list of {text, tokens} without the prompt.

    Raises:
      UserError: a prompt, number or checkpoint that cannot be used.
    """
    sampling.validate()
    # One copy of the model, split along tensor, because decoding is bound by reading the weights.
    heads = config.model.n_kv_head or config.model.n_head
    tensor = math.gcd(heads, jax.device_count())
    mesh = _decoding_mesh(tensor)
    ids = _start_ids(tokenizer_lib.from_workdir(workdir, config.data.tokenizer), prompt)
    model = LanguageModel.load(workdir, step, config, mesh)
    tokenizer = model.tokenizer
    say(f"checkpoint {model.step}, {model.config.dtype} on {tensor} x {mesh.devices.flat[0].device_kind}")
    on_text(prompt or "")
    decoder = tokenizer_lib.StreamingDecoder(tokenizer)
    pieces = []
    for new in model.stream(ids, num_samples=num_samples, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed):
        pieces.append(new)
        on_text("".join(decoder.push(i) for i in new[0] if i != tokenizer.eot_id))
    on_text(decoder.finish())
    samples = []
    for row in np.concatenate(pieces, axis=1).tolist():
        ended = row.index(tokenizer.eot_id) if tokenizer.eot_id in row else len(row)
        samples.append({"text": tokenizer.decode(row[:ended]), "tokens": row[:ended]})
    return {"step": model.step, "prompt": prompt, "samples": samples}


def _start_ids(tokenizer: Vocabulary, prompt: str | None) -> list[int]:
    """The ids that generation starts from. Raises UserError for a prompt without ids, or with unknown characters."""
    if prompt is None and tokenizer.eot_id is not None:
        return [tokenizer.eot_id]
    if prompt is None:  # as nanoGPT's sample.py; the first character if there is no newline
        return [tokenizer.id_of("\n") or 0]
    if prompt == "":
        raise UserError("--prompt is empty; leave it out to start a new document, or give some text")
    try:
        ids = tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from None
    if not ids:
        raise UserError("--prompt: this tokenizer makes no tokens of it")
    return ids


def _decoding_mesh(tensor: int) -> Mesh:
    """A mesh of `tensor` devices; with several processes of all devices, because each process must own some of them."""
    if jax.process_count() == 1:
        return make_mesh({"data": 1, "fsdp": 1, "tensor": tensor}, jax.devices()[:tensor])
    return make_mesh({"data": jax.device_count() // tensor, "fsdp": 1, "tensor": tensor})


def read_prompt(prompt: str | None) -> str | None:
    """The prompt of the command line: text, or the contents of a file for `FILE:path`.

    Raises:
      UserError: the file cannot be read, or is not UTF-8 (names the offset).
    """
    if prompt is None or not prompt.startswith("FILE:"):
        return prompt
    path = prompt.removeprefix("FILE:")
    try:
        with open(path, "rb") as file:
            data = file.read(_LONGEST_PROMPT + 1)
        if len(data) > _LONGEST_PROMPT:
            raise UserError(
                f"--prompt={prompt}: {path} has more than {_LONGEST_PROMPT >> 20} MiB, which no model reads"
            )
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt={prompt}: {path} is not UTF-8 at byte {error.start}; convert it first") from None
    except (OSError, ValueError) as error:  # ValueError: not a possible file name
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--prompt={prompt!a}: {path!a} cannot be read: {why}") from None


FLAGS = {
    "workdir": (None, "folder of the run"),
    "prompt": (None, "text to continue, or FILE:path; left out: a new document"),
    "num_samples": (1, "continuations, generated as one batch"),
    "max_new_tokens": (200, "tokens of each; end-of-text ends one earlier"),
    "temperature": (0.8, "below 1 = more predictable, above 1 = more varied, 0 = greedy"),
    "top_k": (0, "sample from the k likeliest tokens; 0 = all"),
    "top_p": (1.0, "sample from the smallest set of likeliest tokens that reaches probability p; 1 = all"),
    "seed": (0, "of the random numbers; the same seed gives the same samples"),
    "checkpoint_step": cli.CHECKPOINT_STEP,
    "json": (False, "print one JSON object on stdout"),
} | processes.FLAGS


def main(argv: list[str]) -> None:
    flags, config = cli.parse(argv, __doc__, FLAGS)
    workdir = cli.require_workdir(flags)
    step = cli.checkpoint_step(flags)
    cli.at_most(flags, num_samples=10_000, max_new_tokens=10_000_000)
    prompt = read_prompt(flags.prompt)

    def stream(text: str) -> None:
        if not flags.json and jax.process_index() == 0:
            sys.stdout.write(text)
            sys.stdout.flush()

    with cli.start(flags, config):
        if flags.num_samples > 1:
            stream("--- sample 0\n")
        result = infer(
            config,
            workdir,
            prompt,
            num_samples=flags.num_samples,
            max_new_tokens=flags.max_new_tokens,
            sampling=Sampling(flags.temperature, flags.top_k, flags.top_p),
            seed=flags.seed,
            step=step,
            on_text=stream,
        )
        stream("\n")
        for i, sample in enumerate(result["samples"][1:], 1):
            stream(f"--- sample {i}\n{prompt or ''}{sample['text']}\n")
        if flags.json and jax.process_index() == 0:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    cli.run(main)
