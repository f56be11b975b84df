"""Log-probabilities of given tokens, with the head applied to the scored positions alone.

Shapes: B rows, T length of a row, N = B * T positions on a device, M positions of a chunk, C n_embd, V rows of the head
on a device.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from trialgpt_jax.model import packing
from trialgpt_jax.model.attention import Packing
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.gpt import GPT, head
from trialgpt_jax.model.packing import Request
from trialgpt_jax.parallel import processes
from trialgpt_jax.parallel.sharding import RULES, batch_sharding, mesh_axis, put, replicated, spec

CHUNK = 256  # M: scored positions whose logits [M, V] are in memory at a time
TOKENS, CPU_TOKENS = 16384, 2048  # of a batch on a device, with padding
MOST_WEIGHTS = 2**28  # elements of the attention weights [B, H, T, T] of a batch on a device, unless one row has more


class Score(NamedTuple):
    """Of a continuation after its context.

    Attributes:
      log_prob: sum of the log-probabilities of its tokens, nats.
      is_greedy: whether every token is the likeliest one in its place.
    """

    log_prob: float
    is_greedy: bool


class TextLoss(NamedTuple):
    """Of texts.

    Attributes:
      loss: nats per token; perplexity is its exponential.
      bits_per_byte: of the texts in UTF-8.
      tokens: of the texts, all of which are predicted.
    """

    loss: float
    bits_per_byte: float
    tokens: int


class Scorer:
    """Scores requests in batches of few shapes, whose programs it keeps.

    Args:
      config: the model.
      mesh: rows are split over data x fsdp, heads and vocabulary over tensor.
    """

    def __init__(self, config: GPTConfig, mesh: Mesh):
        self._config, self._mesh, self._programs = config, mesh, {}
        self._shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def __call__(self, params, requests: Sequence[Request], advance: Callable[[int, int], None]) -> list[Score]:
        """The score of each request.

        Args:
          params: of training (layers stacked), in one layout on the mesh in every call.
          requests: the same in all processes.
          advance: called after each batch with the number of its requests, and of their tokens before packing.
        """
        scores = [Score(0.0, True)] * len(requests)

        def collect(places: list[packing.Place], results: tuple[jax.Array, jax.Array]) -> None:
            log_probs, is_greedy = jax.device_get(results)
            for request, row, start, stop in places:
                total = log_probs[row, start:stop].sum(dtype=np.float64)
                scores[request] = Score(float(total), bool(is_greedy[row, start:stop].all()))
            advance(len(places), sum(len(requests[place.request].ids) - 1 for place in places))

        pending = collections.deque()  # dispatched, not fetched yet: the host fills the next batch meanwhile
        rows = packing.make_rows(requests, packing.row_lengths(self._config.block_size))
        while rows:
            length = rows[0].length
            same = next((i for i, row in enumerate(rows) if row.length != length), len(rows))
            full = self.batch_rows(length)
            n_rows = full if same > full // 2 else self._shards
            batch, places = packing.fill(requests, rows[: min(same, n_rows)], n_rows)
            pending.append((places, self._dispatch(params, batch)))
            rows = rows[min(same, n_rows) :]
            if len(pending) > 1:
                collect(*pending.popleft())
        for each in pending:
            collect(*each)
        return scores

    def batch_rows(self, length: int) -> int:
        """Rows of `length` tokens in a full batch; the rest of the rows goes in batches of one row per device."""
        tokens = CPU_TOKENS if self._mesh.devices.flat[0].platform == "cpu" else TOKENS
        weights = max(1, self._config.n_head // self._mesh.shape["tensor"]) * length**2
        return self._shards * max(1, min(tokens // length, MOST_WEIGHTS // weights))

    def compile(self, params, n_rows: int, length: int) -> jax.stages.Compiled:
        """`score_rows` for batches [n_rows, length]; `params` may be ShapeDtypeStructs with shardings."""
        row = jax.ShapeDtypeStruct((n_rows, length), jnp.int32, sharding=batch_sharding(self._mesh))
        rows = dict.fromkeys(packing.ARRAYS, row)
        n_chunks = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self._mesh))
        with jax.set_mesh(self._mesh):
            return score_rows.lower(params, self._config, self._mesh, rows, n_chunks).compile()

    def _dispatch(self, params, batch: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
        shape, scored = batch["tokens"].shape, batch["targets"] >= 0
        if shape not in self._programs:
            self._programs[shape] = self.compile(params, *shape)
            processes.meet()
        most = int(scored.reshape(self._shards, -1).sum(axis=1).max())  # of any device
        rows = {name: put(array, batch_sharding(self._mesh)) for name, array in batch.items()}
        return self._programs[shape](params, rows, put(np.int32(-(-most // CHUNK)), replicated(self._mesh)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def score_rows(params, config: GPTConfig, mesh: Mesh, rows: dict[str, jax.Array], n_chunks: jax.Array):
    """Log-probability of a target at each scored position, and whether it is the likeliest id.

    Args:
      params: of training (layers stacked), in any layout on `mesh`.
      config: the model.
      mesh: rows are split over data x fsdp, heads and vocabulary over tensor.
      rows: int32 [B, T] each: `tokens`, `positions` below block_size, `tree`, `branch` (see `attention.Packing`), and
        `targets`, the id after each token; -1 = not scored.
      n_chunks: int32; CHUNK * n_chunks is at least the number of scored positions on any device.

    Returns:
      log_probs [B, T] of float32 (float64 for float64), nats, and is_greedy [B, T] of bool, on every device; 0 and
      True where nothing is scored.
    """
    with nn.logical_axis_rules(RULES):
        trees = Packing(rows["tree"], rows["branch"])
        hidden = GPT(config).apply({"params": params}, rows["tokens"], positions=rows["positions"], packing=trees)
        local = functools.partial(_target_scores, config=config)
        batch = spec("batch")
        # check_vma=False: all reductions are explicit
        scores = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(batch, spec("vocab"), batch, spec()),
            out_specs=(batch, batch),
            check_vma=False,
        )(hidden, head(params, config), rows["targets"], n_chunks)
    return jax.lax.with_sharding_constraint(scores, replicated(mesh))


def _target_scores(hidden_BxTxC, head_VxC, targets_BxT, n_chunks, config: GPTConfig):
    """`score_rows` on one device, from the final hidden states."""
    C, V, tensor = hidden_BxTxC.shape[-1], head_VxC.shape[0], mesh_axis("vocab")
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    hidden_NxC, targets_N = hidden_BxTxC.reshape(-1, C), targets_BxT.reshape(-1)
    head_VxC = head_VxC.astype(config.dtype)
    ids_V = jax.lax.axis_index(tensor) * V + jnp.arange(V)
    order_N = jnp.argsort(targets_N < 0)  # stable: scored positions first
    M = min(CHUNK, len(targets_N))

    def chunk(i, scores):
        places_M = jax.lax.dynamic_slice_in_dim(order_N, i * M, M)  # the last one may overlap
        targets_M = targets_N[places_M]
        logits_MxV = jnp.einsum("mc,vc->mv", hidden_NxC[places_M], head_VxC, preferred_element_type=dtype)
        if config.logit_softcap:
            logits_MxV = config.logit_softcap * jnp.tanh(logits_MxV / config.logit_softcap)
        logits_MxV = jnp.where(ids_V < config.vocab_size, logits_MxV, jnp.finfo(dtype).min)
        max_M = jax.lax.pmax(jnp.max(logits_MxV, axis=1), tensor)
        sum_M = jax.lax.psum(jnp.sum(jnp.exp(logits_MxV - max_M[:, None]), axis=1), tensor)
        target_M = jax.lax.psum(jnp.sum(jnp.where(ids_V == targets_M[:, None], logits_MxV, 0), axis=1), tensor)
        # as argmax: of equal logits the lowest id is the likeliest
        first_M = jax.lax.pmin(
            jnp.min(jnp.where(logits_MxV == max_M[:, None], ids_V, config.vocab_size), axis=1), tensor
        )
        scored_M = targets_M >= 0
        log_probs_M = jnp.where(scored_M, target_M - max_M - jnp.log(sum_M), 0)
        log_probs_N, is_greedy_N = scores
        return log_probs_N.at[places_M].set(log_probs_M), is_greedy_N.at[places_M].set(
            ~scored_M | (first_M == targets_M)
        )

    zeros = jnp.zeros(targets_N.shape, dtype), jnp.ones(targets_N.shape, bool)
    log_probs_N, is_greedy_N = jax.lax.fori_loop(0, n_chunks, chunk, zeros)
    return log_probs_N.reshape(targets_BxT.shape), is_greedy_N.reshape(targets_BxT.shape)
