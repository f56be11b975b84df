"""The tokens of a split, over the shards of one store or over several stores."""

import bisect
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from trialgpt_jax import UserError

NAMES = {"train": "training", "val": "validation"}
_PIECE = 1 << 20  # ids that are read together
_MOST_COUNTED = 1 << 30  # ids whose bytes are counted, in about 3 seconds


class Shard(NamedTuple):
    """A file of ids."""

    path: str
    dtype: np.dtype
    offset: int  # bytes before the first token
    tokens: int


class Split:
    """The tokens of one split over all its shards, in order. Files are memory-mapped at the first read.

    Attributes:
      name: `train` or `val`.
      n_tokens: number of ids.
      max_id: the largest id; None without a manifest.
      vocab_size: number of ids of the tokenizer; `batches` checks every id against it if max_id is None.
      members: [(this split, 1.0)], the interface of `Mixture`.
    """

    def __init__(
        self,
        name: str,
        shards: list[Shard],
        n_bytes: int | None,
        max_id: int | None,
        vocab_size: int,
        id_bytes: np.ndarray | None = None,
    ):
        """`id_bytes`: int64 [vocab_size], UTF-8 bytes of each id, to count n_bytes if that is None."""
        self.name, self.max_id, self.vocab_size = name, max_id, vocab_size
        self._shards, self._n_bytes, self._id_bytes = shards, n_bytes, id_bytes
        self._ends = list(itertools.accumulate(shard.tokens for shard in shards))
        self._maps: list[np.ndarray | None] = [None] * len(shards)
        self.n_tokens = self._ends[-1] if shards else 0
        self.members = [(self, 1.0)]

    @property
    def n_bytes(self) -> int | None:
        """UTF-8 bytes of its documents; None if it is unknown. Without a manifest the tokens are read and counted."""
        if self._n_bytes is None and self._id_bytes is not None and self.n_tokens <= _MOST_COUNTED:
            counts = np.zeros(self.vocab_size, np.int64)
            for start in range(0, self.n_tokens, _PIECE):
                ids = self.read(start, min(_PIECE, self.n_tokens - start))
                self.check_id(int(ids.max()))
                counts += np.bincount(ids, minlength=self.vocab_size)
            self._n_bytes = int(counts @ self._id_bytes)
        return self._n_bytes

    def check_id(self, largest: int, tokenizer: str = "its tokenizer") -> None:
        """Raises UserError for an id beyond the vocabulary, which is that of another tokenizer or a damaged file."""
        if largest >= self.vocab_size:
            folder = os.path.dirname(self._shards[0].path)
            raise UserError(
                f"{folder}: the {NAMES[self.name]} split has the token id {largest}, but {tokenizer} has "
                f"{self.vocab_size} ids"
            )

    def sample(self, most: int) -> Iterator[np.ndarray]:
        """Pieces of the ids, int32: all of them if there are at most `most`, otherwise 64 pieces from everywhere."""
        piece, starts = _PIECE, range(0, self.n_tokens, _PIECE)
        if self.n_tokens > most:
            piece = most >> 8
            starts = np.linspace(0, self.n_tokens - piece, 64, dtype=np.int64).tolist()
        for start in starts:
            yield self.read(start, min(piece, self.n_tokens - start))

    def n_windows(self, block_size: int) -> int:
        """Windows of block_size+1 ids at stride block_size; neighbours share one id."""
        return max(0, (self.n_tokens - 1) // block_size)

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids start ... start+count-1, int32 [count]; may span shards. Raises IndexError outside the split."""
        out = np.empty(count, np.int32)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills int32 `out` with the ids from `start` on. Raises IndexError outside the split."""
        if start < 0 or start + len(out) > self.n_tokens:
            raise IndexError(f"{self.name}: tokens {start} ... {start + len(out) - 1} of {self.n_tokens}")
        shard, done = bisect.bisect_right(self._ends, start), 0
        while done < len(out):
            if (data := self._maps[shard]) is None:
                path, dtype, offset, tokens = self._shards[shard]
                # Slicing a plain array is much cheaper than slicing a memmap
                data = self._maps[shard] = np.memmap(path, dtype, "r", offset, (tokens,)).view(np.ndarray)
            begin = start + done - (self._ends[shard] - len(data))
            piece = data[begin : begin + len(out) - done]
            out[done : done + len(piece)] = piece
            done, shard = done + len(piece), shard + 1


class Mixture:
    """The same split of several stores, sampled with fixed weights.

    Attributes:
      name, n_tokens, max_id, vocab_size: as of `Split`, over all members.
      members: the splits and their shares of the training windows, which sum to 1.
    """

    def __init__(self, members: list[tuple[Split, float]]):
        splits = [split for split, _ in members]
        self.members, self.name, self.vocab_size = members, splits[0].name, splits[0].vocab_size
        self.n_tokens = sum(split.n_tokens for split in splits)
        self.max_id = None if any(s.max_id is None for s in splits) else max(s.max_id for s in splits)

    @property
    def n_bytes(self) -> int | None:
        """UTF-8 bytes of the documents of all members; None if one is unknown."""
        counts = [split.n_bytes for split, _ in self.members]
        return None if None in counts else sum(counts)

    def n_windows(self, block_size: int) -> int:
        """Windows of all members; no window spans two of them."""
        return sum(split.n_windows(block_size) for split, _ in self.members)
