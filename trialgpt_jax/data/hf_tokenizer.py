"""Reads and writes Hugging Face's files of a tokenizer: `tokenizer.json`, or GPT-2's `vocab.json` with `merges.txt`.

Our BPEs store a rank per token, theirs a list of merges; `merges` converts. The encodings differ in one point: theirs
encode the string `<|endoftext|>` inside a text as the special id, ours as ordinary text.
"""

import itertools
import json
import os
from typing import TypedDict

from trialgpt_jax import UserError
from trialgpt_jax.data import library_tokenizer
from trialgpt_jax.data.char_tokenizer import CharTokenizer
from trialgpt_jax.data.library_tokenizer import LibraryTokenizer
from trialgpt_jax.data.tokenizer import END_OF_TEXT, Tokenizer, load
from trialgpt_jax.data.vocabulary import Vocabulary, byte_characters
from trialgpt_jax.storage import files, json_files

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# A token per character, newlines included. Decoding joins them.
_SINGLE = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
_LONGEST = 1 << 28  # bytes; the tokenizer.json of a model with 256,000 ids has 34 MB


class _Any(TypedDict):
    model: dict


class _PlainModel(TypedDict):
    vocab: dict[str, json_files.Count]
    merges: list[str | list[str]]


class _PlainAdded(TypedDict):
    content: str


class _Plain(TypedDict):
    model: _PlainModel
    added_tokens: list[_PlainAdded]


def merges(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """The two parts of every token that is not a single byte, in the order of ids: what all earlier merges make of it.

    Raises UserError if a token is not a merge of two earlier tokens.
    """
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.eot_id)}
    found = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] >= rank:
                raise UserError(f"tokenizer {tokenizer.name}: id {rank} is not a merge of two smaller ids")
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def write(tokenizer: Vocabulary, folder: str, block_size: int) -> None:
    """Writes the files that `AutoTokenizer.from_pretrained` loads, of GPT-2's kind `GPT2TokenizerFast` as well.

    They encode a text without special tokens around it, as training and `infer` do, and pad with end-of-text.

    Args:
      tokenizer: any of ours.
      folder: exists.
      block_size: the model's context in tokens.
    """
    about = {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, Tokenizer):
        _write_gpt2_kind(tokenizer, folder, block_size)
        return
    about["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer, LibraryTokenizer):
        whole = tokenizer.whole
        if tokenizer.adds_tokens:  # neither training nor `infer` adds them
            whole = whole | {"post_processor": None}
        about |= {f"{name}_token": tokenizer.eos_token for name in ("bos", "eos", "pad")}
    else:
        whole = _of_characters(tokenizer)
    for name, value in (("tokenizer.json", whole), ("tokenizer_config.json", about)):
        files.write(os.path.join(folder, name), json.dumps(value, ensure_ascii=False))


def _of_characters(tokenizer: CharTokenizer) -> dict:
    """A tokenizer.json that refuses a text with another character, because its unk_token has no id."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": _SINGLE,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {character: i for i, character in enumerate(tokenizer.characters)},
            "unk_token": "<unk>",
        },
    }


def _write_gpt2_kind(tokenizer: Tokenizer, folder: str, block_size: int) -> None:
    characters = byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[b] for b in token)

    vocab = {text(tokenizer.token_bytes(i)): i for i in range(tokenizer.eot_id)} | {END_OF_TEXT: tokenizer.eot_id}
    pairs = [f"{text(left)} {text(right)}" for left, right in merges(tokenizer)]
    special = {"content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.eot_id, **special, "special": True}],
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": _BYTE_LEVEL | {"trim_offsets": False},
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": pairs,
        },
    }
    about = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        **{f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "pad", "unk")},
    }
    for name, value in (("tokenizer.json", whole), ("vocab.json", vocab), ("tokenizer_config.json", about)):
        files.write(os.path.join(folder, name), json.dumps(value, ensure_ascii=False))
    files.write(os.path.join(folder, "merges.txt"), "".join(line + "\n" for line in ["#version: 0.2", *pairs]))


def read(folder: str) -> Vocabulary | None:
    """The tokenizer of a Hugging Face folder, see `read_file`. None if it has none.

    Raises:
      UserError: the files are damaged or of another kind.
    """
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        return read_file(path)
    if not os.path.exists(path := os.path.join(folder, "vocab.json")):
        return None
    try:
        vocab = json_files.check(_read_json(path), dict[str, json_files.Count])
        lines = _read_bytes(path := os.path.join(folder, "merges.txt")).decode().split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return _named(_from_merges(vocab, pairs))
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from None


def read_file(path: str) -> Vocabulary:
    """The tokenizer in a `tokenizer.json`.

    Named `gpt2` if it is GPT-2's, `bpe:N` or `char` if it is of the kinds that we train, otherwise `hf:...`, which the
    library `tokenizers` runs. Its end-of-text is then the eos_token of the tokenizer_config.json beside it, if any.

    Raises:
      UserError: the file is damaged or not a byte-level BPE.
    """
    try:
        whole = json_files.check(_read_json(path), _Any)
        if whole["model"].get("type") == "WordLevel":
            return _from_characters(whole)
        try:
            plain = _from_merges(*_plain(whole))
        except ValueError as error:
            reason = error
        else:
            return _named(plain)
        beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
        config = json_files.check(_read_json(beside), dict) if os.path.exists(beside) else {}
        try:
            return library_tokenizer.from_json(whole, config)
        except UserError as error:  # the library is not installed
            raise UserError(f"{path} is not GPT-2's kind of BPE ({reason}); {error}") from None
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from None


def _unusable(path: str, error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(f"{path} cannot be used as a tokenizer: {why}")


def _read_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        data = file.read(_LONGEST + 1)
    if files.is_lfs_pointer(data):
        raise ValueError("it is a Git LFS pointer; fetch the file itself")
    if len(data) > _LONGEST:
        raise ValueError(f"it has more than {_LONGEST >> 20} MiB")
    return data


def _read_json(path: str) -> object:
    return json_files.parse(_read_bytes(path))


def _named(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself, or `gpt2` if it is GPT-2's."""
    try:
        gpt2 = load("gpt2")
    except UserError:  # GPT-2's merges are not on this machine; as bpe:50257 this tokenizer does not need them
        return tokenizer
    return gpt2 if gpt2.hash == tokenizer.hash else tokenizer


def _from_characters(whole: dict) -> CharTokenizer:
    """The tokenizer in a file of `_of_characters`; ValueError otherwise."""
    vocab = json_files.check(whole["model"].get("vocab"), dict[str, json_files.Count])
    if whole.get("pre_tokenizer") != _SINGLE or whole.get("normalizer") or whole.get("added_tokens"):
        raise ValueError("it is WordLevel; of that kind only a tokenizer of single characters is supported")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"its ids are not 0 ... {len(vocab) - 1}")
    return CharTokenizer(sorted(vocab, key=vocab.get))


def _plain(whole: dict) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges in a `tokenizer.json`; ValueError if it is not GPT-2's kind of tokenizer."""
    model, step = whole["model"], whole.get("pre_tokenizer")
    kind = model.get("type", "BPE"), whole.get("normalizer"), step.get("type") if isinstance(step, dict) else None
    if kind != ("BPE", None, "ByteLevel") or step.get("add_prefix_space") or not step.get("use_regex", True):
        raise ValueError(f"it is {kind[0]} after {kind[2]}")
    json_files.check(whole, _Plain)
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(option):
            raise ValueError(f"its model has {option}={model[option]!r}")
    if extra := [token["content"] for token in whole["added_tokens"] if token["content"] != END_OF_TEXT]:
        raise ValueError(f"it has the added token {extra[0]!r}")
    return model["vocab"], [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def _from_merges(vocab: dict[str, int], pairs: list[list[str]]) -> Tokenizer:
    """The BPE of these ids and merges; ValueError unless its ids are the bytes, the merges in order and end-of-text."""
    if vocab.get(END_OF_TEXT) != len(vocab) - 1:
        raise ValueError(f"{END_OF_TEXT} has id {vocab.get(END_OF_TEXT)}, not the last one, {len(vocab) - 1}")
    byte_of = {char: b for b, char in byte_characters().items()}
    try:
        as_bytes = {text: bytes(byte_of[char] for char in text) for text in vocab if text != END_OF_TEXT}
        found = [(as_bytes[left], as_bytes[right]) for left, right in pairs]
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r:.40} is not made of tokens or of characters that stand for bytes") from None
    try:
        tokenizer = Tokenizer(f"bpe:{len(vocab)}", {token: vocab[text] for text, token in as_bytes.items()})
        expected = merges(tokenizer)
    except UserError as error:
        raise ValueError(str(error)) from None
    if expected != found:
        raise ValueError("its merges are not in the order of its ids")
    return tokenizer
