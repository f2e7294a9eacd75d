"""A Hub on the loopback interface: the protocol of huggingface_hub's client, over real HTTP.

Repositories are commits of path → bytes, in memory. Large files (by suffix) go through Git LFS and
are served, by redirection, from another host name (``localhost`` instead of ``127.0.0.1``), as the
Hub serves them from a CDN: a token sent there is a leak, which ``leaks`` records. Faults are
planted with ``fail`` and ``drop``; ``seen`` lists what was asked.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_store import (
    LFS_SUFFIXES,
    Fault,
    Hold,
    Repo,
    Seen,
    card_data,
    card_faults,
    git_id,
    sha256,
)

PUBLIC = "https://huggingface.co"
"""What the server calls itself in the addresses of pages."""


class HubServer:
    """The server; a context manager that answers between entering and leaving."""

    def __init__(self) -> None:
        self.users = {"hf_writer": "me", "hf_reader": "reader"}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.leaks: list[str] = []
        self.cards: list[str] = []
        self.faults: list[Fault] = []
        self.part_bytes: int | None = None
        self.ranges = True
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], **facts: Any) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, **facts)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **files}, "initial")
        self.blobs |= {sha256(data): data for data in files.values()}
        return repo

    def fail(self, method: str, part: str, status: int, times: int = 1, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(method, part, times, status, named))

    def drop(self, part: str, after: int, times: int = 1, skip: int = 0) -> None:
        """Break the connection ``after`` bytes of a body, of ``skip`` requests later."""
        self.faults.append(Fault("GET", part, times, after=after, skip=skip))

    def hold(self, part: str, after: int, skip: int = 0) -> Hold:
        """Fall silent ``after`` bytes of a body, of ``skip`` requests later and all that follow."""
        hold = Hold()
        self.faults.append(Fault("GET", part, 10**6, after=after, skip=skip, hold=hold))
        return hold

    def sent(self, part: str) -> int:
        """Return the bytes of bodies that went out."""
        return sum(one.sent for one in self.seen if part in one.path)

    def blob(self, oid: str) -> bytes:
        if oid not in self.blobs:
            everything = (files for repo in self.repos.values() for files in repo.commits.values())
            self.blobs |= {sha256(data): data for files in everything for data in files.values()}
        return self.blobs[oid]

    def asked(self, method: str, part: str) -> list[Seen]:
        return [one for one in self.seen if one.method == method and part in one.path]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.part in path:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    # ------------------------------------------------------------------ answering

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length) if length else self._chunked()
        path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        self.fault = None
        bearer = self.headers.get("Authorization")
        self.token = bearer.removeprefix("Bearer ") if bearer else None
        self.record = Seen(method, path, self.headers.get("Range"), self.token)
        self.hub.seen.append(self.record)
        if self.token and self.headers.get("Host", "").startswith("localhost"):
            self.hub.leaks.append(path)
        self.fault = self.hub.take_fault(method, path)
        if self.fault and self.fault.status:
            self._json({"error": "planted"}, self.fault.status, self.fault.headers)
            return
        if self.token and self.token not in self.hub.users:
            words = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._json({"error": "Invalid username or password."}, 401, words)
            return
        for kind, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and kind in (method, "GET" if method == "HEAD" else method):
                getattr(self, name)(**{k: unquote(v) for k, v in match.groupdict().items() if v})
                return
        self._json({"error": f"no route {method} {path}"}, 404)

    def _chunked(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        found = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(
            json.dumps(value).encode(),
            status,
            {"Content-Type": "application/json", **(headers or {})},
        )

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.after is not None and len(data) > self.fault.after:
            self._write(data[: self.fault.after])
            if self.fault.hold:
                self.fault.hold.reached.set()
                self.fault.hold.over.wait(60)
            self.close_connection = True
            self.connection.close()
            return
        self._write(data)

    def _write(self, data: bytes) -> None:
        self.record.sent = len(data)
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except ConnectionError:
            # Killed in the middle of it.
            self.close_connection = True

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    # ------------------------------------------------------------------ access

    @property
    def user(self) -> str | None:
        return self.hub.users.get(self.token or "")

    def _repo(self, repo: str, *, content: bool = False) -> Repo | None:
        """Return a repository if the user may see it, else answer why not."""
        found = self.hub.repos.get(repo)
        owner = repo.partition("/")[0]
        if found is None or (found.private and self.user != owner):
            self._refuse(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
            return None
        if content and found.gated and self.user != owner:
            self._refuse(401 if self.user is None else 403, "GatedRepo", "Access is restricted")
            return None
        return found

    def _commit_of(self, repo: Repo, revision: str) -> str | None:
        sha = repo.resolve(revision)
        if sha is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _may_write(self, repo: str) -> bool:
        if self.user == repo.partition("/")[0]:
            return True
        words = "You don't have the rights to create a model under this namespace"
        self._json({"error": words}, 403 if self.user else 401, {"X-Error-Message": words})
        return False

    # ------------------------------------------------------------------ routes

    def whoami(self) -> None:
        if self.user is None:
            self._json({"error": "Unauthorized"}, 401)
        else:
            self._json({"type": "user", "name": self.user, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or self.user}/{asked['name']}"
        if not self._may_write(repo):
            return
        if repo in self.hub.repos:
            url = f"{self.hub.url}/{repo}"
            self._json({"error": "You already created this model repo", "url": url}, 409)
            return
        self.hub.add(repo, {}, private=asked.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate(self) -> None:
        text = json.loads(self.body)["content"]
        self.hub.cards.append(text)
        faults = card_faults(text)
        errors = [{"message": f'"{name}" is not valid'} for name in faults]
        self._json({"errors": errors, "warnings": []}, 400 if faults else 200)

    def info(self, repo: str, revision: str = "main") -> None:
        found = self._repo(repo)
        sha = found and self._commit_of(found, revision)
        if not found or not sha:
            return
        files = found.commits[sha]
        card = card_data(files.get("README.md", b"").decode())
        self._json(
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": sha,
                "private": found.private,
                "gated": "auto" if found.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags", []),
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "cardData": card,
                "siblings": [{"rfilename": name} for name in files],
            }
        )

    def tree(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        sha = found and self._commit_of(found, revision)
        if found and sha:
            self._json([self._entry(name, data) for name, data in found.commits[sha].items()])

    def paths_info(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        sha = found and self._commit_of(found, revision)
        if found and sha:
            files = found.commits[sha]
            asked = parse_qs(self.body.decode()).get("paths", [])
            if self.body.startswith(b"{"):
                asked = json.loads(self.body)["paths"]
            self._json([self._entry(name, files[name]) for name in asked if name in files])

    @staticmethod
    def _entry(name: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
        if name.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        return entry

    def refs(self, repo: str) -> None:
        found = self._repo(repo)
        if found:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in found.branches.items()
            ]
            self._json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def preupload(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        sha = found and self._commit_of(found, revision)
        if not found or not sha:
            return
        if "create_pr" not in self.query and not self._may_write(repo):
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def lfs_batch(self, repo: str) -> None:
        if self._repo(repo) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                answer["actions"] = self._upload_actions(asked["oid"], asked["size"])
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _upload_actions(self, oid: str, size: int) -> dict[str, Any]:
        verify = {"href": f"{self.hub.url}/lfs-verify/{oid}"}
        part = self.hub.part_bytes
        if part is None:
            return {"upload": {"href": f"{self.hub.cdn}/lfs/{oid}"}, "verify": verify}
        urls = {str(i + 1): f"{self.hub.cdn}/lfs/{oid}/{i + 1}" for i in range(-(-size // part))}
        href = f"{self.hub.url}/lfs-complete/{oid}"
        return {
            "upload": {"href": href, "header": {"chunk_size": str(part), **urls}},
            "verify": verify,
        }

    def lfs_put(self, oid: str, part: str = "") -> None:
        key = f"{oid}/{part}" if part else oid
        if not part and sha256(self.body) != oid:
            self._json({"error": "hash"}, 400)
            return
        self.hub.blobs[key] = self.body
        self._send(b"", 200, {"ETag": f'"{git_id(self.body)}"'})

    def lfs_complete(self, oid: str) -> None:
        parts = sorted(part["partNumber"] for part in json.loads(self.body)["parts"])
        data = b"".join(self.hub.blobs[f"{oid}/{number}"] for number in parts)
        if sha256(data) != oid:
            self._json({"error": "hash"}, 400)
            return
        self.hub.blobs[oid] = data
        self._json({})

    def lfs_verify(self, oid: str) -> None:
        self._json({}, 200 if oid in self.hub.blobs else 404)

    def branch(self, repo: str, name: str) -> None:
        found = self._repo(repo)
        if not found or not self._may_write(repo):
            return
        if name in found.branches:
            self._json({"error": "Reference already exists"}, 409)
            return
        found.commit(name, dict(found.files()), f"branch {name}")
        self._json({})

    def commit(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        sha = found and self._commit_of(found, revision)
        if not found or not sha:
            return
        proposing = "create_pr" in self.query
        if not proposing and not self._may_write(repo):
            return
        files = dict(found.commits[sha])
        summary = ""
        for line in self._operations():
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        answer: dict[str, Any] = {}
        if proposing:
            found.pulls += 1
            revision = f"refs/pr/{found.pulls}"
            answer["pullRequestUrl"] = f"{PUBLIC}/{repo}/discussions/{found.pulls}"
        new = found.commit(revision, files, summary)
        self._json({"commitUrl": f"{PUBLIC}/{repo}/commit/{new}", "commitOid": new, **answer})

    def _operations(self) -> Iterator[dict[str, Any]]:
        for line in self.body.splitlines():
            if line.strip():
                yield json.loads(line)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo, content=True)
        sha = found and self._commit_of(found, revision)
        if not found or not sha:
            return
        files = found.commits[sha]
        if path not in files:
            self._json(
                {"error": "Entry not found"}, 404,
                {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha},
            )  # fmt: skip
            return
        data = files[path]
        if not path.endswith(LFS_SUFFIXES):
            self._content(data, {"ETag": f'"{git_id(data)}"', "X-Repo-Commit": sha})
            return
        oid = sha256(data)
        self._send(
            b"", 302,
            {
                "Location": f"{self.hub.cdn}/cdn/{oid}", "X-Repo-Commit": sha,
                "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)),
            },
        )  # fmt: skip

    def cdn(self, oid: str) -> None:
        self._content(self.hub.blob(oid), {"ETag": f'"{oid}"'})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked or not self.hub.ranges:
            self._send(data, 200, {"Accept-Ranges": "bytes", **headers})
            return
        start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        found = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
        self._send(data[start:stop], 206, {"Content-Range": found, **headers})


_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"/api/models/{_ID}", "info"),
    ("GET", rf"/api/models/{_ID}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", rf"/api/models/{_ID}/refs", "refs"),
    ("POST", rf"/api/models/{_ID}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"/api/models/{_ID}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{_ID}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/models/{_ID}/branch/(?P<name>[^/]+)", "branch"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)(?:/(?P<part>\d+))?", "lfs_put"),
    ("POST", r"/lfs-complete/(?P<oid>\w+)", "lfs_complete"),
    ("POST", r"/lfs-verify/(?P<oid>\w+)", "lfs_verify"),
    ("GET", r"/cdn/(?P<oid>\w+)", "cdn"),
    ("GET", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)
