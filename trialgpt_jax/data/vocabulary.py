"""What all tokenizers share: identity, ids <-> bytes, and the values of `data.tokenizer`.

Every tokenizer has `encode`, `encode_to_numpy` and `save` besides the attributes and methods of `Vocabulary`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from trialgpt_jax import UserError

FROM, FILE = "from:", "file:"  # of `data.tokenizer`: a folder with a tokenizer, and a tokenizer.json
TOKENIZERS = (
    "`gpt2`, `bpe:N` with N ids, N > 256, `char`, `from:FOLDER` (the tokenizer of a workdir or token store), or "
    "`file:PATH/tokenizer.json`"
)


class TokenizerId(NamedTuple):
    """The identity of a tokenizer: its name and `Vocabulary.hash`; hash None = not recorded."""

    name: str
    hash: str | None

    def matches(self, other: "TokenizerId") -> bool:
        """Whether both can be the same tokenizer: equal names, and equal hashes where both are known."""
        return self.name == other.name and (None in (self.hash, other.hash) or self.hash == other.hash)

    def __str__(self) -> str:
        return f"{self.name} ({self.hash[:8]})" if self.hash else self.name


class Vocabulary:
    """Ids and their bytes.

    Attributes:
      name: `gpt2`, `bpe:N`, `char` or `hf:` and eight hex digits.
      vocab_size: number of ids; with gaps in the ids, the largest one and 1.
      eot_id: of end-of-text, which ends every document; None if the tokenizer has none.
      hash: sha256 (hex) of everything that decides the ids: equal hashes encode equally.
      id: name and hash.
      dtype: of its ids in a token store, `uint16` or `uint32`.
    """

    def __init__(self, name: str, token_bytes: Mapping[int, bytes], eot_id: int | None, digest: str):
        """`token_bytes`: id -> its bytes; `digest`: the hash."""
        self.name, self.eot_id, self.hash, self._bytes = name, eot_id, digest, token_bytes
        self.vocab_size = max(token_bytes) + 1
        self.id = TokenizerId(name, digest)
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id; UserError outside the vocabulary, e.g. for a padding row of a model's embeddings."""
        if (found := self._bytes.get(token_id)) is None:
            raise UserError(
                f"token id {token_id} has no text: the tokenizer {self.name} has ids 0 ... {self.vocab_size - 1}"
            )
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD. Raises UserError as `token_bytes` does."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")


def is_tokenizer(value: str) -> bool:
    """Whether a value of `data.tokenizer` is well-formed, see `TOKENIZERS`; nothing is opened."""
    if value in ("gpt2", "char"):
        return True
    if value.startswith((FROM, FILE)):
        return len(value) > len(FROM) and "\0" not in value
    if re.fullmatch("hf:[0-9a-f]{8}", value):  # in the snapshot of a workdir
        return True
    return bool(re.fullmatch("bpe:[1-9][0-9]{2,8}", value)) and int(value[4:]) > 256


def has_valid_utf8(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    return not re.search("[\ud800-\udfff]", text)


def valid_text(text: str) -> str:
    """The text with U+FFFD for half a surrogate pair, which is not valid UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def byte_characters() -> dict[int, str]:
    """Byte -> the printable character that represents it in byte-level vocabularies, in the order of GPT-2's ids."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
