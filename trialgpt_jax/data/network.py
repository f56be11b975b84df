"""Requests that are repeated until they succeed."""

import errno
import http.client
import itertools
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import TypeVar

from trialgpt_jax import UserError, __version__
from trialgpt_jax.console import say

ATTEMPTS, FIRST_DELAY = 9, 0.5  # seconds; doubles up to 60 s, about two minutes in total
FIRST_SECONDS = 20  # in which the first request of a command must succeed
_PERMANENT = (400, 401, 403, 404, 410, 416)  # HTTP statuses that are not retried
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_T = TypeVar("_T")


def open_url(request: urllib.request.Request, seconds: float) -> http.client.HTTPResponse:
    """Sends a request; redirections lead to http and https only.

    Its User-Agent is our own: some servers answer 403 to that of urllib.
    """
    request.add_header("User-Agent", f"trialgpt_jax/{__version__}")
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener.open(request, timeout=seconds)


def length_of(answer: http.client.HTTPResponse) -> int | None:
    """Bytes of an answer, if its header says."""
    text = answer.headers.get("Content-Length") or ""
    return int(text) if text.isdecimal() else None


def with_retries(action: Callable[[], _T], what: str, seconds: float = 0) -> _T:
    """Calls `action` until it succeeds, with exponential backoff after network errors.

    Args:
      action: sends a request.
      what: it asks for; for messages.
      seconds: if given, gives up after this time in all, even inside `action`, and does not log the attempts.

    Raises UserError after a permanent error or `ATTEMPTS` failures; the OSError of a full or unwritable disk passes.
    """
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # HTTPError: the base class of its errors

    end = time.monotonic() + seconds
    for attempt in itertools.count(1):
        try:
            return bounded(action, end - time.monotonic()) if seconds else action()
        except OfflineModeIsEnabled:
            raise UserError(
                f"{what} is not in the cache, and HF_HUB_OFFLINE is set; unset it where the hub can be reached"
            ) from None
        except (OSError, HTTPError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in _DISK:
                raise
            status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            # LocalEntryNotFoundError is how the hub's client reports that it has no connection
            missing = isinstance(error, FileNotFoundError) and "LocalEntryNotFound" not in repr(error)
            if status in _PERMANENT or missing or isinstance(error, http.client.InvalidURL):
                raise UserError(f"{what} cannot be fetched ({text}); check the name and your access to it") from None
            delay = min(60.0, FIRST_DELAY * 2 ** (attempt - 1))
            if seconds and time.monotonic() + delay >= end:
                raise UserError(
                    f"{what} cannot be reached ({text}); check the network and its proxy, or download the files and "
                    "use data.source=files"
                ) from None
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{what} failed {ATTEMPTS} times ({text}); finished work is kept, and the same command continues"
                ) from None
            if not seconds:
                say(f"{what}: {text}; retrying in {delay:g} s")
            time.sleep(delay)


def bounded(action: Callable[[], _T], seconds: float) -> _T:
    """The result of `action`; TimeoutError if it takes longer, for example in a name server's query."""
    result: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(action())
        except BaseException as error:  # noqa: BLE001, raised below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # nothing waits for it at exit
    thread.start()
    thread.join(max(0, seconds))
    if errors:
        raise errors[0]
    if not result:
        raise TimeoutError("no answer")
    return result[0]
