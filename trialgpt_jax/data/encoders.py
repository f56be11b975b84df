"""Encoders by name: the implementations that turn many texts into token ids. All give the ids of `tokenizer.encode`."""

import itertools
import tempfile
from collections.abc import Callable, Iterable

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data.tokenizer import Tokenizer
from trialgpt_jax.data.vocabulary import Vocabulary
from trialgpt_jax.schema import choose

Encode = Callable[[list[str]], list[np.ndarray]]  # texts -> their ids, uint32 [n] each, without end-of-text


def batch_encoder(tokenizer: Vocabulary, encoder: str) -> Encode:
    """The encoder `tiktoken`, or `gigatoken`, several times as fast. It releases the GIL, so threads can share it.

    Both are for BPEs; any other tokenizer encodes by itself, whatever the encoder.

    Raises UserError if it is unknown or not installed.
    """
    return choose(ENCODERS, encoder, "data.encoder")(tokenizer)


def check_encoder(tokenizer: Vocabulary, encoder: str, texts: Iterable[str]) -> None:
    """Compares an encoder with tiktoken on a sample of the corpus; UserError if the ids differ."""
    encode = batch_encoder(tokenizer, encoder)
    if encoder == "tiktoken":
        return
    if not isinstance(tokenizer, Tokenizer):
        say(f"data.encoder={encoder} is not used: it does not have the tokenizer {tokenizer.name}")
        return
    for text in texts:
        if not np.array_equal(encode([text])[0], tokenizer.encode_to_numpy(text)):
            raise UserError(
                f"data.encoder={encoder} differs from tiktoken on {text[:40]!r}...; use data.encoder=tiktoken"
            )


def _tiktoken(tokenizer: Vocabulary) -> Encode:
    return lambda texts: [tokenizer.encode_to_numpy(text) for text in texts]


def _gigatoken(tokenizer: Vocabulary) -> Encode:
    if not isinstance(tokenizer, Tokenizer):
        return _tiktoken(tokenizer)
    try:
        import gigatoken
    except ImportError:
        raise UserError(
            "data.encoder=gigatoken needs the extra `fast`: `pip install gigatoken`, or use data.encoder=tiktoken"
        ) from None
    with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
        file.write(tokenizer.ranks_file())
        file.flush()
        fast = gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer="gpt2")  # PATTERN; no special tokens

    def encode(texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        rows = fast.encode_batch(texts, parallel=False).layout  # single-threaded: called from several threads
        offsets, ids = np.asarray(rows.offsets.data), np.asarray(rows.content.data)
        return [ids[begin:end] for begin, end in itertools.pairwise(offsets.tolist())]

    return encode


ENCODERS = {"tiktoken": _tiktoken, "gigatoken": _gigatoken}
