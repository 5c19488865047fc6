"""A hub on this machine: the routes of the Hugging Face hub and of ModelScope that their own clients use.

Repositories are `{(kind, name): {path: bytes}}`, kind "models" or "datasets". Weights are answered with a redirect, as
the hub does. Everything asked for is kept in `asked` as (method, path, token).
"""

import base64
import hashlib
import http.server
import json
import threading
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1f" * 20


class Hub:
    """A server in a thread; close it, or use `with`."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.created: list[dict] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> set[str]:
        """The files whose contents were sent."""
        return {path for method, path, _ in self.asked if method == "sent"}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)) >= 0:
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        self._answer(body)

    def _answer(self, body: bytes = b""):
        url = urlsplit(self.path)
        parts, query = [unquote(part) for part in url.path.strip("/").split("/")], parse_qs(url.query)
        self.hub.asked.append((self.command, url.path, self.headers.get("Authorization")))
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:  # the head of a model card
            return self._json({"errors": [], "warnings": []})
        if parts[:2] == ["api", "v1"]:
            return self._modelscope(parts[2:], query)
        if parts[0] == "api":
            return self._hugging_face(parts[1], "/".join(parts[2:4]), parts[4:], body)
        kind, parts = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
        redirected = parts[0] == "storage"
        kind, parts = (parts[1], parts[2:]) if redirected else (kind, parts)
        files = self.hub.repositories.get((kind, "/".join(parts[:2])), {})
        path = "/".join(parts[4:])
        if parts[2] != "resolve" or path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if path.endswith(".safetensors") and not redirected:
            tag = hashlib.sha256(files[path]).hexdigest()
            linked = {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(files[path])), "X-Repo-Commit": COMMIT}
            return self._send(302, b"", linked | {"Location": f"/storage/{kind}/{'/'.join(parts)}"})
        return self._file(path, files[path])

    def _hugging_face(self, kind: str, name: str, rest: list[str], body: bytes):
        files = self.hub.repositories.get((kind, name))
        if files is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        match rest[0]:
            case "revision":
                if rest[1] not in ("main", "v1.0", COMMIT):
                    return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})
            case "tree":
                return self._json([_entry(path, content) for path, content in files.items()])
            case "preupload":
                asked = json.loads(body)["files"]
                modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
                return self._json({"files": modes})
            case "commit":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        return self._send(404)

    def _create(self, wanted: dict):
        if self.headers.get("Authorization") != "Bearer secret":
            return self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        self.hub.created.append(wanted)
        name = f"{wanted['organization']}/{wanted['name']}"
        self.hub.repositories.setdefault(("models", name), {})
        return self._json({"url": f"{self.hub.address}/{name}", "id": "1", "name": name})

    def _modelscope(self, parts: list[str], query: dict):
        kind, name, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        files = self.hub.repositories.get((kind, name))
        if files is None:
            return self._json({"Code": 10010205001, "Message": "not found", "Success": False}, status=404)
        if rest == ["repo"]:
            path = query["FilePath"][0]
            return self._file(path, files[path])
        if rest[-1] in ("files", "tree"):
            entries = [
                {"Path": path, "Name": path.split("/")[-1], "Type": "blob", "Size": len(content)}
                | {"Sha256": hashlib.sha256(content).hexdigest(), "Revision": COMMIT}
                for path, content in files.items()
            ]
            page = int(query.get("PageNumber", ["1"])[0])
            data = {"Files": entries if page == 1 else [], "TotalCount": len(entries), "LatestCommitter": {}}
            return self._json({"Code": 200, "Success": True, "Data": data})
        return self._json({"Code": 200, "Success": True, "Data": {"Name": name, "Id": 1}})

    def _file(self, path: str, content: bytes):
        tag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if self.command == "GET":
            self.hub.asked.append(("sent", path, None))
        self._send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def _json(self, value, *, status: int = 200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
