"""Opens and verifies token stores: shards of token ids and their manifest. Reads nanoGPT's and llm.c's files as well.

A token store is a folder of `train_00000.bin ...`, `val_00000.bin ...` (little-endian uint16, or uint32 for more than
65,536 ids; every document ends with the end-of-text id) and `manifest.json`, which is written last and lists them.
"""

import bisect
import dataclasses
import glob
import hashlib
import itertools
import json
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.data.tokenizer import TokenizerId
from trialgpt_jax.storage import files, json_files

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
_GPT2 = {"tokenizer_id": TokenizerId("gpt2", None), "vocab_size": 50257, "eot_id": 50256}  # of foreign files
_LLMC_MAGIC, _LLMC_HEADER = 20240520, 256 * 4  # llm.c: 256 int32 words: magic, version, tokens, ...
_END_BYTES = 64 << 10
_RUN = "run `python -m trialgpt_jax.preprocess`"


class _Shard(NamedTuple):
    path: str
    dtype: np.dtype
    offset: int  # bytes before the first token
    tokens: int


class Split:
    """The tokens of one split over all its shards, in order. Files are memory-mapped at the first read.

    Attributes:
      name: `train` or `val`.
      n_tokens: number of ids.
      n_bytes, max_id: UTF-8 bytes of its documents, and the largest id; None without a manifest.
      vocab_size: number of ids of the tokenizer; `batches` checks every id against it if max_id is None.
      members: [(this split, 1.0)], the interface of `Mixture`.
    """

    def __init__(self, name: str, shards: list[_Shard], n_bytes: int | None, max_id: int | None, vocab_size: int):
        self.name, self.n_bytes, self.max_id, self.vocab_size = name, n_bytes, max_id, vocab_size
        self._shards = shards
        self._ends = list(itertools.accumulate(shard.tokens for shard in shards))
        self._maps: list[np.ndarray | None] = [None] * len(shards)
        self.n_tokens = self._ends[-1] if shards else 0
        self.members = [(self, 1.0)]

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
      name, n_tokens, n_bytes, max_id, vocab_size: as of `Split`, over all members.
      members: the splits and their shares of the training windows, which sum to 1.
    """

    def __init__(self, members: list[tuple[Split, float]]):
        splits = [split for split, _ in members]
        self.members, self.name, self.vocab_size = members, splits[0].name, splits[0].vocab_size
        self.n_tokens = sum(split.n_tokens for split in splits)
        self.n_bytes = None if any(s.n_bytes is None for s in splits) else sum(s.n_bytes for s in splits)
        self.max_id = None if any(s.max_id is None for s in splits) else max(s.max_id for s in splits)

    def n_windows(self, block_size: int) -> int:
        """Windows of all members; no window spans two of them."""
        return sum(split.n_windows(block_size) for split, _ in self.members)


@dataclass(frozen=True)
class TokenStore:
    """An open token store.

    Attributes:
      folder, manifest: of a mixture, those of the first member; no manifest with nanoGPT's and llm.c's files.
      tokenizer_id: the tokenizer that made the ids; its hash is None without a manifest.
      vocab_size, eot_id: number of ids, end-of-text included, and the id of end-of-text.
      splits: `train` and `val`; one without shards has no tokens.
      members: folder and sha256 (hex) of this store, or of every member of a mixture. The sha256 is that of the tokens'
        checksums, not of the folder's name; of foreign files that of sizes, beginnings and ends.
    """

    folder: str
    tokenizer_id: TokenizerId
    vocab_size: int
    eot_id: int
    manifest: dict | None
    splits: dict[str, Split | Mixture]
    members: tuple[tuple[str, str], ...]

    def __post_init__(self):
        if not self.splits["train"].n_tokens:
            raise UserError(
                f"{self.folder} is empty: its training split has no tokens; {_RUN} with a corpus that has documents"
            )

    @property
    def tokenizer(self) -> str:
        """The name of the tokenizer, `gpt2` or `bpe:N`."""
        return self.tokenizer_id.name

    def split(self, name: str) -> Split | Mixture:
        return self.splits[name]


def open_store(folder: str) -> TokenStore:
    """Opens a token store without reading its tokens, so time and memory do not depend on its size.

    The mixture `a:0.7,b:0.3` draws 70% of the training windows from the store `a`.

    Raises:
      UserError: the store does not exist, is unfinished or empty; a manifest that is damaged or names files outside the
        folder; a missing file or one of the wrong size; ids beyond the vocabulary.
    """
    if not os.path.isdir(folder):
        if "," in folder or ":" in folder:
            return _open_mixture(folder)
        raise UserError(f"data.dir={folder} does not exist; {_RUN} with this config first")
    if os.path.exists(path := os.path.join(folder, MANIFEST)):
        return _open_manifest(folder, _read_manifest(path))
    if glob.glob("progress_*.json", root_dir=folder):
        raise UserError(f"{folder} is an unfinished token store; {_RUN} with the same config to finish it")
    return _open_foreign(folder)


def verify(folder: str) -> list[dict]:
    """Compares every byte of a store with its manifest, and returns the manifest's shard records.

    Raises UserError as `open_store`, without a manifest, or for the first shard that differs; the message says how.
    """
    store = open_store(folder)
    if store.folder != folder:
        raise UserError(f"data.dir={folder} is a mixture; verify its members one at a time")
    if store.manifest is None:
        raise UserError(f"{folder} has no {MANIFEST} to compare its files with")
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
    try:
        manifest = json_files.read(path)
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
            raise ValueError("a count is not a non-negative integer")
        if not all(isinstance(value, str) for value in strings) or manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError("a name or dtype is wrong")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is not a valid manifest ({error!r}); remove the folder and {_RUN} again") from None
    return manifest


def _open_manifest(folder: str, manifest: dict) -> TokenStore:
    dtype, vocab_size = np.dtype(manifest["dtype"]).newbyteorder("<"), manifest["vocab_size"]
    splits = {}
    for name in SPLITS:
        records = [record for record in manifest["shards"] if record["split"] == name]
        shards = []
        for record in records:
            path, largest = os.path.join(folder, record["file"]), record["max_id"]
            shards.append(_shard(path, dtype, 0, record["tokens"]))
            if largest >= vocab_size:
                raise UserError(f"{path}: largest id {largest}, but the vocabulary has {vocab_size} ids; {_RUN} again")
        largest = max((record["max_id"] for record in records), default=None)
        splits[name] = Split(name, shards, sum(record["bytes"] for record in records), largest, vocab_size)
    tokenizer_id = TokenizerId(manifest["tokenizer"]["name"], manifest["tokenizer"]["hash"])
    content = [[record["split"], record["tokens"], record["sha256"]] for record in manifest["shards"]]
    members = ((folder, _digest([manifest["dtype"], *tokenizer_id, content])),)
    return TokenStore(folder, tokenizer_id, vocab_size, manifest["eot_id"], manifest, splits, members)


def _open_mixture(text: str) -> TokenStore:
    stores, weights = [], []
    for item in text.split(","):
        folder, _, weight = item.strip().rpartition(":")
        try:
            weights.append(float(weight))
        except ValueError:
            weights.append(0.0)
        if not folder or not 0 < weights[-1] < float("inf"):
            raise UserError(
                f"data.dir={text}: `{item}` is not FOLDER:WEIGHT with a positive weight, as in `a:0.7,b:0.3`"
            )
        stores.append(open_store(folder))
    first, total = stores[0], sum(weights)
    for store in stores[1:]:
        if not store.tokenizer_id.matches(first.tokenizer_id):
            raise UserError(
                f"data.dir={text}: {store.folder} was made with tokenizer {store.tokenizer_id}, but {first.folder} "
                f"with {first.tokenizer_id}; the members of a mixture need the same tokenizer"
            )
    splits = {}
    for name in SPLITS:
        members = [(s.split(name), w / total) for s, w in zip(stores, weights, strict=True) if s.split(name).n_tokens]
        splits[name] = Mixture(members) if members else first.split(name)
    return dataclasses.replace(first, splits=splits, members=tuple(member for s in stores for member in s.members))


def _open_foreign(folder: str) -> TokenStore:
    """nanoGPT's `train.bin` and `val.bin`, or llm.c's shards; both hold GPT-2 ids as uint16."""
    if not glob.glob("*.bin", root_dir=folder):
        raise UserError(f"{folder} holds no token store ({MANIFEST}), no train.bin and no llm.c shards; {_RUN} first")
    splits, content = {}, []
    for name in SPLITS:
        if os.path.isfile(path := os.path.join(folder, f"{name}.bin")):
            shards = [_nanogpt_shard(path)]
        else:
            names = sorted(glob.glob(f"*{name}*.bin", root_dir=folder))
            shards = [_llmc_shard(os.path.join(folder, file)) for file in names]
        shards = [shard for shard in shards if shard.tokens]
        splits[name] = Split(name, shards, None, None, _GPT2["vocab_size"])
        content += [[name, shard.tokens, _ends(shard.path)] for shard in shards]
    return TokenStore(folder, **_GPT2, manifest=None, splits=splits, members=((folder, _digest(content)),))


def _digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _ends(path: str) -> str:
    """sha256 of the first and last 64 KiB of a file without a checksum, which may have many gigabytes."""
    with open(path, "rb") as file:
        begin = file.read(_END_BYTES)
        file.seek(max(0, os.path.getsize(path) - _END_BYTES))
        return hashlib.sha256(begin + file.read()).hexdigest()


def _nanogpt_shard(path: str) -> _Shard:
    size = os.path.getsize(path)
    if size % 2:
        raise UserError(f"{path} has {size} bytes, an odd number, so it does not hold uint16 ids as nanoGPT's files do")
    return _Shard(path, np.dtype("<u2"), 0, size // 2)


def _llmc_shard(path: str) -> _Shard:
    words = np.fromfile(path, "<i4", 3)
    if len(words) < 3 or words[0] != _LLMC_MAGIC or words[1] != 1:
        raise UserError(f"{path} is neither in a manifest nor an llm.c shard (magic {_LLMC_MAGIC}, version 1)")
    return _shard(path, np.dtype("<u2"), _LLMC_HEADER, int(words[2]))


def _shard(path: str, dtype: np.dtype, offset: int, tokens: int) -> _Shard:
    """The shard, if the file has the right size."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing, though the store names it; remove the folder and {_RUN} again")
    size, expected = os.path.getsize(path), offset + tokens * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes, but its {tokens} tokens take {expected}: it is truncated or damaged; remove the "
            f"folder and {_RUN} again"
        )
    return _Shard(path, dtype, offset, tokens)
