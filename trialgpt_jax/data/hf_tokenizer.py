"""Reads and writes Hugging Face's files of a GPT-2 tokenizer: `tokenizer.json`, or `vocab.json` with `merges.txt`.

Our tokenizers store a rank per token, theirs a list of merges; `merges` converts. The encodings differ in one point:
theirs encode the string `<|endoftext|>` inside a text as the special id, ours as ordinary text.
"""

import itertools
import json
import os

from trialgpt_jax import UserError
from trialgpt_jax.data.tokenizer import END_OF_TEXT, Tokenizer, byte_characters, load
from trialgpt_jax.storage import files, json_files

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


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


def write(tokenizer: Tokenizer, folder: str, block_size: int) -> None:
    """Writes the files that `GPT2TokenizerFast.from_pretrained` loads; `block_size`: the model's context in tokens."""
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
        **{f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "unk")},
    }
    for name, value in (("tokenizer.json", whole), ("vocab.json", vocab), ("tokenizer_config.json", about)):
        files.write(os.path.join(folder, name), json.dumps(value, ensure_ascii=False))
    files.write(os.path.join(folder, "merges.txt"), "".join(line + "\n" for line in ["#version: 0.2", *pairs]))


def read(folder: str) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, named `gpt2` if it is GPT-2's, otherwise `bpe:N`. None if it has none.

    Raises:
      UserError: the files are damaged, or it is not a byte-level BPE whose ids are the bytes, the merges in order and
        `<|endoftext|>`.
    """
    path = os.path.join(folder, "tokenizer.json")
    try:
        if os.path.exists(path):
            vocab, pairs = _read_whole(path)
        elif os.path.exists(path := os.path.join(folder, "vocab.json")):
            vocab = json_files.read(path)
            with open(path := os.path.join(folder, "merges.txt"), encoding="utf-8") as file:
                lines = file.read().split("\n")
            pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        else:
            return None
        tokenizer = _from_merges(vocab, pairs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        why = f"{error} is not what it should hold" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} cannot be used as a tokenizer: {why}; remove the tokenizer's files to convert only the weights"
        ) from None
    try:
        gpt2 = load("gpt2")
    except UserError:  # GPT-2's merges are not on this machine; as bpe:50257 this tokenizer does not need them
        return tokenizer
    return gpt2 if gpt2.hash == tokenizer.hash else tokenizer


def _read_whole(path: str) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges in a `tokenizer.json`; ValueError if it is not GPT-2's kind of tokenizer."""
    whole = json_files.read(path)
    model = whole["model"]
    kind = model.get("type", "BPE"), whole["normalizer"], whole["pre_tokenizer"]["type"]
    if kind != ("BPE", None, "ByteLevel") or whole["pre_tokenizer"]["add_prefix_space"]:
        raise ValueError(f"it is {kind[0]} after {kind[2]}, not GPT-2's byte-level BPE")
    if extra := [token["content"] for token in whole["added_tokens"] if token["content"] != END_OF_TEXT]:
        raise ValueError(f"it has the added token {extra[0]!r}")
    return model["vocab"], [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def _from_merges(vocab: dict[str, int], pairs: list[list[str]]) -> Tokenizer:
    if vocab.get(END_OF_TEXT) != len(vocab) - 1:
        raise ValueError(f"{END_OF_TEXT} has id {vocab.get(END_OF_TEXT)}, not the last one, {len(vocab) - 1}")
    byte_of = {char: b for b, char in byte_characters().items()}
    as_bytes = {text: bytes(byte_of[char] for char in text) for text in vocab if text != END_OF_TEXT}
    tokenizer = Tokenizer(f"bpe:{len(vocab)}", {token: vocab[text] for text, token in as_bytes.items()})
    if merges(tokenizer) != [(as_bytes[left], as_bytes[right]) for left, right in pairs]:
        raise ValueError("its merges are not in the order of its ids")
    return tokenizer
