"""Any byte-level BPE in a `tokenizer.json` of the library `tokenizers`, as of GPT-2, Llama 3 or Qwen, run by it.

Its ids are those that the library gives without added special tokens; the strings of special tokens inside a text are
encoded as ordinary text. The name is `hf:` and the first eight digits of the hash.
"""

import hashlib
import json
import os
from typing import TypedDict

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.data.vocabulary import Vocabulary, byte_characters, valid_text
from trialgpt_jax.storage import files, json_files

LIBRARY_FILE = "tokenizer.library.json"  # in a token store or workdir: {"eos_token": ..., "tokenizer": tokenizer.json}
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>")  # names of end-of-text without a config
_LARGEST_ID = 1 << 24  # more would be a model of many gigabytes
_NO_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no UTF-8 text has


class _Content(TypedDict):
    content: str


class _Config(TypedDict, total=False):
    eos_token: _Content | str | None


class _AddedToken(TypedDict):
    id: json_files.Count
    content: str


class _Model(TypedDict):
    vocab: dict[str, json_files.Count]
    merges: list


class _Whole(TypedDict):
    model: _Model
    added_tokens: list[_AddedToken]
    pre_tokenizer: dict


class _Saved(TypedDict):
    eos_token: str
    tokenizer: dict


class LibraryTokenizer(Vocabulary):
    """See `Vocabulary` and the module.

    Attributes:
      whole: the contents of its tokenizer.json.
      eos_token: the content of the end-of-text token.
      adds_tokens: its tokenizer.json puts special tokens around a text, such as Llama 3's <|begin_of_text|>.
    """

    def __init__(self, whole: dict, eos_token: str):
        """Raises ValueError if it is not a byte-level BPE that the library can run, or has no such end-of-text."""
        whole = {"added_tokens": []} | whole
        _check_kind(whole)
        tokens, token_bytes = _token_bytes(whole)
        if eos_token not in tokens:
            raise ValueError(f"its end-of-text token {eos_token!r} has no id")
        self.whole, self.eos_token = whole, eos_token
        model = whole["model"]
        deciding = [
            sorted(tokens.items()),
            [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]],
            [[token["content"], token.get("special", False)] for token in whole["added_tokens"]],
            [whole.get("normalizer"), whole["pre_tokenizer"], bool(model.get("ignore_merges")), eos_token],
        ]
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
        super().__init__(f"hf:{digest[:8]}", token_bytes, tokens[eos_token], digest)
        self._library = _load(whole, tokens)
        self.adds_tokens = bool(self._library.encode("").ids)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without end-of-text. Half a surrogate pair becomes U+FFFD."""
        return self._ids(valid_text(text))

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32 [n], without end-of-text. Releases the GIL, so threads run in parallel."""
        return np.array(self._ids(text), np.uint32)

    def _ids(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def save(self, folder: str) -> None:
        """Writes the tokenizer atomically to `<folder>/tokenizer.library.json`."""
        value = {"eos_token": self.eos_token, "tokenizer": self.whole}
        files.write(os.path.join(folder, LIBRARY_FILE), json.dumps(value, ensure_ascii=False))


def load_library(folder: str) -> LibraryTokenizer:
    """The tokenizer that `LibraryTokenizer.save` has written. Raises UserError if the file is missing or damaged."""
    path = os.path.join(folder, LIBRARY_FILE)
    try:
        saved = json_files.read(path, _Saved)
        return LibraryTokenizer(saved["tokenizer"], saved["eos_token"])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it holds a tokenizer that came from a file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be used as a tokenizer: {' '.join(str(error).split())}") from None


def from_json(whole: dict, config: dict) -> LibraryTokenizer:
    """The tokenizer of a tokenizer.json.

    Args:
      whole: its contents.
      config: the contents of the tokenizer_config.json beside it, which may name the end-of-text token `eos_token`.

    Raises:
      ValueError: as `LibraryTokenizer`, or no end-of-text token is known.
      UserError: `tokenizers` is not installed.
    """
    whole = {"added_tokens": []} | whole
    _check_kind(whole)
    eos = json_files.check(config, _Config).get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    if eos is None:
        known = whole["model"]["vocab"].keys() | {token["content"] for token in whole["added_tokens"]}
        eos = next((name for name in _ENDS if name in known), None)
    if eos is None:
        raise ValueError('no end-of-text token is known; name one as "eos_token" in tokenizer_config.json beside it')
    return LibraryTokenizer(whole, eos)


def _check_kind(whole: dict) -> None:
    model, step = whole.get("model"), whole.get("pre_tokenizer")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE" or not _is_byte_level(step):
        after = step.get("type") if isinstance(step, dict) else "no pre-tokenizer"
        raise ValueError(f"it is {kind} after {after}; supported is BPE after ByteLevel, as GPT-2's or Llama 3's")
    json_files.check(whole, _Whole)
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"its model has {option}={model[option]!r}, which a byte-level BPE does not use")


def _is_byte_level(step: object) -> bool:
    if not isinstance(step, dict):
        return False
    inner = step.get("pretokenizers")
    return step.get("type") == "ByteLevel" or (isinstance(inner, list) and any(map(_is_byte_level, inner)))


def _token_bytes(whole: dict) -> tuple[dict[str, int], dict[int, bytes]]:
    """Token -> id, and id -> bytes; ValueError unless they are those of a byte-level vocabulary."""
    byte_of = {char: b for b, char in byte_characters().items()}
    added = {token["content"]: token["id"] for token in whole["added_tokens"]}
    tokens, found = whole["model"]["vocab"] | added, {}
    for text, i in tokens.items():
        if i > _LARGEST_ID:
            raise ValueError(f"token {text!r:.40} has id {i}, more than {_LARGEST_ID}")
        if i in found:
            raise ValueError(f"two tokens have id {i}")
        try:
            found[i] = text.encode() if text in added else bytes(byte_of[char] for char in text)
        except (KeyError, UnicodeEncodeError):
            raise ValueError(f"token {text!r:.40} is not made of the characters that stand for bytes") from None
    singles = {piece for piece in found.values() if len(piece) == 1}
    if missing := [b for b in range(256) if b not in _NO_UTF8 and bytes([b]) not in singles]:
        raise ValueError(f"byte {missing[0]} has no token, so not every text can be encoded")
    return tokens, found


def _load(whole: dict, tokens: dict[str, int]):
    try:
        import tokenizers  # late: an extra
    except ImportError:
        raise UserError(
            "a tokenizer from a tokenizer.json needs the extra `tokenizers`: `pip install tokenizers`"
        ) from None
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(whole))
    except Exception as error:
        if type(error) is not Exception:  # the library raises plain Exceptions for wrong contents
            raise
        raise ValueError(f"the library tokenizers refuses it: {error}") from None
    # The library numbers added tokens itself, whatever the file says.
    if (theirs := library.get_vocab(with_added_tokens=True)) != tokens:
        text = next(text for text in tokens if theirs.get(text) != tokens[text])
        raise ValueError(
            f"token {text!r:.40} has id {tokens[text]}, but the library tokenizers gives it {theirs.get(text)}: the "
            "ids of added tokens must follow those of the model without a gap"
        )
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # as ordinary text
    return library
