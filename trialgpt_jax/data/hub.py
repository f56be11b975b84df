"""Remote corpora: lists their files and downloads them one at a time, with retries."""

import collections
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from trialgpt_jax import UserError
from trialgpt_jax.data import network
from trialgpt_jax.data.network import length_of, open_url, with_retries
from trialgpt_jax.storage.files import remove

_ADDRESS = re.compile(r"hf://datasets/([^/]+/[^/@]+)@([^/]+)/(.+)")
_WEB = re.compile(r"https?://[!-.0-~][!-~]*", re.IGNORECASE)  # no spaces, no other characters that need quoting
_PART_OF = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")
_PATHS = 500  # whose sizes one request asks for; ClimbMix has 6,543
_NO_HEAD = (405, 501)  # HTTP statuses of a server that does not answer HEAD


def list_dataset(repo: str, config: str, split: str, revision: str) -> list[tuple[str, int, str]]:
    """The data files of a dataset on the Hugging Face hub, in the order in which `datasets` reads them.

    With `HF_HUB_OFFLINE=1` these are the files in the cache of `huggingface_hub`.

    Returns:
      Name, bytes and URL (`hf://datasets/owner/name@commit/path`) of every file.

    Raises UserError if there is no such dataset, configuration or split, or the hub cannot be reached.
    """
    import huggingface_hub

    quiet()
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except huggingface_hub.errors.HFValidationError as error:
        raise UserError(f"config field `data.source` is 'hf:{repo}', but should be hf:owner/name: {error}") from None
    if huggingface_hub.constants.is_offline_mode():
        return _list_cached(repo, config, split, revision)
    check_reachable(repo, revision)
    addresses = with_retries(
        lambda: _data_files(repo, f"hf://datasets/{repo}", config, split, revision), f"the list of files of hf:{repo}"
    )
    matches = [_ADDRESS.fullmatch(address) for address in addresses]
    if not all(matches):
        raise UserError(
            f"hf:{repo} keeps its data outside the hub ({addresses[0]}); download it and use data.source=files"
        )
    commit, paths = matches[0][2], [match[3] for match in matches]

    def measure(some: list[str]) -> dict[str, int]:
        infos = huggingface_hub.HfApi().get_paths_info(repo, some, revision=commit, repo_type="dataset")
        return {info.path: info.size for info in infos}

    sizes = {}
    for i in range(0, len(paths), _PATHS):
        some = paths[i : i + _PATHS]
        sizes |= with_retries(functools.partial(measure, some), f"the sizes of the files of hf:{repo}")
    return [(path, sizes.get(path, 0), address) for path, address in zip(paths, addresses, strict=True)]


def _data_files(repo: str, where: str, config: str, split: str, revision: str) -> list[str]:
    """What `datasets` reads of a dataset at `where`, a URL or folder, for one split."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(where, config or None, revision=revision or None)
    except ValueError as error:  # unknown configuration, or several without a default; the message lists them
        why = " ".join(str(error).split())
        raise UserError(f"data.source_options.config={config!r} of hf:{repo}: {why}") from None
    found = builder.config.data_files or {}
    if split not in found:
        raise UserError(f"hf:{repo} has no split {split!r} (data.source_options.split), but {', '.join(found)}")
    return [str(address) for address in found[split]]


def _list_cached(repo: str, config: str, split: str, revision: str) -> list[tuple[str, int, str]]:
    """`list_dataset` from the cache of `huggingface_hub`."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=revision or None, local_files_only=True
        )
    except (OSError, ValueError):
        raise UserError(
            f"hf:{repo} is not in the cache, and HF_HUB_OFFLINE is set; unset it where the hub can be reached"
        ) from None
    paths = [os.path.relpath(path, folder) for path in _data_files(repo, folder, config, split, "")]
    missing = _missing_parts(paths)
    if missing:
        raise UserError(f"hf:{repo}: {missing} is not in the cache, and HF_HUB_OFFLINE is set")
    prefix = f"hf://datasets/{repo}@{os.path.basename(folder)}"
    return [(path, os.path.getsize(os.path.join(folder, path)), f"{prefix}/{path}") for path in paths]


def _missing_parts(paths: list[str]) -> str:
    """The first file that is not among those whose names say `-00003-of-00080`, or ""."""
    groups = collections.defaultdict(set)
    for match in filter(None, map(_PART_OF.fullmatch, paths)):
        groups[match[1], match[3], match[4]].add(int(match[2]))
    for (begin, count, end), there in sorted(groups.items()):
        for number in range(int(count)):
            if number not in there:
                return f"{begin}-{number:05d}-of-{count}{end}"
    return ""


def check_reachable(repo: str, revision: str = "") -> None:
    """One small request, because `datasets` and `huggingface_hub` retry for minutes. Raises UserError.

    Before it the folder that they write to is checked, whose errors they report as a missing dataset.
    """
    import huggingface_hub

    cache = huggingface_hub.constants.HF_HUB_CACHE
    try:
        os.makedirs(cache, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise UserError(
            f"{cache}, the cache of huggingface_hub, cannot be written: {error.strerror}; set HF_HOME to a folder that "
            "can"
        ) from None

    def ask() -> None:
        huggingface_hub.HfApi().dataset_info(repo, revision=revision or None, timeout=10)

    with_retries(ask, f"hf:{repo}", seconds=network.FIRST_SECONDS)


def why_unreachable(repo: str) -> str | None:
    """Why a dataset that is not in the cache cannot be fetched, after one small request; None = it can."""
    import datasets
    import huggingface_hub

    if huggingface_hub.constants.is_offline_mode() or datasets.config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        check_reachable(repo)
    except UserError as error:
        return str(error).partition(";")[0]
    return None


def quiet() -> None:
    """Turns off what `datasets` and `huggingface_hub` log and show; `with_retries` reports what matters."""
    import datasets
    import huggingface_hub

    for library in (datasets, huggingface_hub):
        library.utils.logging.set_verbosity_error()
        library.utils.disable_progress_bars()


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """`datasets` uses its cache and sends no requests: without a network it retries for about 20 s."""
    import datasets
    import huggingface_hub

    places = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in places]
    try:
        for module in places:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(places, before, strict=True):
            module.HF_HUB_OFFLINE = value


def list_addresses(repo: str, path: str, folder: str, revision: str = "main") -> list[tuple[str, int, str]]:
    """The files listed in a text file of a hub dataset, one http(s) address per line; `#` begins a comment.

    Returns:
      Name, bytes (0 if unknown) and URL of each. The name is the last part of the address, or all of it after the
      scheme where another address has the same last part.

    Raises UserError if a line is not such an address, the list is empty, or a server cannot be reached.
    """
    quiet()
    what = f"the list of files {path} of hf:{repo}"
    check_reachable(repo, revision)
    try:
        with open(download(f"hf://datasets/{repo}@{revision}/{path}", folder), encoding="utf-8-sig") as file:
            lines = [(i, line.strip()) for i, line in enumerate(file, 1)]
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    addresses = [(i, line) for i, line in lines if line and not line.startswith("#")]
    for i, address in addresses:
        if not _WEB.fullmatch(address) or not _file_name(address):
            raise UserError(f"{what}, line {i}: {address[:200]!r} is not the http or https address of a file")
    if not addresses:
        raise UserError(f"{what} has no addresses")
    urls = [address for _, address in addresses]
    named = collections.Counter(_file_name(address) for address in dict.fromkeys(urls))

    def size(address: str, seconds: float) -> int:
        request = urllib.request.Request(address, method="HEAD")
        try:
            with open_url(request, seconds) as answer:
                return length_of(answer) or 0
        except urllib.error.HTTPError as error:
            if error.code in _NO_HEAD:
                return 0
            raise

    def size_in_time(address: str) -> int:
        return with_retries(lambda: size(address, 10), address, seconds=network.FIRST_SECONDS)

    pool = concurrent.futures.ThreadPoolExecutor(8)
    try:
        sizes = list(pool.map(size_in_time, urls))
    finally:
        pool.shutdown(cancel_futures=True)

    def name(address: str) -> str:
        parts = urllib.parse.urlsplit(address)
        short = _file_name(address)
        return short if named[short] == 1 else f"{'?'.join(filter(None, (parts.netloc, parts.query)))}{parts.path}"

    return [(name(address), n, address) for address, n in zip(urls, sizes, strict=True)]


def _file_name(address: str) -> str:
    """The last part of an address, without query."""
    return urllib.parse.urlsplit(address).path.rpartition("/")[2]


@contextlib.contextmanager
def fetched(address: str, folder: str) -> Iterator[str]:
    """Yields the local path of a remote file: in the cache of `huggingface_hub`, or downloaded and removed at exit.

    Raises UserError as `download` does.
    """
    if match := _ADDRESS.fullmatch(address):
        import huggingface_hub

        repo, revision, name = match.groups()
        path = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision, repo_type="dataset")
        if isinstance(path, str):
            yield path
            return
    path = download(address, folder)
    try:
        yield path
    finally:
        remove(path)


def download(address: str, folder: str) -> str:
    """Downloads one file into `folder` and returns its path. A dropped connection resumes at the byte where it broke.

    Raises UserError as `with_retries` does.
    """
    os.makedirs(folder, exist_ok=True)
    if match := _ADDRESS.fullmatch(address):
        import huggingface_hub

        quiet()
        repo, revision, path = match.groups()
        where = {"repo_type": "dataset", "revision": revision, "local_dir": folder}
        return with_retries(lambda: huggingface_hub.hf_hub_download(repo, path, **where), address)
    # The hash, because addresses of two servers can have the same last part
    path, etag = os.path.join(folder, f"{hashlib.sha256(address.encode()).hexdigest()[:16]}_{_file_name(address)}"), ""
    remove(path)

    def download_rest() -> None:
        """Appends the missing bytes; starts over if the server's ETag is not that of the first part."""
        nonlocal etag
        have = os.path.getsize(path) if etag and os.path.exists(path) else 0
        headers = {"Range": f"bytes={have}-", "If-Range": etag} if have else {}
        with open_url(urllib.request.Request(address, headers=headers), 60) as answer:
            resumed, etag = answer.status == 206, answer.headers.get("ETag") or ""
            with open(path, "ab" if resumed else "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
            length = length_of(answer)
        expected = None if length is None else (have if resumed else 0) + length
        if expected is not None and os.path.getsize(path) != expected:
            raise http.client.IncompleteRead(b"", expected - os.path.getsize(path))

    with_retries(download_rest, address)
    return path


def count_rows(address: str) -> int:
    """Rows of a remote parquet file; downloads only its footer. Raises UserError as `download` does."""
    import huggingface_hub
    import pyarrow.parquet

    quiet()

    def read() -> int:
        with huggingface_hub.HfFileSystem().open(address, "rb") as file:
            return pyarrow.parquet.ParquetFile(file).metadata.num_rows

    return with_retries(read, address)
