"""Remote corpora: lists their files and downloads them one at a time, with retries."""

import concurrent.futures
import errno
import http.client
import itertools
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable
from typing import TypeVar

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.storage.files import remove

ATTEMPTS, FIRST_DELAY = 9, 0.5  # seconds; doubles up to 60 s, about two minutes in total
_PERMANENT = (400, 401, 403, 404, 410, 416)  # HTTP statuses that are not retried
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_ADDRESS = re.compile(r"hf://datasets/([^/]+/[^/@]+)@([^/]+)/(.+)")
_T = TypeVar("_T")


def list_dataset(repo: str, config: str, split: str, revision: str) -> list[tuple[str, int, str]]:
    """The data files of a dataset on the Hugging Face hub, in the order in which `datasets` reads them.

    Returns:
      Name, bytes and URL (`hf://datasets/owner/name@commit/path`) of every file.

    Raises UserError if there is no such dataset, configuration or split, or the hub cannot be reached.
    """
    import datasets
    import huggingface_hub

    def find() -> list[str]:
        try:
            builder = datasets.load_dataset_builder(f"hf://datasets/{repo}", config or None, revision=revision or None)
        except ValueError as error:  # unknown configuration, or several without a default; the message lists them
            why = " ".join(str(error).split())
            raise UserError(f"data.source_options.config={config!r} of hf:{repo}: {why}") from None
        found = builder.config.data_files or {}
        if split not in found:
            raise UserError(f"hf:{repo} has no split {split!r} (data.source_options.split), but {', '.join(found)}")
        return [str(address) for address in found[split]]

    addresses = with_retries(find, f"the list of files of hf:{repo}")
    matches = [_ADDRESS.fullmatch(address) for address in addresses]
    if not all(matches):
        raise UserError(
            f"hf:{repo} keeps its data outside the hub ({addresses[0]}); download it and use data.source=files"
        )
    commit, paths = matches[0][2], [match[3] for match in matches]

    def measure() -> dict[str, int]:
        infos = huggingface_hub.HfApi().get_paths_info(repo, paths, revision=commit, repo_type="dataset")
        return {info.path: info.size for info in infos}

    sizes = with_retries(measure, f"the sizes of the files of hf:{repo}")
    return [(path, sizes.get(path, 0), address) for path, address in zip(paths, addresses, strict=True)]


def list_addresses(repo: str, path: str, folder: str) -> list[tuple[str, int, str]]:
    """The files listed in a text file of a hub dataset, one URL per line: name, bytes (0 if unknown), URL."""
    with open(download(f"hf://datasets/{repo}@main/{path}", folder), encoding="utf-8") as file:
        addresses = [line.strip() for line in file if line.strip()]

    def size(address: str) -> int:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.headers.get("Content-Length") or 0)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sizes = pool.map(lambda address: with_retries(lambda: size(address), address), addresses)
        return [(address.rsplit("/", 1)[-1], n, address) for address, n in zip(addresses, sizes, strict=True)]


def download(address: str, folder: str) -> str:
    """Downloads one file into `folder` and returns its path. A dropped connection resumes at the byte where it broke.

    Raises UserError as `with_retries` does.
    """
    os.makedirs(folder, exist_ok=True)
    if match := _ADDRESS.fullmatch(address):
        import huggingface_hub

        repo, revision, path = match.groups()
        where = {"repo_type": "dataset", "revision": revision, "local_dir": folder}
        return with_retries(lambda: huggingface_hub.hf_hub_download(repo, path, **where), address)
    path, etag = os.path.join(folder, address.rsplit("/", 1)[-1]), ""
    remove(path)

    def download_rest() -> None:
        """Appends the missing bytes; starts over if the server's ETag is not that of the first part."""
        nonlocal etag
        have = os.path.getsize(path) if etag and os.path.exists(path) else 0
        headers = {"Range": f"bytes={have}-", "If-Range": etag} if have else {}
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
            resumed, etag = answer.status == 206, answer.headers.get("ETag") or ""
            with open(path, "ab" if resumed else "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
            length = answer.headers.get("Content-Length")
        expected = (have if resumed else 0) + int(length) if length else None
        if expected is not None and os.path.getsize(path) != expected:
            raise http.client.IncompleteRead(b"", expected - os.path.getsize(path))

    with_retries(download_rest, address)
    return path


def count_rows(address: str) -> int:
    """Rows of a remote parquet file; downloads only its footer. Raises UserError as `download` does."""
    import huggingface_hub
    import pyarrow.parquet

    def read() -> int:
        with huggingface_hub.HfFileSystem().open(address, "rb") as file:
            return pyarrow.parquet.ParquetFile(file).metadata.num_rows

    return with_retries(read, address)


def with_retries(action: Callable[[], _T], what: str) -> _T:
    """Calls `action` until it succeeds, with exponential backoff after network errors.

    Raises UserError after a permanent error or `ATTEMPTS` failures; the OSError of a full or unwritable disk passes.
    """
    from huggingface_hub.errors import HTTPError  # the base class of the hub client's errors

    for attempt in itertools.count(1):
        try:
            return action()
        except (OSError, HTTPError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in _DISK:
                raise
            status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            # LocalEntryNotFoundError is how the hub's client reports that it has no connection
            missing = isinstance(error, FileNotFoundError) and "LocalEntryNotFound" not in repr(error)
            if status in _PERMANENT or missing:
                raise UserError(f"{what} cannot be fetched ({text}); check the name and your access to it") from None
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{what} failed {ATTEMPTS} times ({text}); finished work is kept, and the same command continues"
                ) from None
            delay = min(60.0, FIRST_DELAY * 2 ** (attempt - 1))
            say(f"{what}: {text}; retrying in {delay:g} s")
            time.sleep(delay)
