"""Token shards and their manifest on disk: open and verify. Reads nanoGPT's `train.bin` and llm.c's shards as well.

A token store is a folder of `train_00000.bin ...`, `val_00000.bin ...` (little-endian uint16, or uint32 when the
vocabulary needs it; every document ends with the end-of-text id) and `manifest.json`, which is written last and names
every shard.
"""

import bisect
import dataclasses
import glob
import hashlib
import itertools
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trialgpt_jax import UserError, files

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
_LLMC_MAGIC, _LLMC_HEADER = 20240520, 256 * 4  # llm.c: 256 int32 words: magic, version, tokens, ...
_RUN = "run `python -m trialgpt_jax.preprocess`"


class _Shard(NamedTuple):
    path: str
    dtype: np.dtype
    offset: int  # bytes before the first token
    tokens: int


class Split:
    """The tokens of one split, in order, over all its shards. Files are mapped when read: memory does not grow.

    Attributes:
      name: `train` or `val`.
      n_tokens: number of ids.
      n_bytes: UTF-8 bytes of its documents; None when unknown (no manifest).
      max_id: the largest id; None when unknown (no manifest).
      vocab_size: ids that the tokenizer has; `batches` holds every id against it where max_id is unknown.
    """

    def __init__(self, name: str, shards: list[_Shard], n_bytes: int | None, max_id: int | None, vocab_size: int):
        self.name, self.n_bytes, self.max_id, self.vocab_size = name, n_bytes, max_id, vocab_size
        self._shards = shards
        self._ends = list(itertools.accumulate(shard.tokens for shard in shards))
        self._maps: list[np.ndarray | None] = [None] * len(shards)
        self.n_tokens = self._ends[-1] if shards else 0
        self.parts = [(self, 1.0)]  # as a `Mixture` has them

    def n_windows(self, block_size: int) -> int:
        """Windows of block_size+1 ids at stride block_size; neighbours share one id."""
        return max(0, (self.n_tokens - 1) // block_size)

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids start ... start+count-1, int32 [count]; may span shards.

        Raises:
          IndexError: the range leaves the split.
        """
        out = np.empty(count, np.int32)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills int32 `out` with the ids from `start` on. Raises IndexError as `read` does."""
        if start < 0 or start + len(out) > self.n_tokens:
            raise IndexError(f"{self.name}: tokens {start} ... {start + len(out) - 1} of {self.n_tokens}")
        shard, done = bisect.bisect_right(self._ends, start), 0
        while done < len(out):
            data = self._maps[shard]
            if data is None:
                data = self._map(shard)
            begin = start + done - (self._ends[shard] - len(data))
            piece = data[begin : begin + len(out) - done]
            out[done : done + len(piece)] = piece
            done, shard = done + len(piece), shard + 1

    def _map(self, index: int) -> np.ndarray:
        path, dtype, offset, tokens = self._shards[index]
        mapped = np.memmap(path, dtype, "r", offset, (tokens,))
        self._maps[index] = mapped.view(np.ndarray)  # slices of a plain array are much cheaper than of a memmap
        return self._maps[index]


class Mixture:
    """The same split of several stores, to be drawn from in fixed shares.

    Attributes:
      name, n_tokens, n_bytes, max_id, vocab_size: as of `Split`, over all parts.
      parts: the splits and their shares of the training windows, which add up to 1.
    """

    def __init__(self, parts: list[tuple[Split, float]]):
        splits = [split for split, _ in parts]
        self.parts, self.name, self.vocab_size = parts, splits[0].name, splits[0].vocab_size
        self.n_tokens = sum(split.n_tokens for split in splits)
        self.n_bytes = None if any(s.n_bytes is None for s in splits) else sum(s.n_bytes for s in splits)
        self.max_id = None if any(s.max_id is None for s in splits) else max(s.max_id for s in splits)

    def n_windows(self, block_size: int) -> int:
        """Windows of all parts together; none spans two of them."""
        return sum(split.n_windows(block_size) for split, _ in self.parts)


@dataclass(frozen=True)
class TokenStore:
    """An opened token store.

    Attributes:
      folder: where it lies.
      tokenizer: name of the tokenizer, `gpt2` or `bpe:N`.
      tokenizer_hash: `Tokenizer.hash` of the tokenizer that made the ids; None without a manifest.
      vocab_size: ids, end-of-text included.
      eot_id: the id of end-of-text.
      manifest: the manifest's contents; None for nanoGPT's and llm.c's files. A mixture has its first part's.
    """

    folder: str
    tokenizer: str
    tokenizer_hash: str | None
    vocab_size: int
    eot_id: int
    manifest: dict | None
    splits: dict[str, Split | Mixture]

    def split(self, name: str) -> Split | Mixture:
        """The split `train` or `val`; one without shards has no tokens."""
        return self.splits[name]


def open_store(folder: str) -> TokenStore:
    """Opens a token store without reading its tokens: time and memory do not grow with them.

    Args:
      folder: the store's folder, or a mixture: `a:0.7,b:0.3` draws 70% of the training windows from the store `a`.

    Raises:
      UserError: no store there, an unfinished one, an empty one, a manifest that is damaged or names files outside the
        folder, a file that is missing or of the wrong size, ids beyond the vocabulary.
    """
    if not os.path.isdir(folder) and ("," in folder or ":" in folder):
        return _open_mixture(folder)
    if not os.path.isdir(folder):
        raise UserError(f"data.dir={folder} does not exist; {_RUN} with this config first")
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        if glob.glob(os.path.join(glob.escape(folder), "progress_*.json")):
            raise UserError(f"{folder} is an unfinished token store; {_RUN} with the same config to finish it")
        return _open_foreign(folder)
    manifest = _read_manifest(path)
    dtype, vocab_size = np.dtype(manifest["dtype"]).newbyteorder("<"), manifest["vocab_size"]
    splits = {}
    for name in SPLITS:
        records = [record for record in manifest["shards"] if record["split"] == name]
        shards = []
        for record in records:
            shard = _Shard(os.path.join(folder, record["file"]), dtype, 0, record["tokens"])
            _check_size(shard, record["tokens"] * dtype.itemsize)
            if record["max_id"] >= vocab_size:
                raise UserError(
                    f"{shard.path}: largest id {record['max_id']}, but the vocabulary has {vocab_size} ids; "
                    f"{_RUN} again"
                )
            shards.append(shard)
        largest = max((record["max_id"] for record in records), default=None)
        splits[name] = Split(name, shards, sum(record["bytes"] for record in records), largest, vocab_size)
    tokenizer = manifest["tokenizer"]
    return _not_empty(
        TokenStore(folder, tokenizer["name"], tokenizer["hash"], vocab_size, manifest["eot_id"], manifest, splits)
    )


def verify(folder: str) -> list[dict]:
    """Reads every byte of a store and compares it with its manifest: checksum, documents, largest id, end-of-text.

    Returns:
      The manifest's shard records.

    Raises:
      UserError: as `open_store`, no manifest, or the first shard that differs and how.
    """
    store = open_store(folder)
    if store.folder != folder:
        raise UserError(f"data.dir={folder} is a mixture; verify its parts one by one")
    if store.manifest is None:
        raise UserError(f"{folder} has no {MANIFEST}, so there is nothing to compare its files with")
    for record in store.manifest["shards"]:
        path = os.path.join(folder, record["file"])
        ids = np.memmap(path, np.dtype(store.manifest["dtype"]).newbyteorder("<"), "r")
        digest, largest, documents = hashlib.sha256(), 0, 0
        for start in range(0, len(ids), 1 << 23):
            piece = np.asarray(ids[start : start + (1 << 23)])
            digest.update(piece.data)
            largest = max(largest, int(piece.max()))
            documents += int(np.count_nonzero(piece == store.eot_id))
        for what, found, expected in (
            ("sha256", digest.hexdigest(), record["sha256"]),
            ("largest id", largest, record["max_id"]),
            ("number of documents", documents, record["documents"]),
            ("last id", int(ids[-1]), store.eot_id),
        ):
            if found != expected:
                raise UserError(
                    f"{path} is damaged: its {what} is {found}, but should be {expected}; remove {folder} "
                    f"and {_RUN} again"
                )
    return store.manifest["shards"]


def _read_manifest(path: str) -> dict:
    """Loads and checks a manifest: types, names of files, counts."""
    try:
        manifest = files.read_json(path)
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {manifest['format_version']}, but this program reads {FORMAT_VERSION}"
            )
        integers = [manifest["vocab_size"], manifest["eot_id"]]
        strings = [manifest["tokenizer"]["name"], manifest["tokenizer"]["hash"]]
        for record in manifest["shards"]:
            integers += [record["tokens"], record["documents"], record["bytes"], record["max_id"]]
            strings += [record["file"], record["sha256"]]
            if not files.is_plain_name(record["file"]):
                raise UserError(f"{path}: the shard {record['file']!r} is not a plain file name inside the folder")
            if record["split"] not in SPLITS:
                raise ValueError(f"split {record['split']!r}")
        if not all(type(value) is int and value >= 0 for value in integers):
            raise ValueError("a count is not a whole number")
        if not all(isinstance(value, str) for value in strings) or manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError("a name or dtype is wrong")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is not a valid manifest ({error!r}); remove the folder and {_RUN} again") from None
    return manifest


def _open_mixture(text: str) -> TokenStore:
    stores, weights = [], []
    for part in text.split(","):
        folder, _, weight = part.strip().rpartition(":")
        try:
            weights.append(float(weight))
        except ValueError:
            weights.append(0.0)
        if not folder or not 0 < weights[-1] < float("inf"):
            raise UserError(
                f"data.dir={text}: `{part}` is not FOLDER:WEIGHT with a positive weight, as in `a:0.7,b:0.3`"
            )
        stores.append(open_store(folder))
    first, total = stores[0], sum(weights)
    for store in stores[1:]:
        if store.tokenizer != first.tokenizer or len({store.tokenizer_hash, first.tokenizer_hash} - {None}) > 1:
            raise UserError(
                f"data.dir={text}: {store.folder} was made with another tokenizer ({store.tokenizer}) than "
                f"{first.folder} ({first.tokenizer}); the parts of a mixture must have the same"
            )
    splits = {}
    for name in SPLITS:
        present = [(s.split(name), w / total) for s, w in zip(stores, weights, strict=True) if s.split(name).n_tokens]
        splits[name] = Mixture(present) if present else first.split(name)
    return dataclasses.replace(first, splits=splits)


def _open_foreign(folder: str) -> TokenStore:
    """nanoGPT's two files, or llm.c's shards; both hold GPT-2 ids as uint16."""
    splits = {}
    for name in SPLITS:
        path = os.path.join(folder, f"{name}.bin")
        if os.path.isfile(path):
            files, headers = [path], 0
        else:
            files, headers = sorted(glob.glob(os.path.join(glob.escape(folder), f"*{name}*.bin"))), _LLMC_HEADER
        shards = []
        for path in files:
            size = os.path.getsize(path) - headers
            if headers:
                words = np.fromfile(path, "<i4", 3)
                if len(words) < 3 or words[0] != _LLMC_MAGIC or words[1] != 1:
                    raise UserError(
                        f"{path} is neither in a manifest nor an llm.c shard (magic {_LLMC_MAGIC}, version 1)"
                    )
                shards.append(_Shard(path, np.dtype("<u2"), headers, int(words[2])))
                _check_size(shards[-1], headers + 2 * int(words[2]))
            elif size % 2:
                raise UserError(
                    f"{path} has {size} bytes, an odd number, so it does not hold uint16 ids as nanoGPT writes them"
                )
            else:
                shards.append(_Shard(path, np.dtype("<u2"), 0, size // 2))
        splits[name] = Split(name, [shard for shard in shards if shard.tokens], None, None, 50257)
    if not any(split.n_tokens for split in splits.values()) and not glob.glob(
        os.path.join(glob.escape(folder), "*.bin")
    ):
        raise UserError(f"{folder} holds no token store ({MANIFEST}), no train.bin and no llm.c shards; {_RUN} first")
    return _not_empty(TokenStore(folder, "gpt2", None, 50257, 50256, None, splits))


def _check_size(shard: _Shard, expected: int) -> None:
    if not os.path.isfile(shard.path):
        raise UserError(f"{shard.path} is missing, though the store names it; remove the folder and {_RUN} again")
    if (size := os.path.getsize(shard.path)) != expected:
        raise UserError(
            f"{shard.path} has {size} bytes, but its {shard.tokens} tokens take {expected}: it is truncated or "
            f"damaged; remove the folder and {_RUN} again"
        )


def _not_empty(store: TokenStore) -> TokenStore:
    if not store.splits["train"].n_tokens:
        raise UserError(
            f"{store.folder} is empty: its training split has no tokens; {_RUN} with a corpus that has documents"
        )
    return store
