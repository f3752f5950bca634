"""Writing shards: each appears under its final name only when it is complete, and then in the manifest."""

import errno
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from common.atomic_files import write_atomically
from common.cli_errors import InputError
from common.token_files import Split
from training.data.shards.manifest import Manifest, ShardRecord

_SPARE_BYTES = 1 << 20  # for the manifest and the file system's own data


class ShardWriter:
    """Cuts a stream of ids into shards, writes each as soon as it is full, and updates the manifest.

    Args:
        folder: an existing folder.
        manifest: the folder's manifest; writing continues after the shards it lists.
        manifest_changes: called with the number of documents that begin in the shards so far, when a shard is
            complete; returns further fields of the manifest to change.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        manifest_changes: Callable[[int], dict[str, Any]] = lambda documents: {},
    ) -> None:
        self.manifest = manifest
        self._manifest_changes = manifest_changes
        self._folder = folder
        self._buffer = self._empty_buffer()
        self._filled = 0

    @property
    def tokens(self) -> int:
        """Return how many tokens the shards and the buffer hold."""
        return self.manifest.tokens + self._filled

    @property
    def full(self) -> bool:
        """Return whether `max_tokens` is reached."""
        return self._room() == 0

    def add(self, ids: np.ndarray) -> None:
        """Append `ids`, (tokens,), up to `max_tokens`; write each shard that becomes full."""
        ids = ids[: self._room()]
        while len(ids):
            taken = min(len(ids), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = ids[:taken]
            self._filled += taken
            ids = ids[taken:]
            if self._filled == len(self._buffer):
                self._write_shard()

    def finish(self) -> Manifest:
        """Write the last shard and mark the folder complete.

        Raises:
            InputError: the corpus is too small for a validation shard and a training window; no shard is kept.
        """
        needed = self.manifest.val_tokens + 2  # an input and its target
        found = self.tokens
        if found < needed:
            written = self.manifest.shards
            self._update(shards=())
            for shard in written:
                (self._folder / shard.file).unlink(missing_ok=True)
            raise InputError(
                f"the corpus has {found:,} tokens, but val_tokens={self.manifest.val_tokens:,} and training need at "
                f"least {needed:,}; choose a larger corpus or a smaller --val_tokens"
            )
        if self._filled:
            self._write_shard()
        self._update(complete=True, resume=None)
        return self.manifest

    def _room(self) -> int | None:
        if self.manifest.max_tokens is None:
            return None
        return max(0, self.manifest.val_tokens + self.manifest.max_tokens - self.tokens)

    def _next_shard_tokens(self) -> int:
        return self.manifest.shard_tokens if self.manifest.shards else self.manifest.val_tokens

    def _empty_buffer(self) -> np.ndarray:
        tokens = self._next_shard_tokens()
        try:
            return np.empty(tokens, dtype=np.dtype(self.manifest.dtype).newbyteorder("<"))
        except MemoryError:
            raise InputError(
                f"not enough memory for a shard of {tokens:,} tokens; lower --shard_tokens and --val_tokens, "
                "and choose another --output"
            ) from None

    def _update(self, **changes: Any) -> None:
        self.manifest = replace(self.manifest, **changes)
        self.manifest.write(self._folder)

    def _write_shard(self) -> None:
        ids = self._buffer[: self._filled]
        split: Split = "train" if self.manifest.shards else "val"
        file = f"{self.manifest.corpus}_{split}_{len(self.manifest.shards):06d}.npy"
        require_space(self._folder, ids.nbytes)
        digest = write_atomically(
            self._folder / file, lambda stream: np.lib.format.write_array(cast(Any, stream), ids, allow_pickle=False)
        )
        documents = int(np.count_nonzero(ids == self.manifest.end_of_text_id))
        record = ShardRecord(file, split, len(ids), documents, digest)
        changes = self._manifest_changes(self.manifest.documents + documents)
        self._update(shards=(*self.manifest.shards, record), **changes)
        self._filled = 0
        if len(self._buffer) != self._next_shard_tokens():
            self._buffer = self._empty_buffer()


def require_space(folder: Path, needed_bytes: int) -> None:
    """Check the free disk space before writing `needed_bytes`.

    Raises:
        OSError: ENOSPC, as the write would raise it.
    """
    free = shutil.disk_usage(folder).free
    needed = needed_bytes + _SPARE_BYTES
    if free < needed:
        left, wanted = math.floor(free / 1e5) / 10, math.ceil(needed / 1e5) / 10  # never print equal numbers
        raise OSError(errno.ENOSPC, f"{left:,.1f} MB of disk space left, {wanted:,.1f} MB needed")
