"""The preprocess engine: does one machine's share of a job, and merges the shares into a token store.

Neither function takes the locks of the folder, see `job_folder.locked`; `trialgpt_jax.preprocess` does.
"""

import collections
import glob
import math
import operator
import os
import sys
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from trialgpt_jax import UserError, live_line
from trialgpt_jax.console import say
from trialgpt_jax.data import corpora, input_record, job_folder, token_store, tokenizer_source, units, workers
from trialgpt_jax.data import progress as progress_lib
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.char_tokenizer import CHARACTERS_FILE
from trialgpt_jax.data.documents import InputFile, count_rows, is_text
from trialgpt_jax.data.encoders import check_encoder
from trialgpt_jax.data.library_tokenizer import LIBRARY_FILE
from trialgpt_jax.data.progress import Progress
from trialgpt_jax.data.units import Job, Task
from trialgpt_jax.data.vocabulary import FILE, FROM, TokenizerId, Vocabulary
from trialgpt_jax.storage import json_files
from trialgpt_jax.storage.files import sync_file, sync_folder

TRAINING_CHARACTERS = 256 << 20  # a `bpe:N` tokenizer is trained on the first training documents, up to this much text
SAMPLE_CHARACTERS = 2 << 20  # a fast encoder is compared with tiktoken on this much of them
_ORDER = operator.itemgetter("group", "part")  # of units in the store


def prepare(data: ConfigDict, index: int, count: int) -> dict:
    """Does what is missing of share `index` of `count` of the job `config.data`, saving the progress after every unit.

    Returns:
      The manifest if it is complete or this is the only share, otherwise the progress record.

    Raises:
      UserError: as `trialgpt_jax.preprocess.preprocess`. OSError: the folder cannot be written.
    """
    original, (data, given) = data, _resolved(data)
    if manifest := _finished(original, data, given):
        print(f"{data.dir} is already complete; nothing to do")
        job_folder.warn_of_changes(data, manifest)
        return manifest
    progress = job_folder.load_progress(data, index, count)
    path = progress_lib.path_of(data.dir, index, count)
    if not progress["files"]:
        with live_line.task(f"listing the files of {data.source}"):
            corpus = corpora.survey(data.source, data.source_options, data.dir)
        progress |= {"files": corpus.files, "contents": corpus.contents, "left_out": corpus.left_out}
        if data.split == "nanogpt":
            with live_line.task("counting rows, files", len(corpus.files)) as shown:
                progress["rows"] = []
                for file in corpus.files:
                    progress["rows"].append(count_rows(file))
                    shown.advance()
        json_files.write(path, progress)
    listed = [InputFile(*entry) for entry in progress["files"]]
    val_rows = _nanogpt_rows(listed, progress["rows"], data) if data.split == "nanogpt" else {}
    only_text = data.split == "hash" and len(listed) == 1 and is_text(listed[0], data.source_options)
    job = Job(data.to_dict(), val_rows, only_text)
    groups = corpora.group_files(listed, data.shard_tokens)
    progress_lib.check_groups(progress, groups, path)
    say(corpora.count_text(len(listed), progress.get("left_out", {})))
    job_folder.remove_parts(data.dir, index, count)
    tokenizer = _tokenizer(job, groups, given)
    progress["tokenizer"] = {name: getattr(tokenizer, name) for name in ("hash", "vocab_size", "eot_id", "dtype")}
    json_files.write(path, progress)
    check_encoder(tokenizer, data.encoder, _training_texts(job, groups, SAMPLE_CHARACTERS))

    tasks = []
    last_units = {unit["group"]: unit for unit in progress["units"]}  # the last one of every group: they are in order
    for group in range(index, len(groups), count):
        last = last_units.get(group, {"part": -1, "next": (0, 0)})
        if last["next"] is not None:
            tasks.append(Task(group, groups[group], last["part"] + 1, last["next"]))

    def finish(record: dict) -> None:
        progress["units"].append(record)
        progress["units"].sort(key=_ORDER)
        json_files.write(path, progress)

    with workers.progress_bar(sum(file.size for task in tasks for file in task.files)) as report:
        workers.run(job, tasks, finish, report)
    return merge(original) if count == 1 else progress


def merge(data: ConfigDict) -> dict:
    """Merges the finished shares in `data.dir` and returns the manifest; may be interrupted and repeated.

    Raises UserError if a share is missing, unfinished, or was made with another config, input or tokenizer.
    """
    original, (data, given) = data, _resolved(data)
    if manifest := _finished(original, data, given):
        return manifest
    shares = _finished_shares(data)
    listed, tokenizer = shares[0]["files"], shares[0]["tokenizer"]
    recorded = input_record.Input([(name, size) for name, size, _ in listed], shares[0].get("contents", []))
    records = sorted((unit for share in shares for unit in share["units"]), key=_ORDER)
    skipped = collections.Counter()
    for unit in records:
        skipped.update(unit["skipped"])
    shards = [shard for unit in records for shard in unit["shards"]]
    if not any(shard["split"] == "train" for shard in shards):
        raise UserError(
            f"{data.dir} gets no training documents: {sum(shard['documents'] for shard in shards):,} are validation "
            f"documents and {sum(skipped.values()):,} were skipped; give more text, or set data.val_fraction=0"
        )
    manifest = {
        "format_version": token_store.FORMAT_VERSION,
        **{name: tokenizer[name] for name in ("vocab_size", "eot_id", "dtype")},
        **job_folder.job_settings(data),
        "tokenizer": {"name": data.tokenizer, "hash": tokenizer["hash"]} | _given(original),
        "input": {
            "files": len(listed),
            "bytes": sum(size for _, size, _ in listed),
            "sha256": input_record.digest(recorded.files),
            "left_out": shares[0].get("left_out", {}),
        },
        "skipped": dict(sorted(skipped.items())),
        "sources": _sum_sources(records),
        "shards": _rename_shards(data.dir, records),
    }
    input_record.write(data.dir, recorded)
    json_files.write(os.path.join(data.dir, token_store.MANIFEST), manifest)
    job_folder.remove_leftovers(data.dir)
    return manifest


def _nanogpt_rows(listed: list[InputFile], rows: list[int], data: ConfigDict) -> dict[str, frozenset[int]]:
    """File -> rows that `datasets`' train_test_split(val_fraction, seed=split_seed) puts into its test split."""
    total = sum(rows)
    chosen = np.random.default_rng(data.split_seed).permutation(total)[: math.ceil(data.val_fraction * total)]
    first = np.cumsum([0, *rows])
    return {
        file.name: frozenset((chosen[(chosen >= first[i]) & (chosen < first[i + 1])] - first[i]).tolist())
        for i, file in enumerate(listed)
    }


def _resolved(data: ConfigDict) -> tuple[ConfigDict, Vocabulary | None]:
    """The config with the real name of the tokenizer, and the tokenizer that `from:` or `file:` names, if any."""
    given = tokenizer_source.resolve(data.tokenizer)
    if given is not None:
        data = data.copy_and_resolve_references()
        data.tokenizer = given.name
    return data, given


def _given(original: ConfigDict) -> dict[str, str]:
    """For the manifest: where the tokenizer came from, unless it was trained on the corpus or is GPT-2's."""
    named = original.tokenizer.startswith((FROM, FILE))
    return {"given": original.tokenizer} if named else {}


def _finished(original: ConfigDict, data: ConfigDict, given: Vocabulary | None) -> dict | None:
    """As `job_folder.finished`; UserError also if another tokenizer of the same name made the store."""
    manifest = job_folder.finished(data)
    if manifest is None:
        return None
    made = TokenizerId(manifest["tokenizer"]["name"], manifest["tokenizer"]["hash"])
    source = manifest["tokenizer"].get("given")
    if (given and not given.id.matches(made)) or (given is None and source and made.name != "gpt2"):
        raise UserError(
            f"{data.dir} was made with the tokenizer {made}{f' ({source})' if source else ''}, but this config has "
            f"data.tokenizer={original.tokenizer}{f', which is {given.id}' if given else ''}; choose another data.dir "
            "or remove the folder"
        )
    return manifest


def _tokenizer(job: Job, groups: list[list[InputFile]], given: Vocabulary | None) -> Vocabulary:
    """The tokenizer: `given`, that in the folder, or one that is trained on the beginning of the corpus; saves it.

    Raises UserError if the folder holds units of another tokenizer than `given`.
    """
    name, folder = job.data["tokenizer"], job.data["dir"]
    file = tokenizer_lib.file_of(name)
    if file is None or os.path.exists(os.path.join(folder, file)):
        found = tokenizer_lib.load(name, folder)
        if given is None or given.id == found.id:
            return found
        if glob.glob("*.bin", root_dir=glob.escape(folder)):
            raise UserError(
                f"{folder} was begun with the tokenizer {found.id}, but this config has {given.id}; choose another "
                "data.dir or remove the folder"
            )
    if given is None:
        say(f"training the tokenizer {name}")
        most, every = (TRAINING_CHARACTERS, False) if name != "char" else (sys.maxsize, True)
        with live_line.task(f"training the tokenizer {name}"):
            given = tokenizer_lib.train(name, _training_texts(job, groups, most, every))
    given.save(folder)
    return given


def _training_texts(
    job: Job, groups: list[list[InputFile]], characters: int, every_split: bool = False
) -> Iterator[str]:
    """The first training documents, up to `characters` in total; of both splits with `every_split`."""
    for group in groups:
        for document in units.read_group(job, group):
            if document.text is None:
                continue
            if every_split or units.split_of(job, group[document.file], document) == "train":
                yield document.text[:characters]
                characters -= len(document.text)
                if characters <= 0:
                    return


def _finished_shares(data: ConfigDict) -> list[Progress]:
    """The progress records of all shares; UserError unless they are complete and of the same job."""
    folder, paths = data.dir, job_folder.progress_paths(data.dir)
    shares = [job_folder.read_progress(data, path) for path in paths]
    if not shares:
        raise UserError(f"{folder} holds no shares to merge; run preprocess with --worker=i/n first")
    count = shares[0]["worker"][1]
    for share, path in zip(shares, paths, strict=True):
        for field in ("files", "tokenizer"):
            if _comparable(share, field) != _comparable(shares[0], field):
                raise UserError(
                    f"{path}: its {field} differ from those of {paths[0]}; all workers must see the same input"
                )
    missing = set(range(count)) - {share["worker"][0] for share in shares if share["worker"][1] == count}
    if missing or len(shares) != count:
        why = f"--worker={min(missing)}/{count} is missing" if missing else "they are of different jobs"
        raise UserError(f"{folder} holds {len(shares)} of {count} shares; {why}; run it, and merge again")
    ended = {unit["group"] for share in shares for unit in share["units"] if unit["next"] is None}
    groups = corpora.group_files([InputFile(*entry) for entry in shares[0]["files"]], data.shard_tokens)
    for share, path in zip(shares, paths, strict=True):
        progress_lib.check_groups(share, groups, path)
    if unfinished := set(range(len(groups))) - ended:
        group = min(unfinished)
        raise UserError(f"{folder}: group {group} is unfinished; run --worker={group % count}/{count} again")
    return shares


def _comparable(share: Progress, field: str) -> object:
    """What shares of one job have in common: of the files not their paths and times, which differ between machines."""
    if field != "files":
        return share[field]
    contents = [ends for ends, _ in share.get("contents", [])]
    return [(name, size) for name, size, _ in share["files"]], contents


def _rename_shards(folder: str, records: list[dict]) -> list[dict]:
    """Gives the shards of every split their final numbers, durably; returns their records."""
    shards = []
    for split in token_store.SPLITS:
        for number, shard in enumerate(s for unit in records for s in unit["shards"] if s["split"] == split):
            name = f"{split}_{number:05d}.bin"
            old, new = os.path.join(folder, shard["file"]), os.path.join(folder, name)
            if os.path.exists(old):
                os.replace(old, new)
            elif not os.path.exists(new):  # an interrupted merge has renamed it if it exists
                raise UserError(f"{old} is missing, though its share is finished; copy it here and merge again")
            sync_file(new)  # a share may have been copied here by other means, which the manifest must not outlive
            shards.append(shard | {"file": name})
    for file in (tokenizer_lib.RANKS_FILE, CHARACTERS_FILE, LIBRARY_FILE):
        if os.path.exists(path := os.path.join(folder, file)):
            sync_file(path)
    sync_folder(folder)
    return shards


def _sum_sources(records: list[dict]) -> dict[str, list[int]]:
    """Documents, tokens and UTF-8 bytes by source: the largest `units.MAX_SOURCES`, and the rest as `units.OTHERS`."""
    total: dict[str, list[int]] = {}
    for unit in records:
        for name, counts in unit["sources"].items():
            units.add_counts(total, name, counts)
    largest = sorted(total.keys() - {units.OTHERS}, key=lambda name: (-total[name][2], name))
    for name in largest[units.MAX_SOURCES :]:
        units.add_counts(total, units.OTHERS, total.pop(name))
    return dict(sorted(total.items()))
