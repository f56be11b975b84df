"""Opens and verifies token stores: shards of token ids and their manifest. Reads nanoGPT's and llm.c's files as well.

A token store is a folder of `train_00000.bin ...`, `val_00000.bin ...` (little-endian uint16, or uint32 for more than
65,536 ids; every document ends with the end-of-text id) and `manifest.json`, which is written last and lists them.
"""

import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import numpy as np

from trialgpt_jax import UserError, live_line
from trialgpt_jax.console import say
from trialgpt_jax.data import foreign_store
from trialgpt_jax.data.splits import Mixture, Shard, Split
from trialgpt_jax.data.vocabulary import TokenizerId
from trialgpt_jax.storage import files, json_files

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
_RUN = "run `trialgpt preprocess`"


class _Version(TypedDict):
    format_version: int


class _Tokenizer(TypedDict):
    name: str
    hash: str


class _Record(TypedDict):
    file: str
    split: Literal["train", "val"]
    tokens: json_files.Count
    documents: json_files.Count
    bytes: json_files.Count
    max_id: json_files.Count
    sha256: str


class _Input(TypedDict):
    files: json_files.Count
    bytes: json_files.Count
    sha256: str
    left_out: NotRequired[dict[str, json_files.Count]]


class _Manifest(TypedDict):
    tokenizer: _Tokenizer
    vocab_size: json_files.Size
    eot_id: json_files.Count | None
    dtype: Literal["uint16", "uint32"]
    shards: list[_Record]
    input: NotRequired[_Input]
    source_options: NotRequired[dict[str, object]]
    sources: NotRequired[dict[str, tuple[json_files.Count, json_files.Count, json_files.Count]]]
    skipped: NotRequired[dict[str, json_files.Count]]


@dataclass(frozen=True)
class TokenStore:
    """An open token store.

    Attributes:
      folder, manifest: of a mixture, those of the first member; no manifest with nanoGPT's and llm.c's files.
      tokenizer_id: the tokenizer that made the ids; its hash is None if they are taken for GPT-2's.
      vocab_size, eot_id: number of ids, end-of-text included, and the id of end-of-text; None if there is none.
      splits: `train` and `val`; one without shards has no tokens.
      members: folder and sha256 (hex) of this store, or of every member of a mixture. The sha256 is that of the tokens'
        checksums, not of the folder's name; of foreign files that of sizes, beginnings and ends.
    """

    folder: str
    tokenizer_id: TokenizerId
    vocab_size: int
    eot_id: int | None
    manifest: dict | None
    splits: dict[str, Split | Mixture]
    members: tuple[tuple[str, str], ...]

    def __post_init__(self):
        if not self.splits["train"].n_tokens:
            raise UserError(
                f"{self.folder} is empty: its training split has no tokens; remove the folder and {_RUN} with a corpus "
                "that has documents"
            )

    @property
    def tokenizer(self) -> str:
        """The name of the tokenizer."""
        return self.tokenizer_id.name

    def split(self, name: str) -> Split | Mixture:
        return self.splits[name]


def open_store(folder: str) -> TokenStore:
    """Opens a token store without reading all of its tokens, so time and memory do not depend on its size.

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
    with live_line.task("verifying", sum(record["tokens"] for record in store.manifest["shards"])) as shown:
        for record in store.manifest["shards"]:
            _verify_shard(store, record, shown.advance)
    return store.manifest["shards"]


def _verify_shard(store: "TokenStore", record: dict, read: Callable[[int], None]) -> None:
    """Raises UserError if a shard differs from its record; `read` gets the number of ids of each piece."""
    path, folder = os.path.join(store.folder, record["file"]), store.folder
    if not record["tokens"]:  # of empty documents, by a tokenizer without end-of-text
        return
    ids = np.memmap(path, np.dtype(store.manifest["dtype"]).newbyteorder("<"), "r")
    digest, largest, documents = hashlib.sha256(), 0, 0
    for start in range(0, len(ids), 1 << 23):
        piece = np.asarray(ids[start : start + (1 << 23)])
        digest.update(piece.data)
        largest = max(largest, int(piece.max()))
        documents += 0 if store.eot_id is None else int(np.count_nonzero(piece == store.eot_id))
        read(len(piece))
    expectations = [("sha256", digest.hexdigest(), record["sha256"]), ("largest id", largest, record["max_id"])]
    if store.eot_id is not None:
        expectations.append(("number of documents", documents, record["documents"]))
        expectations.append(("last id", int(ids[-1]), store.eot_id))
    for what, found, expected in expectations:
        if found != expected:
            raise UserError(
                f"{path} is damaged: its {what} is {found}, but should be {expected}; remove {folder} and {_RUN} again"
            )


def _read_manifest(path: str) -> dict:
    try:
        manifest = json_files.read(path, _Version)
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {manifest['format_version']}, but this program reads {FORMAT_VERSION}"
            )
        manifest = json_files.check(manifest, _Manifest)
    except (ValueError, OSError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path} is not a valid manifest ({why}); remove the folder and {_RUN} again") from None
    for record in manifest["shards"]:
        if not files.is_plain_name(record["file"]):
            raise UserError(f"{path}: the shard {record['file']!r} is not a plain file name inside the folder")
    return manifest


def _open_manifest(folder: str, manifest: dict) -> TokenStore:
    dtype, vocab_size = np.dtype(manifest["dtype"]).newbyteorder("<"), manifest["vocab_size"]
    splits = {}
    for name in SPLITS:
        records = [record for record in manifest["shards"] if record["split"] == name]
        shards = []
        for record in records:
            path, largest = os.path.join(folder, record["file"]), record["max_id"]
            shards.append(_shard(path, dtype, record["tokens"]))
            if largest >= vocab_size:
                raise UserError(f"{path}: largest id {largest}, but the vocabulary has {vocab_size} ids; {_RUN} again")
        largest = max((record["max_id"] for record in records), default=None)
        shards = [shard for shard in shards if shard.tokens]
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
                f"with {first.tokenizer_id}; the members of a mixture need the same tokenizer: preprocess that text "
                f"with --config.data.tokenizer=from:{first.folder}"
            )
    splits = {}
    for name in SPLITS:
        members = [(s.split(name), w / total) for s, w in zip(stores, weights, strict=True) if s.split(name).n_tokens]
        splits[name] = Mixture(members) if members else first.split(name)
    return dataclasses.replace(first, splits=splits, members=tuple(member for s in stores for member in s.members))


def _open_foreign(folder: str) -> TokenStore:
    """nanoGPT's `train.bin` and `val.bin`, or llm.c's shards."""
    if not (found := foreign_store.find(folder)):
        raise UserError(f"{folder} holds no token store ({MANIFEST}), no train.bin and no llm.c shards; {_RUN} first")
    splits, content = {}, []
    for name in SPLITS:
        splits[name] = Split(name, found.shards[name], None, None, found.vocab_size, found.id_bytes)
        content += [[name, shard.tokens, foreign_store.ends(shard.path)] for shard in found.shards[name]]
        foreign_store.check_ids(folder, splits[name], found.tokenizer_id)
    kept = (found.tokenizer_id, found.vocab_size, found.eot_id)
    store = TokenStore(folder, *kept, manifest=None, splits=splits, members=((folder, _digest(content)),))
    say(f"{folder} has no {MANIFEST}; its ids are taken for those of the tokenizer {found.tokenizer_id}{found.why}")
    return store


def _digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _shard(path: str, dtype: np.dtype, tokens: int) -> Shard:
    try:
        return foreign_store.shard(path, dtype, 0, tokens)
    except UserError as error:
        raise UserError(f"{error}; remove the folder and {_RUN} again") from None
