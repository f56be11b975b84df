"""Remote corpora: which files there are, and one file at a time onto this machine, with patience for a bad network."""

import concurrent.futures
import contextlib
import errno
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar

from trialgpt_jax import UserError

ATTEMPTS, FIRST_DELAY = 9, 0.5  # seconds, doubled every time up to a minute: together two minutes
_PERMANENT = (400, 401, 403, 404, 410, 416)  # HTTP statuses that no repetition mends
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_ADDRESS = re.compile(r"hf://datasets/([^/]+/[^/@]+)@([^/]+)/(.+)")
_T = TypeVar("_T")


def list_dataset(repo: str, config: str, split: str, revision: str) -> list[tuple[str, int, str]]:
    """The data files of a dataset on the Hugging Face hub, in the order in which `datasets` reads them.

    Args:
      repo: `owner/name`.
      config, revision: empty for the dataset's default configuration, for its main branch.

    Returns:
      Name, bytes and address (`hf://datasets/owner/name@commit/path`) of every file.

    Raises:
      UserError: no such dataset, configuration or split, or the hub cannot be reached.
    """
    import datasets
    import huggingface_hub

    def find() -> list[str]:
        try:
            builder = datasets.load_dataset_builder(f"hf://datasets/{repo}", config or None, revision=revision or None)
        except ValueError as error:  # an unknown configuration, or several and no default; the message names them
            raise UserError(
                f"data.source_options.config={config!r} of hf:{repo}: {' '.join(str(error).split())}"
            ) from None
        found = builder.config.data_files or {}
        if split not in found:
            raise UserError(f"hf:{repo} has no split {split!r} (data.source_options.split), but {', '.join(found)}")
        return [str(address) for address in found[split]]

    addresses = with_retries(find, f"the list of files of hf:{repo}")
    parts = [_ADDRESS.fullmatch(address) for address in addresses]
    if not all(parts):
        raise UserError(f"hf:{repo} keeps its data elsewhere ({addresses[0]}); download it and use data.source=files")
    commit, paths = parts[0][2], [part[3] for part in parts]

    def measure() -> dict[str, int]:
        infos = huggingface_hub.HfApi().get_paths_info(repo, paths, revision=commit, repo_type="dataset")
        return {info.path: info.size for info in infos}

    sizes = with_retries(measure, f"the sizes of the files of hf:{repo}")
    return [(path, sizes.get(path, 0), address) for path, address in zip(paths, addresses, strict=True)]


def list_addresses(repo: str, path: str, folder: str) -> list[tuple[str, int, str]]:
    """The files that a text file in a hub dataset lists, one address a line: name, bytes (0 if unknown), address.

    Raises:
      UserError: as `list_dataset`.
    """
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
    """Brings one file into `folder` and returns its path. Dropped connections are taken up where they broke off.

    Raises:
      UserError: it is not there, or the network failed `ATTEMPTS` times in a row.
    """
    os.makedirs(folder, exist_ok=True)
    if match := _ADDRESS.fullmatch(address):
        import huggingface_hub

        repo, revision, path = match.groups()
        fetch = lambda: huggingface_hub.hf_hub_download(
            repo, path, repo_type="dataset", revision=revision, local_dir=folder
        )
        return with_retries(fetch, address)
    path = os.path.join(folder, address.rsplit("/", 1)[-1])
    state: dict[str, str] = {}  # what identifies the version of the file that we have the beginning of
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    with_retries(lambda: _download_rest(address, path, state), address)
    return path


def count_rows(address: str) -> int:
    """Rows of a remote parquet file; reads its footer alone. Raises UserError as `download` does."""
    import huggingface_hub
    import pyarrow.parquet

    def read() -> int:
        with huggingface_hub.HfFileSystem().open(address, "rb") as file:
            return pyarrow.parquet.ParquetFile(file).metadata.num_rows

    return with_retries(read, address)


def with_retries(action: Callable[[], _T], what: str) -> _T:
    """Calls `action` until the network lets it, with growing pauses.

    Raises:
      UserError: a permanent refusal, or too many failures.
    """
    from huggingface_hub.errors import HTTPError  # the base of what the hub's HTTP client raises

    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (OSError, HTTPError, http.client.HTTPException) as error:
            status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            if getattr(error, "errno", None) in _DISK:
                raise
            # That an entry is missing from the local cache is how the hub's client reports that it has no connection
            missing = isinstance(error, FileNotFoundError) and "LocalEntryNotFound" not in repr(error)
            if status in _PERMANENT or missing:
                raise UserError(f"{what} cannot be had ({text}); check the name, or your access to it") from None
            if attempt == ATTEMPTS - 1:
                raise UserError(
                    f"{what} failed {ATTEMPTS} times ({text}); what is finished is kept, and the same command goes on"
                ) from None
            delay = min(60.0, FIRST_DELAY * 2**attempt)
            print(f"{what}: {text}; trying again in {delay:g} s", file=sys.stderr)
            time.sleep(delay)
    raise AssertionError("unreachable")


def _download_rest(address: str, path: str, state: dict[str, str]) -> None:
    """Appends to `path` what is missing of `address`; starts over when the server has another version by now."""
    have = os.path.getsize(path) if os.path.exists(path) and state.get("etag") else 0
    headers = {"Range": f"bytes={have}-", "If-Range": state["etag"]} if have else {}
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
        resumed = answer.status == 206
        state["etag"] = answer.headers.get("ETag") or ""
        length = answer.headers.get("Content-Length")
        with open(path, "ab" if resumed else "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
    expected = (have if resumed else 0) + int(length) if length else None
    if expected is not None and os.path.getsize(path) != expected:
        raise http.client.IncompleteRead(b"", expected - os.path.getsize(path))
