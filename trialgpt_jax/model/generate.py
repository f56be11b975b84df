"""Generation: the prompt in one forward pass, then a jitted loop over a key/value cache.

Up to `block_size` tokens the cache grows. Beyond it the window slides by one token at a time, as in nanoGPT: every
position changes, so each new token takes a forward pass over the whole window.

Shapes: B samples, P prompt length, S cache length, T window length, V vocab_size, K key/value heads, D head width.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trialgpt_jax import UserError
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.gpt import GPT, cast_matrices, logits
from trialgpt_jax.model.sampling import DEFAULT_SAMPLING, Draw, Sampling, sample
from trialgpt_jax.parallel.sharding import replicated

CHUNK = 16  # tokens decoded per dispatch


class _State(NamedTuple):
    """The carry of the decode loops."""

    last_B: jax.Array  # newest token of each sample
    n_new: jax.Array  # tokens generated so far, by every sample
    done_B: jax.Array  # samples that have produced the stop id
    memory: tuple  # per layer the cached keys and values [K * B, S, D]; or the window's tokens [B, T]


class _Drawing(NamedTuple):
    """What decides the next token besides its logits."""

    draw: Draw
    keys_B: jax.Array  # PRNG key of each sample
    stop_id: jax.Array


def keep_ids(params: dict, config: GPTConfig, n_ids: int) -> tuple[dict, GPTConfig]:
    """The model with its first `n_ids` ids: those beyond its tokenizer's have no text. Before `split_layers`."""
    if n_ids >= config.vocab_size:
        return params, config
    config = dataclasses.replace(config, vocab_size=n_ids)
    for name in {"wte", "lm_head"} & params.keys():
        params = params | {name: {"embedding": params[name]["embedding"][: config.padded_vocab_size]}}
    return params, config


def split_layers(params, config: GPTConfig):
    """Parameters in the layout of `config.decode`: cast to `config.dtype`, layers apart, kernels [out, in].

    A slice of a stacked array would be copied at every token; for the kernels see docs/performance.md#decode-layout.
    """
    return _split(params, config)


@functools.partial(jax.jit, static_argnums=1)
def _split(params, config: GPTConfig):
    params = cast_matrices(params, config.dtype)

    def layer(i):
        return jax.tree_util.tree_map_with_path(
            lambda path, p: p[i].T if path[-1].key == "kernel" else p[i], params["blocks"]
        )

    outer = {name: value for name, value in params.items() if name != "blocks"}
    return outer | {f"blocks_{i}": layer(i) for i in range(config.n_layer)}


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
    drawing = _drawing(sampling, num_samples, seed, stop_id)
    cache_length = _cache_length(config, len(prompt), max_new_tokens)
    padded = np.zeros((1, min(cache_length, _power_of_two(len(prompt)))), np.int32)
    padded[0, : len(prompt)] = prompt
    first_BxV, memory = _prefill(params, config, padded, len(prompt), num_samples, cache_length)
    zeros_B = jnp.zeros(num_samples, jnp.int32)
    state = _next(_State(zeros_B, jnp.int32(0), zeros_B > 0, memory), first_BxV, drawing)
    history = np.concatenate([np.tile(prompt, (num_samples, 1)), np.asarray(state.last_B)[:, None]], axis=1)
    yield history[:, -1:]
    n_new, sliding = 1, False
    while n_new < max_new_tokens and not np.asarray(state.done_B).all():
        # The newest token is not in the cache yet: its slot is len(history) - 1.
        free_slots = config.block_size - (history.shape[1] - 1)
        if free_slots > 0:
            n = min(chunk, max_new_tokens - n_new, free_slots)
            state, tokens_BxN = _decode(params, config, state, jnp.int32(len(prompt) - 1), jnp.int32(n), chunk, drawing)
        else:
            if not sliding:
                sliding, window = True, jnp.asarray(history[:, -config.block_size :])
                state = state._replace(memory=window)
            n = min(chunk, max_new_tokens - n_new)
            state, tokens_BxN = _slide(params, config, state, jnp.int32(n), chunk, drawing)
        new = np.asarray(tokens_BxN)[:, :n]
        history = np.concatenate([history, new], axis=1)
        n_new += n
        yield new


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
    S = max(cache_length or _cache_length(config, longest, max_new_tokens), tokens_BxP.shape[1])
    drawing = _drawing(sampling, len(prompts) if sample_numbers is None else np.asarray(sample_numbers), seed, stop_id)
    first_BxV, memory = _prefill(params, config, tokens_BxP, lengths_B, len(prompts), S)
    zeros_B = jnp.zeros(len(prompts), jnp.int32)
    state = _next(_State(zeros_B, jnp.int32(0), zeros_B > 0, memory), first_BxV, drawing)
    yield np.asarray(state.last_B)[:, None]
    n_new = 1
    while n_new < max_new_tokens and not np.asarray(state.done_B).all():
        n = min(chunk, max_new_tokens - n_new)
        state, tokens_BxN = _decode(params, config, state, jnp.asarray(lengths_B - 1), jnp.int32(n), chunk, drawing)
        n_new += n
        yield np.asarray(tokens_BxN)[:, :n]


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


def compile_decode(
    config: GPTConfig, mesh: Mesh, params_layout, *, num_samples: int, prompt_length: int, max_new_tokens: int
) -> jax.stages.Compiled:
    """Compiles the decode loop of `generate` for `mesh`, whose devices may belong to a chip that is not attached.

    The loop's body, one token of every sample, occurs once in the program: its bytes are those of one token.

    Args:
      config: the model, for the mesh's platform.
      mesh: from `make_mesh`.
      params_layout: ShapeDtypeStructs of the parameters, from `Program.params_layout`.
      num_samples: B.
      prompt_length: P.
      max_new_tokens: with P, gives the length of the cache, as in `generate`.

    Returns:
      (params, state, slot before the first, n, drawing) -> (state, tokens [B, chunk]); the state is donated.
    """
    S = _cache_length(config, prompt_length, max_new_tokens)

    def array(shape, dtype, sharding=None):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or replicated(mesh))

    def like(tree, shardings):
        return jax.tree.map(lambda leaf, sharding: array(leaf.shape, leaf.dtype, sharding), tree, shardings)

    with jax.set_mesh(mesh):
        # The decode step reads parameters and cache in the layouts that the programs before it give them.
        split = _split.lower(params_layout, config).compile()
        params = like(jax.eval_shape(_split, params_layout, config), split.output_shardings)
        prompt, length = array((1, min(S, _power_of_two(prompt_length))), jnp.int32), array((), jnp.int32)
        prefill_args = (params, config, prompt, length, num_samples, S)
        prefill = _prefill.lower(*prefill_args).compile()
        _, memory = like(jax.eval_shape(_prefill, *prefill_args), prefill.output_shardings)
        drawing = jax.eval_shape(lambda: _drawing(DEFAULT_SAMPLING, num_samples, 0, None))
        drawing = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), drawing)
        state = _State(array((num_samples,), jnp.int32), array((), jnp.int32), array((num_samples,), bool), memory)
        return _decode.lower(params, config, state, length, length, CHUNK, drawing).compile()


def _drawing(sampling: Sampling, samples: int | np.ndarray, seed: int, stop_id: int | None) -> _Drawing:
    """`samples`: the numbers of the samples, or how many there are."""
    numbers_B = np.arange(samples) if isinstance(samples, int) else samples
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(numbers_B))
    return _Drawing(Draw.of(sampling), keys_B, jnp.int32(-1 if stop_id is None else stop_id))


def _cache_length(config: GPTConfig, prompt_length: int, max_new_tokens: int) -> int:
    """S, rounded up to a power of two, so that few programs are compiled."""
    return min(config.block_size, _power_of_two(prompt_length + max_new_tokens))


def _power_of_two(n: int) -> int:
    return 1 << max(4, (n - 1).bit_length())


def _forward(params, config: GPTConfig, tokens_BxT, positions=None, caches=None):
    """The GPT on parameters from `split_layers`."""
    config = dataclasses.replace(config, decode=True)
    return GPT(config).apply({"params": params}, tokens_BxT, positions=positions, caches=caches)


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def _prefill(params, config, tokens_RxP, length, num_samples, cache_length):
    """Logits [B, V] after the `length` tokens of the prompts, and the caches. R is B, or 1 for B equal samples.

    `length` is a scalar or [R]. Slots from `length` on hold keys of the padding; each is overwritten before a query can
    see it.
    """
    R, P = tokens_RxP.shape
    empty = jnp.zeros((config.n_kv_head * R, cache_length, config.head_dim), config.dtype)
    caches = ((empty, empty),) * config.n_layer
    hidden, caches = _forward(params, config, tokens_RxP, jnp.arange(P), caches)
    last = jnp.take_along_axis(hidden, jnp.reshape(length - 1, (-1, 1, 1)), axis=1)
    result = (logits(params, config, last)[:, 0], caches)
    return jax.tree.map(lambda x: jnp.repeat(x, num_samples // R, axis=0), result)


@jax.jit
def _next(state: _State, logits_BxV, drawing: _Drawing) -> _State:
    """The state after drawing one more token from `logits_BxV`."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(drawing.keys_B, state.n_new)
    drawn_B = jnp.where(state.done_B, drawing.stop_id, sample(logits_BxV, drawing.draw, keys_B))
    return state._replace(last_B=drawn_B, n_new=state.n_new + 1, done_B=state.done_B | (drawn_B == drawing.stop_id))


def _loop(step, state: _State, n, chunk: int):
    """Runs `step` n <= chunk times, or until every sample is done; returns the state and the tokens [B, chunk]."""
    B = state.last_B.shape[0]

    def body(carry):
        i, state, tokens_BxN = carry
        state = step(state)
        return i + 1, state, jax.lax.dynamic_update_slice(tokens_BxN, state.last_B[:, None], (0, i))

    def running(carry):
        i, state, _ = carry
        return (i < n) & ~jnp.all(state.done_B)

    # Columns that an early end does not reach repeat the stop id, because all samples are done.
    tokens_BxN = jnp.broadcast_to(state.last_B[:, None], (B, chunk))
    i, state, tokens_BxN = jax.lax.while_loop(running, body, (jnp.int32(0), state, tokens_BxN))
    return state, jnp.where(jnp.arange(chunk) < i, tokens_BxN, state.last_B[:, None])


@functools.partial(jax.jit, static_argnums=(1, 5), donate_argnums=2)
def _decode(params, config, state, before_first, n, chunk, drawing):
    """n more tokens with the cache. The newest token's slot is `before_first` + the number of tokens generated;
    `before_first` is a scalar, or [B] where prompts differ in length."""

    def step(state):
        positions = (before_first + state.n_new)[..., None]
        hidden, caches = _forward(params, config, state.last_B[:, None], positions, state.memory)
        return _next(state._replace(memory=caches), logits(params, config, hidden)[:, 0], drawing)

    return _loop(step, state, n, chunk)


@functools.partial(jax.jit, static_argnums=(1, 4), donate_argnums=2)
def _slide(params, config, state, n, chunk, drawing):
    """n more tokens, each from a forward pass over the last block_size tokens."""

    def step(state):
        window_BxT = state.memory
        hidden = _forward(params, config, window_BxT)
        state = _next(state, logits(params, config, hidden[:, -1:])[:, 0], drawing)
        return state._replace(memory=jnp.concatenate([window_BxT[:, 1:], state.last_B[:, None]], axis=1))

    return _loop(step, state, n, chunk)
