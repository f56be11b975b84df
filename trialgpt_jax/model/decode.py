"""The compiled programs of generation: the prompt in one forward pass, then loops over a key/value cache or a window.

Shapes: R prompts, B samples, P prompt length, S cache length, T window length, V vocab_size, K key/value heads, D head
width.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.gpt import GPT, cast_matrices, logits
from trialgpt_jax.model.sampling import DEFAULT_SAMPLING, Draw, Sampling, sample
from trialgpt_jax.parallel.sharding import replicated

CHUNK = 16  # tokens decoded per dispatch


class State(NamedTuple):
    """The carry of the decode loops."""

    last_B: jax.Array  # newest token of each sample
    n_new: jax.Array  # tokens generated so far, by every sample
    done_B: jax.Array  # samples that have produced the stop id
    memory: tuple  # per layer the cached keys and values [K * B, S, D]; or the window's tokens [B, T]


class Drawing(NamedTuple):
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


def compile_decode(
    config: GPTConfig, mesh: Mesh, params_layout, *, num_samples: int, prompt_length: int, max_new_tokens: int
) -> jax.stages.Compiled:
    """Compiles the decode loop of `generate` for `mesh`, whose devices may belong to a chip that is not attached.

    The loop's body, one token of every sample, occurs once in the program: its bytes are those of one token.

    Args:
      config: the model; its dtype and kernels are those of the mesh's platform.
      mesh: from `make_mesh`.
      params_layout: ShapeDtypeStructs of the parameters, from `Program.params_layout`.
      num_samples: B.
      prompt_length: P.
      max_new_tokens: with P, gives the length of the cache, as in `generate`.

    Returns:
      (params, state, slot before the first, n, drawing) -> (state, tokens [B, chunk]); the state is donated.
    """
    S = cache_length_of(config, prompt_length, max_new_tokens)

    def array(shape, dtype, sharding=None):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or replicated(mesh))

    def like(tree, shardings):
        return jax.tree.map(lambda leaf, sharding: array(leaf.shape, leaf.dtype, sharding), tree, shardings)

    with jax.set_mesh(mesh):
        # The decode step reads parameters and cache in the layouts that the programs before it give them.
        split = _split.lower(params_layout, config).compile()
        params = like(jax.eval_shape(_split, params_layout, config), split.output_shardings)
        prompt, length = array((1, min(S, power_of_two(prompt_length))), jnp.int32), array((), jnp.int32)
        arguments = (params, config, prompt, length, num_samples, S)
        compiled = prefill.lower(*arguments).compile()
        _, memory = like(jax.eval_shape(prefill, *arguments), compiled.output_shardings)
        drawing = jax.eval_shape(lambda: make_drawing(DEFAULT_SAMPLING, num_samples, 0, None))
        drawing = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), drawing)
        state = State(array((num_samples,), jnp.int32), array((), jnp.int32), array((num_samples,), bool), memory)
        return decode_cached.lower(params, config, state, length, length, CHUNK, drawing).compile()


def make_drawing(sampling: Sampling, samples: int | np.ndarray, seed: int, stop_id: int | None) -> Drawing:
    """`samples`: the numbers of the samples, or how many there are."""
    numbers_B = np.arange(samples) if isinstance(samples, int) else samples
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(numbers_B))
    return Drawing(Draw.of(sampling), keys_B, jnp.int32(-1 if stop_id is None else stop_id))


def cache_length_of(config: GPTConfig, prompt_length: int, max_new_tokens: int) -> int:
    """S, rounded up to a power of two, so that few programs are compiled."""
    return min(config.block_size, power_of_two(prompt_length + max_new_tokens))


def power_of_two(n: int) -> int:
    return 1 << max(4, (n - 1).bit_length())


def _forward(params, config: GPTConfig, tokens_BxT, positions=None, caches=None):
    """The GPT on parameters from `split_layers`."""
    config = dataclasses.replace(config, decode=True)
    return GPT(config).apply({"params": params}, tokens_BxT, positions=positions, caches=caches)


def first_state(logits_BxV: jax.Array, memory: tuple, drawing: Drawing) -> State:
    """The state after drawing the first token."""
    zeros_B = jnp.zeros(logits_BxV.shape[0], jnp.int32)
    return _next(State(zeros_B, jnp.int32(0), zeros_B > 0, memory), logits_BxV, drawing)


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def prefill(params, config, tokens_RxP, length, num_samples, cache_length):
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
def _next(state: State, logits_BxV, drawing: Drawing) -> State:
    """The state after drawing one more token from `logits_BxV`."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(drawing.keys_B, state.n_new)
    drawn_B = jnp.where(state.done_B, drawing.stop_id, sample(logits_BxV, drawing.draw, keys_B))
    return state._replace(last_B=drawn_B, n_new=state.n_new + 1, done_B=state.done_B | (drawn_B == drawing.stop_id))


def _loop(step, state: State, n, chunk: int):
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
def decode_cached(params, config, state, before_first, n, chunk, drawing):
    """n more tokens with the cache. The newest token's slot is `before_first` + the number of tokens generated;
    `before_first` is a scalar, or [B] where prompts differ in length."""

    def step(state):
        positions = (before_first + state.n_new)[..., None]
        hidden, caches = _forward(params, config, state.last_B[:, None], positions, state.memory)
        return _next(state._replace(memory=caches), logits(params, config, hidden)[:, 0], drawing)

    return _loop(step, state, n, chunk)


@functools.partial(jax.jit, static_argnums=(1, 4), donate_argnums=2)
def decode_window(params, config, state, n, chunk, drawing):
    """n more tokens, each from a forward pass over the last block_size tokens."""

    def step(state):
        window_BxT = state.memory
        hidden = _forward(params, config, window_BxT)
        state = _next(state, logits(params, config, hidden[:, -1:])[:, 0], drawing)
        return state._replace(memory=jnp.concatenate([window_BxT[:, 1:], state.last_B[:, None]], axis=1))

    return _loop(step, state, n, chunk)
