"""Progress files of a preprocess job: their shape, and the checks that what they say is possible."""

import itertools
import os
import re
from typing import Any, Literal, NotRequired, TypedDict

from trialgpt_jax import UserError
from trialgpt_jax.data.documents import InputFile
from trialgpt_jax.storage import json_files
from trialgpt_jax.storage.json_files import Count

NAME = re.compile(r"progress_(\d+)_of_(\d+)\.json")


class Shard(TypedDict):
    """As `shard_writer.ShardWriter` makes it; merged, in the manifest."""

    file: str
    split: Literal["train", "val"]
    tokens: Count
    documents: Count
    bytes: Count
    max_id: Count
    sha256: str


class Unit(TypedDict):
    """As `units.encode_group` makes it."""

    group: Count
    part: Count
    next: tuple[Count, Count] | None
    shards: list[Shard]
    skipped: dict[str, Count]
    sources: dict[str, tuple[Count, Count, Count]]


class Tokenizer(TypedDict, total=False):
    """What the manifest says of the tokenizer; empty until it is there."""

    hash: str
    vocab_size: Count
    eot_id: Count | None
    dtype: Literal["uint16", "uint32"]


class Progress(TypedDict):
    """The progress of one share. Files are an `InputFile`; contents, `input_record.Content` in the same order."""

    worker: tuple[Count, Count]
    settings: dict[str, Any]
    files: list[tuple[str, Count, str]]
    contents: NotRequired[list[tuple[str, int]]]
    left_out: NotRequired[dict[str, Count]]
    rows: NotRequired[list[Count]]
    tokenizer: Tokenizer
    units: list[Unit]


def new(index: int, count: int, settings: dict) -> Progress:
    """The record of a share that has not begun."""
    return {"worker": [index, count], "settings": settings, "files": [], "tokenizer": {}, "units": []}


def path_of(folder: str, index: int, count: int) -> str:
    """The progress file of share `index` of `count`."""
    return os.path.join(folder, f"progress_{index}_of_{count}.json")


def read(path: str) -> Progress:
    """Loads a progress file. Raises UserError if it is damaged."""
    try:
        found = json_files.read(path, Progress)
        if problem := _problem(found, os.path.basename(path)):
            raise ValueError(problem)
    except ValueError as error:
        folder = os.path.dirname(path)
        raise UserError(f"{path} is damaged ({error}); remove {folder} and run preprocess again") from None
    return found


def _problem(found: Progress, name: str) -> str:
    """What is impossible in a record of the right shape, or ""."""
    index, count = found["worker"]
    if name != f"progress_{index}_of_{count}.json" or index >= count:
        return f"worker: share {index} of {count}"
    n = len(found["files"])
    if found.get("contents") and len(found["contents"]) != n:
        return f"contents: {len(found['contents'])} of {n} files"
    if "rows" in found and len(found["rows"]) != n:
        return f"rows: {len(found['rows'])} of {n} files"
    if not n and found["units"]:
        return "units: without files"
    for i, unit in enumerate(found["units"]):
        for shard in unit["shards"]:
            expected = f"{shard['split']}_{unit['group']:05d}_{unit['part']:04d}.bin"
            if shard["file"] != expected:
                return f"units[{i}].shards: file {shard['file']!r}, not {expected!r}"
    for group, units in itertools.groupby(found["units"], lambda unit: unit["group"]):
        units = list(units)
        if [unit["part"] for unit in units] != list(range(len(units))):
            return f"units: parts of group {group}"
        if any(unit["next"] is None for unit in units[:-1]):
            return f"units: group {group} goes on after its end"
    if any(a["group"] > b["group"] for a, b in itertools.pairwise(found["units"])):
        return "units: groups are not in order"
    if found["units"] and not found["tokenizer"]:
        return "tokenizer: missing"
    return ""


def check_groups(found: Progress, groups: list[list[InputFile]], path: str) -> None:
    """Raises UserError if a record of share i of n names groups or files that are not there, or are not its own."""
    index, count = found["worker"]
    for unit in found["units"]:
        group, following = unit["group"], unit["next"]
        if group >= len(groups) or group % count != index or (following and following[0] >= len(groups[group])):
            raise UserError(
                f"{path} is damaged (group {group}, next {following}); remove {os.path.dirname(path)} and run "
                "preprocess again"
            )
