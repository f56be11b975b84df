"""A model on the Hugging Face hub as a local folder, `hf:owner/name@revision`; the tokenizer of such a folder.

The files are kept in the cache of `huggingface_hub` (`HF_HUB_CACHE`, `HF_HOME`). Without a connection, or with
`HF_HUB_OFFLINE=1`, those of an earlier download are used.
"""

import contextlib
import functools
import logging
import os
import re
import warnings
from collections.abc import Iterator

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data import hf_tokenizer, tokenizer_source
from trialgpt_jax.data.network import FIRST_SECONDS, bounded, with_retries
from trialgpt_jax.data.vocabulary import TokenizerId, Vocabulary
from trialgpt_jax.live_line import task

PREFIX = "hf:"
KNOWN = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
# Tokenizer, configuration and weights as safetensors in the top folder; nothing else is read.
_FILES = ("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors")
_FILES += ("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_FILES += ("special_tokens_map.json", "added_tokens.json")
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_ADDRESS = re.compile(r"^(hf:|https?://(huggingface|hf)\.co/)")
_REPO = re.compile(r"\w[\w-]*/[\w.-]+")  # may also be a path that is mistyped


def local_folder(source: str, field: str) -> str:
    """`source` itself if it is a folder or URL; of `hf:owner/name@revision` the folder of its downloaded files.

    Args:
      source: what the user gave.
      field: the flag or config field in which it was given, for messages.

    Raises:
      UserError: no such folder (a known name on the hub is proposed), no such repository, no connection.
    """
    name = _ADDRESS.sub("", source).rstrip("/")
    if source.startswith(PREFIX) and name.lower() not in KNOWN:
        return _download(source, field)
    if "://" in name or os.path.exists(source):
        return source
    repo = KNOWN.get(name.lower()) or (name if _REPO.fullmatch(name) else None)
    flag = field if field.startswith("--") else f"--config.{field}"
    hint = f"; for the model {repo} on the Hugging Face hub give {flag}={PREFIX}{repo}" if repo else ""
    raise UserError(f"{field}={source}: there is no such folder{hint}")


def tokenizer_of(folder: str, vocab_size: int) -> Vocabulary | None:
    """The tokenizer in a Hugging Face folder with a model of `vocab_size` ids; None if there is none.

    Raises:
      UserError: one that cannot be used, or has more ids than the model.
    """
    tokenizer = hf_tokenizer.read(folder)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}")
    return tokenizer


def decide_tokenizer(folder: str, vocab_size: int, configured: str) -> tuple[TokenizerId, Vocabulary | None]:
    """The tokenizer of a model that is imported from a Hugging Face folder.

    Args:
      folder: its own tokenizer comes first.
      vocab_size: of the model.
      configured: data.tokenizer; `from:FOLDER` or `file:PATH` is used for a folder without a tokenizer.

    Returns:
      The identity, and the tokenizer; None if the identity follows from the number of ids alone.

    Raises:
      UserError: as `tokenizer_of`, or the folder has another tokenizer than `configured`.
    """
    found, given = tokenizer_of(folder, vocab_size), tokenizer_source.resolve(configured)
    if found and given and not found.id.matches(given.id):
        raise UserError(f"{folder} has tokenizer {found.id}, but data.tokenizer={configured} is {given.id}")
    if given and given.vocab_size > vocab_size:
        raise UserError(f"data.tokenizer={configured} has {given.vocab_size} ids, the model of {folder} {vocab_size}")
    if tokenizer := found or given:
        return tokenizer.id, tokenizer
    identity = tokenizer_source.guess(vocab_size)
    say(
        f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); its {vocab_size} ids are taken for "
        f"those of {identity}; --config.data.tokenizer=from:FOLDER or file:PATH names another"
    )
    return identity, None


@functools.cache
def _download(source: str, field: str) -> str:
    """The folder of the repository's files; fetched once in a process."""
    match = _NAME.fullmatch(source)
    if match is None:
        raise UserError(f"{field}={source} is not {PREFIX}owner/name or {PREFIX}owner/name@revision")
    import huggingface_hub
    import huggingface_hub.constants
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    repo, revision = match[1], match[2] or None
    ask = functools.partial(huggingface_hub.HfApi().model_info, repo, revision=revision, timeout=10)
    get = functools.partial(huggingface_hub.snapshot_download, repo, allow_patterns=list(_FILES))
    with _quiet():
        try:
            with task(f"asking the hub for {source}"):
                info = bounded(ask, FIRST_SECONDS)
        except HFValidationError as error:
            raise UserError(f"{field}={source}: {_one_line(error)}") from None
        except (OSError, HTTPError, OfflineModeIsEnabled) as error:
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
                raise UserError(
                    f"{field}={source}: the hub has no such model or revision, or no access to it is granted "
                    f"({_one_line(error)})"
                ) from None
            with contextlib.suppress(OSError, ValueError, HTTPError):
                folder = get(revision=revision, local_files_only=True)
                say(f"{source}: the hub does not answer; the files of an earlier download are used")
                return folder
            raise UserError(
                f"{field}={source}: the hub does not answer and no earlier download is in "
                f"{huggingface_hub.constants.HF_HUB_CACHE} ({_one_line(error)})"
            ) from None
        names = [file.rfilename for file in info.siblings or ()]
        if not any(name.endswith(".safetensors") and "/" not in name for name in names):
            held = next((name for name in names if name.endswith((".bin", ".h5", ".gguf", ".msgpack"))), "no weights")
            raise UserError(f"{field}={source}: the repository has no model.safetensors, but {held}")
        say(f"{source}: at commit {info.sha[:8]} of the hub, kept in {huggingface_hub.constants.HF_HUB_CACHE}")
        with task(f"downloading {source}"):
            return with_retries(lambda: get(revision=revision), source)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the progress bars and the log of huggingface_hub."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, shown = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    disable_progress_bars()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
        if shown:
            enable_progress_bars()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
