"""The tokenizer `char`: an id per character, without end-of-text. Reads nanoGPT's `meta.pkl`.

nanoGPT's `data/shakespeare_char` writes `{"vocab_size": 65, "itos": {0: "\\n", ...}, "stoi": {"\\n": 0, ...}}`.
"""

import hashlib
import io
import json
import os
import pickletools
import struct
from collections.abc import Iterable, Iterator

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.data.vocabulary import Vocabulary, has_valid_utf8, valid_text
from trialgpt_jax.storage import files, json_files

CHARACTERS_FILE = "characters.json"  # a list of the characters in the order of their ids
META_FILE = "meta.pkl"  # nanoGPT's
_LONGEST_META = 64 << 20  # bytes; every character of Unicode takes 30 MB
_PLAIN = "a dict with vocab_size, itos and stoi, as nanoGPT's prepare.py writes it"


class CharTokenizer(Vocabulary):
    """One id per character; see `Vocabulary`. A text with any other character cannot be encoded."""

    def __init__(self, characters: list[str]):
        """`characters`: in the order of their ids. Raises ValueError unless they are distinct single characters."""
        if not characters:
            raise ValueError("there are no characters")
        for i, character in enumerate(characters):
            if not isinstance(character, str) or len(character) != 1 or not has_valid_utf8(character):
                raise ValueError(f"id {i} is {character!r:.40}, not one character")
        self.characters = characters
        self._ids = np.full(max(map(ord, characters)) + 1, -1, np.int64)  # code point -> id
        self._ids[[ord(character) for character in characters]] = np.arange(len(characters))
        if (self._ids >= 0).sum() != len(characters):
            raise ValueError("a character has two ids")
        digest = hashlib.sha256("\n".join(["char", *(f"{ord(character):x}" for character in characters)]).encode())
        super().__init__("char", {i: c.encode() for i, c in enumerate(characters)}, None, digest.hexdigest())

    def id_of(self, character: str) -> int | None:
        """The id of a character; None if it has none."""
        point = ord(character)
        found = int(self._ids[point]) if point < len(self._ids) else -1
        return found if found >= 0 else None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; half a surrogate pair counts as U+FFFD. Raises UserError as `encode_to_numpy`."""
        return self.encode_to_numpy(valid_text(text)).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32 [n].

        Raises:
          UserError: names the first character without an id and its position, counted from 0.
        """
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        known = points < len(self._ids)
        ids = np.where(known, self._ids[np.where(known, points, 0)], -1)
        if (ids < 0).any():
            place = int(np.argmax(ids < 0))
            raise UserError(
                f"character {text[place]!r} (U+{ord(text[place]):04X}) at position {place} of the text is not among "
                f"the {self.vocab_size} characters of the tokenizer"
            )
        return ids.astype(np.uint32)

    def save(self, folder: str) -> None:
        """Writes the characters atomically to `<folder>/characters.json`."""
        files.write(os.path.join(folder, CHARACTERS_FILE), json.dumps(self.characters))


def load_characters(folder: str) -> CharTokenizer:
    """The tokenizer that `CharTokenizer.save` has written. Raises UserError if the file is missing or damaged."""
    path = os.path.join(folder, CHARACTERS_FILE)
    try:
        return CharTokenizer(json_files.read(path, list[str]))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it holds the characters of the tokenizer char") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a list of characters: {' '.join(str(error).split())}") from None


def from_texts(texts: Iterable[str]) -> CharTokenizer:
    """The tokenizer of all characters in some texts, in the order of their code points, as nanoGPT's prepare.py.

    Raises UserError if there are none.
    """
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise UserError("data.tokenizer=char: the corpus has no characters")
    return CharTokenizer(sorted(found))


def read_meta(path: str) -> CharTokenizer:
    """The tokenizer in nanoGPT's `meta.pkl`. Only dicts, strings and numbers are read, so no code can run.

    Raises:
      UserError: it cannot be read, has other contents, or its ids are not 0 ... vocab_size-1, one character each.
    """
    try:
        if (size := os.path.getsize(path)) > _LONGEST_META:
            raise ValueError(f"it has {size} bytes, more than {_LONGEST_META}")
        with open(path, "rb") as file:
            data = file.read(size)
        if files.is_lfs_pointer(data):
            raise ValueError("it is a Git LFS pointer; fetch the file itself")
        return _tokenizer(_unpickle(data))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path} cannot be used as the tokenizer of the ids beside it: {why}") from None


# Opcodes of a pickle that put a plain value on the stack
_VALUES = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_VALUES += ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


def _unpickle(data: bytes) -> object:
    """The dicts, lists, strings and numbers in a pickle, whose opcodes are read one by one.

    Python's own unpickler is not used: every opcode that refers to code or to anything outside the file is refused.

    Raises:
      ValueError: any other opcode, or a file that is damaged.
    """
    try:
        return _run(pickletools.genops(io.BytesIO(data)))
    except _Refused as error:
        raise ValueError(f"it is not {_PLAIN}: {error}, and only dicts, strings and numbers are read") from None
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, struct.error):
        raise ValueError(f"it is not {_PLAIN}: it is not a whole pickle") from None


class _Refused(Exception):
    pass


def _run(opcodes: Iterator[tuple]) -> object:
    stack, memo = [], {}

    def since_mark() -> list:
        place = len(stack) - 1 - stack[::-1].index(_MARK)
        values = stack[place + 1 :]
        del stack[place:]
        return values

    for opcode, argument, _ in opcodes:
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "DICT":
            values = since_mark()
            stack.append(dict(zip(values[::2], values[1::2], strict=True)))
        elif name == "LIST":
            stack.append(since_mark())
        elif name in ("SETITEM", "SETITEMS"):
            values = since_mark() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            stack[-1].update(zip(values[::2], values[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            values = since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(values)
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "STOP":
            return stack.pop()
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            names = argument.split(" ") if argument else stack[-2:]
            raise _Refused(f"it refers to {'.'.join(map(str, names))}")
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(f"it has the opcode {name}")
    raise ValueError("no STOP")


def _tokenizer(meta: object) -> CharTokenizer:
    """Raises ValueError if the contents are not nanoGPT's."""
    if not isinstance(meta, dict) or not {"vocab_size", "itos", "stoi"} <= meta.keys():
        held = f"the keys {sorted(map(str, meta))!r:.80}" if isinstance(meta, dict) else f"a {type(meta).__name__}"
        raise ValueError(f"it holds {held}, not {_PLAIN}")
    size, itos, stoi = meta["vocab_size"], meta["itos"], meta["stoi"]
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    if type(size) is not int or not isinstance(itos, dict) or not isinstance(stoi, dict):
        raise ValueError(f"it is not {_PLAIN}")
    if len(itos) != size or any(type(i) is not int or not 0 <= i < size for i in itos):
        raise ValueError(f"vocab_size is {size}, but itos has {len(itos)} entries or ids that are not 0 ... {size - 1}")
    characters = json_files.check([itos[i] for i in range(size)], list[str])
    if len(stoi) != size or any(stoi.get(character) != i for i, character in enumerate(characters)):
        raise ValueError("stoi is not the inverse of itos")
    return CharTokenizer(characters)
