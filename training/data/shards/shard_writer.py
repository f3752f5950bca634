"""Writing a shard folder: it is created, filled, and resumed after an interruption, which leaves partial files.

A shard appears under its final name only when it is complete, and then in the manifest.
"""

import contextlib
import errno
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.atomic_files import PARTIAL_SUFFIX, fsync, write_atomically
from common.cli_errors import InputError
from common.token_files import Split
from training.data.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord
from training.data.shards.shard_reader import ShardFolder
from training.data.shards.shard_spec import ShardSpec
from training.data.sources.base import Corpus
from training.data.tokenization.tokenizer import Tokenizer
from training.data.tokenization.tokenizer_files import TOKENIZER_FILES

_SPARE_BYTES = 1 << 20  # for the manifest and the file system's own data


def create_folder(spec: ShardSpec, source: Corpus, tokenizer: Tokenizer, *, dtype: Any = None) -> Manifest:
    """Write the tokenizer and a manifest without shards into the spec's folder, which exists; return the manifest.

    `dtype` of the ids is by default the smallest that holds the vocabulary.
    """
    manifest = Manifest(
        corpus=source.name,
        corpus_revision=source.revision,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        dtype=dtype or ("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"),
        max_tokens=spec.max_tokens,
        **spec.recorded,
    )
    tokenizer.save(spec.folder)
    for path in (*(spec.folder / name for name in TOKENIZER_FILES), spec.folder):
        if path.exists():
            fsync(path)
    manifest.write(spec.folder)
    return manifest


def resume_folder(folder: ShardFolder, manifest: Manifest, source: Corpus) -> tuple[Corpus, Tokenizer]:
    """Remove the partial files of a folder; return the corpus and the tokenizer, which must not have changed."""
    corpus = source.at_revision(manifest.corpus_revision)
    if corpus is None:
        raise InputError(
            f"the corpus '{source.name}' has changed since {folder.path} was created; delete the folder and prepare it "
            "again"
        )
    tokenizer = folder.load_tokenizer(str(folder.path))
    _remove_partial_files(folder.path, manifest)
    return corpus, tokenizer


@contextlib.contextmanager
def removing_partial_files(folder: Path) -> Iterator[None]:
    """On exit, delete partial files, and manifest and tokenizer too if no shard was completed."""
    try:
        yield
    finally:
        manifest = Manifest.read(folder)
        _remove_partial_files(folder, manifest)
        if manifest is None or not manifest.shards:
            for name in (MANIFEST_NAME, *TOKENIZER_FILES):
                (folder / name).unlink(missing_ok=True)


def _remove_partial_files(folder: Path, manifest: Manifest | None) -> None:
    """Delete what a killed producer left: partial files, and a shard that is not in the manifest yet."""
    for path in folder.glob(f"*{PARTIAL_SUFFIX}"):
        path.unlink()
    if manifest is not None:
        shard_name = re.compile(re.escape(manifest.corpus) + r"_(val|train)_\d{6}\.npy")
        listed = {shard.file for shard in manifest.shards}
        for path in list(folder.iterdir()):
            if shard_name.fullmatch(path.name) and path.name not in listed:
                path.unlink()


class ShardWriter:
    """Cuts a stream of ids into shards, writes each as soon as it is full, and updates the manifest.

    Writing continues after the shards that the manifest lists. `manifest_changes` is called when a shard is complete,
    with the number of tokens in the shards so far, and returns further fields of the manifest to change.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, manifest_changes: Callable[[int], dict[str, Any]] = lambda tokens: {}
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
                f"not enough memory for a shard of {tokens:,} tokens; lower shard_tokens and val_tokens, "
                "and choose another folder"
            ) from None

    def _update(self, **changes: Any) -> None:
        self.manifest = replace(self.manifest, **changes)
        self.manifest.write(self._folder)

    def _write_shard(self) -> None:
        ids = self._buffer[: self._filled]
        split: Split = "train" if self.manifest.shards else "val"
        file = f"{self.manifest.corpus}_{split}_{len(self.manifest.shards):06d}.npy"
        require_space(self._folder, ids.nbytes)

        def write(stream: BinaryIO) -> None:
            np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(ids))
            stream.write(ids.data)  # unlike `np.save`, it raises ENOSPC when the disk is full

        digest = write_atomically(self._folder / file, write)
        documents = int(np.count_nonzero(ids == self.manifest.end_of_text_id))
        record = ShardRecord(file, split, len(ids), documents, digest)
        changes = self._manifest_changes(self.manifest.tokens + len(ids))
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
