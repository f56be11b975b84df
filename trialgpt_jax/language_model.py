"""A trained model as an object: scores text, continues it, returns its logits.

    model = LanguageModel.load("runs/quickstart")
    model.score([("The people of the United", " States"), ("The people of the United", " Kingdom")])
    model.generate(["My fellow citizens"], max_new_tokens=50)

Requests go to the devices in rows of a few fixed lengths, see `model/packing.py`: any number of requests takes at most
six compiled programs, and those of one context compute it once.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from trialgpt_jax import UserError, console
from trialgpt_jax import config as config_lib
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.vocabulary import Vocabulary
from trialgpt_jax.model import generate as decoding
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.decode import keep_ids, split_layers
from trialgpt_jax.model.gpt import GPT
from trialgpt_jax.model.gpt import logits as head_logits
from trialgpt_jax.model.packing import make_request
from trialgpt_jax.model.sampling import Sampling
from trialgpt_jax.model.scoring import Scorer
from trialgpt_jax.parallel.axes import AXES
from trialgpt_jax.parallel.driven import Driven
from trialgpt_jax.parallel.sharding import mesh_axis, put, replicated
from trialgpt_jax.training.program import Program, run_mesh
from trialgpt_jax.training.start import load_params

GREEDY = Sampling(temperature=0.0)
_BATCH_PROMPTS = 16  # generated together


class Score(NamedTuple):
    """Of a continuation after its context.

    Attributes:
      log_prob: sum of the log-probabilities of its tokens, nats.
      is_greedy: whether every token is the likeliest one in its place.
    """

    log_prob: float
    is_greedy: bool


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

    Attributes:
      params, config, tokenizer, mesh, step: the arguments. `params` and `step` may be replaced by those of another
        checkpoint of the same run.
      block_size: longest input, tokens.
      shows_progress: whether calls show a progress bar on stderr.
      on_batch: called after each batch. It may raise to end the call if there is one process: others would wait.
    """

    def __init__(self, params, config: GPTConfig, tokenizer: Vocabulary, mesh: Mesh, step: int | None = None):
        self.params, self.config, self.tokenizer, self.mesh, self.step = params, config, tokenizer, mesh, step
        self.block_size = config.block_size
        self.shows_progress, self.on_batch = True, lambda: None
        self._scorer = Scorer(config, mesh)
        # For few sequences, which data and fsdp cannot split: the devices along them do the same work.
        copies = mesh.devices.reshape(-1, 1, 1, mesh.shape["tensor"])
        self._copies = Mesh(copies, ("copies", *AXES), axis_types=(AxisType.Auto,) * 4)

    @classmethod
    def load(
        cls, workdir: str, step: int | str = -1, config: ConfigDict | None = None, mesh: Mesh | None = None
    ) -> "LanguageModel":
        """Loads a checkpoint of a run.

        Args:
          workdir: of the run.
          step: of the checkpoint; -1 = the newest whole one, "best" = the one with the lowest validation loss.
          config: default: the run's.
          mesh: default: the run's if the devices suffice for it, otherwise all devices along data.

        Raises:
          UserError: no such checkpoint, or a damaged one.
        """
        config = config_lib.load_snapshot(workdir) if config is None else config
        config_lib.set_precision(config)
        program = Program(config, mesh=run_mesh(config) if mesh is None else mesh)
        params, step = load_params(workdir, program.params_layout, step)
        tokenizer = tokenizer_lib.from_workdir(workdir, config.data.tokenizer)
        return cls(params, program.gpt, tokenizer, program.mesh, step)

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
            return [Score(*score) for score in self._scorer(self.params, prepared, advance)]

    def rolling(self, texts: Sequence[str | Sequence[int]], what: str = "texts") -> list[float]:
        """The log-probability of texts (or their ids), nats: every token is scored once, as lm-eval's rolling ones.

        A text is cut into windows of block_size tokens. The first begins after `start_id`, each other one after the
        last token of the one before, so the tokens of a window see nothing of earlier windows but that.
        """
        requests, owners = [], []
        for number, text in enumerate(texts):
            ids = [self.start_id, *self._ids(text)]
            for start in range(0, len(ids) - 1, self.block_size):
                stop = min(start + self.block_size, len(ids) - 1)
                # the last window is filled up with earlier tokens, which are its context
                first = max(0, stop - self.block_size)
                requests.append((ids[first : start + 1], ids[start + 1 : stop + 1]))
                owners.append(number)
        totals = [0.0] * len(texts)
        for owner, score in zip(owners, self.score_tokens(requests, what), strict=True):
            totals[owner] += score.log_prob
        return totals

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """What the model predicts after each of T ids, 1 ... block_size of them: float32 [T, vocab_size]."""
        self._repeat("logits", [int(i) for i in ids])
        if not 1 <= len(ids) <= self.block_size:
            raise UserError(f"logits of {len(ids)} ids: there must be 1 to model.block_size={self.block_size}")
        tokens = np.zeros((1, min(self.block_size, 1 << max(4, (len(ids) - 1).bit_length()))), np.int32)
        tokens[0, : len(ids)] = ids
        everywhere = replicated(self._copies)
        config = dataclasses.replace(self.config, attention="xla")  # which takes any length
        params = self._copied_params()
        with jax.set_mesh(self._copies):
            return np.asarray(_logits(params, config, everywhere, put(tokens, everywhere)))[0, : len(ids)]

    # ---- generation

    def stream(
        self,
        ids: Sequence[int],
        *,
        num_samples: int = 1,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> Iterator[np.ndarray]:
        """Continues one prompt, piece by piece; beyond block_size the window slides. See `model.generate.generate`.

        Args:
          ids: of the prompt, 1 ... block_size of them.
          num_samples: B continuations.
          max_new_tokens, sampling, seed: as in `generate`.

        Yields:
          int32 [B, n]; after end-of-text a row repeats it.
        """
        params, config = self._for_decoding()
        with jax.set_mesh(self._copies):
            yield from decoding.generate(
                params,
                config,
                np.asarray(ids),
                max_new_tokens=max_new_tokens,
                num_samples=num_samples,
                sampling=sampling,
                seed=seed,
                stop_id=self.tokenizer.eot_id,
            )

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        until: Sequence[str] = (),
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        what: str = "prompts",
    ) -> list[str]:
        """Continues prompts, in batches.

        Args:
          prompts: texts or ids; "" is a new document. Of more than block_size - max_new_tokens ids the first are cut.
          until: strings (or one) at the first of which a continuation ends; so does end-of-text. Neither is returned.
          max_new_tokens: of each continuation, less than block_size.
          sampling: how tokens are drawn; greedy by default.
          seed: of the random numbers; those of a prompt depend on its number in `prompts`, not on its batch.
          what: they are, for the progress bar.

        Returns:
          The continuations, in the order of `prompts`.

        Raises:
          UserError: no room for a prompt, characters that the tokenizer does not have, or numbers out of range.
        """
        until = [until] if isinstance(until, str) else list(until)
        self._repeat(
            "generate", prompts, until=until, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, what=what
        )
        sampling = Sampling(*sampling)  # a list where `_repeat` has sent it
        room = self.block_size - max_new_tokens
        if room < 1:
            raise UserError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt in model.block_size={self.block_size}"
            )
        ids = [np.asarray(self._ids(prompt)[-room:] or [self.start_id], np.int32) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # prompts of a batch have similar lengths
        texts = [""] * len(ids)
        params, config = self._for_decoding()
        with (
            jax.set_mesh(self._copies),
            console.requests_bar(len(ids), what, self.shows_progress, self.on_batch) as advance,
        ):
            for start in range(0, len(order), _BATCH_PROMPTS):
                numbers = order[start : start + _BATCH_PROMPTS]
                # a part of a batch is filled up, so that it needs no programs of its own
                filled = numbers + numbers[:1] * (_BATCH_PROMPTS - len(numbers)) if len(order) > 1 else numbers
                need = len(ids[numbers[0]]) + max_new_tokens
                length = next((n for n in (self.block_size // 4, self.block_size // 2) if n >= need), self.block_size)
                pieces = decoding.generate_batch(
                    params,
                    config,
                    [ids[i] for i in filled],
                    max_new_tokens=max_new_tokens,
                    sample_numbers=filled,
                    prompt_length=length,
                    cache_length=length,
                    sampling=sampling,
                    seed=seed,
                    stop_id=self.tokenizer.eot_id,
                )
                found, n_new = self._read(pieces, len(numbers), until)
                for i, text in zip(numbers, found, strict=True):
                    texts[i] = text
                advance(len(numbers), n_new)
        return texts

    def _read(self, pieces: Iterator[np.ndarray], n: int, until: Sequence[str]) -> tuple[list[str], int]:
        """The texts of the first n rows up to their stop strings, and the number of their ids."""
        rows, texts, done = [[] for _ in range(n)], [""] * n, [False] * n
        for piece in pieces:
            for i in range(n):
                if done[i]:
                    continue
                rows[i] += piece[i].tolist()
                eot = self.tokenizer.eot_id
                done[i] = eot in rows[i]
                text = self.tokenizer.decode(rows[i][: rows[i].index(eot)] if done[i] else rows[i])
                ends = [text.index(stop) + len(stop) for stop in until if stop and stop in text]
                texts[i], done[i] = text[: min(ends, default=len(text))], done[i] or bool(ends)
                for stop in filter(None, until):  # in their order, as lm-eval: of ("B:", "\nB:") only "B:" is cut
                    texts[i] = texts[i].partition(stop)[0]
            if all(done):
                break
        return texts, sum(map(len, rows))

    def _for_decoding(self) -> tuple[dict, GPTConfig]:
        """The parameters as `model.decode` takes them, split along tensor alone, without ids that have no text."""
        params, config = keep_ids(self._copied_params(), self.config, self.tokenizer.vocab_size)
        with jax.set_mesh(self._copies):
            return split_layers(params, config), config

    def _copied_params(self) -> dict:
        """The parameters on `_copies`, split along tensor alone."""

        def sharding(leaf):
            axes = getattr(leaf.sharding, "spec", ())  # no NamedSharding: the array is not split
            return NamedSharding(self._copies, PartitionSpec(*map(_tensor_axis, axes)))

        return jax.device_put(self.params, jax.tree.map(sharding, self.params))


def _tensor_axis(axes: str | tuple[str, ...] | None) -> str | None:
    """The tensor axis if it is among the mesh axes that split a dimension."""
    tensor = mesh_axis("vocab")
    return tensor if tensor == axes or (isinstance(axes, tuple) and tensor in axes) else None


@functools.partial(jax.jit, static_argnums=(1, 2))
def _logits(params, config: GPTConfig, sharding: NamedSharding, tokens_1xT: jax.Array) -> jax.Array:
    hidden = GPT(config).apply({"params": params}, tokens_1xT)
    return jax.lax.with_sharding_constraint(head_logits(params, config, hidden).astype(jnp.float32), sharding)
