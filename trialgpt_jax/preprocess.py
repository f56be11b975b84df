"""Turns a corpus into a token store: documents -> token ids -> shards and a manifest.

    python -m trialgpt_jax.preprocess --config=configs/quickstart.py
    python -m trialgpt_jax.preprocess --config=... --worker=0/4    # on each of four machines, then on one: --merge
    python -m trialgpt_jax.preprocess --config.data.dir=data/openwebtext --verify --show=3

It may be killed at any moment; the same command goes on, and the result has the same bytes whatever was killed and however
many workers there were.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from trialgpt_jax import UserError
from trialgpt_jax import config as config_lib
from trialgpt_jax.data import corpora, token_store, units
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.corpora import InputFile
from trialgpt_jax.data.tokenizer import Tokenizer
from trialgpt_jax.data.units import Job

TRAINING_BYTES = 256 << 20  # a `bpe:N` tokenizer is trained on the first training documents up to this many characters


def preprocess(config: ConfigDict, worker: str = "0/1") -> dict:
    """Writes the token store that `config.data` describes to `config.data.dir`, or what is missing of it.

    Args:
      config: only its `data` part is used.
      worker: `i/n`: this machine does the i-th of n parts (from 0); `merge` joins them afterwards. 0/1 does all.

    Returns:
      The manifest, or for one part of several its progress record.

    Raises:
      UserError: a source that is not there or has unusable documents, a folder that holds the result of another config or
        is in use by another run, a full disk. What is finished stays, and the same call goes on from there.
    """
    index, count = _parse_worker(worker)
    config_lib.validate(config)
    folder, settings = config.data.dir, _settings(config)
    try:
        os.makedirs(folder, exist_ok=True)
        with _locked(folder, index, count):
            if manifest := _finished(folder, settings):
                _remove_leftovers(folder)
                print(f"{folder} is complete already; nothing to do")
                return manifest
            progress = _load_progress(folder, settings, index, count)
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
    folder, settings = config.data.dir, _settings(config)
    if manifest := _finished(folder, settings):
        _remove_leftovers(folder)
        return manifest
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "progress_*_of_*.json")))
    parts = [_read_progress(path, settings) for path in paths]
    if not parts:
        raise UserError(f"{folder} holds no parts to merge; run preprocess with --worker=i/n first")
    count = parts[0]["worker"][1]
    for part, path in zip(parts, paths, strict=True):
        for field in ("files", "tokenizer"):
            if part[field] != parts[0][field]:
                raise UserError(
                    f"{path}: its {field} differ from those of {paths[0]}; all workers must see the same input"
                )
    groups = corpora.group_files([InputFile(*file) for file in parts[0]["files"]])
    found = {part["worker"][0] for part in parts if part["worker"][1] == count}
    if missing := set(range(count)) - found or len(parts) != count:
        raise UserError(f"{folder} holds {len(parts)} of {count} parts; missing: {missing}; run them and merge again")
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
            shards.append(shard | {"file": os.path.basename(new)})
    token_store.sync_folder(folder)
    manifest = {
        "format_version": token_store.FORMAT_VERSION, **parts[0]["tokenizer"], **settings,
        "input": {
            "files": len(parts[0]["files"]), "bytes": sum(size for _, size, _ in parts[0]["files"]),
            "sha256": hashlib.sha256(json.dumps([file[:2] for file in parts[0]["files"]]).encode()).hexdigest(),
        },
        "skipped": _sum_counts(unit["skipped"] for unit in records),
        "sources": _sum_sources(unit["sources"] for unit in records), "shards": shards,
    }  # fmt: skip
    manifest["tokenizer"] = {"name": settings["tokenizer"], "hash": parts[0]["tokenizer"]["hash"]}
    del manifest["hash"]
    token_store.write_json(folder, token_store.MANIFEST, manifest)
    _remove_leftovers(folder)
    return manifest


# ---- the work


def _work(config: ConfigDict, folder: str, progress: dict) -> None:
    """Does what `progress` lacks, saving it after every unit."""
    index, count = progress["worker"]
    file = f"progress_{index}_of_{count}.json"
    if not progress["files"]:
        listed = corpora.list_files(config.data.source, config.data.source_options)
        progress["files"] = [[entry.name, entry.size, entry.path] for entry in listed]
    files = [InputFile(*entry) for entry in progress["files"]]
    groups = corpora.group_files(files)
    options = config.data.source_options.to_dict()
    job = Job(
        folder, options, config.data.split, config.data.split_seed, config.data.val_fraction, config.data.shard_tokens,
        _nanogpt_rows(config, files),
    )  # fmt: skip
    tokenizer = _tokenizer(config.data.tokenizer, job, groups)
    progress["tokenizer"] = {
        "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
    }  # fmt: skip
    token_store.write_json(folder, file, progress)

    done = {
        group: [unit for unit in progress["units"] if unit["group"] == group]
        for group in range(index, len(groups), count)
    }
    for part in glob.glob(os.path.join(glob.escape(folder), "*.bin.*.part")):
        if int(os.path.basename(part).split("_")[1]) in done:  # other groups may be in work on another machine
            os.remove(part)
    todo = [group for group, finished in done.items() if not finished or finished[-1]["next"] is not None]
    tasks = [(group, groups[group], done[group], len(files) == 1 and files[0].is_text) for group in todo]
    workers = config.data.num_workers or len(os.sched_getaffinity(0))
    processes = max(1, min(workers, len(tasks)))
    threads = -(-workers // processes)
    bar = _Progress(sum(f.size for group in todo for f in groups[group]))
    started = time.perf_counter()

    def finished_unit(record: dict) -> None:
        progress["units"].append(record)
        progress["units"].sort(key=lambda unit: (unit["group"], unit["part"]))
        token_store.write_json(folder, file, progress)

    try:
        run = _run_here if processes == 1 else _run_processes
        run(job, config.data.tokenizer, config.data.encoder, threads, tasks, processes, finished_unit, bar.update)
    finally:
        bar.close()
    bar.summary(time.perf_counter() - started)


def _run_here(job, name, encoder, threads, tasks, processes, finished_unit, report) -> None:
    tokenizer = tokenizer_lib.load(name, job.folder)
    encode = tokenizer_lib.batch_encoder(tokenizer, encoder)
    for group, files, done, only_text in tasks:
        counts = lambda *numbers, group=group: report(group, *numbers)
        for record in units.encode_group(job, tokenizer, encode, threads, group, files, done, counts, only_text):
            finished_unit(record)


def _run_processes(job, name, encoder, threads, tasks, processes, finished_unit, report) -> None:
    """As `_run_here`, with the groups spread over processes. Records and messages come back through a queue."""
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    todo, events = context.Queue(), context.Queue()
    for task in (*tasks, *[None] * processes):
        todo.put(task)
    arguments = (job, name, encoder, threads, todo, events)
    children = [context.Process(target=_child, args=arguments, daemon=True) for _ in range(processes)]
    for child in children:
        child.start()
    running = processes
    try:
        while running:
            try:
                kind, *rest = events.get(timeout=1)
            except queue.Empty:
                if dead := [child.exitcode for child in children if child.exitcode]:
                    raise UserError(
                        f"a worker process ended with status {dead[0]} (-9: killed, as when memory runs out); lower "
                        "data.num_workers; what is finished is kept, and the same command goes on"
                    ) from None
                continue
            if kind == "unit":
                finished_unit(*rest)
            elif kind == "progress":
                report(*rest)
            elif kind == "error":
                raise UserError(*rest)
            else:
                running -= 1
    finally:
        for child in children:
            if running:
                child.terminate()
            child.join()


def _child(job: Job, name: str, encoder: str, threads: int, todo, events) -> None:
    """The body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends us
    parent = multiprocessing.parent_process()
    threading.Thread(
        target=lambda: (parent.join(), os._exit(1)), daemon=True
    ).start()  # a killed parent leaves no orphans
    try:
        tasks = iter(todo.get, None)
        _run_here(
            job, name, encoder, threads, tasks, 1,
            lambda record: events.put(("unit", record)), lambda *counts: events.put(("progress", *counts)),
        )  # fmt: skip
        events.put(("end",))
    except UserError as error:
        events.put(("error", str(error)))


def _tokenizer(name: str, job: Job, groups: list[list[InputFile]]) -> Tokenizer:
    """The tokenizer, trained on the beginning of the corpus if it is a `bpe:N` that is not in the folder yet."""
    if name == "gpt2" or os.path.exists(os.path.join(job.folder, tokenizer_lib.RANKS_FILE)):
        return tokenizer_lib.load(name, job.folder)
    print(f"training the tokenizer {name}", file=sys.stderr)
    tokenizer = tokenizer_lib.train(name, _training_texts(job, groups))
    tokenizer.save(job.folder)
    return tokenizer


def _training_texts(job: Job, groups: list[list[InputFile]]) -> Iterator[str]:
    left = TRAINING_BYTES
    for files in groups:
        only_text = len(groups) == 1 and len(files) == 1 and files[0].is_text
        for index, document in units.read_group(job, files, only_text=only_text):
            if document.text is not None and units.split_of(job, files[index], document) == "train":
                yield document.text[:left]
                left -= len(document.text)
                if left <= 0:
                    return


def _nanogpt_rows(config: ConfigDict, files: list[InputFile]) -> dict[str, frozenset[int]]:
    return {}


# ---- the folder


def _settings(config: ConfigDict) -> dict:
    """What the bytes of the store depend on, as the manifest has it; num_workers, encoder and the order do not count."""
    data = config.data.to_dict()
    return {name: data[name] for name in
            ("source", "source_options", "tokenizer", "split", "split_seed", "val_fraction", "shard_tokens")}  # fmt: skip


def _finished(folder: str, settings: dict) -> dict | None:
    """The manifest, if the folder holds one and it is of these settings.

    Raises:
      UserError: another config made it, or it is damaged.
    """
    if not os.path.exists(os.path.join(folder, token_store.MANIFEST)):
        return None
    manifest = token_store.open_store(folder).manifest
    _check_settings(folder, manifest | {"tokenizer": manifest["tokenizer"]["name"]}, settings)
    return manifest


def _check_settings(where: str, saved: dict, settings: dict) -> None:
    for name, value in settings.items():
        old, new = (config_lib.fields(ConfigDict({name: v})) for v in (saved.get(name), value))
        for field in sorted(new.keys() | old.keys()):
            if old.get(field) != new.get(field):
                raise UserError(
                    f"{where} was made with data.{field}={old.get(field)!r}, but this config has {new.get(field)!r}; give it "
                    "another data.dir or remove the folder"
                )


def _load_progress(folder: str, settings: dict, index: int, count: int) -> dict:
    path = os.path.join(folder, f"progress_{index}_of_{count}.json")
    if os.path.exists(path):
        progress = _read_progress(path, settings)
        local = [file for file in progress["files"] if "://" not in file[2]]
        for name, size, path_ in local:
            if not os.path.exists(path_) or os.path.getsize(path_) != size:
                raise UserError(
                    f"{name} has changed since {folder} was begun; restore it, or remove {folder} to begin anew"
                )
        return progress
    others = glob.glob(os.path.join(glob.escape(folder), "progress_*.json"))
    if others and not all(path.endswith(f"_of_{count}.json") for path in others):
        raise UserError(
            f"{folder} was begun with another number of workers ({os.path.basename(others[0])}); keep to it"
        )
    foreign = glob.glob(os.path.join(glob.escape(folder), "*.bin"))
    if foreign and not others:
        raise UserError(f"{folder} holds {os.path.basename(foreign[0])} of something else; give it another data.dir")
    return {"worker": [index, count], "settings": settings, "files": [], "tokenizer": {}, "units": []}


def _read_progress(path: str, settings: dict) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            progress = json.load(file)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); remove {os.path.dirname(path)} and run preprocess again"
        ) from None
    _check_settings(os.path.dirname(path), progress["settings"], settings)
    return progress


@contextlib.contextmanager
def _locked(folder: str, index: int, count: int) -> Iterator[None]:
    """Keeps a second run out of the same part of the same folder; the system lets go of the lock when we end."""
    path = os.path.join(folder, f"lock_{index}_of_{count}")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another preprocess; wait for it or give another data.dir") from None
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def _remove_leftovers(folder: str) -> None:
    """Removes what only an unfinished job needs."""
    for pattern in ("progress_*_of_*.json", "*.part", "downloads/*"):
        for path in glob.glob(os.path.join(glob.escape(folder), pattern)):
            os.remove(path)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.join(folder, "downloads"))


def _parse_worker(worker: str) -> tuple[int, int]:
    index, slash, count = worker.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--worker={worker} is not i/n with 0 <= i < n")
    return int(index), int(count)


def _sum_counts(counts) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for name, number in part.items():
            total[name] = total.get(name, 0) + number
    return dict(sorted(total.items()))


def _sum_sources(sources) -> dict[str, list[int]]:
    total: dict[str, list[int]] = {}
    for part in sources:
        for name, numbers in part.items():
            total[name] = [a + b for a, b in zip(total.get(name, [0, 0, 0]), numbers, strict=True)]
    return dict(sorted(total.items()))


class _Progress:
    """The bar on stderr: input read so far, documents, tokens, megabytes of text a second, time left."""

    def __init__(self, total: int):
        every = 0.2 if sys.stderr.isatty() else 10
        self._bar = tqdm(
            total=total or None, unit="B", unit_scale=True, mininterval=every, dynamic_ncols=True, file=sys.stderr
        )
        self._documents = self._tokens = self._bytes = 0
        self._read: dict[int, int] = {}  # group -> bytes of it read
        self._started = time.perf_counter()

    def update(self, group: int, documents: int, tokens: int, n_bytes: int, read: int) -> None:
        self._documents, self._tokens, self._bytes = (
            self._documents + documents,
            self._tokens + tokens,
            self._bytes + n_bytes,
        )
        rate = self._bytes / (time.perf_counter() - self._started) / 1e6
        self._bar.set_postfix_str(
            f"{self._documents:,} documents, {self._tokens:,} tokens, {rate:.1f} MB/s", refresh=False
        )
        self._bar.update(read - self._read.get(group, 0))
        self._read[group] = read

    def close(self) -> None:
        self._bar.close()

    def summary(self, seconds: float) -> None:
        rate = self._bytes / seconds / 1e6
        text = f"{self._documents:,} documents, {self._tokens:,} tokens, {self._bytes / 1e6:.1f} MB of text"
        print(f"{text} in {seconds:.1f} s ({rate:.1f} MB/s)", file=sys.stderr)


# ---- the command line


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
