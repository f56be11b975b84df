"""A local HTTP server with the part of the Hugging Face hub's API that datasets and models use, and injected faults."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import random
import re
import threading
import urllib.parse
from collections.abc import Iterator

import datasets
import huggingface_hub
import pytest

COMMIT = "79d93d786212f7344586290adb811d4ae6a1762c"


class HubServer(http.server.ThreadingHTTPServer):
    """Serves `files` (URL path -> bytes): `/owner/name/path` as hub datasets and models, `/plain/...` as plain files.

    Attributes:
      url: its address.
      faults: probability that a data request returns 503 or disconnects in the middle.
      failed: number of such requests so far.
      log: method, path and Range header of every request.
      agents: User-Agent headers of the requests for plain files.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], faults: float = 0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.faults, self.log, self.agents = files, faults, [], set()
        self.dice, self.failed = random.Random(0), 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.log.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(f"/{match[1]}/{match[3]}", commit=True)
        if path.startswith("/plain/"):
            self.server.agents.add(self.headers.get("User-Agent"))
            return self._file(path, commit=False)
        if match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if not self._paths(match[1]):
                return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": name} for name in self._paths(match[1])]
            return self._json({"id": match[1], "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        if match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            inside = match[2] + "/" if match[2] else ""
            names = [name for name in self._paths(match[1]) if name.startswith(inside)]
            if "recursive=True" not in self.path and "recursive=true" not in self.path:
                folders = {inside + name[len(inside) :].split("/")[0] for name in names if "/" in name[len(inside) :]}
                names = [name for name in names if "/" not in name[len(inside) :]]
            else:
                folders = {
                    name[:i] for name in names for i, char in enumerate(name) if char == "/" and i >= len(inside)
                }
            entries = [self._entry(match[1], name) for name in names]
            return self._json(
                [{"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in sorted(folders)] + entries
            )
        return self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.log.append((self.command, path, None))
        if match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/paths-info/[^/]+", path):
            if self.headers.get("Content-Type", "").startswith("application/json"):
                asked = json.loads(body)["paths"]
            else:
                asked = urllib.parse.parse_qs(body.decode())["paths"]
            known = [name for name in self._paths(match[1]) if name in asked]
            return self._json([self._entry(match[1], name) for name in known])
        return self._json({"error": "not found"}, 404)

    def _paths(self, repo):
        return [path[len(repo) + 2 :] for path in sorted(self.server.files) if path.startswith(f"/{repo}/")]

    def _entry(self, repo, name):
        data = self.server.files[f"/{repo}/{name}"]
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}

    def _json(self, value, status=200, headers=()):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in dict(headers).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _file(self, path, commit):
        data = self.server.files.get(path)
        if data is None:
            return self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        fault = self.server.dice.random() < self.server.faults
        if fault and self.server.dice.random() < 0.5:
            self.server.failed += 1
            return self._json({"error": "overloaded"}, 503)
        etag, begin = f'"{hashlib.sha1(data).hexdigest()}"', 0
        end = len(data)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match and self.headers.get("If-Range") in (None, etag):
            begin, end = int(match[1]), min(len(data), int(match[2]) + 1 if match[2] else len(data))
        partial = (begin, end) != (0, len(data))
        self.send_response(206 if partial else 200)
        self.send_header("ETag", etag)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        if partial:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        if commit:
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault:
            self.server.failed += 1
            end = begin + (end - begin) // 2
            self.close_connection = True
        self.wfile.write(data[begin:end])
        return None

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serve_dataset(repo: str, rows: list[dict], folder: pathlib.Path, patch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with one dataset, whose splits train and validation have the same rows, and empty caches under `folder`."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for module, name in ((huggingface_hub.constants, "HF_HUB_CACHE"), (datasets.config, "HF_DATASETS_CACHE")):
        patch.setattr(module, name, str(folder / name))
    with HubServer({f"/{repo}/{split}.jsonl": lines for split in ("train", "validation")}) as server:
        yield server
