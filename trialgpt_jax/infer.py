"""Generates text: `trialgpt infer --workdir=runs/quickstart --prompt="The people"`.

Text streams to stdout while it is generated; with --json, stdout is one JSON object at the end. --prompts=FILE.jsonl
continues many prompts, one JSON line each, and --interactive asks for them. docs/generation.md has examples.
"""

import contextlib
import itertools
import json
import math
import sys

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trialgpt_jax import UserError, cli, live_line
from trialgpt_jax.console import say
from trialgpt_jax.generation import prompts as prompt_files
from trialgpt_jax.generation.samples import BATCH_SIZE, Options
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.model import weights as weights_lib
from trialgpt_jax.model.sampling import Sampling
from trialgpt_jax.parallel import processes
from trialgpt_jax.parallel.sharding import make_mesh
from trialgpt_jax.storage import files


def load(config: ConfigDict, workdir: str, step: int | str = -1, weights: str = "auto") -> LanguageModel:
    """The model of a workdir for decoding: its heads are split over the devices if they divide them.

    Raises:
      UserError: as `LanguageModel.load`.
    """
    # One copy of the model, split along tensor, because decoding is bound by reading the weights.
    heads = config.model.n_kv_head or config.model.n_head
    tensor = math.gcd(heads, jax.device_count())
    mesh = _decoding_mesh(tensor)
    model = LanguageModel.load(workdir, step, config, mesh, weights)
    stored = model.config.dtype if weights == "auto" else f"{model.config.dtype}, weights in {weights},"
    say(f"checkpoint {model.step}, {stored} on {tensor} x {mesh.devices.flat[0].device_kind}")
    return model


def infer(model: LanguageModel, prompt: str | None, options: Options, *, number: int = 0, show: bool = False) -> dict:
    """Continues one prompt.

    Args:
      model: from `load`.
      prompt: text; None starts a document: the end-of-text id, or a newline if the tokenizer has none.
      options: see there.
      number: of the prompt, for the random numbers.
      show: print the samples, the first one while it is generated.

    Returns:
      step, prompt, and samples: a list of {text, tokens} without the prompt, with logprobs if they are asked for.

    Raises:
      UserError: a prompt that cannot be used.
    """
    begin, several = prompt or "", options.num_samples > 1
    waiting = ["--- sample 0\n" if several else "", begin]  # printed with the first token: nothing is refused after it

    def on_text(text: str) -> None:
        until_text.close()
        sys.stdout.write("".join([*waiting, text]))
        sys.stdout.flush()
        waiting.clear()

    with contextlib.ExitStack() as until_text:  # a program that was not compiled here before takes seconds
        if show:
            until_text.enter_context(live_line.task("compiling and reading the prompt", plain=False))
        (samples,) = model.samples([begin], options, first=number, on_text=on_text if show else None)
    if show:
        print()
        for i, sample in enumerate(samples[1:], 1):
            print(f"--- sample {i}\n{begin}{sample.text}", flush=True)
    return {"step": model.step} | prompt_files.as_line(prompt, samples)


def interact(model: LanguageModel, options: Options) -> None:
    """Asks for prompts, one a line, and continues each, until the end of stdin. Ctrl-C stops the text."""
    with contextlib.suppress(ImportError):  # not on every system; `input` has editing and history with it
        import readline  # noqa: F401
    say("one prompt per line; an empty one starts a document; Ctrl-C stops the text, Ctrl-D ends")
    for number in itertools.count():
        try:
            infer(model, input("> "), options, number=number, show=True)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(flush=True)
        except UserError as error:
            say(f"error: {error}")


def _decoding_mesh(tensor: int) -> Mesh:
    """A mesh of `tensor` devices; with several processes of all devices, because each process must own some of them."""
    if jax.process_count() == 1:
        return make_mesh({"data": 1, "fsdp": 1, "tensor": tensor}, jax.devices()[:tensor])
    return make_mesh({"data": jax.device_count() // tensor, "fsdp": 1, "tensor": tensor})


FLAGS = {
    "workdir": (None, "folder of the run"),
    "prompt": (None, "text to continue, or FILE:path; left out: a new document"),
    "prompts": (None, 'file of prompts, or - for stdin: lines {"prompt": "..."}'),
    "out": (None, "file for the lines of --prompts, which the same command continues; left out: stdout"),
    "interactive": (False, "ask for prompts; Ctrl-C stops a text, Ctrl-D ends"),
    "num_samples": (1, "continuations, generated as one batch"),
    "max_new_tokens": (200, "tokens of each; end-of-text ends one earlier"),
    "stop": ((), "string that ends a continuation; may be given more than once; a newline is $'\\n' in bash"),
    "temperature": (0.8, "below 1 = more predictable, above 1 = more varied, 0 = greedy"),
    "top_k": (0, "sample from the k likeliest tokens; 0 = all"),
    "top_p": (1.0, "sample from the smallest set of likeliest tokens that reaches probability p; 1 = all"),
    "min_p": (0.0, "sample from tokens at least this times as likely as the likeliest one; 0 = all"),
    "repetition_penalty": (1.0, "above 1 = ids that the text already has are less likely; 1 = none"),
    "seed": (0, "of the random numbers; the same seed gives the same samples"),
    "logprobs": (False, "with --json or --prompts: the log-probability of each token by the model, nats"),
    "special_tokens": (False, "<|endoftext|> in a prompt is the id, not text"),
    "strict": (False, "refuse a prompt longer than model.block_size, of which the end is used otherwise"),
    "weights": ("auto", "of the matrices: bfloat16 or int8 take fewer bytes, less exact; auto = those of the matmuls"),
    "batch_size": (BATCH_SIZE, "rows that are decoded together"),
    "checkpoint_step": cli.CHECKPOINT_STEP,
    "json": (False, "print one JSON object on stdout"),
} | processes.FLAGS
_NO_SETTINGS = {"prompt", "prompts", "out", "interactive", "json", "strict", "workdir", "checkpoint_step"}


def _options(flags) -> Options:
    """The options of the flags. Raises UserError for flags that are out of range or exclude each other."""
    cli.at_most(flags, num_samples=10_000, max_new_tokens=10_000_000, batch_size=100_000)
    ways = [f"--{name}" for name in ("prompt", "prompts", "interactive") if flags[name].value not in (None, False)]
    for name in ("prompts", "out"):
        if flags[name].value == "":
            raise UserError(f"--{name} is empty")
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)} exclude each other")
    if flags.out and not flags.prompts:
        raise UserError("--out is of the lines of --prompts; without it redirect stdout")
    if flags.json and (flags.prompts or flags.interactive):
        raise UserError(f"--json and {ways[0]} exclude each other; --prompts prints JSON lines")
    if flags.logprobs and not (flags.json or flags.prompts):
        raise UserError("--logprobs is only for --json and --prompts, whose output has room for them")
    limits = (flags.top_k, flags.top_p, flags.min_p, flags.repetition_penalty)
    options = Options(flags.max_new_tokens, flags.num_samples, Sampling(flags.temperature, *limits), tuple(flags.stop))
    own = ("seed", "logprobs", "special_tokens", "strict", "batch_size")
    options = options._replace(**{name: flags[name].value for name in own})
    options.check()
    weights_lib.check(flags.weights)
    return options


def main(argv: list[str]) -> None:
    flags, config = cli.parse(argv, __doc__, FLAGS)
    workdir, step = cli.require_workdir(flags), cli.checkpoint_step(flags)
    options, prompt = _options(flags), prompt_files.read_prompt(flags.prompt)
    if prompt == "":
        raise UserError("--prompt is empty; leave it out to start a new document, or give some text")
    with cli.start(flags, config):
        first = jax.process_index() == 0
        if flags.interactive and jax.process_count() > 1:
            raise UserError("--interactive needs a single process")
        prompts = prompt_files.read(flags.prompts) if flags.prompts and first else None
        model = load(config, workdir, step, flags.weights)
        model.shows_progress = bool(flags.out)
        if flags.prompts:
            settings = {name: flags[name].value for name in FLAGS if name not in _NO_SETTINGS | processes.FLAGS.keys()}
            settings |= {"workdir": files.resolve(workdir), "checkpoint_step": model.step}
            settings |= {f"config.model.{name}": value for name, value in config.model.items()}
            settings |= {f"config.train.{name}": config.train[name] for name in ("dtype", "matmul_precision")}

            def run() -> None:
                if isinstance(prompts, list):  # of a file: the last one is refused before the first one is continued
                    model.check_prompts(prompts, options)
                with prompt_files.open_output(flags.out, settings) as output:
                    n = prompt_files.continue_all(
                        prompts, output, options, lambda block, first: model.samples(block, options, first=first)
                    )
                say(f"{n:,} prompt{'s' * (n != 1)}" + (f", in {flags.out}" if flags.out else ""))

            model.drive(run)
        elif flags.interactive:
            interact(model, options)
        else:
            try:
                result = infer(model, prompt, options, show=first and not flags.json)
            except UserError as error:
                raise UserError(f"--prompt: {error}") from None
            if flags.json and first:
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    cli.run(main)
