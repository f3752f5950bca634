"""A repository in memory: immutable commits, and branches and tags that point to them."""

import hashlib
from pathlib import PurePosixPath
from typing import Any

COMMIT = "c0ffee" * 6 + "c0ff"
_LFS_SUFFIXES = {".safetensors", ".npy", ".npz", ".bin", ".parquet", ".png", ".zst", ".gz"}
_REGULAR_BYTES = 10_000_000


def is_lfs(path: str, content: bytes | int) -> bool:
    """Return whether the Hub stores a file with LFS, by the `.gitattributes` of a new repository or by its size."""
    size = content if isinstance(content, int) else len(content)
    return PurePosixPath(path).suffix in _LFS_SUFFIXES or size > _REGULAR_BYTES


class Repository:
    """Commits, branches and tags."""

    def __init__(self, files: dict[str, bytes] | None = None, *, private: bool = False) -> None:
        self.commits: dict[str, dict[str, bytes]] = {COMMIT: files if files is not None else {".gitattributes": b""}}
        self.branches = {"main": COMMIT}
        self.tags: dict[str, str] = {}
        self.messages: list[str] = []
        self.private = private

    @staticmethod
    def sha256(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        commit = self.resolve(revision)
        assert commit is not None, (revision, self.branches, self.tags)
        return self.commits[commit]

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def refs(self) -> dict[str, Any]:
        def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in names.items()]

        return {"branches": listed("heads", self.branches), "tags": listed("tags", self.tags), "converts": []}
