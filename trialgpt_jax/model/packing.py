"""Requests of any length as rows of a few fixed lengths, in which requests share their common beginning.

The choices of a multiple-choice question have one context: it is a trunk, computed once, and each choice is a branch
that continues it. A tree is a trunk and its branches. Several trees stand in one row, see `attention.Packing`.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.model.config import GPTConfig

ARRAYS = ("tokens", "positions", "tree", "branch", "targets")  # of a batch, int32 [rows, length] each, see `fill`


class Request(NamedTuple):
    """Ids whose last ones are scored.

    Attributes:
      ids: int32 [n + 1], n at most block_size; all but the last are fed.
      n_scored: how many of the last ids are scored, 1 ... n.
    """

    ids: np.ndarray
    n_scored: int

    @property
    def shareable(self) -> int:
        """How many first ids can be in a trunk: all that are before the one that predicts the first scored id."""
        return len(self.ids) - 1 - self.n_scored


def make_request(context: Sequence[int], continuation: Sequence[int], config: GPTConfig) -> Request:
    """A request for the score of `continuation`. Of more than block_size + 1 ids the first are left out.

    Raises:
      UserError: an empty context or continuation, a continuation longer than block_size, or an unknown id.
    """
    n, size = len(continuation), config.block_size + 1
    if not len(context) or not n:
        raise UserError(f"a {'continuation' if len(context) else 'context'} without tokens cannot be scored")
    if n > config.block_size:
        raise UserError(f"a continuation has {n} tokens, more than model.block_size={config.block_size}")
    ids = np.concatenate([np.asarray(part, np.int64) for part in (context[-size:], continuation)])[-size:]
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise UserError(f"ids {ids.min()} ... {ids.max()} are not all of the model's 0 ... {config.vocab_size - 1}")
    return Request(ids.astype(np.int32), n)


def rolling_windows(ids: Sequence[int], block_size: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Windows (context, continuation) in which every id but the first is a continuation once.

    A window has block_size + 1 ids, of which one is the context; the last window is filled up with earlier ids.
    """
    windows = []
    for start in range(0, len(ids) - 1, block_size):
        stop = min(start + block_size, len(ids) - 1)
        first = max(0, stop - block_size)
        windows.append((ids[first : start + 1], ids[start + 1 : stop + 1]))
    return windows


class Tree(NamedTuple):
    """Requests that begin with the same `trunk` ids."""

    members: list[int]  # numbers of the requests
    trunk: int
    size: int  # tokens: those of the trunk and of all branches


class Row(NamedTuple):
    """Trees in a row of `length` tokens."""

    length: int
    trees: list[Tree]


class Place(NamedTuple):
    """Where the scored positions of a request are."""

    request: int
    row: int
    start: int
    stop: int


def row_lengths(block_size: int) -> tuple[int, ...]:
    """The lengths of rows, ascending; a tree fits the longest one. Longer rows have less padding, but attention costs
    more, so three are a compromise that keeps the number of compiled programs small."""
    longest = max(1024, 1 << (block_size - 1).bit_length())
    return longest // 4, longest // 2, longest


def make_rows(requests: Sequence[Request], lengths: Sequence[int]) -> list[Row]:
    """Places all requests, longest trees first, each where the least room is left (best fit decreasing).

    Args:
      requests: each at most `lengths[-1]` tokens long.
      lengths: from `row_lengths`.

    Returns:
      The rows, longest first.
    """
    trees = sorted(_grow_trees(requests, lengths[-1]), key=lambda tree: -tree.size)
    rows, room = [], []  # room: (tokens left, row), ascending
    for tree in trees:
        i = bisect.bisect_left(room, (tree.size, -1))
        if i < len(room):
            left, row = room.pop(i)
        else:
            length = next((n for n in lengths if n >= 2 * tree.size), lengths[-1])
            left, row = length, len(rows)
            rows.append(Row(length, []))
        rows[row].trees.append(tree)
        bisect.insort(room, (left - tree.size, row))
    return sorted(rows, key=lambda row: -row.length)


def _grow_trees(requests: Sequence[Request], longest: int) -> list[Tree]:
    """Joins requests that share at least half of what each of them could share."""
    # big-endian bytes sort as the ids do, so requests with a common beginning become neighbours
    order = sorted(range(len(requests)), key=lambda i: requests[i].ids[:-1].astype(">i4").tobytes())
    trees: list[Tree] = []
    for i in order:
        request, size = requests[i], len(requests[i].ids) - 1
        if trees:
            tree = trees[-1]
            last = requests[tree.members[-1]]
            trunk = min(tree.trunk, request.shareable, _common(last.ids, request.ids))
            # a shorter trunk is repeated in every branch
            joined = tree.size + (len(tree.members) - 1) * (tree.trunk - trunk) + size - trunk
            if trunk and 2 * trunk >= max(tree.trunk, request.shareable) and joined <= longest:
                trees[-1] = Tree([*tree.members, i], trunk, joined)
                continue
        trees.append(Tree([i], request.shareable, size))
    return trees


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def fill(requests: Sequence[Request], rows: Sequence[Row], n_rows: int) -> tuple[dict[str, np.ndarray], list[Place]]:
    """The arrays of one batch, as `scoring.score_rows` takes them.

    Args:
      requests: those that `rows` refer to.
      rows: of one length T.
      n_rows: B, at least len(rows); the others are padding.

    Returns:
      int32 [B, T] `tokens`, `positions`, `tree`, `branch` and `targets`; and the places of the requests.
    """
    shape = (n_rows, rows[0].length)
    batch = {name: np.zeros(shape, np.int32) for name in ARRAYS}
    batch["tree"] -= 1  # of padding
    batch["targets"] -= 1  # not scored
    places = []
    for r, row in enumerate(rows):
        column = 0

        def put(ids, first_position, tree, branch, r=r):
            nonlocal column
            span = slice(column, column + len(ids))
            batch["tokens"][r, span] = ids
            batch["positions"][r, span] = np.arange(first_position, first_position + len(ids))
            batch["tree"][r, span], batch["branch"][r, span] = tree, branch
            column += len(ids)

        for t, tree in enumerate(row.trees):
            put(requests[tree.members[0]].ids[: tree.trunk], 0, t, 0)
            for b, i in enumerate(tree.members, 1):
                ids, n = requests[i]
                put(ids[tree.trunk : -1], tree.trunk, t, b)
                batch["targets"][r, column - n : column] = ids[-n:]
                places.append(Place(i, r, column - n, column))
    return batch, places
