"""Batches of token windows: training batch k is a pure function of (seed, k), so the step is its only state.

Window i of a split is tokens [i*T, i*T+T], T+1 ids at stride T = block_size. Global batch k of B rows takes rows
k*B ... k*B+B-1 of an endless sequence: a new permutation of all windows every epoch. The permutation is computed, not
stored, so seeking to any step takes constant time for any size of corpus. In a mixture every member has its own such
sequence, and each run of 1,024 rows draws from the members by their weights, in a shuffled pattern.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.data.splits import NAMES, Mixture, Split

WHOLE = ((0,), 1)  # `blocks` of a process that feeds all rows of a batch

_ROUNDS = 10  # of the Feistel network; with 6, neighbours in a tiny corpus are measurably not independent
_PATTERN = 1024  # rows over which a mixture's weights hold exactly, to one row
_PREFETCH = 4  # batches that the thread keeps ready
_CHUNK = 16  # batches whose windows are computed together: numpy takes as long for 16 batches as for 2


def train_batches(
    split: Split | Mixture,
    *,
    block_size: int,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    start_step: int = 0,
    blocks: tuple[Sequence[int], int] = WHOLE,
) -> Iterator[np.ndarray]:
    """This process's L rows of the global batches start_step, start_step+1, ..., endless: int32 [L, T+1].

    Args:
      block_size: T, the model's context length in tokens.
      batch_size: B, rows of the global batch, over all processes.
      seed: of the order; every epoch has its own permutation.
      shuffle: False keeps the windows in the order of the corpus.
      blocks: this process's blocks of every global batch, and the number of blocks; ((2, 3), 8) is rows B/4 ... B/2-1.

    Raises UserError if the split has no window, or the blocks do not divide the batch.
    """
    import grain  # late: it imports jax, which the rest of this module does not need

    local = _local_rows(batch_size, blocks)
    _count_windows(split, block_size)

    @functools.lru_cache(1)
    def order(chunk: int) -> tuple[np.ndarray, np.ndarray]:
        steps = chunk * _CHUNK + np.arange(_CHUNK)
        rows = steps[:, None] * batch_size + local
        members, windows = training_order(rows.ravel(), split, block_size, seed, shuffle)
        return members.reshape(rows.shape), windows.reshape(rows.shape)

    def batch(step: int) -> np.ndarray:
        chunk, place = divmod(step, _CHUNK)
        members, windows = order(chunk)
        return _gather(split, members[place], windows[place], block_size)

    # An element is a whole batch: per-window elements take 3-4 times as long, grain's default reader threads even more.
    endless = grain.MapDataset.range(start_step, 1 << 40).map(batch)
    batches = endless.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return _closing(iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_PREFETCH)))


def eval_batches(
    split: Split | Mixture,
    *,
    block_size: int,
    batch_size: int,
    n_batches: int = 0,
    blocks: tuple[Sequence[int], int] = WHOLE,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This process's rows of the batches that cover windows 0, 1, 2, ... of a split once, in order.

    Args and errors: as of `train_batches`; n_batches: number of global batches, 0 = the whole split.

    Yields:
      tokens, int32 [L, T+1], and valid, bool [L]: False on the rows that pad the last batch.
    """
    local = _local_rows(batch_size, blocks)
    windows = _count_windows(split, block_size)
    ends = np.cumsum([member.n_windows(block_size) for member, _ in split.members])
    starts = np.concatenate([[0], ends])
    whole = -(-windows // batch_size)
    for k in range(min(whole, n_batches or whole)):
        rows = k * batch_size + local
        valid = rows < windows
        inside = np.where(valid, rows, 0)
        members = np.searchsorted(ends, inside, side="right")
        yield _gather(split, members, inside - starts[members], block_size), valid


def training_order(
    rows: np.ndarray, split: Split | Mixture, block_size: int, seed: int, shuffle: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Positions `rows` of the endless training order -> member of the mixture (0 for a `Split`), window; int64 [n]."""
    members, places = pick_members(rows, [weight for _, weight in split.members], seed)
    windows = np.empty_like(rows)
    for number, (member, _) in enumerate(split.members):
        mine, n_windows = members == number, member.n_windows(block_size)
        epochs, windows[mine] = np.divmod(places[mine], n_windows)
        if shuffle:
            own_seed = (seed + number * 0x9E3779B97F4A7C15) % 2**64
            windows[mine] = permute(windows[mine], epochs, n_windows, own_seed)
    return members, windows


def pick_members(rows: np.ndarray, weights: list[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The member of a mixture that each row draws from, and the number of earlier rows of that member, int64 [n].

    `rows` is int64 [n] too; the weights sum to 1.
    """
    if len(weights) == 1:
        return np.zeros_like(rows), rows
    # Member i has entries edges[i] ... edges[i+1]-1 of a pattern, before it is shuffled
    edges = np.rint(np.cumsum([0.0, *weights]) * _PATTERN).astype(np.int64)
    if not np.diff(edges).all():
        raise UserError(
            f"data.dir: a weight of {min(weights):.2g} is less than one window in {_PATTERN}; leave that member out"
        )
    run, place = np.divmod(rows, _PATTERN)
    members, before = np.empty_like(rows), np.empty_like(rows)
    for number in np.unique(run):
        order = permute(np.arange(_PATTERN), np.full(_PATTERN, number), _PATTERN, seed ^ 0x5851F42D4C957F2D)
        pattern = np.searchsorted(edges, order, side="right") - 1
        earlier = np.empty(_PATTERN, np.int64)
        for member in range(len(weights)):
            mine = pattern == member
            earlier[mine] = number * (edges[member + 1] - edges[member]) + np.arange(mine.sum())
        here = run == number
        members[here], before[here] = pattern[place[here]], earlier[place[here]]
    return members, before


def permute(places: np.ndarray, epochs: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Maps `places` by a pseudorandom permutation of 0 ... n-1, a different one for each (seed, epoch).

    A Feistel network on pairs (left, right) in [a] x [b], a*b slightly over n, with sums modulo a and b instead of XOR.
    Results of n and above are fed through the network until they are below n ("cycle walking", Black and Rogaway 2002),
    which makes it a permutation of 0 ... n-1.

    Args and result: int64 [m], 0 <= places < n.
    """
    a = np.uint64(max(1, int(np.sqrt(n))))
    b = np.uint64(-(-n // int(a)))
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
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
    """splitmix64's finaliser (Steele, Lea, Flood 2014): every input bit affects every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _closing(iterator) -> Iterator[np.ndarray]:
    """The items of a grain iterator; ends its thread with the generator instead of during interpreter shutdown."""
    try:
        yield from iterator
    finally:
        iterator.close()


def _gather(split: Split | Mixture, members: np.ndarray, windows: np.ndarray, block_size: int) -> np.ndarray:
    out = np.empty((len(windows), block_size + 1), np.int32)
    splits = [member for member, _ in split.members]
    for row, (member, window) in enumerate(zip(members.tolist(), windows.tolist(), strict=True)):
        splits[member].read_into(window * block_size, out[row])
    if split.max_id is None and int(out.max()) >= split.vocab_size:  # no manifest has checked the ids
        for row, member in enumerate(members.tolist()):
            splits[member].check_id(int(out[row].max()))
    return out


def _count_windows(split: Split | Mixture, block_size: int) -> int:
    """Windows of a split; UserError without any. Training needs one in every member of a mixture."""
    members = [member for member, _ in split.members]
    smallest = min(members, key=lambda member: member.n_windows(block_size)) if split.name == "train" else split
    if not smallest.n_windows(block_size):
        lever = "raise data.val_fraction" if split.name == "val" else "give more text"
        raise UserError(
            f"the {NAMES[split.name]} split has {smallest.n_tokens} tokens, fewer than one window of "
            f"model.block_size+1 = {block_size + 1}; {lever} and run preprocess into a new folder, or lower "
            "model.block_size"
        )
    return split.n_windows(block_size)


def _local_rows(batch_size: int, blocks: tuple[Sequence[int], int]) -> np.ndarray:
    """Row numbers, int64 [L], of `blocks` in a global batch."""
    mine, n_blocks = blocks
    if batch_size % n_blocks:
        raise UserError(f"a batch of {batch_size} sequences is not divisible by the {n_blocks} devices that share it")
    size = batch_size // n_blocks
    return (np.asarray(mine)[:, None] * size + np.arange(size)).ravel()
