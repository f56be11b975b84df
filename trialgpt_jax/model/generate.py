"""Generation: continues prompts of any lengths with the programs of `decode.py`, a chunk of tokens at a time.

Beyond `block_size` tokens:
- rope: the cache slides. In every layer a token attends to itself and to the block_size - 1 tokens before it.
- learned positions: when the cache is full, the last half of it is read again from position 0 on. Each token is drawn
  from the model's logits after block_size // 2 + 1 to block_size tokens, and nothing else.

Shapes: R prompts, B samples (B = R * samples of each), P prompt length, H length read again.
"""

import collections
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.decode import (
    CHUNK,
    State,
    cache_length_of,
    decode,
    first_state,
    make_drawing,
    make_room,
    piece_length,
    power_of_two,
    prefill,
    read_again,
    sample_keys,
)
from trialgpt_jax.model.sampling import DEFAULT_SAMPLING, Sampling
from trialgpt_jax.parallel import accelerators

_FIRST, _SECONDS = 16, 0.05  # of a watched piece: tokens of the first ones; time that each is to take


class Piece(NamedTuple):
    """New tokens of every sample.

    Attributes:
      tokens: int32 [B, n].
      log_probs: float32 [B, n], their log-probabilities by the model, nats: before penalty, temperature and limits.
        Zeros unless they are asked for, and after the stop id.
    """

    tokens: np.ndarray
    log_probs: np.ndarray


def generate(
    params,
    config: GPTConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    numbers: Sequence[int] | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    seed: int = 0,
    stop_id: int | None = None,
    log_probs: bool = False,
    watched: bool = False,
    chunk: int = CHUNK,
) -> Iterator[Piece]:
    """Continues R prompts.

    The random numbers of a sample follow from the seed, the number of its prompt, its own number and the position: a
    sample does not depend on num_samples, nor on the prompts beside it.

    Args:
      params: from `split_layers`.
      config: the model.
      prompts: ids, 1 ... block_size of each.
      max_new_tokens: tokens to generate, at least 1.
      num_samples: continuations of each prompt; those of prompt r are the rows r * num_samples and following.
      numbers: of the prompts, for the random numbers; default: 0 ... R-1.
      sampling: how tokens are drawn.
      seed: of the random numbers.
      stop_id: ends a sample; the rest of its row repeats `stop_id`.
      log_probs: whether log-probabilities are wanted.
      watched: whether somebody reads the text while it is made; pieces then take about 50 ms each.
      chunk: the most tokens of a piece.

    Yields:
      Pieces of `chunk` tokens, or fewer if they are watched, of every sample, until max_new_tokens or until every
      sample has ended.

    Raises:
      UserError: an empty or over-long prompt, ids beyond the vocabulary, numbers out of range.
    """
    check(max_new_tokens, num_samples, sampling)
    prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
    for prompt in prompts:
        _check_prompt(prompt, config)
    lengths_R = np.array([len(prompt) for prompt in prompts], np.int32)
    lengths_B = np.repeat(lengths_R, num_samples)
    keys_B = sample_keys(seed, range(len(prompts)) if numbers is None else numbers, num_samples)
    drawing = make_drawing(sampling, keys_B, stop_id, log_probs)
    seen_BxV = np.zeros((len(lengths_B), config.vocab_size if sampling.repetition_penalty != 1 else 0), bool)
    if seen_BxV.size:
        for row, prompt in zip(np.split(seen_BxV, len(prompts)), prompts, strict=True):
            row[:, prompt] = True
    slides, n_again = config.position == "rope", config.block_size // 2

    pace = _Pace(chunk, watched)

    def chunks() -> Iterator[_Chunk]:
        logits_BxV, caches = _read(params, config, prompts, num_samples, max_new_tokens)
        state, n_new = first_state(logits_BxV, seen_BxV, drawing)._replace(caches=caches), 1
        del caches  # donated to the loop
        new = _Chunk(state.last_B[:, None], state.log_prob_B[:, None], 1)
        recent = [new]  # the last block_size tokens or more, for `_again`
        yield new
        begins_B = np.zeros_like(lengths_B)  # where the text in the cache begins
        while n_new < max_new_tokens:
            n = min(pace.tokens(), max_new_tokens - n_new)
            if not slides:
                # The newest token is not in the cache yet: its position is the length of the text - 1.
                free_B = config.block_size - (lengths_B + n_new - 1 - begins_B)
                if (due := np.flatnonzero(free_B == 0)).size:
                    tail_BxM = np.concatenate([each.fetch().tokens for each in recent], axis=1)[:, -config.block_size :]
                    recent = [_Chunk(tail_BxM, tail_BxM, tail_BxM.shape[1])]
                    texts = [np.concatenate([prompts[row // num_samples], tail_BxM[row]]) for row in due]
                    state = _again(params, config, state, due, [text[-n_again - 1 : -1] for text in texts])
                    begins_B[due] = lengths_B[due] + n_new - 1 - n_again
                    continue
                n = min(n, int(free_B.min()))
            before_first_B = lengths_B - 1 - begins_B
            before_first = before_first_B[0] if len(prompts) == 1 else before_first_B
            state, *made = decode(params, config, state, before_first, np.int32(n), chunk, drawing)
            n_new += n
            new = _Chunk(*made, n)
            recent = [] if slides else [*recent, new]
            yield new

    yield from _fetched(chunks(), stop_id)


def _read(params, config: GPTConfig, prompts: list[np.ndarray], num_samples: int, max_new_tokens: int):
    """The logits after the prompts and the caches, piece by piece; see `prefill`."""
    lengths_R = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths_R.max())
    S = cache_length_of(config, len(prompts) * num_samples, longest, max_new_tokens)
    P = piece_length(len(prompts), longest, S)
    n_pieces = -(-longest // P)
    read_length = min(S, power_of_two(n_pieces * P))
    tokens_RxT = np.zeros((len(prompts), n_pieces * P), np.int32)
    for row, prompt in zip(tokens_RxT, prompts, strict=True):
        row[: len(prompt)] = prompt
    result = None
    for i in range(n_pieces):
        first = min(i * P, S - P)  # S may not be a multiple of P: some tokens are then read twice
        tokens_RxP = tokens_RxT[:, first : first + P]
        result = prefill(params, config, tokens_RxP, np.int32(first), lengths_R, result, read_length)
    return result if (num_samples, read_length) == (1, S) else make_room(*result, num_samples, S)


def _again(params, config, state: State, rows: np.ndarray, texts: list[np.ndarray]) -> State:
    """The state after the samples `rows` have read `texts` instead of what they have in the cache."""
    if not len(texts[0]):  # block_size 1: there is no half of it
        return state
    B = len(state.last_B)
    places = np.resize(np.arange(len(rows)), min(B, 1 << (len(rows) - 1).bit_length()))  # few sizes, few programs
    tokens_RxH = np.stack(texts)[places]
    return state._replace(caches=read_again(params, config, state.caches, tokens_RxH, rows[places]))


class _Pace:
    """How many tokens a piece has: `most`, or if `watched` as many as take `_SECONDS` at the speed of the last one."""

    def __init__(self, most: int, watched: bool):
        self._most, self._n, self._began = most, min(most, _FIRST) if watched else most, None
        self._adapts = watched and jax.process_count() == 1  # the clocks of processes differ, their pieces must not

    def tokens(self) -> int:
        """Called before each piece is dispatched, and so after the one before it is fetched, or the one before that."""
        now = time.monotonic()
        if self._adapts and self._began is not None:
            fit = int(_SECONDS * self._n / max(now - self._began, 1e-6))
            self._n = min(max(fit, self._n // 2, 1), 2 * self._n, self._most)
        self._began = now
        return self._n


class _Chunk(NamedTuple):
    """New tokens on the device, the first `n` columns of [B, chunk]."""

    tokens_BxN: jax.Array
    log_probs_BxN: jax.Array
    n: int

    def fetch(self) -> Piece:
        return Piece(np.asarray(self.tokens_BxN)[:, : self.n], np.asarray(self.log_probs_BxN)[:, : self.n])


def _fetched(chunks: Iterator[_Chunk], stop_id: int | None) -> Iterator[Piece]:
    """The tokens of `chunks` on the host, until every sample has ended.

    A chunk is fetched after the next one is dispatched, so that the device does not wait for the host. On CPU, where a
    dispatch returns when the chunk is complete, it is fetched at once.
    """
    ahead = int(accelerators.dispatches_ahead(jax.devices()[0].platform))
    waiting, done_B = collections.deque(), False
    for chunk in itertools.chain(chunks, [None] * ahead):
        waiting.append(chunk)
        if len(waiting) > ahead:
            piece = waiting.popleft().fetch()
            yield piece
            done_B = done_B | (piece.tokens == (-1 if stop_id is None else stop_id)).any(axis=1)
            if done_B.all():
                return


def check(max_new_tokens: int, num_samples: int, sampling: Sampling) -> None:
    """Raises UserError for a number out of range."""
    sampling.validate()
    for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        if value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")


def _check_prompt(prompt: np.ndarray, config: GPTConfig) -> None:
    if len(prompt) == 0:
        raise UserError("the prompt is empty; give at least one token")
    if len(prompt) > config.block_size:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, more than model.block_size={config.block_size}; shorten it"
        )
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        wrong = prompt[(prompt < 0) | (prompt >= config.vocab_size)][0]
        raise UserError(f"the prompt has id {wrong}, but the model has ids 0 ... {config.vocab_size - 1}")
