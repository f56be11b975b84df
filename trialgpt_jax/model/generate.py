"""Generation: a prefill, then a jitted loop over a key/value cache, with greedy, top-k and top-p sampling.

Up to `block_size` the cache grows. Beyond it the window slides by one token for each new one, as in nanoGPT: every position
in it changes, so it is run again as a whole; exact, and as slow as that sounds.

Shapes: B samples, P prompt length, S cache length, T window length, V vocab_size.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from trialgpt_jax import UserError
from trialgpt_jax.model.gpt import GPT, Block, Dense, GPTConfig, cast_matrices, logits
from trialgpt_jax.parallel.sharding import replicated


class Sampling(NamedTuple):
    """How the next token is drawn: temperature first, then top-k, then top-p, as in Hugging Face's `generate`.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only the k likeliest; 0 = all.
      top_p: only the fewest likeliest whose probabilities reach p; 1 = all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def validate(self) -> None:
        """Raises UserError for a value out of range (NaN is in no range)."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}, but must be at least 0 (0 = greedy) and finite")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, but must be at least 1, or 0 for no limit")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, outside (0, 1]")


DEFAULT_SAMPLING = Sampling()
CHUNK = 16  # tokens that one dispatch decodes


class _State(NamedTuple):
    """What the decode loops carry."""

    last_B: jax.Array  # newest token of each sample
    n_new: jax.Array  # tokens generated so far, by every sample
    done_B: jax.Array  # samples that have produced the stop id
    memory: tuple  # per layer the cached keys and values [K * B, S, D]; or the window's tokens [B, T]


def split_layers(params, config: GPTConfig):
    """Parameters for decoding: matrices cast to `config.dtype`, each layer's arrays of their own under `blocks`, kernels [out, in].

    A slice of a stacked array would be copied at every token. As for the kernels, XLA on CPU multiplies a few rows by a
    matrix twice as fast when the matrix is the left operand and its rows are what is summed over: it is then read once,
    as it lies, and not rearranged first (measured at 8 rows: 21-28 against 15 GB/s; at one row 32 against 26).
    """
    return _split(params, config)


@functools.partial(jax.jit, static_argnums=1)
def _split(params, config: GPTConfig):
    params = cast_matrices(params, config.dtype)

    def layer(i):
        return jax.tree_util.tree_map_with_path(
            lambda path, p: p[i].T if path[-1].key == "kernel" else p[i], params["blocks"]
        )

    return {**params, "blocks": tuple(layer(i) for i in range(config.n_layer))}


def _dense_of_rows(call, args, kwargs, context):
    """Takes the place of `Dense.__call__`, for kernels [out, in]."""
    if not isinstance(context.module, Dense) or context.method_name != "__call__":
        return call(*args, **kwargs)
    weights = context.module.variables["params"]
    rows_Nx1xI = args[0].reshape(-1, 1, args[0].shape[-1])  # of two axes, XLA would turn the operands around again
    out = jnp.einsum("oi,nti->ont", weights["kernel"], rows_Nx1xI).transpose(1, 2, 0).reshape(*args[0].shape[:-1], -1)
    return out + weights["bias"].astype(out.dtype) if "bias" in weights else out


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

    Sample i of a seed is the same whatever num_samples is: its random numbers follow from (seed, i, position) alone.

    Args:
      params: from `split_layers`.
      config: the model.
      prompt: ids [P], at least one and at most block_size.
      max_new_tokens: tokens to generate, at least 1.
      num_samples: B, continuations of the prompt.
      sampling: how tokens are drawn.
      seed: of the random numbers.
      stop_id: ends a sample; what follows in its row is `stop_id` again.
      chunk: tokens between yields.

    Yields:
      int32 [B, n] new ids, n at most `chunk`, until max_new_tokens or until every sample has ended.

    Raises:
      UserError: an empty or over-long prompt, ids beyond the vocabulary, numbers out of range.
    """
    prompt = np.asarray(prompt, np.int32)
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

    draw = _draw(sampling, num_samples, seed, stop_id)
    cache_length = _cache_length(config, len(prompt), max_new_tokens)
    padded = np.zeros((1, min(cache_length, _power_of_two(len(prompt)))), np.int32)
    padded[0, : len(prompt)] = prompt
    first_BxV, memory = _prefill(params, config, padded, len(prompt), num_samples, cache_length)
    zeros_B = jnp.zeros(num_samples, jnp.int32)
    state = _next(_State(zeros_B, jnp.int32(0), zeros_B > 0, memory), first_BxV, draw)
    history = np.concatenate([np.tile(prompt, (num_samples, 1)), np.asarray(state.last_B)[:, None]], axis=1)
    yield history[:, -1:]
    n_new, sliding = 1, False
    while n_new < max_new_tokens and not np.asarray(state.done_B).all():
        # The newest token is not in the cache yet: it goes to slot len(history) - 1.
        room = config.block_size - (history.shape[1] - 1)
        if room > 0:
            n = min(chunk, max_new_tokens - n_new, room)
            state, tokens_BxN = _decode(params, config, state, jnp.int32(len(prompt) - 1), jnp.int32(n), chunk, draw)
        else:
            if not sliding:
                sliding, window = True, jnp.asarray(history[:, -config.block_size :])
                state = state._replace(memory=window)
            n = min(chunk, max_new_tokens - n_new)
            state, tokens_BxN = _slide(params, config, state, jnp.int32(n), chunk, draw)
        new = np.asarray(tokens_BxN)[:, :n]
        history = np.concatenate([history, new], axis=1)
        n_new += n
        yield new


class _Draw(NamedTuple):
    """Sampling as arrays, so that every setting runs the same compiled loop."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    keys_B: jax.Array
    stop_id: jax.Array


def _draw(sampling: Sampling, num_samples: int, seed: int, stop_id: int | None) -> _Draw:
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(num_samples))
    stop_id = jnp.int32(-1 if stop_id is None else stop_id)
    return _Draw(
        jnp.float32(sampling.temperature), jnp.int32(sampling.top_k), jnp.float32(sampling.top_p), keys_B, stop_id
    )


def compile_decode(
    config: GPTConfig, mesh: Mesh, params_layout, *, num_samples: int, prompt_length: int, max_new_tokens: int
) -> jax.stages.Compiled:
    """Compiles what `generate` runs token after token for `mesh`, whose devices may be of a chip that is not attached.

    The loop's body, one token of every sample, stands once in the program: its bytes are those of one token.

    Args:
      config: the model, for the mesh's platform.
      mesh: from `make_mesh`.
      params_layout: ShapeDtypeStructs of the parameters on it, from `train_step.params_layout`.
      num_samples: B.
      prompt_length: P.
      max_new_tokens: with P, gives the length of the cache, as in `generate`.

    Returns:
      (params, state, slot before the first, n, draw) -> (state, tokens [B, chunk]); the state is donated.
    """
    S = _cache_length(config, prompt_length, max_new_tokens)

    def array(shape, dtype, sharding=None):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or replicated(mesh))

    def like(tree, shardings):
        return jax.tree.map(lambda leaf, sharding: array(leaf.shape, leaf.dtype, sharding), tree, shardings)

    with jax.set_mesh(mesh):
        # where the compiler lays the split parameters and the cache is where the decode step finds them
        split = _split.lower(params_layout, config).compile()
        params = like(jax.eval_shape(_split, params_layout, config), split.output_shardings)
        prefill_args = (params, config, array((1, min(S, _power_of_two(prompt_length))), jnp.int32),
                        array((), jnp.int32), num_samples, S)  # fmt: skip
        prefill = _prefill.lower(*prefill_args).compile()
        _, memory = like(jax.eval_shape(_prefill, *prefill_args), prefill.output_shardings)
        draw = jax.eval_shape(lambda: _draw(DEFAULT_SAMPLING, num_samples, 0, None))
        draw = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), draw)
        state = _State(array((num_samples,), jnp.int32), array((), jnp.int32), array((num_samples,), bool), memory)
        integer = array((), jnp.int32)
        return _decode.lower(params, config, state, integer, integer, CHUNK, draw).compile()


def _cache_length(config: GPTConfig, prompt_length: int, max_new_tokens: int) -> int:
    """S, rounded up to a power of two, so that few programs are compiled."""
    return min(config.block_size, _power_of_two(prompt_length + max_new_tokens))


def _power_of_two(n: int) -> int:
    return 1 << max(4, (n - 1).bit_length())


def _blocks(params, config: GPTConfig, x_BxTxC, positions_T, caches=None):
    """Every layer in turn; the caches, where given, come back with the new keys and values."""
    new = []
    with nn.intercept_methods(_dense_of_rows):
        for i, layer in enumerate(params["blocks"]):
            x_BxTxC, cache = Block(config).apply({"params": layer}, x_BxTxC, positions_T, True, caches and caches[i])
            new.append(cache)
    return x_BxTxC, tuple(new)


def _apply(params, config: GPTConfig, tokens_BxT, positions_T, caches=None):
    """Hidden states after the final norm, and the caches."""
    outer = {"params": {name: value for name, value in params.items() if name != "blocks"}}
    model = GPT(config)
    x = model.apply(outer, tokens_BxT, positions_T, method=GPT.embed)
    x, caches = _blocks(params, config, x, positions_T, caches)
    return model.apply(outer, x, method=GPT.final_norm), caches


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def _prefill(params, config, tokens_1xP, length, num_samples, cache_length):
    """Runs the prompt once; returns the logits [B, V] after its `length` tokens and the caches, for B equal samples.

    Slots from `length` on hold what the padding left; each is overwritten before a query can see it.
    """
    empty = jnp.zeros((config.n_kv_head, cache_length, config.head_dim), config.dtype)
    caches = ((empty, empty),) * config.n_layer
    hidden, caches = _apply(params, config, tokens_1xP, jnp.arange(tokens_1xP.shape[1]), caches)
    last = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1)
    return jax.tree.map(
        lambda x: jnp.repeat(x, num_samples, axis=0), (logits(params, config, last)[:, 0], caches)
    )  # fmt: skip


@jax.jit
def _next(state: _State, logits_BxV, draw: _Draw) -> _State:
    """The state after drawing one more token from `logits_BxV`."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(draw.keys_B, state.n_new)
    drawn_B = jnp.where(state.done_B, draw.stop_id, _sample(logits_BxV, draw, keys_B))
    return state._replace(last_B=drawn_B, n_new=state.n_new + 1, done_B=state.done_B | (drawn_B == draw.stop_id))


def _sample(logits_BxV, draw: _Draw, keys_B):
    def greedy():
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)

    def sampled():
        scaled_BxV = logits_BxV / draw.temperature
        limited = (draw.top_k > 0) | (draw.top_p < 1)
        # the sort costs more than the head's matmul, so it is run only when it is asked for
        kept_BxV = jax.lax.cond(limited, lambda: _limit(scaled_BxV, draw.top_k, draw.top_p), lambda: scaled_BxV)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BxV).astype(jnp.int32)

    return jax.lax.cond(draw.temperature == 0, greedy, sampled)


def _limit(logits_BxV, top_k, top_p):
    """-inf for what top-k and then top-p leave out; ties with the last one kept are kept."""
    V = logits_BxV.shape[-1]
    sorted_BxV = -jnp.sort(-logits_BxV, axis=-1)
    sorted_BxV = jnp.where(jnp.arange(V) < jnp.where(top_k > 0, top_k, V), sorted_BxV, -jnp.inf)
    probabilities = jax.nn.softmax(sorted_BxV, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # the rounded sum reaches 1 before the last of the unlikely ones, which p = 1 must not leave out
    keep = ((before < top_p) | (top_p >= 1)) & (sorted_BxV > -jnp.inf)
    threshold_Bx1 = jnp.min(jnp.where(keep, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BxV < threshold_Bx1, -jnp.inf, logits_BxV)


def _loop(step, state: _State, n, chunk: int):
    """Runs `step` n <= chunk times, or until every sample is done; returns the state and the tokens [B, chunk]."""
    B = state.last_B.shape[0]

    def body(carry):
        i, state, tokens_BxN = carry
        state = step(state)
        return i + 1, state, jax.lax.dynamic_update_slice(tokens_BxN, state.last_B[:, None], (0, i))

    def going(carry):
        i, state, _ = carry
        return (i < n) & ~jnp.all(state.done_B)

    # columns that an early end leaves unwritten belong to samples that are all done, and repeat their stop id
    tokens_BxN = jnp.broadcast_to(state.last_B[:, None], (B, chunk))
    i, state, tokens_BxN = jax.lax.while_loop(going, body, (jnp.int32(0), state, tokens_BxN))
    return state, jnp.where(jnp.arange(chunk) < i, tokens_BxN, state.last_B[:, None])


@functools.partial(jax.jit, static_argnums=(1, 5), donate_argnums=2)
def _decode(params, config, state, before_first, n, chunk, draw):
    """n more tokens by the cache. The newest token's slot is `before_first` + the number of tokens generated."""

    def step(state):
        positions_T = (before_first + state.n_new)[None]
        hidden, caches = _apply(params, config, state.last_B[:, None], positions_T, state.memory)
        return _next(state._replace(memory=caches), logits(params, config, hidden)[:, 0], draw)

    return _loop(step, state, n, chunk)


@functools.partial(jax.jit, static_argnums=(1, 4), donate_argnums=2)
def _slide(params, config, state, n, chunk, draw):
    """n more tokens, each from a whole forward over the last block_size tokens."""
    config = dataclasses.replace(config, remat="none")

    def step(state):
        window_BxT = state.memory
        hidden, _ = _apply(params, config, window_BxT, jnp.arange(window_BxT.shape[1]))
        state = _next(state, logits(params, config, hidden[:, -1:])[:, 0], draw)
        return state._replace(memory=jnp.concatenate([window_BxT[:, 1:], state.last_B[:, None]], axis=1))

    return _loop(step, state, n, chunk)
