"""Batches of token windows: training batch k is a pure function of (seed, k), so the step is its only state.

Window i of a split is tokens [i*T, i*T+T], T+1 ids at stride T = block_size. Global batch k of B rows takes rows
k*B ... k*B+B-1 of an endless sequence that is one permutation of all windows after the other. The permutation is
computed, not stored: seeking to any step costs nothing, and neither does a larger corpus. In a mixture every part has
such a sequence of its own, and each run of 1,024 rows takes from the parts by their weights, in a shuffled pattern.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.data.token_store import Mixture, Split

WHOLE = ((0,), 1)  # one process feeds all rows of a batch

_NAMES = {"train": "training", "val": "validation"}
_ROUNDS = 10  # of the Feistel network; with 6, neighbours in a tiny corpus are measurably not independent
_PATTERN = 1024  # rows over which a mixture's weights are met, to within one row
_CHUNK = 16  # batches whose windows are computed together: numpy costs the same for 16 batches as for 2


def train_batches(
    split: Split | Mixture,
    *,
    block_size: int,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    start_step: int = 0,
    blocks: tuple[Sequence[int], int] = WHOLE,
    prefetch: int = 4,
) -> Iterator[np.ndarray]:
    """This process's part of the global batches start_step, start_step+1, ... without end, prefetched by a thread.

    Args:
      block_size: T, tokens that a model reads at once.
      batch_size: B, rows of the global batch, over all processes.
      seed: of the order; every epoch has its own permutation.
      shuffle: False leaves the windows in the order of the corpus.
      blocks: which rows of every global batch this process has: numbers of blocks, and into how many equal blocks the
        batch is cut. ((2, 3), 8) stands for rows B/4 ... B/2-1.
      prefetch: batches kept ready.

    Returns:
      An iterator of int32 arrays [L, T+1], L the number of rows that `blocks` stands for.

    Raises:
      UserError: the split has no window, or the blocks do not divide the batch.
    """
    import grain  # here, because it loads jax, which the other uses of this module do without

    source = BatchSource(split, block_size, batch_size, seed, shuffle, start_step, blocks)
    # An element is a whole batch: per-window elements cost 3-4 times as much, grain's default reader threads even more.
    batches = grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return _closing(iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)))


def eval_batches(
    split: Split | Mixture,
    *,
    block_size: int,
    batch_size: int,
    n_batches: int = 0,
    blocks: tuple[Sequence[int], int] = WHOLE,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This process's part of the batches that cover windows 0, 1, 2, ... of a split once, in order.

    Args:
      n_batches: stop after so many global batches; 0 covers the split.

    Yields:
      tokens, int32 [L, T+1], and valid, bool [L]: False on the rows that pad the last batch.

    Raises:
      UserError: as `train_batches`.
    """
    local = _local_rows(batch_size, blocks)
    windows = _count_windows(split, block_size)
    ends = np.cumsum([part.n_windows(block_size) for part, _ in split.parts])
    for k in range(n_eval_batches(split, block_size=block_size, batch_size=batch_size, n_batches=n_batches)):
        rows = k * batch_size + local
        valid = rows < windows
        inside = np.where(valid, rows, 0)
        parts = np.searchsorted(ends, inside, side="right")
        yield _gather(split, parts, inside - np.concatenate([[0], ends])[parts], block_size), valid


def n_eval_batches(split: Split | Mixture, *, block_size: int, batch_size: int, n_batches: int = 0) -> int:
    """How many global batches `eval_batches` yields."""
    whole = -(-_count_windows(split, block_size) // batch_size)
    return min(whole, n_batches) if n_batches else whole


class BatchSource:
    """Random access to one process's part of the training batches: `source[k]` is that of step start_step + k.

    Arguments and errors are those of `train_batches`.
    """

    def __init__(
        self,
        split: Split | Mixture,
        block_size: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        start_step: int = 0,
        blocks: tuple[Sequence[int], int] = WHOLE,
    ):
        self._local = _local_rows(batch_size, blocks)
        self._split, self._block_size, self._seed, self._shuffle = split, block_size, seed, shuffle
        self._first_row, self._batch_size = start_step * batch_size, batch_size
        _count_windows(split, block_size)
        self._chunk = (-1, np.empty(0), np.empty(0))  # its number, and the parts and windows of its batches

    def __len__(self) -> int:
        return 1 << 40  # training has no end; grain wants a number

    def __getitem__(self, k: int) -> np.ndarray:
        number, place = divmod(k, _CHUNK)
        chunk = self._chunk
        if chunk[0] != number:
            batches = number * _CHUNK + np.arange(_CHUNK)
            rows = (self._first_row + batches[:, None] * self._batch_size + self._local).ravel()
            parts, windows = training_order(rows, self._split, self._block_size, self._seed, self._shuffle)
            shape = (_CHUNK, len(self._local))
            chunk = self._chunk = number, parts.reshape(shape), windows.reshape(shape)  # at once: safe with threads
        return _gather(self._split, chunk[1][place], chunk[2][place], self._block_size)


def training_order(
    rows: np.ndarray, split: Split | Mixture, block_size: int, seed: int, shuffle: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """What stands at positions `rows`, int64 [n], of the endless training order.

    Returns:
      The number of the part of a mixture (0 for a `Split`) and the window of it, both int64 [n].
    """
    parts, places = pick_parts(rows, [weight for _, weight in split.parts], seed)
    windows = np.empty_like(rows)
    for number, (part, _) in enumerate(split.parts):
        mine = parts == number
        own_seed = (seed + number * 0x9E3779B97F4A7C15) % 2**64
        windows[mine] = window_order(places[mine], part.n_windows(block_size), own_seed, shuffle)
    return parts, windows


def pick_parts(rows: np.ndarray, weights: list[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which part of a mixture each row takes its window from, and how many rows before it took from the same part.

    Args:
      rows: int64 [n].
      weights: shares that add up to 1.

    Returns:
      int64 [n], int64 [n].
    """
    if len(weights) == 1:
        return np.zeros_like(rows), rows
    edges = np.rint(np.cumsum([0.0, *weights]) * _PATTERN).astype(
        np.int64
    )  # part i has edges[i] ... edges[i+1]-1 of a run
    if not np.diff(edges).all():
        raise UserError(
            f"data.dir: a weight of {min(weights):.2g} is less than one window in {_PATTERN}; leave that part out"
        )
    run, place = np.divmod(rows, _PATTERN)
    parts, before = np.empty_like(rows), np.empty_like(rows)
    for number in np.unique(run):
        order = permute(np.arange(_PATTERN), np.full(_PATTERN, number), _PATTERN, seed ^ 0x5851F42D4C957F2D)
        pattern = np.searchsorted(edges, order, side="right") - 1
        earlier = np.empty(_PATTERN, np.int64)
        for part in range(len(weights)):
            mine = pattern == part
            earlier[mine] = number * (edges[part + 1] - edges[part]) + np.arange(mine.sum())
        here = run == number
        parts[here], before[here] = pattern[place[here]], earlier[place[here]]
    return parts, before


def window_order(rows: np.ndarray, n_windows: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """The windows at positions `rows`, int64 [n], of the endless training order: window numbers, int64 [n]."""
    epochs, places = np.divmod(rows, n_windows)
    return permute(places, epochs, n_windows, seed) if shuffle else places


def permute(places: np.ndarray, epochs: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Where a pseudorandom permutation of 0 ... n-1, another one for each (seed, epoch), sends `places`.

    A Feistel network on pairs (left, right) in [a] x [b], a*b barely over n, with sums modulo a and b in place of XOR;
    what lands on n or above is sent through again until it does not ("cycle walking"), which keeps it a permutation.

    Args:
      places, epochs: int64 [m], 0 <= places < n.

    Returns:
      int64 [m].
    """
    a = np.uint64(max(1, int(np.sqrt(n))))
    b = np.uint64(-(-n // int(a)))
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        keys = _mix(_mix(np.full(1, seed, np.uint64)) + epochs.astype(np.uint64))
        out = _feistel(places.astype(np.uint64), keys, a, b)
        while (beyond := np.flatnonzero(out >= n)).size:
            out[beyond] = _feistel(out[beyond], keys[beyond], a, b)
    return out.astype(np.int64)


def _feistel(x: np.ndarray, keys: np.ndarray, a: np.uint64, b: np.uint64) -> np.ndarray:
    left, right = np.divmod(x, b)
    for round_number in range(0, _ROUNDS, 2):
        left = (left + _mix(keys + np.uint64(round_number) + (right << np.uint64(8))) % a) % a
        right = (right + _mix(keys + np.uint64(round_number + 1) + (left << np.uint64(8))) % b) % b
    return left * b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): every input bit moves every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _closing(iterator) -> Iterator[np.ndarray]:
    """The items of a grain iterator, whose thread ends with the generator and not at some point of the exit."""
    try:
        yield from iterator
    finally:
        iterator.close()


def _gather(split: Split | Mixture, parts: np.ndarray, windows: np.ndarray, block_size: int) -> np.ndarray:
    out = np.empty((len(windows), block_size + 1), np.int32)
    splits = [part for part, _ in split.parts]
    for row, (part, window) in enumerate(zip(parts.tolist(), windows.tolist(), strict=True)):
        splits[part].read_into(window * block_size, out[row])
    if split.max_id is None and (largest := int(out.max())) >= split.vocab_size:  # no manifest vouches for the ids
        name = _NAMES[split.name]
        raise UserError(f"{name} split: token id {largest} is beyond the vocabulary of {split.vocab_size} ids")
    return out


def _count_windows(split: Split | Mixture, block_size: int) -> int:
    smallest = min(split.parts, key=lambda part: part[0].n_windows(block_size))[0] if split.name == "train" else split
    if not smallest.n_windows(block_size):
        lever = "raise data.val_fraction" if split.name == "val" else "give more text"
        raise UserError(
            f"the {_NAMES[split.name]} split has {smallest.n_tokens} tokens, fewer than one window of "
            f"model.block_size+1 = {block_size + 1}; {lever} and run preprocess into a new folder, or lower model.block_size"
        )
    return split.n_windows(block_size)


def _local_rows(batch_size: int, blocks: tuple[Sequence[int], int]) -> np.ndarray:
    """Numbers, int64 [L], of the rows of a batch that `blocks` stands for."""
    mine, n_blocks = blocks
    if batch_size % n_blocks:
        raise UserError(f"a batch of {batch_size} sequences is not divisible by the {n_blocks} devices that share it")
    size = batch_size // n_blocks
    return (np.asarray(mine)[:, None] * size + np.arange(size)).ravel()
