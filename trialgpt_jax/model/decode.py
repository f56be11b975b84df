"""The compiled programs of generation: prompts a piece at a time, then loops over a key/value cache.

Shapes: R prompts, B samples (B = R * samples of each), P prompt length, S cache length, H length read again, V
vocab_size, K key/value heads, D head width.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.gpt import GPT, logits
from trialgpt_jax.model.sampling import DEFAULT_SAMPLING, Draw, Sampling, penalise, sample
from trialgpt_jax.model.weights import stored
from trialgpt_jax.parallel.sharding import replicated

CHUNK = 128  # the most tokens of a dispatch: a program for all lengths of pieces
_MANY_ROWS = 8  # whose cache of 512 tokens is more than half as large as the weights of GPT-2 124M


class State(NamedTuple):
    """The carry of the decode loop."""

    last_B: jax.Array  # newest token of each sample
    log_prob_B: jax.Array  # float32, its log-probability by the model, nats; 0 if `Drawing.log_probs` is off
    n_new: jax.Array  # tokens generated so far, by every sample
    done_B: jax.Array  # samples that have produced the stop id
    seen_BxV: jax.Array  # bool, the ids of each text, for the repetition penalty; [B, 0] without one
    caches: tuple  # per layer the keys and values [K * B, S, D]


class Drawing(NamedTuple):
    """What decides the next token besides its logits."""

    draw: Draw
    keys_B: jax.Array  # PRNG key of each sample
    stop_id: jax.Array
    log_probs: jax.Array  # bool, whether log-probabilities are wanted


def keep_ids(params: dict, config: GPTConfig, n_ids: int) -> tuple[dict, GPTConfig]:
    """The model with its first `n_ids` ids: those beyond its tokenizer's have no text. Before `split_layers`."""
    if n_ids >= config.vocab_size:
        return params, config
    config = dataclasses.replace(config, vocab_size=n_ids)
    for name in {"wte", "lm_head"} & params.keys():
        params = params | {name: {"embedding": params[name]["embedding"][: config.padded_vocab_size]}}
    return params, config


def split_layers(params, config: GPTConfig, weights: str = "auto"):
    """Parameters in the layout of `config.decode`: matrices as `weights.stored`, layers apart, kernels [out, in].

    A slice of a stacked array would be copied at every token; for the kernels see docs/performance.md#decode-layout.
    """
    return _split(params, config, weights)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _split(params, config: GPTConfig, weights: str):
    params = stored(params, weights, config.dtype)

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
      num_samples: B, of one prompt.
      prompt_length: P.
      max_new_tokens: with P, gives the length of the cache, as in `generate`.

    Returns:
      `decode` without its static arguments.
    """
    S = cache_length_of(config, num_samples, prompt_length, max_new_tokens)

    def array(shape, dtype, sharding=None):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or replicated(mesh))

    def like(tree, shardings):
        return jax.tree.map(lambda leaf, sharding: array(leaf.shape, leaf.dtype, sharding), tree, shardings)

    def everywhere(made):
        return jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), made)

    with jax.set_mesh(mesh):
        # The decode step reads parameters and cache in the layouts that the programs before it give them.
        split = _split.lower(params_layout, config, "auto").compile()
        params = like(jax.eval_shape(lambda p: _split(p, config, "auto"), params_layout), split.output_shardings)
        P = piece_length(1, prompt_length, S)
        prompt, scalar, lengths = (array(shape, jnp.int32) for shape in ((1, P), (), (1,)))
        arguments = (params, config, prompt, scalar, lengths, None, min(S, power_of_two(prompt_length)))
        read = prefill.lower(*arguments).compile()
        arguments = (*like(jax.eval_shape(prefill, *arguments), read.output_shardings), num_samples, S)
        compiled = make_room.lower(*arguments).compile()
        first_BxV, caches = jax.eval_shape(make_room, *arguments)
        caches = like(caches, compiled.output_shardings[1])
        keys_B = jax.eval_shape(lambda: sample_keys(0, [0], num_samples))
        drawing = everywhere(jax.eval_shape(lambda keys: make_drawing(DEFAULT_SAMPLING, keys, None, False), keys_B))
        seen = array((num_samples, 0), bool)
        state = everywhere(jax.eval_shape(first_state, first_BxV, seen, drawing))._replace(caches=caches)
        return decode.lower(params, config, state, scalar, scalar, CHUNK, drawing).compile()


def sample_keys(seed: int, numbers: Sequence[int], samples: int) -> jax.Array:
    """PRNG keys [R * samples], which follow from the seed, the number of the sample and that of its prompt.

    A draw folds in a position, which is below 2**31; the number n of a prompt is folded in as 2**32 - n.
    """
    numbers_B = np.repeat(np.asarray(numbers, np.int32), samples)
    return _keys(jax.random.key(seed), numbers_B, np.tile(np.arange(samples, dtype=np.int32), len(numbers)))


@jax.jit  # one program: without it, ten small ones
def _keys(key: jax.Array, numbers_B, samples_B) -> jax.Array:
    def of(number, sample):
        alone = jax.random.fold_in(key, sample)
        return jnp.where(number == 0, alone, jax.random.fold_in(alone, -number))

    return jax.vmap(of)(numbers_B, samples_B)


def make_drawing(sampling: Sampling, keys_B: jax.Array, stop_id: int | None, log_probs: bool) -> Drawing:
    """`keys_B`: from `sample_keys`."""
    scalars = Draw.of(sampling), np.int32(-1 if stop_id is None else stop_id), np.bool_(log_probs)
    draw, stop_id, log_probs = jax.device_put(scalars)
    return Drawing(draw, keys_B, stop_id, log_probs)


def cache_length_of(config: GPTConfig, rows: int, prompt_length: int, max_new_tokens: int) -> int:
    """S, rounded up to a power of two and at least 64, so that few programs are compiled.

    For many rows, whose cache takes longer to read than the weights, to a multiple of 64.
    """
    length = prompt_length + max_new_tokens
    rounded = -(-length // 64) * 64 if rows >= _MANY_ROWS else max(64, power_of_two(length))
    return min(config.block_size, rounded)


def piece_length(n_prompts: int, longest: int, cache_length: int) -> int:
    """The tokens of each prompt in one call of `prefill`: a power of two, together about 512 for several prompts.

    As many as keep a matmul busy: longer pieces would take memory for [pieces, S] attention weights, and compute more
    padding of prompts that differ in length.
    """
    return min(cache_length, power_of_two(longest), power_of_two((1024 if n_prompts == 1 else 512) // n_prompts))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and 16."""
    return 1 << max(4, (n - 1).bit_length())


def _forward(params, config: GPTConfig, tokens_BxT, positions=None, caches=None):
    """The GPT on parameters from `split_layers`."""
    config = dataclasses.replace(config, decode=True)
    return GPT(config).apply({"params": params}, tokens_BxT, positions=positions, caches=caches)


def _empty_caches(config: GPTConfig, rows: int, length: int) -> tuple:
    empty = jnp.zeros((config.n_kv_head * rows, length, config.head_dim), config.dtype)
    return ((empty, empty),) * config.n_layer


@functools.partial(jax.jit, static_argnums=(1, 6), donate_argnums=5)
def prefill(params, config, tokens_RxP, first, lengths_R, before, read_length):
    """Reads P tokens of each prompt.

    Args:
      tokens_RxP: the tokens at positions `first` ... first + P - 1; first + P is at most `read_length`.
      lengths_R: lengths of the whole prompts. Slots from there on hold keys of the padding; each is overwritten before
        a query can see it.
      before: of the call with the positions before; None for the first one.
      read_length: of the caches: that of the prompts. Attention over the room for new tokens would be wasted work.

    Returns:
      logits [R, V] after each prompt, if a call has come to its end; the caches.
    """
    R, P = tokens_RxP.shape
    logits_RxV, caches = before or (None, _empty_caches(config, R, read_length))
    hidden, caches = _forward(params, config, tokens_RxP, first + jnp.arange(P), caches)
    last_R = lengths_R - 1 - first
    here_R = (last_R >= 0) & (last_R < P)
    ends = jnp.take_along_axis(hidden, jnp.clip(last_R, 0, P - 1)[:, None, None], axis=1)
    ends_RxV = logits(params, config, ends)[:, 0]
    return ends_RxV if before is None else jnp.where(here_R[:, None], ends_RxV, logits_RxV), caches


@functools.partial(jax.jit, static_argnums=(2, 3))
def make_room(logits_RxV, caches, samples, cache_length):
    """The logits [B, V] and caches [K * B, S, D] of `samples` of each prompt, with room for new tokens."""

    def longer(x):
        return jnp.pad(x, ((0, 0), (0, cache_length - x.shape[1]), (0, 0)))

    return jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), (logits_RxV, jax.tree.map(longer, caches)))


@functools.partial(jax.jit, static_argnums=1, donate_argnums=2)
def read_again(params, config, caches, tokens_RxH, rows_R):
    """The caches after the rows `rows_R` have read other tokens, from position 0 on; a row may occur more than once."""
    R, H = tokens_RxH.shape
    _, new = _forward(params, config, tokens_RxH, jnp.arange(H), _empty_caches(config, R, H))
    K = config.n_kv_head

    def put(old_NxSxD, new_NxHxD):
        by_head = old_NxSxD.reshape(K, -1, *old_NxSxD.shape[1:])
        return by_head.at[:, rows_R, :H].set(new_NxHxD.reshape(K, R, H, -1)).reshape(old_NxSxD.shape)

    return jax.tree.map(put, caches, new)


@jax.jit
def first_state(logits_BxV: jax.Array, seen_BxV: jax.Array, drawing: Drawing) -> State:
    """The state after drawing the first token, without the caches, which XLA would copy."""
    zeros_B = jnp.zeros(logits_BxV.shape[0], jnp.int32)
    return _next(State(zeros_B, zeros_B * 0.0, jnp.int32(0), zeros_B > 0, seen_BxV, ()), logits_BxV, drawing)


def _next(state: State, logits_BxV, drawing: Drawing) -> State:
    """The state after drawing one more token from `logits_BxV`."""
    keys_B, seen_BxV = jax.vmap(jax.random.fold_in, (0, None))(drawing.keys_B, state.n_new), state.seen_BxV
    penalty = drawing.draw.repetition_penalty
    changed_BxV = penalise(logits_BxV, seen_BxV, penalty) if seen_BxV.size else logits_BxV
    drawn_B = jnp.where(state.done_B, drawing.stop_id, sample(changed_BxV, drawing.draw, keys_B))

    def log_probs():
        drawn = jnp.take_along_axis(logits_BxV, jnp.maximum(drawn_B, 0)[:, None], axis=1)[:, 0]
        return (drawn - jax.nn.logsumexp(logits_BxV, axis=-1)).astype(jnp.float32)

    return state._replace(
        last_B=drawn_B,
        log_prob_B=jax.lax.cond(drawing.log_probs, log_probs, lambda: jnp.zeros(len(drawn_B), jnp.float32)),
        n_new=state.n_new + 1,
        done_B=state.done_B | (drawn_B == drawing.stop_id),
        seen_BxV=seen_BxV.at[jnp.arange(len(drawn_B)), drawn_B].set(True) if seen_BxV.size else seen_BxV,
    )


@functools.partial(jax.jit, static_argnums=(1, 5), donate_argnums=2)
def decode(params, config, state, before_first, n, chunk, drawing):
    """n <= chunk more tokens of each sample, or fewer if all are done.

    Args:
      before_first: the position of the newest token is `before_first` + the number of tokens generated; a scalar, or
        [B] where samples differ.

    Returns:
      The state, the tokens [B, chunk] and their log-probabilities [B, chunk]; the first n columns count.
    """
    B = state.last_B.shape[0]

    def body(carry):
        i, state, tokens_BxN, log_probs_BxN = carry
        positions = (before_first + state.n_new)[..., None]
        hidden, caches = _forward(params, config, state.last_B[:, None], positions, state.caches)
        state = _next(state._replace(caches=caches), logits(params, config, hidden)[:, 0], drawing)
        tokens_BxN = jax.lax.dynamic_update_index_in_dim(tokens_BxN, state.last_B, i, axis=1)
        log_probs_BxN = jax.lax.dynamic_update_index_in_dim(log_probs_BxN, state.log_prob_B, i, axis=1)
        return i + 1, state, tokens_BxN, log_probs_BxN

    def running(carry):
        i, state, *_ = carry
        return (i < n) & ~jnp.all(state.done_B)

    made = jnp.broadcast_to(state.last_B[:, None], (B, chunk)), jnp.zeros((B, chunk), jnp.float32)
    i, state, tokens_BxN, log_probs_BxN = jax.lax.while_loop(running, body, (jnp.int32(0), state, *made))
    # Columns that an early end does not reach repeat the stop id, because all samples are done.
    return state, jnp.where(jnp.arange(chunk) < i, tokens_BxN, state.last_B[:, None]), log_probs_BxN
