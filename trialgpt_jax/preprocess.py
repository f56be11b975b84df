"""Turns a corpus into a token store: documents -> token ids -> shards and a manifest.

    trialgpt preprocess --config=quickstart
    trialgpt preprocess --config=... --worker=0/4   # of 4; then --merge
    trialgpt preprocess --config.data.dir=data/openwebtext --verify --show=3

It can be killed at any moment, and the same command continues. The bytes of the store depend neither on interruptions
nor on the number of workers.
"""

import contextlib
import os
import re
from collections.abc import Iterator

import numpy as np
from absl import flags as absl_flags
from ml_collections import ConfigDict

from trialgpt_jax import UserError, cli, faults
from trialgpt_jax.config import validate
from trialgpt_jax.console import say, terminations_interrupt
from trialgpt_jax.data import corpora, job_folder, prepare, token_store
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.storage import files


def preprocess(config: ConfigDict, worker: str = "0/1") -> dict:
    """Writes the token store that `config.data` describes to `config.data.dir`, or the missing rest of it.

    Args:
      worker: `i/n`: this machine does share i of n, counted from 0; `merge` joins them. `0/1` does everything.

    Returns:
      The manifest, or with several shares the progress record of this one.

    Raises:
      UserError: a missing source or unusable documents; a folder that holds the result of another config or that
        another run uses; a full disk. Finished work is kept, and the same call continues from there.
    """
    index, count = _parse_worker(worker)
    with _writing(config), job_folder.locked(config.data.dir, index, count):
        return prepare.prepare(config.data, index, count)


def merge(config: ConfigDict) -> dict:
    """Joins the finished shares in `config.data.dir` into a token store, and returns the manifest.

    Raises:
      UserError: as `prepare.merge`, or a share is still running; the same call continues when that is fixed.
    """
    folder = config.data.dir
    with _writing(config):
        if not files.names(folder):  # nor is the folder made
            raise UserError(f"data.dir={folder} holds no shares to merge; run preprocess with --worker=i/n first")
        with job_folder.locked(folder):
            return prepare.merge(config.data)


@contextlib.contextmanager
def _writing(config: ConfigDict) -> Iterator[None]:
    """Refuses a config whose token store cannot be written; an OSError of the block becomes a UserError."""
    validate(config)
    folder = config.data.dir
    if not folder:
        raise UserError("config field `data.dir` is empty; it names the folder of the token store")
    if "," in folder:
        raise UserError(f"data.dir={folder} is a mixture, which is for training; preprocess its members one at a time")
    if files.is_remote(folder):
        raise UserError(f"data.dir={folder} is a URL, but token stores are written to a local folder")
    existed = os.path.isdir(folder)
    try:
        yield
    except UserError:
        if not existed:
            with contextlib.suppress(OSError):  # only a folder that is empty can be removed so
                os.rmdir(folder)
        raise
    except OSError as error:
        if (line := faults.explain(error)) is None:
            raise
        where = "" if error.filename else f"{folder}: "
        raise UserError(f"{where}{line}; the token store cannot be written") from None


def describe(folder: str) -> str:
    """A table of a store: its input; documents, tokens, UTF-8 bytes and bytes per token of its splits and sources."""
    store = token_store.open_store(folder)
    if store.manifest is None:
        return "\n".join(f"{name}: {store.split(name).n_tokens:,} tokens" for name in token_store.SPLITS)
    rows = []
    for split in token_store.SPLITS:
        shards = [shard for shard in store.manifest["shards"] if shard["split"] == split]
        rows.append((split, *(sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes"))))
    sources = store.manifest.get("sources", {})
    if set(sources) != {""}:
        rows += [(f"source {name or '(none)'}", *numbers) for name, numbers in sources.items()]
    found = store.manifest.get("input", {"files": 0})
    lines = [corpora.count_text(found["files"], found.get("left_out", {}))] if found["files"] else []
    lines += [f"{'':20} {'documents':>11} {'tokens':>15} {'bytes':>17} {'bytes/token':>11}"]
    for name, documents, tokens, n_bytes in rows:
        lines.append(f"{name:20} {documents:11,} {tokens:15,} {n_bytes:17,} {n_bytes / max(tokens, 1):11.3f}")
    lines += [f"skipped: {number:,} ({problem})" for problem, number in store.manifest.get("skipped", {}).items()]
    return "\n".join(lines)


def show(folder: str, count: int) -> Iterator[str]:
    """The first `count` documents of a store's training split, decoded; without end-of-text pieces of 1,000 ids."""
    store = token_store.open_store(folder)
    tokenizer, split = tokenizer_lib.from_store(store.folder), store.split("train")
    if store.eot_id is None:
        for start in range(0, split.n_tokens, 1000)[:count]:
            yield tokenizer.decode(split.read(start, min(1000, split.n_tokens - start)))
        return
    rest = np.empty(0, np.int32)
    for start in range(0, split.n_tokens, 1 << 16):
        if count <= 0:
            return
        ids = np.append(rest, split.read(start, min(1 << 16, split.n_tokens - start)))
        *documents, rest = np.split(ids, np.flatnonzero(ids == store.eot_id) + 1)
        for document in documents[:count]:
            yield tokenizer.decode(document[:-1])
        count -= len(documents)
    if rest.size and count > 0:  # nanoGPT's files may end without end-of-text
        yield tokenizer.decode(rest)


def _parse_worker(worker: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", worker)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--worker={worker} is not i/n with 0 <= i < n")
    return int(match[1]), int(match[2])


OPTIONS = {
    "worker": ("0/1", "i/n: do share i of n of the work, counted from 0"),
    "merge": (False, "merge the shares made with --worker"),
    "verify": (False, "compare every byte of a finished token store with its manifest"),
    "show": (0, "print a table of a finished token store and this number of its documents"),
}


def main(argv: list[str]) -> int:
    flags, config = cli.parse(argv, __doc__, OPTIONS)
    if not any(argument.lstrip("-").partition("=")[0] in ("config", "config.data.dir") for argument in argv):
        raise UserError("neither --config=FILE, such as --config=quickstart, nor --config.data.dir=FOLDER is given")
    if flags.verify or (flags.show and not flags.merge):
        return _command(flags, config)
    try:
        with terminations_interrupt():
            return _command(flags, config)
    except KeyboardInterrupt:
        say("stopped; finished work is kept, and the same command continues")
        return cli.EXIT_STOPPED


def _command(flags: absl_flags.FlagValues, config: ConfigDict) -> int:
    folder = config.data.dir
    if flags.verify:
        shards = token_store.verify(folder)
        tokens = sum(shard["tokens"] for shard in shards)
        print(f"{folder}: {len(shards)} shards, {tokens:,} tokens: all match the manifest")
    elif flags.merge:
        merge(config)
    elif not flags.show:
        done = preprocess(config, flags.worker)
        if "worker" in done:
            print(corpora.count_text(len(done["files"]), done.get("left_out", {})))
            print(f"share {flags.worker} is done; after the last one, run the same command with --merge, not --worker")
            return 0
    print(describe(folder))
    _warn_of_an_empty_split(config)
    for text in show(folder, flags.show):
        print(f"---- document\n{text}")
    return 0


def _warn_of_an_empty_split(config: ConfigDict) -> None:
    """Whole documents are drawn for the validation split, so of a few there may be none."""
    if config.data.val_fraction and not token_store.open_store(config.data.dir).split("val").n_tokens:
        say(
            "warning: no document was drawn for the validation split; run preprocess into a new folder with a larger "
            "data.val_fraction, or with more documents"
        )


if __name__ == "__main__":
    cli.run(main)
