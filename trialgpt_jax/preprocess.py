"""Turns a corpus into a token store: documents -> token ids -> shards and a manifest.

    python -m trialgpt_jax.preprocess --config=configs/quickstart.py
    python -m trialgpt_jax.preprocess --config=... --worker=0/4    # on each of four machines, then on one: --merge
    python -m trialgpt_jax.preprocess --config.data.dir=data/openwebtext --verify --show=3

It may be killed at any moment; the same command goes on, and the result has the same bytes whatever was killed and
however many workers there were.
"""

import glob
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax import config as config_lib
from trialgpt_jax.data import corpora, job_folder, token_store, units, workers
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.corpora import InputFile
from trialgpt_jax.data.tokenizer import Tokenizer
from trialgpt_jax.data.units import Job
from trialgpt_jax.data.workers import Task
from trialgpt_jax.files import sync_folder, write_json

TRAINING_CHARACTERS = 256 << 20  # a `bpe:N` tokenizer is trained on the first training documents, up to this much text
SAMPLE_CHARACTERS = 2 << 20  # and a fast encoder is compared with tiktoken on so much of them


def preprocess(config: ConfigDict, worker: str = "0/1") -> dict:
    """Writes the token store that `config.data` describes to `config.data.dir`, or what is missing of it.

    Args:
      config: only its `data` part is used.
      worker: `i/n`: this machine does the i-th of n parts (from 0); `merge` joins them afterwards. 0/1 does all.

    Returns:
      The manifest, or for one part of several its progress record.

    Raises:
      UserError: a source that is not there or has unusable documents, a folder that holds the result of another config
        or
        is in use by another run, a full disk. What is finished stays, and the same call goes on from there.
    """
    index, count = _parse_worker(worker)
    config_lib.validate(config)
    if "," in config.data.dir:
        raise UserError(
            f"data.dir={config.data.dir} is a mixture, which is for training; preprocess its parts one by one"
        )
    folder, settings = config.data.dir, job_folder.job_settings(config.data.to_dict())
    try:
        os.makedirs(folder, exist_ok=True)
        with job_folder.locked(folder, index, count):
            if manifest := job_folder.finished(folder, settings):
                job_folder.remove_leftovers(folder)
                print(f"{folder} is complete already; nothing to do")
                job_folder.warn_of_changes(folder, settings, manifest)
                return manifest
            progress = job_folder.load_progress(folder, settings, index, count)
            _work(config, folder, progress)
            return merge(config) if count == 1 else progress
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; the token store cannot be written"
        ) from None


def merge(config: ConfigDict) -> dict:
    """Joins the finished parts in `config.data.dir` into one token store and returns its manifest.

    Raises:
      UserError: a part is missing, unfinished, or was made with another config, input or tokenizer.
    """
    folder, settings = config.data.dir, job_folder.job_settings(config.data.to_dict())
    if manifest := job_folder.finished(folder, settings):
        job_folder.remove_leftovers(folder)
        return manifest
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "progress_*_of_*.json")))
    parts = [job_folder.read_progress(path, settings) for path in paths]
    if not parts:
        raise UserError(f"{folder} holds no parts to merge; run preprocess with --worker=i/n first")
    count = parts[0]["worker"][1]
    for part, path in zip(parts, paths, strict=True):
        for field in ("files", "tokenizer"):
            if part[field] != parts[0][field]:
                raise UserError(
                    f"{path}: its {field} differ from those of {paths[0]}; all workers must see the same input"
                )
    groups = corpora.group_files([InputFile(*file) for file in parts[0]["files"]], config.data.shard_tokens)
    missing = set(range(count)) - {part["worker"][0] for part in parts if part["worker"][1] == count}
    if missing or len(parts) != count:
        wanted = f"--worker={min(missing)}/{count} is missing" if missing else "they are of different jobs"
        raise UserError(f"{folder} holds {len(parts)} of {count} parts; {wanted}; run it, and merge again")
    records = sorted((unit for part in parts for unit in part["units"]), key=lambda unit: (unit["group"], unit["part"]))
    ended = {unit["group"] for unit in records if unit["next"] is None}
    if missing := sorted(set(range(len(groups))) - ended):
        raise UserError(f"{folder}: group {missing[0]} is unfinished; run --worker={missing[0] % count}/{count} again")

    shards = []
    for split in token_store.SPLITS:
        mine = [shard for unit in records for shard in unit["shards"] if shard["split"] == split]
        for number, shard in enumerate(mine):
            old, new = (os.path.join(folder, file) for file in (shard["file"], f"{split}_{number:05d}.bin"))
            if os.path.exists(old):  # else a merge that was killed has renamed it
                os.replace(old, new)
            elif not os.path.exists(new):
                raise UserError(f"{old} is missing, though its part is finished; copy it here and merge again")
            shards.append(shard | {"file": os.path.basename(new)})
    sync_folder(folder)
    manifest = {
        "format_version": token_store.FORMAT_VERSION, **parts[0]["tokenizer"], **settings,
        "input": {
            "files": len(parts[0]["files"]), "bytes": sum(size for _, size, _ in parts[0]["files"]),
            "sha256": job_folder.digest([file[:2] for file in parts[0]["files"]]),
        },
        "skipped": _sum_counts(unit["skipped"] for unit in records),
        "sources": _sum_sources(unit["sources"] for unit in records), "shards": shards,
    }  # fmt: skip
    manifest["tokenizer"] = {"name": settings["tokenizer"], "hash": parts[0]["tokenizer"]["hash"]}
    del manifest["hash"]
    write_json(os.path.join(folder, token_store.MANIFEST), manifest)
    job_folder.remove_leftovers(folder)
    return manifest


# ---- the work


def _work(config: ConfigDict, folder: str, progress: dict) -> None:
    """Does what `progress` lacks, saving it after every unit."""
    data, (index, count) = config.data, progress["worker"]

    def save() -> None:
        write_json(os.path.join(folder, f"progress_{index}_of_{count}.json"), progress)

    if not progress["files"]:
        listed = corpora.list_files(data.source, data.source_options)
        progress["files"] = [[file.name, file.size, file.path] for file in listed]
        if data.split == "nanogpt":
            progress["rows"] = [corpora.count_rows(file) for file in listed]
        save()
    files = [InputFile(*entry) for entry in progress["files"]]
    val_rows = _nanogpt_rows(files, progress["rows"], data) if data.split == "nanogpt" else {}
    job = Job(
        folder, data.tokenizer, data.encoder, data.source_options.to_dict(), data.split, data.split_seed,
        data.val_fraction, data.shard_tokens, val_rows,
    )  # fmt: skip
    groups = corpora.group_files(files, data.shard_tokens)
    only_text = data.split == "hash" and len(files) == 1 and files[0].is_text
    tokenizer = _tokenizer(job, groups, only_text)
    progress["tokenizer"] = {
        "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
    }  # fmt: skip
    save()
    tokenizer_lib.check_encoder(tokenizer, data.encoder, _training_texts(job, groups, only_text, SAMPLE_CHARACTERS))

    tasks = []
    for group in range(index, len(groups), count):
        done = [unit for unit in progress["units"] if unit["group"] == group]
        if not done or done[-1]["next"] is not None:
            tasks.append(Task(group, groups[group], done, only_text))
        for part in glob.glob(os.path.join(glob.escape(folder), f"*_{group:05d}_*.part")):
            os.remove(part)  # of a run that was killed; other groups may be in work on another machine

    def finish(record: dict) -> None:
        progress["units"].append(record)
        progress["units"].sort(key=lambda unit: (unit["group"], unit["part"]))
        save()

    with workers.ProgressBar(sum(file.size for task in tasks for file in task.files)) as bar:
        workers.run(job, data.num_workers, tasks, finish, bar.update)


def _tokenizer(job: Job, groups: list[list[InputFile]], only_text: bool) -> Tokenizer:
    """The tokenizer, trained on the beginning of the corpus if it is a `bpe:N` that is not in the folder yet."""
    if job.tokenizer == "gpt2" or os.path.exists(os.path.join(job.folder, tokenizer_lib.RANKS_FILE)):
        return tokenizer_lib.load(job.tokenizer, job.folder)
    print(f"training the tokenizer {job.tokenizer}", file=sys.stderr)
    tokenizer = tokenizer_lib.train(job.tokenizer, _training_texts(job, groups, only_text, TRAINING_CHARACTERS))
    tokenizer.save(job.folder)
    return tokenizer


def _training_texts(job: Job, groups: list[list[InputFile]], only_text: bool, characters: int) -> Iterator[str]:
    """The first training documents, up to so many characters."""
    left = characters
    for files in groups:
        for index, document in units.read_group(job, files, only_text=only_text):
            if document.text is not None and units.split_of(job, files[index], document) == "train":
                yield document.text[:left]
                left -= len(document.text)
                if left <= 0:
                    return


def _nanogpt_rows(files: list[InputFile], rows: list[int], data: ConfigDict) -> dict[str, frozenset[int]]:
    """File -> rows that `datasets`' train_test_split(val_fraction, seed=split_seed) puts into its test part."""
    total = sum(rows)
    chosen = np.random.default_rng(data.split_seed).permutation(total)[: math.ceil(data.val_fraction * total)]
    first = np.cumsum([0, *rows])
    return {
        file.name: frozenset((chosen[(chosen >= first[i]) & (chosen < first[i + 1])] - first[i]).tolist())
        for i, file in enumerate(files)
    }


# ---- the command line


def _parse_worker(worker: str) -> tuple[int, int]:
    index, slash, count = worker.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--worker={worker} is not i/n with 0 <= i < n")
    return int(index), int(count)


def _sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for name, number in part.items():
            total[name] = total.get(name, 0) + number
    return dict(sorted(total.items()))


def _sum_sources(sources: Iterable[dict[str, list[int]]]) -> dict[str, list[int]]:
    """Documents, tokens and UTF-8 bytes by source; the hundred largest and the others."""
    total: dict[str, list[int]] = {}
    for part in sources:
        for name, numbers in part.items():
            total[name] = [a + b for a, b in zip(total.get(name, [0, 0, 0]), numbers, strict=True)]
    largest = sorted(total, key=lambda name: (name == units.OTHERS, -total[name][2], name))
    for name in largest[100:]:
        if name != units.OTHERS:
            total[units.OTHERS] = [
                a + b for a, b in zip(total.get(units.OTHERS, [0, 0, 0]), total.pop(name), strict=True)
            ]
    return dict(sorted(total.items()))


def describe(folder: str) -> str:
    """A table of a store's splits and sources: documents, tokens, UTF-8 bytes, bytes per token."""
    store = token_store.open_store(folder)
    rows = []
    if store.manifest is None:
        return "\n".join(f"{name}: {store.split(name).n_tokens:,} tokens" for name in token_store.SPLITS)
    for split in token_store.SPLITS:
        shards = [shard for shard in store.manifest["shards"] if shard["split"] == split]
        rows.append((split, *(sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes"))))
    if set(store.manifest["sources"]) != {""}:
        rows += [(f"source {name or '(none)'}", *numbers) for name, numbers in store.manifest["sources"].items()]
    lines = [f"{'':24} {'documents':>12} {'tokens':>16} {'bytes':>16} {'bytes/token':>12}"]
    for name, documents, tokens, n_bytes in rows:
        lines.append(f"{name:24} {documents:12,} {tokens:16,} {n_bytes:16,} {n_bytes / max(tokens, 1):12.3f}")
    lines += [f"left out: {number:,} ({problem})" for problem, number in store.manifest["skipped"].items()]
    return "\n".join(lines)


def show(folder: str, count: int) -> Iterator[str]:
    """The first `count` documents of a store's training split, decoded."""
    store = token_store.open_store(folder)
    tokenizer, split = tokenizer_lib.from_store(folder), store.split("train")
    start = 0
    for _ in range(count):
        ids: list[np.ndarray] = []
        while start < split.n_tokens:
            piece = split.read(start, min(4096, split.n_tokens - start))
            ends = np.flatnonzero(piece == store.eot_id)
            ids.append(piece[: ends[0]] if ends.size else piece)
            start += int(ends[0]) + 1 if ends.size else len(piece)
            if ends.size:
                break
        if not ids:
            return
        yield tokenizer.decode(np.concatenate(ids))


def main(argv: list[str]) -> int:
    options = {
        "worker": ("0/1", "i/n: do the i-th of n parts of the work, counted from 0"),
        "merge": (False, "join the parts that --worker has made"),
        "verify": (False, "compare every byte of a finished token store with its manifest"),
        "show": (0, "print a table of a finished token store and this many of its documents"),
    }
    values, config = config_lib.parse_command_line(argv, __doc__, options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as at Ctrl-C
    try:
        return _command(argv, values, config)
    except KeyboardInterrupt:
        print("stopped; what is finished is kept, and the same command goes on", file=sys.stderr)
        return config_lib.EXIT_STOPPED


def _command(argv: list[str], values: flags.FlagValues, config: ConfigDict) -> int:
    if not any(argument.startswith(("--config=", "--config.data.dir=")) for argument in argv):
        raise UserError(
            "neither --config=FILE nor --config.data.dir=FOLDER is given; configs come with the project in configs/"
        )
    folder = config.data.dir
    if values.verify:
        shards = token_store.verify(folder)
        print(f"{folder}: {len(shards)} shards, {sum(s['tokens'] for s in shards):,} tokens: all as the manifest says")
    elif values.merge:
        merge(config)
    elif not values.show:
        preprocess(config, values.worker)
        if values.worker != "0/1":
            print(f"part {values.worker} is done; when all are, run the same command with --merge in place of --worker")
            return 0
    print(describe(folder))
    for text in show(folder, values.show):
        print(f"---- document\n{text}")
    return 0


if __name__ == "__main__":
    config_lib.run(main)
