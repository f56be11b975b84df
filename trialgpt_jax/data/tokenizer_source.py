"""The tokenizer of another workdir, token store or file: `data.tokenizer=from:FOLDER` and `file:tokenizer.json`."""

import glob
import os
from typing import TypedDict

from trialgpt_jax import UserError
from trialgpt_jax.data import hf_tokenizer, tokenizer
from trialgpt_jax.data.char_tokenizer import META_FILE
from trialgpt_jax.data.vocabulary import FILE, FROM, TokenizerId, Vocabulary
from trialgpt_jax.storage import files, json_files


class _Data(TypedDict):
    tokenizer: str


class _Snapshot(TypedDict):
    data: _Data


def resolve(value: str) -> Vocabulary | None:
    """The tokenizer that a value of `data.tokenizer` names by `from:` or `file:`; None for any other value.

    Its `name` is what a token store records: `gpt2`, `bpe:N`, `char` or `hf:...`. Its `save` copies its files.

    Raises:
      UserError: there is none, or its files are damaged; the message begins with the value.
    """
    if not value.startswith((FROM, FILE)):
        return None
    try:
        if value.startswith(FILE):
            return hf_tokenizer.read_file(_file(os.path.expanduser(value.removeprefix(FILE))))
        return _of_folder(os.path.expanduser(value.removeprefix(FROM)))
    except UserError as error:
        raise UserError(f"data.tokenizer={value}: {error}") from None


def guess(vocab_size: int) -> TokenizerId:
    """The tokenizer that a model without tokenizer files is taken to have."""
    name = "gpt2" if vocab_size >= 50257 or vocab_size <= 256 else f"bpe:{vocab_size}"
    if name == "gpt2":
        try:
            return tokenizer.load(name).id
        except UserError:  # GPT-2's merges are not on this machine
            pass
    return TokenizerId(name, None)


def _file(path: str) -> str:
    if os.path.isdir(path):
        path = os.path.join(path, tokenizer.IDENTITY_FILE)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    return path


def _of_folder(folder: str) -> Vocabulary:
    if not files.is_remote(folder) and not os.path.isdir(folder):
        if os.path.exists(folder):
            raise UserError(f"{folder} is not a folder")
        if "," in folder:
            raise UserError("that is a mixture; it takes one workdir or token store")
        raise UserError(f"{folder} does not exist")
    if files.exists(os.path.join(folder, tokenizer.MANIFEST_FILE)):
        return tokenizer.from_store(folder)
    if files.exists(os.path.join(folder, "config.json")) and (configured := _configured(folder)):
        return tokenizer.from_workdir(folder, configured)
    if files.exists(os.path.join(folder, META_FILE)) or glob.glob("*.bin", root_dir=folder):
        if glob.glob("progress_*.json", root_dir=folder):
            raise UserError(f"{folder} is an unfinished token store")
        return tokenizer.from_store(folder)
    if not files.is_remote(folder) and (found := hf_tokenizer.read(folder)):
        return found
    raise UserError(f"{folder} holds no tokenizer; it is neither a workdir nor a token store")


def _configured(folder: str) -> str | None:
    """The data.tokenizer of a workdir's snapshot; None if config.json is not a workdir's."""
    try:
        return json_files.read(os.path.join(folder, "config.json"), _Snapshot)["data"]["tokenizer"]
    except (OSError, ValueError):
        return None
