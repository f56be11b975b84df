"""A bucket in memory with the part of Google Cloud Storage's JSON API that gcsfs and TensorStore use, for tests.

with serve() as server:  # server.env: environment for both clients; server.objects: (bucket, name) -> bytes
"""

import contextlib
import http.server
import json
import re
import threading
import urllib.parse


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    objects: dict[tuple[str, str], bytes]

    def handle_error(self, request, client_address):
        """Prints nothing: clients that are killed, or have read enough, close the connection during a response."""

    @property
    def env(self):
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GS_TOKEN": "anon",
            "FSSPEC_GCS_TOKEN": "anon",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # its client for hierarchical buckets uses gRPC
        }


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), headers | {"Content-Type": "application/json"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def about(self, bucket, name):
        server = self.server
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "id": f"{bucket}/{name}",
            "size": str(len(server.objects[bucket, name])),
            "generation": str(server.generations[bucket, name]),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00Z",
            "timeCreated": "2026-01-01T00:00:00Z",
            "storageClass": "STANDARD",
        }

    def store(self, bucket, name, data, query):
        server = self.server
        with server.lock:
            want = query.get("ifGenerationMatch")
            if want is not None and int(want) != server.generations.get((bucket, name), 0):
                return self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            server.counter += 1
            server.objects[bucket, name], server.generations[bucket, name] = data, server.counter
            return self.answer(200, self.about(bucket, name))

    def handle_any(self):
        server = self.server
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self.body()
        server.requests.append((self.command, self.path))
        if match := re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o|/resumable/([^/]+)", url.path):
            return self.upload(match[1], query, body)
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)", url.path):
            return self.answer(200, {"kind": "storage#bucket", "name": match[1], "id": match[1]})
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/storageLayout", url.path):
            return self.answer(200, {"kind": "storage#storageLayout", "hierarchicalNamespace": {"enabled": False}})
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/?", url.path):
            return self.list(match[1], query)
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", url.path):
            source, target = [urllib.parse.unquote(match[i]) for i in (2, 4)]
            with server.lock:
                if (match[1], source) not in server.objects:
                    return self.answer(404, {"error": {"code": 404, "message": "No such object"}})
                server.counter += 1
                server.objects[match[3], target] = server.objects[match[1], source]
                server.generations[match[3], target] = server.counter
                return self.answer(200, {"done": True, "resource": self.about(match[3], target)})
        if match := re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)", url.path):
            return self.one(match[1], urllib.parse.unquote(match[2]), query)
        return self.answer(404, {"error": {"code": 404, "message": f"not emulated: {self.path}"}})

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_any

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def upload(self, bucket, query, body):
        server = self.server
        kind = query.get("uploadType")
        if session := query.get("session"):  # one chunk of a resumable upload
            state = server.sessions[session]
            state["data"] += body
            total = self.headers.get("Content-Range", "*/*").rsplit("/", 1)[1]
            if total == "*":
                return self.answer(308, Range=f"bytes=0-{len(state['data']) - 1}")
            return self.store(state["bucket"], state["name"], state["data"], state["query"])
        if kind == "media":
            return self.store(bucket, query["name"], body, query)
        if kind == "multipart":
            boundary = re.search(r"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"])[1].encode()
            parts = body.split(b"--" + boundary)[1:3]  # JSON, then the bytes up to the line break before the boundary
            about, data = [re.split(rb"\r\n\r\n|\n\n", part, maxsplit=1)[1] for part in parts]
            data = data[:-2] if data.endswith(b"\r\n") else data[:-1]
            return self.store(bucket, query.get("name") or json.loads(about)["name"], data, query)
        if kind == "resumable":
            session = str(len(server.sessions))
            name = query.get("name") or json.loads(body)["name"]
            server.sessions[session] = {"bucket": bucket, "name": name, "data": b"", "query": query}
            location = f"http://127.0.0.1:{server.server_port}/upload/storage/v1/b/{bucket}/o?session={session}"
            return self.answer(200, {}, Location=location)
        return self.answer(400, {"error": {"code": 400, "message": f"uploadType {kind}"}})

    def list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.server.lock:
            for owner, name in sorted(self.server.objects):
                if owner != bucket or not name.startswith(prefix) or name < query.get("startOffset", ""):
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self.about(owner, name))
        end = query.get("endOffset")
        items = [item for item in items if not end or item["name"] < end]
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def one(self, bucket, name, query):
        server = self.server
        with server.lock:
            data = server.objects.get((bucket, name))
            if data is None:
                return self.answer(404, {"error": {"code": 404, "message": "No such object"}})
            generation = str(server.generations[bucket, name])
            if self.command == "DELETE":
                del server.objects[bucket, name], server.generations[bucket, name]
                return self.answer(204)
            if query.get("alt") != "media":
                return self.answer(200, self.about(bucket, name))
        if query.get("ifGenerationNotMatch") == generation:
            return self.answer(304, x_goog_generation=generation)
        if query.get("ifGenerationMatch", generation) != generation:
            return self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        headers = {"x_goog_generation": generation, "Content_Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            if match[1]:
                begin, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            else:
                begin, end = max(0, len(data) - int(match[2])), len(data) - 1
            if begin >= len(data):
                return self.answer(416, Content_Range=f"bytes */{len(data)}")
            headers["Content_Range"] = f"bytes {begin}-{end}/{len(data)}"
            return self.answer(206, data[begin : end + 1], **headers)
        return self.answer(200, data, **headers)


@contextlib.contextmanager
def serve():
    server = Server(("127.0.0.1", 0), Handler)
    server.objects, server.generations, server.sessions, server.requests = {}, {}, {}, []
    server.counter, server.lock = 0, threading.RLock()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
