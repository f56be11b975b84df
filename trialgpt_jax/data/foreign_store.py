"""Token stores of other trainers: nanoGPT's `train.bin` and `val.bin`, and llm.c's shards.

They record no tokenizer. The ids are those of the characters in nanoGPT's `meta.pkl` if that is beside them, and
otherwise GPT-2's. Files that contradict this are refused.
"""

import glob
import hashlib
import os
from typing import NamedTuple

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data.char_tokenizer import META_FILE, read_meta
from trialgpt_jax.data.splits import NAMES, Shard, Split
from trialgpt_jax.data.vocabulary import TokenizerId
from trialgpt_jax.storage import files

# llm.c: 256 int32 words: magic, version, tokens, ...; then the ids
_MAGIC, _VERSION, _HEADER = 20240520, 1, 256 * 4
_LLAMA_MAGIC = 20240801  # uint32 ids of Llama 3's tokenizer
_EVAL_MAGIC = 20240522  # multiple-choice questions
_MANY = 10_000  # ids of English text hold one above 255 among the first few
_END_BYTES = 64 << 10
_MOST_CHECKED = 1 << 24  # ids that are compared with the vocabulary when a store is opened


class Found(NamedTuple):
    """What a folder holds.

    Attributes:
      shards: of each split, empty ones left out.
      tokenizer_id, vocab_size, eot_id: as of `TokenStore`.
      id_bytes: int64 [vocab_size], UTF-8 bytes of each id; None if they are not known.
      why: for the log, how the tokenizer is known.
    """

    shards: dict[str, list[Shard]]
    tokenizer_id: TokenizerId
    vocab_size: int
    eot_id: int | None
    id_bytes: np.ndarray | None
    why: str


def find(folder: str) -> Found | None:
    """The ids in a folder without a manifest; None if it has none.

    Raises:
      UserError: a file that is of neither format or damaged, or a `meta.pkl` that cannot be read.
    """
    if not glob.glob("*.bin", root_dir=glob.escape(folder)):
        return None
    shards = {}
    for name in NAMES:
        if os.path.isfile(path := os.path.join(folder, f"{name}.bin")):
            found = [_nanogpt_shard(path)]
        else:
            names = sorted(glob.glob(f"*{name}*.bin", root_dir=glob.escape(folder)))
            found = [_llmc_shard(os.path.join(folder, file)) for file in names]
        shards[name] = [shard for shard in found if shard.tokens]
    if not os.path.lexists(meta := os.path.join(folder, META_FILE)):  # a dangling link is an error
        return Found(shards, TokenizerId("gpt2", None), 50257, 50256, None, "")
    tokenizer = read_meta(meta)
    id_bytes = np.array([len(character.encode()) for character in tokenizer.characters])
    why = f" with the {tokenizer.vocab_size} characters in {META_FILE}"
    return Found(shards, tokenizer.id, tokenizer.vocab_size, None, id_bytes, why)


def check_ids(folder: str, split: Split, tokenizer_id: TokenizerId) -> None:
    """Compares ids from all over a split with its vocabulary; `batches` compares all that are read.

    Raises:
      UserError: an id beyond the vocabulary, or ids of four or eight bytes.
    """
    char = tokenizer_id.name == "char"
    name = f"the tokenizer char of {META_FILE}" if char else "gpt2, the tokenizer of such files,"
    checked = largest = 0
    for ids in split.sample(_MOST_CHECKED):
        high, low = ids[1::2], ids[::2]  # as halves of uint32 ids
        if len(ids) >= 256 and low.any() and (not high.any() or ((high < 4).all() and low.max() > 255)):
            raise UserError(
                f"{folder}: the {NAMES[split.name]} split holds uint32 ids, but nanoGPT's files hold uint16"
            )
        split.check_id(int(ids.max()), name)
        checked, largest = checked + len(ids), max(largest, int(ids.max()))
    if not char and checked >= _MANY and largest < 256:
        say(
            f"warning: {folder}: the largest of {checked:,} ids of the {NAMES[split.name]} split is {largest}, so they "
            f"are hardly GPT-2's; nanoGPT's character data have their {META_FILE} beside them"
        )


def shard(path: str, dtype: np.dtype, offset: int, tokens: int) -> Shard:
    """A file of `tokens` ids after `offset` bytes. Raises UserError if it is missing or has another size."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing, though the store names it")
    size, expected = os.path.getsize(path), offset + tokens * dtype.itemsize
    if size != expected:
        raise UserError(f"{path} has {size} bytes, but its {tokens} tokens take {expected}: it is truncated or damaged")
    return Shard(path, dtype, offset, tokens)


def ends(path: str) -> str:
    """sha256 of the first and last 64 KiB of a file without a checksum, which may have many gigabytes."""
    with open(path, "rb") as file:
        begin = file.read(_END_BYTES)
        file.seek(max(0, os.path.getsize(path) - _END_BYTES))
        return hashlib.sha256(begin + file.read()).hexdigest()


def _head(path: str) -> bytes:
    """The first bytes of a file. Raises UserError if they are those of a known other format."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if files.is_lfs_pointer(head):
        raise UserError(f"{path} is a Git LFS pointer; fetch the file itself")
    if head.startswith(b"\x93NUMPY"):
        raise UserError(f"{path} is a .npy file of numpy, but nanoGPT's files hold uint16 ids alone")
    return head


def _nanogpt_shard(path: str) -> Shard:
    head, size = _head(path), os.path.getsize(path)
    if _magic(head)[0] in (_MAGIC, _LLAMA_MAGIC, _EVAL_MAGIC):  # a shard of llm.c, renamed
        return _llmc_shard(path)
    if size % 2:
        raise UserError(f"{path} has {size} bytes, an odd number, so it does not hold uint16 ids as nanoGPT's files do")
    return Shard(path, np.dtype("<u2"), 0, size // 2)


def _llmc_shard(path: str) -> Shard:
    magic, version, tokens = _magic(_head(path))
    if magic == _LLAMA_MAGIC:
        raise UserError(
            f"{path} is an llm.c shard with uint32 ids of Llama 3's tokenizer (magic {magic}, version {version}); "
            f"only those with GPT-2's ids are read (magic {_MAGIC}, version {_VERSION})"
        )
    if magic == _EVAL_MAGIC:
        raise UserError(f"{path} is an llm.c file of multiple-choice questions (magic {magic}), not of text")
    if (magic, version) != (_MAGIC, _VERSION) or tokens < 0:
        raise UserError(
            f"{path} is neither in a manifest nor an llm.c shard of GPT-2's ids (magic {_MAGIC}, version {_VERSION}, "
            f"tokens); it begins with {magic}, {version}, {tokens}"
        )
    return shard(path, np.dtype("<u2"), _HEADER, tokens)


def _magic(head: bytes) -> tuple[int, int, int]:
    """Magic, version and tokens of an llm.c header; zeros for a shorter file."""
    return tuple(np.frombuffer(head, "<i4", 3).tolist()) if len(head) >= 12 else (0, 0, 0)
