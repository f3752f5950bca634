"""A Hub on this machine: the part of the real one's protocol that `huggingface_hub` and `datasets` speak for a dataset.

Imitated from huggingface_hub's source: `HfApi.dataset_info` (GET /api/datasets/ID/revision/REV), `HfApi.list_repo_tree`
(GET …/tree/REV), `HfApi.get_paths_info` (POST …/paths-info/REV), `hf_hub_url` and `get_hf_file_metadata` (HEAD and GET
/datasets/ID/resolve/REV/FILE with ETag, X-Repo-Commit and ranges), and `hf_raise_for_status` (X-Error-Code).
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

COMMIT = "c0ffee" * 6 + "c0ff"

_API = re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)/?(?P<what>revision|tree|paths-info)?/?(?P<rest>.*)")
_FILE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class LoopbackHub(http.server.ThreadingHTTPServer):
    """Serves repositories from memory.

    Args:
        repositories: name -> path -> content.
        trouble: is shown every request (method, path, its number) and may return a status to answer it with, or "reset"
            to close the connection in the middle of the answer.
    """

    daemon_threads = True

    def __init__(
        self,
        repositories: dict[str, dict[str, bytes]],
        trouble: Callable[[str, str, int], int | str | None] = lambda method, path, number: None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.trouble = trouble
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range

    @property
    def environment(self) -> dict[str, str]:
        """What lets a client find this Hub."""
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


@contextmanager
def serving(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """Run the server in a thread, and end both."""
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _respond(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._respond(200, json.dumps(value).encode(), Content_Type="application/json")

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        requests = self.server.requests
        requests.append((self.command, path, self.headers.get("Range")))
        trouble = self.server.trouble(self.command, path, len(requests))
        if isinstance(trouble, int):
            self._respond(trouble)
        elif api := _API.fullmatch(path):
            self._serve_api(api, body)
        elif file := _FILE.fullmatch(path):
            self._serve_file(file["repo"], file["path"], cut=trouble == "reset")
        else:
            self._respond(404)

    do_GET = do_HEAD = do_POST = _serve  # noqa: N815 - the base class's names

    def _serve_api(self, api: "re.Match[str]", body: str) -> None:
        files = self.server.repositories.get(api["repo"])
        if files is None:
            self._respond(404, X_Error_Code="RepoNotFound")
        elif api["what"] in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            self._json({"_id": "0" * 24, "id": api["repo"], "sha": COMMIT, "siblings": siblings, "tags": []})
        elif api["what"] == "paths-info":
            asked = urllib.parse.parse_qs(body).get("paths") or json.loads(body)["paths"]
            self._json([entry for path in asked for entry in _entries(files, path)])
        else:
            recursive = "recursive=true" in urllib.parse.urlsplit(self.path).query.lower()
            found = _below(files, api["rest"].partition("/")[2], recursive)
            self._json([entry for path in found for entry in _entries(files, path)])

    def _serve_file(self, repo: str, path: str, *, cut: bool) -> None:
        content = self.server.repositories.get(repo, {}).get(path)
        if content is None:
            self._respond(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = (int(wanted[1]), int(wanted[2] or len(content) - 1)) if wanted else (0, len(content) - 1)
        part = content[start : end + 1]
        headers = {"ETag": f'"{_oid(content)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
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
            self._respond(206 if wanted else 200, part, **headers)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _below(files: dict[str, bytes], folder: str, recursive: bool) -> list[str]:
    """Files and folders in a folder, or in all folders below it."""
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
        return [{"type": "file", "path": path, "size": len(files[path]), "oid": _oid(files[path])}]
    if any(name.startswith(path.rstrip("/") + "/") for name in files):
        return [{"type": "directory", "path": path, "oid": "0" * 40}]
    return []
