"""A trained model as an object: scores text, continues it, returns its logits.

    model = LanguageModel.load("runs/quickstart")
    model.score([("The people of the United", " States"), ("The people of the United", " Kingdom")])
    model.generate("My fellow citizens", max_new_tokens=50)

Requests go to the devices in rows of a few fixed lengths, see `model/packing.py`: any number of requests takes at most
six compiled programs, and those of one context compute it once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict

from trialgpt_jax import UserError, console
from trialgpt_jax import config as config_lib
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.vocabulary import Vocabulary
from trialgpt_jax.generation.samples import (
    DEFAULT_OPTIONS,
    GREEDY,
    GrowingText,
    Options,
    Sample,
    batches,
    grow,
    prompt_ids,
)
from trialgpt_jax.model import weights as weights_lib
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.decode import keep_ids, split_layers
from trialgpt_jax.model.gpt import GPT
from trialgpt_jax.model.gpt import logits as head_logits
from trialgpt_jax.model.packing import make_request, rolling_windows
from trialgpt_jax.model.sampling import Sampling
from trialgpt_jax.model.scoring import Score, Scorer, TextLoss
from trialgpt_jax.parallel.axes import AXES
from trialgpt_jax.parallel.driven import Driven
from trialgpt_jax.parallel.sharding import put, replicated, split_along_tensor
from trialgpt_jax.training.metrics import bits_per_byte
from trialgpt_jax.training.program import Program, run_mesh
from trialgpt_jax.training.start import load_params


class LanguageModel(Driven):
    """A model with its tokenizer on a mesh.

    With several processes every method is called by all of them with equal arguments, or by process 0 alone inside
    `drive`.

    Args:
      params: of training (layers stacked), on `mesh` in any layout.
      config: the model.
      tokenizer: its tokenizer.
      mesh: batches are split over data x fsdp, heads and vocabulary over tensor.
      step: of the checkpoint, if the parameters are of one.
      weights: how matrices are stored, see `model.weights`: "auto", "bfloat16" or "int8". The parameters have the
        rounded values already.

    Attributes:
      params, config, tokenizer, mesh, step, weights: the arguments. `params` and `step` may be replaced by those
        of another checkpoint of the same run.
      block_size: longest input, tokens.
      shows_progress: whether calls show a progress bar on stderr.
      on_batch: called after each batch. It may raise to end the call if there is one process: others would wait.
    """

    def __init__(
        self,
        params,
        config: GPTConfig,
        tokenizer: Vocabulary,
        mesh: Mesh,
        step: int | None = None,
        weights: str = "auto",
    ):
        self.params, self.config, self.tokenizer, self.mesh, self.step = params, config, tokenizer, mesh, step
        self.weights = weights
        self.block_size = config.block_size
        self.shows_progress, self.on_batch = True, lambda: None
        self._scorer = Scorer(config, mesh)
        # For few sequences, which data and fsdp cannot split: the devices along them do the same work.
        copies = mesh.devices.reshape(-1, 1, 1, mesh.shape["tensor"])
        self._copies = Mesh(copies, ("copies", *AXES), axis_types=(AxisType.Auto,) * 4)

    @classmethod
    def load(
        cls,
        workdir: str,
        step: int | str = -1,
        config: ConfigDict | None = None,
        mesh: Mesh | None = None,
        weights: str = "auto",
    ) -> "LanguageModel":
        """Loads a checkpoint of a run.

        Args:
          workdir: of the run.
          step: of the checkpoint; -1 = the newest whole one, "best" = the one with the lowest validation loss.
          config: default: the run's.
          mesh: default: the run's if the devices suffice for it, otherwise all devices along data.
          weights: "bfloat16" or "int8" round the matrices, and decoding reads them so; "auto" = as they are.

        Raises:
          UserError: no such checkpoint, or a damaged one.
        """
        weights_lib.check(weights)
        config = config_lib.load_snapshot(workdir) if config is None else config
        config_lib.set_precision(config)
        program = Program(config, mesh=run_mesh(config) if mesh is None else mesh)
        params, step = load_params(workdir, program.params_layout, step)
        tokenizer = tokenizer_lib.from_workdir(workdir, config.data.tokenizer)
        return cls(weights_lib.rounded(params, weights), program.gpt, tokenizer, program.mesh, step, weights)

    @property
    def params(self) -> dict:
        """See the class."""
        return self._params

    @params.setter
    def params(self, params: dict | None) -> None:
        self._params, self._decoding = params, None  # `_decoding`: what `_for_decoding` made of the old ones

    @property
    def start_id(self) -> int:
        """The id before the first token of a text: end-of-text, or if there is none a newline, or else id 0."""
        if self.tokenizer.eot_id is not None:
            return self.tokenizer.eot_id
        return self.tokenizer.id_of("\n") or 0

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises UserError for characters that the tokenizer does not have."""
        return list(self.tokenizer.encode(text))

    def _ids(self, text: str | Sequence[int]) -> list[int]:
        return self.encode(text) if isinstance(text, str) else list(text)

    # ---- scoring

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Scores continuations of contexts, as lm-eval defines it for causal models.

        Both are encoded as one text, and white space at the end of the context counts as part of the continuation. An
        empty context is `start_id`.

        Args:
          pairs: (context, continuation); a continuation has at least one token.
        """
        return self.score_tokens([self._encode_pair(*pair) for pair in pairs])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        stripped = context.rstrip()
        whole = self.encode(context + continuation)
        if not stripped:
            return ([self.start_id], whole) if whole[:1] != [self.start_id] else (whole[:1], whole[1:])
        before = self.encode(stripped)
        return before, whole[len(before) :]

    def score_tokens(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], what: str = "requests"
    ) -> list[Score]:
        """Scores continuations of contexts.

        Args:
          requests: (context ids, continuation ids), at least one each. Of more than block_size + 1 ids the first are
            left out.
          what: they are, for the progress bar.

        Returns:
          A score each, in the order of `requests`.

        Raises:
          UserError: an empty context or continuation, a continuation longer than block_size, or an unknown id.
        """
        self._repeat("score_tokens", requests, what)
        prepared = [make_request(*request, self.config) for request in requests]
        with console.requests_bar(len(prepared), what, self.shows_progress, self.on_batch) as advance:
            return self._scorer(self.params, prepared, advance)

    def rolling(self, texts: Sequence[str | Sequence[int]], what: str = "texts") -> list[float]:
        """The log-probability of texts (or their ids), nats: every token is scored once, as lm-eval's rolling ones.

        A text is cut into windows of block_size tokens. The first begins after `start_id`, each other one after the
        last token of the one before, so the tokens of a window see nothing of earlier windows but that.
        """
        windows = [rolling_windows([self.start_id, *self._ids(text)], self.block_size) for text in texts]
        scores = iter(self.score_tokens([window for each in windows for window in each], what))
        return [sum((next(scores).log_prob for _ in each), 0.0) for each in windows]

    def evaluate(self, texts: str | Sequence[str]) -> TextLoss:
        """How well the model predicts a text, or several of which each begins after `start_id`; see `rolling`.

        Raises:
          UserError: no text at all, or characters that the tokenizer does not have.
        """
        ids = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        n_tokens, n_bytes = sum(map(len, ids)), len("".join(texts).encode())
        if not n_tokens:
            raise UserError("a text without tokens has no loss")
        loss = -sum(self.rolling(ids)) / n_tokens
        return TextLoss(loss, bits_per_byte(loss, n_tokens, n_bytes), n_tokens)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """What the model predicts after each of T ids, 1 ... block_size of them: float32 [T, vocab_size]."""
        self._repeat("logits", [int(i) for i in ids])
        if not 1 <= len(ids) <= self.block_size:
            raise UserError(f"logits of {len(ids)} ids: there must be 1 to model.block_size={self.block_size}")
        if unknown := [int(i) for i in ids if not 0 <= i < self.config.vocab_size]:
            raise UserError(f"logits: id {unknown[0]} is not one of the model's, 0 ... {self.config.vocab_size - 1}")
        tokens = np.zeros((1, min(self.block_size, 1 << max(4, (len(ids) - 1).bit_length()))), np.int32)
        tokens[0, : len(ids)] = ids
        everywhere = replicated(self._copies)
        config = dataclasses.replace(self.config, attention="xla")  # which takes any length
        params = split_along_tensor(self.params, self._copies)
        with jax.set_mesh(self._copies):
            return np.asarray(_logits(params, config, everywhere, put(tokens, everywhere)))[0, : len(ids)]

    # ---- generation

    def check_prompts(self, prompts: Sequence[str | Sequence[int]], options: Options) -> None:
        """Raises UserError if `samples` would refuse one of them."""
        prompt_ids(self.tokenizer, prompts, self.start_id, self.block_size, options, quiet=True)

    @overload
    def generate(self, prompts: str, *, stream: Literal[True], **options) -> Iterator[str]: ...
    @overload
    def generate(self, prompts: str, **options) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str | Sequence[int]], **options) -> list[str]: ...
    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        stream: bool = False,
        what: str = "prompts",
    ) -> str | list[str] | Iterator[str]:
        """The text of one continuation of each prompt; `samples` has more options and more in its result.

        Args:
          prompts: a text; or several texts or lists of ids.
          max_new_tokens, sampling, stop, seed: see `Options`; `stop` may be one string.
          stream: return an iterator over the pieces of the text while it is generated; of one text alone.
          what: they are, for the progress bar.

        Returns:
          The continuation of one text, or a list of those of several in their order.

        Raises:
          UserError: as `samples`.
        """
        options = Options(max_new_tokens, sampling=sampling, stop=stop, seed=seed).normal()
        if stream:
            if not isinstance(prompts, str):
                raise UserError("stream=True takes one text, not a list of prompts")
            options.check()
            return self._stream(prompts, options)
        single = isinstance(prompts, str)
        found = self.samples([prompts] if single else prompts, options, what=what)
        return found[0][0].text if single else [samples[0].text for samples in found]

    def samples(
        self,
        prompts: Sequence[str | Sequence[int]],
        options: Options = DEFAULT_OPTIONS,
        *,
        first: int = 0,
        what: str = "prompts",
        on_text: Callable[[str], None] | None = None,
    ) -> list[list[Sample]]:
        """Continues prompts, in batches of similar lengths. Past block_size as `model.generate` says.

        Args:
          prompts: texts or ids; an empty one starts a document, after `start_id`. Of one that is longer than block_size
            the end is used, which is said on stderr.
          options: see there.
          first: number of the first prompt, for the random numbers.
          what: they are, for the progress bar.
          on_text: called with pieces of the first sample of the first prompt while it is generated, instead of the
            progress bar.

        Returns:
          `options.num_samples` samples of each prompt, in the order of `prompts`.

        Raises:
          UserError: options out of range, characters that the tokenizer does not have, or a long prompt with `strict`.
        """
        options = Options(*options).normal()  # lists where `_repeat` has sent them
        options.check()
        self._repeat("samples", prompts, options, first=first, what=what)
        ids = prompt_ids(self.tokenizer, prompts, self.start_id, self.block_size, options, first)
        found: list[list[Sample]] = [[] for _ in ids]
        shown = self.shows_progress and on_text is None
        with console.requests_bar(len(ids), what, shown, self.on_batch) as advance:
            for places in batches([len(each) for each in ids], options):
                texts = []
                watched = on_text is not None and 0 in places
                for texts in self._grow([ids[i] for i in places], [first + i for i in places], options, watched):
                    if watched:
                        on_text(texts[places.index(0)][0].take())
                for place, group in zip(places, texts, strict=True):
                    found[place] = [text.sample() for text in group]
                advance(len(places), sum(len(sample.tokens) for place in places for sample in found[place]))
        return found

    def _stream(self, prompt: str, options: Options) -> Iterator[str]:
        for texts in self._grow(
            prompt_ids(self.tokenizer, [prompt], self.start_id, self.block_size, options), [0], options, watched=True
        ):
            if new := texts[0][0].take():
                yield new

    def _grow(
        self, ids: list[np.ndarray], numbers: list[int], options: Options, watched: bool
    ) -> Iterator[list[list[GrowingText]]]:
        params, config = self._for_decoding()
        pieces = grow(params, config, self.tokenizer, ids, numbers, options, watched)
        while True:
            with jax.set_mesh(self._copies):  # entered for each piece, so that the caller's mesh is untouched
                texts = next(pieces, None)
            if texts is None:
                return
            yield texts

    def _for_decoding(self) -> tuple[dict, GPTConfig]:
        """The parameters as `model.decode` takes them, split along tensor alone, without ids that have no text."""
        if self._decoding is None:
            params, config = keep_ids(
                split_along_tensor(self.params, self._copies), self.config, self.tokenizer.vocab_size
            )
            with jax.set_mesh(self._copies):
                self._decoding = split_layers(params, config, self.weights), config
        return self._decoding


@functools.partial(jax.jit, static_argnums=(1, 2))
def _logits(params, config: GPTConfig, sharding: NamedSharding, tokens_1xT: jax.Array) -> jax.Array:
    hidden = GPT(config).apply({"params": params}, tokens_1xT)
    return jax.lax.with_sharding_constraint(head_logits(params, config, hidden).astype(jnp.float32), sharding)
