"""Generates text: `python -m trialgpt_jax.infer --workdir=runs/quickstart --prompt="The people"`.

Text streams to stdout as it is produced; with --json, stdout is one JSON object at the end.
"""

import json
import math
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax import config as config_lib
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.evaluate import load_params
from trialgpt_jax.model.generate import DEFAULT_SAMPLING, Sampling, generate, split_layers
from trialgpt_jax.parallel import accelerators, processes
from trialgpt_jax.parallel.sharding import AXES, make_mesh
from trialgpt_jax.training.metrics import say


def infer(
    config: ConfigDict,
    workdir: str,
    prompt: str | None = None,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    sampling: Sampling = DEFAULT_SAMPLING,
    seed: int = 0,
    step: int = -1,
    on_text: Callable[[str], None] = lambda text: None,
) -> dict:
    """Continues a prompt with the model of a workdir, its heads split over the devices where they can be.

    Args:
      config: the workdir's.
      workdir: of a run.
      prompt: text; None starts a document (the end-of-text id).
      num_samples: continuations, generated together.
      max_new_tokens: tokens of each; end-of-text ends one earlier.
      sampling: temperature, top-k, top-p.
      seed: sample i of a seed does not depend on num_samples.
      step: of the checkpoint; -1 = the newest whole one.
      on_text: gets the prompt and the first sample's text, piece by piece, while it is made.

    Returns:
      step, prompt, and samples: a list of {text, tokens}, the text without the prompt.

    Raises:
      UserError: a prompt, number or checkpoint that cannot be used.
    """
    sampling.validate()
    # One copy of the model: decoding is bound by reading the weights, so devices share them along tensor.
    heads = config.model.n_kv_head or config.model.n_head
    tensor = math.gcd(heads, jax.device_count())
    mesh = _decoding_mesh(tensor)
    tokenizer = tokenizer_lib.load(config.data.tokenizer, workdir)
    if prompt == "":
        raise UserError("--prompt is empty; leave it out to start a new document, or give some text")
    ids = [tokenizer.eot_id] if prompt is None else tokenizer.encode(prompt)
    with jax.set_mesh(mesh):
        gpt, params, step = load_params(config, workdir, step, mesh)
        say(f"checkpoint {step}, {gpt.dtype} on {tensor} x {mesh.devices.flat[0].device_kind}")
        params = split_layers(params, gpt)
        on_text(prompt or "")
        decoder = tokenizer_lib.StreamingDecoder(tokenizer)
        pieces = []
        for new in generate(
            params,
            gpt,
            np.asarray(ids),
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            sampling=sampling,
            seed=seed,
            stop_id=tokenizer.eot_id,
        ):
            pieces.append(new)
            on_text("".join(decoder.push(i) for i in new[0] if i != tokenizer.eot_id))
        on_text(decoder.finish())
    samples = []
    for row in np.concatenate(pieces, axis=1).tolist():
        ended = row.index(tokenizer.eot_id) if tokenizer.eot_id in row else len(row)
        samples.append({"text": tokenizer.decode(row[:ended]), "tokens": row[:ended]})
    return {"step": step, "prompt": prompt, "samples": samples}


def _decoding_mesh(tensor: int) -> Mesh:
    """A mesh of `tensor` devices; with several processes one of all devices, as every process must have some of them.

    The devices beyond `tensor` then do the same work along an axis of their own, over which nothing is split.
    """
    if jax.process_count() == 1:
        return make_mesh({"data": 1, "fsdp": 1, "tensor": tensor}, jax.devices()[:tensor])
    devices = make_mesh({"data": jax.device_count() // tensor, "fsdp": 1, "tensor": tensor}).devices
    return Mesh(devices[:, None], ("copies", *AXES), axis_types=(AxisType.Auto,) * 4)


def read_prompt(prompt: str | None) -> str | None:
    """The prompt of the command line: text, or the contents of a file for `FILE:path`.

    Raises:
      UserError: the file is not there, or not UTF-8 (names the offset).
    """
    if prompt is None or not prompt.startswith("FILE:"):
        return prompt
    path = prompt.removeprefix("FILE:")
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt={prompt}: {path} is not UTF-8 at byte {error.start}; convert it first") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--prompt={prompt!a}: {path!a} cannot be read: {why}") from None


FLAGS = {
    "workdir": (None, "folder of the run"),
    "prompt": (None, "text to continue, or FILE:path; left out: a new document"),
    "num_samples": (1, "continuations, generated together"),
    "max_new_tokens": (200, "tokens of each, unless it ends earlier"),
    "temperature": (0.8, "below 1 = more of the likely, above 1 = more surprises, 0 = always the likeliest"),
    "top_k": (0, "draw from the k likeliest only; 0 = all"),
    "top_p": (1.0, "draw from the fewest likeliest that together reach probability p; 1 = all"),
    "seed": (0, "of the draws; reproduces a sample"),
    "checkpoint_step": (-1, "which checkpoint; -1 = the newest whole one"),
    "json": (False, "print one JSON object on stdout"),
} | processes.FLAGS


def main(argv: list[str]) -> None:
    flags, config = config_lib.parse_command_line(argv, __doc__, FLAGS)
    if not flags.workdir:
        raise UserError("--workdir=FOLDER is missing: the folder of a run")
    config_lib.validate(config)
    prompt = read_prompt(flags.prompt)

    def stream(text: str) -> None:
        if not flags.json and jax.process_index() == 0:
            sys.stdout.write(text)
            sys.stdout.flush()

    accelerators.use_compilation_cache()
    with processes.joined(flags):
        if flags.num_samples > 1:
            stream("--- sample 0\n")
        result = infer(
            config,
            flags.workdir,
            prompt,
            num_samples=flags.num_samples,
            max_new_tokens=flags.max_new_tokens,
            sampling=Sampling(flags.temperature, flags.top_k, flags.top_p),
            seed=flags.seed,
            step=flags.checkpoint_step,
            on_text=stream,
        )
        stream("\n")
        for i, sample in enumerate(result["samples"][1:], 1):
            stream(f"--- sample {i}\n{prompt or ''}{sample['text']}\n")
        if flags.json and jax.process_index() == 0:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    config_lib.run(main)
