"""A Hub on this machine: the part of the protocol that `huggingface_hub`, `datasets` and transformers use.

Reads are here, writes in `loopback_writing.py`. Imitated from huggingface_hub's source: `HfApi.model_info` and
`dataset_info` (GET /api/datasets/ID/revision/REV), `HfApi.list_repo_tree` (GET …/tree/REV), `HfApi.get_paths_info`
(POST …/paths-info/REV), `HfApi.list_repo_refs` (GET …/refs), `hf_hub_url` and `get_hf_file_metadata` (HEAD and GET
[/datasets]/ID/resolve/REV/FILE with ETag, X-Repo-Commit and ranges), and `hf_raise_for_status` (X-Error-Code).
"""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from support.loopback_repository import COMMIT, Repository, is_lfs
from support.loopback_writing import serve_writing

__all__ = ["COMMIT", "LoopbackHub", "serving"]

_API = re.compile(
    r"/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)/?(?P<what>revision|tree|paths-info|refs)?/?(?P<rest>.*)"
)
_FILE = re.compile(r"/(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
Trouble = int | str | tuple[int, dict[str, str]] | None


class LoopbackHub(http.server.ThreadingHTTPServer):
    """Serves repositories from memory.

    Args:
        repositories: of datasets: name -> path -> content.
        trouble: called with every request (method, path, number); it may return a status to respond with, also with
            headers, "reset" to close the connection in the middle of the response, "cut" to close it in the middle of
            the request, "down" to close it immediately, or "hang" to wait for `released`.
        accounts: the namespaces that a token can write to, the user's own first.
        part_bytes: larger files are uploaded in parts of this size.
    """

    daemon_threads = True

    def __init__(
        self,
        repositories: dict[str, dict[str, bytes]] | None = None,
        trouble: Callable[[str, str, int], Trouble] = lambda method, path, number: None,
        *,
        accounts: dict[str, list[str]] | None = None,
        part_bytes: int = 1 << 30,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = {("dataset", name): Repository(files) for name, files in (repositories or {}).items()}
        self.trouble = trouble
        self.accounts = accounts or {}
        self.part_bytes = part_bytes
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.large_files: dict[str, bytes] = {}  # by sha256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range

    def hang_uploads(self) -> threading.Event:
        """Make all uploads of large files hang, and return an event that is set by the first one."""
        hangs = threading.Event()

        def trouble(method: str, path: str, number: int) -> Trouble:
            if "/lfs/upload/" not in path:
                return None
            hangs.set()
            return "hang"

        self.trouble = trouble
        return hangs

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for clients of this Hub, which has git LFS and no Xet."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def model(self, name: str) -> Repository:
        return self.repositories["model", name]

    def writes(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path, _ in self.requests if method not in ("GET", "HEAD")]


@contextmanager
def serving(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """Run the server in a thread, and stop both at the end."""
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which holds back every answer for 40 ms

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def respond(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value: Any, status: int = 200) -> None:
        self.respond(status, json.dumps(value).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    @property
    def names(self) -> list[str] | None:
        """The namespaces that the request's token can write to; None for an unknown token."""
        return self.server.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _serve(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        requests = self.server.requests
        requests.append((self.command, urllib.parse.unquote(path), self.headers.get("Range")))
        trouble = self.server.trouble(self.command, requests[-1][1], len(requests))
        if trouble == "hang":
            self.server.released.wait()
        if trouble == "cut":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
        if trouble in ("hang", "cut", "down"):
            self.close_connection = True
            return
        body = self.body()
        if isinstance(trouble, int):
            self.respond(trouble)
        elif isinstance(trouble, tuple):
            self.respond(trouble[0], **trouble[1])
        elif serve_writing(self, path, body):
            pass
        elif api := _API.fullmatch(path):
            self._serve_api(api, body.decode())
        elif file := _FILE.fullmatch(path):
            self._serve_file(file, cut=trouble == "reset")
        else:
            self.respond(404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - the base class's names

    def readable(self, kind: str, name: str) -> Repository | None:
        repository = self.server.repositories.get((kind, name))
        if repository is not None and repository.private and name.split("/")[0] not in (self.names or []):
            return None
        return repository

    def _serve_api(self, api: "re.Match[str]", body: str) -> None:
        repository = self.readable(api["kind"], api["repo"])
        if repository is None:
            self.respond(404, X_Error_Code="RepoNotFound")
            return
        if api["what"] == "refs":
            self.json(repository.refs())
            return
        revision, _, folder = api["rest"].partition("/")
        commit = repository.resolve(urllib.parse.unquote(revision) or "main")
        if commit is None:
            self.respond(404, X_Error_Code="RevisionNotFound")
            return
        files = repository.commits[commit]
        if api["what"] in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            about = {"_id": "0" * 24, "id": api["repo"], "sha": commit, "siblings": siblings, "tags": []}
            self.json(about | {"private": repository.private})
        elif api["what"] == "paths-info":
            paths = urllib.parse.parse_qs(body).get("paths") or json.loads(body)["paths"]
            self.json([entry for path in paths for entry in _entries(files, path)])
        else:
            recursive = "recursive=true" in urllib.parse.urlsplit(self.path).query.lower()
            found = _below(files, urllib.parse.unquote(folder), recursive)
            if folder and not found:
                self.respond(404, X_Error_Code="EntryNotFound")
                return
            self.json([entry for path in found for entry in _entries(files, path)])

    def _serve_file(self, file: "re.Match[str]", *, cut: bool) -> None:
        repository = self.readable(file["kind"] or "model", file["repo"])
        if repository is None:
            self.respond(404, X_Error_Code="RepoNotFound")
            return
        commit = repository.resolve(urllib.parse.unquote(file["revision"]))
        if commit is None:
            self.respond(404, X_Error_Code="RevisionNotFound")
            return
        path = urllib.parse.unquote(file["path"])
        content = repository.commits[commit].get(path)
        if content is None:
            self.respond(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = (int(wanted[1]), int(wanted[2] or len(content) - 1)) if wanted else (0, len(content) - 1)
        part = content[start : end + 1]
        oid = Repository.sha256(content) if is_lfs(path, content) else _oid(content)
        headers = {"ETag": f'"{oid}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if wanted:
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        if cut and self.command == "GET":
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(part)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
        else:
            self.respond(206 if wanted else 200, part, **headers)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _below(files: dict[str, bytes], folder: str, recursive: bool) -> list[str]:
    """Return the files and folders in a folder, with `recursive` also those further below."""
    start = folder.rstrip("/") + "/" if folder else ""
    found: dict[str, None] = {}
    for name in files:
        if name.startswith(start):
            parts = name.removeprefix(start).split("/")
            deepest = len(parts) if recursive else 1
            found.update({start + "/".join(parts[: depth + 1]): None for depth in range(deepest)})
    return list(found)


def _entries(files: dict[str, bytes], path: str) -> list[dict[str, Any]]:
    if path in files:
        content = files[path]
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
        if is_lfs(path, content):
            entry["lfs"] = {"oid": Repository.sha256(content), "size": len(content), "pointerSize": 134}
        return [entry]
    if any(name.startswith(path.rstrip("/") + "/") for name in files):
        return [{"type": "directory", "path": path, "oid": "0" * 40}]
    return []
