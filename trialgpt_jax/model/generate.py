"""Generation: continues prompts with the programs of `decode.py`, a chunk of tokens at a time.

Up to `block_size` tokens the cache grows. Beyond it the window slides by one token at a time, as in nanoGPT: every
position changes, so each new token takes a forward pass over the whole window.

Shapes: B samples, P prompt length, S cache length, T window length, V vocab_size.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.decode import (
    CHUNK,
    cache_length_of,
    decode_cached,
    decode_window,
    first_state,
    make_drawing,
    power_of_two,
    prefill,
)
from trialgpt_jax.model.sampling import DEFAULT_SAMPLING, Sampling
from trialgpt_jax.parallel import accelerators


def generate(
    params,
    config: GPTConfig,
    prompt: np.ndarray,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    sampling: Sampling = DEFAULT_SAMPLING,
    seed: int = 0,
    stop_id: int | None = None,
    chunk: int = CHUNK,
) -> Iterator[np.ndarray]:
    """Continues a prompt.

    Sample i of a seed does not depend on num_samples: its random numbers follow from (seed, i, position) alone.

    Args:
      params: from `split_layers`.
      config: the model.
      prompt: ids [P], at least one and at most block_size.
      max_new_tokens: tokens to generate, at least 1.
      num_samples: B, continuations of the prompt.
      sampling: how tokens are drawn.
      seed: of the random numbers.
      stop_id: ends a sample; the rest of its row repeats `stop_id`.
      chunk: tokens between yields.

    Yields:
      int32 [B, n] new ids, n at most `chunk`, until max_new_tokens or until every sample has ended.

    Raises:
      UserError: an empty or over-long prompt, ids beyond the vocabulary, numbers out of range.
    """
    prompt = np.asarray(prompt, np.int32)
    _check(prompt, config, max_new_tokens, num_samples, sampling)
    drawing = make_drawing(sampling, num_samples, seed, stop_id)
    cache_length = cache_length_of(config, len(prompt), max_new_tokens)
    padded = np.zeros((1, min(cache_length, power_of_two(len(prompt)))), np.int32)
    padded[0, : len(prompt)] = prompt

    def chunks() -> Iterator[_Chunk]:
        first_BxV, memory = prefill(params, config, padded, len(prompt), num_samples, cache_length)
        state = first_state(first_BxV, memory, drawing)
        made, n_new = [_Chunk(state.last_B[:, None], 1)], 1
        yield made[0]
        while n_new < max_new_tokens:
            n = min(chunk, max_new_tokens - n_new)
            # The newest token is not in the cache yet: its slot is the length of the text - 1.
            free_slots = config.block_size - (len(prompt) + n_new - 1)
            if free_slots > 0:
                n, before_first = min(n, free_slots), jnp.int32(len(prompt) - 1)
                state, tokens_BxN = decode_cached(params, config, state, before_first, jnp.int32(n), chunk, drawing)
            else:
                if isinstance(state.memory, tuple):  # from here on the window's tokens take the place of the cache
                    text_BxT = np.concatenate([np.tile(prompt, (num_samples, 1)), *(each.fetch() for each in made)], 1)
                    state = state._replace(memory=jnp.asarray(text_BxT[:, -config.block_size :]))
                state, tokens_BxN = decode_window(params, config, state, jnp.int32(n), chunk, drawing)
                made.clear()
            made.append(_Chunk(tokens_BxN, n))
            n_new += n
            yield made[-1]

    yield from _fetched(chunks(), stop_id)


def generate_batch(
    params,
    config: GPTConfig,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sample_numbers: Sequence[int] | None = None,
    prompt_length: int = 0,
    cache_length: int = 0,
    sampling: Sampling = DEFAULT_SAMPLING,
    seed: int = 0,
    stop_id: int | None = None,
    chunk: int = CHUNK,
) -> Iterator[np.ndarray]:
    """Continues B prompts of any lengths, one sample each. Prompt and new tokens together fit into block_size.

    Args:
      params, config, max_new_tokens, sampling, seed, stop_id, chunk: as in `generate`.
      prompts: ids [P], P at least 1.
      sample_numbers: of each prompt: its random numbers follow from (seed, this number, position); default: 0 ... B-1.
      prompt_length, cache_length: at least the longest P and the longest P + max_new_tokens; calls with equal ones, and
        equally many prompts, share their compiled programs. 0 = what the prompts need.

    Yields:
      int32 [B, n] as `generate` does.

    Raises:
      UserError: as `generate` does, or a prompt that leaves no room for max_new_tokens.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    for prompt in prompts:
        _check(prompt, config, max_new_tokens, len(prompts), sampling)
    if (longest := int(lengths_B.max())) + max_new_tokens > config.block_size:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are more than "
            f"model.block_size={config.block_size}"
        )
    tokens_BxP = np.zeros((len(prompts), prompt_length or longest), np.int32)
    for row, prompt in zip(tokens_BxP, prompts, strict=True):
        row[: len(prompt)] = prompt
    S = max(cache_length or cache_length_of(config, longest, max_new_tokens), tokens_BxP.shape[1])
    numbers = len(prompts) if sample_numbers is None else np.asarray(sample_numbers)
    drawing, before_first_B = make_drawing(sampling, numbers, seed, stop_id), jnp.asarray(lengths_B - 1)

    def chunks() -> Iterator[_Chunk]:
        first_BxV, memory = prefill(params, config, tokens_BxP, lengths_B, len(prompts), S)
        state, n_new = first_state(first_BxV, memory, drawing), 1
        yield _Chunk(state.last_B[:, None], 1)
        while n_new < max_new_tokens:
            n = min(chunk, max_new_tokens - n_new)
            state, tokens_BxN = decode_cached(params, config, state, before_first_B, jnp.int32(n), chunk, drawing)
            n_new += n
            yield _Chunk(tokens_BxN, n)

    yield from _fetched(chunks(), stop_id)


class _Chunk(NamedTuple):
    """New tokens on the device, the first `n` columns of [B, chunk]."""

    tokens_BxN: jax.Array
    n: int

    def fetch(self) -> np.ndarray:
        return np.asarray(self.tokens_BxN)[:, : self.n]


def _fetched(chunks: Iterator[_Chunk], stop_id: int | None) -> Iterator[np.ndarray]:
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
            done_B = done_B | (piece == (-1 if stop_id is None else stop_id)).any(axis=1)
            if done_B.all():
                return


def _check(prompt: np.ndarray, config: GPTConfig, max_new_tokens: int, num_samples: int, sampling: Sampling) -> None:
    sampling.validate()
    if len(prompt) == 0:
        raise UserError("the prompt is empty; give at least one token")
    if len(prompt) > config.block_size:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, more than model.block_size={config.block_size}; shorten it"
        )
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        wrong = prompt[(prompt < 0) | (prompt >= config.vocab_size)][0]
        raise UserError(f"the prompt has id {wrong}, but the model has ids 0 ... {config.vocab_size - 1}")
    for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        if value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")
