"""The shard folder: token ids on disk, and the manifest that says where they came from.

`NAME_val_000000.npy`, `NAME_train_000001.npy`, …: one-dimensional little-endian ids, `uint16` while the vocabulary
fits. Every document begins with the end-of-text token and may run on into the next shard; shard 0 is validation.
Folders of build-nanogpt's layout and llm.c's and modded-nanogpt's `.bin` shards are read too: they have no manifest.

A file appears under its name only when it is whole: it is written under another name, forced to disk, and renamed.
Opening a folder reads headers and sizes only.
"""

import errno
import math
import os
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np

from common.atomic_files import write_atomically
from common.cli_errors import InputError
from training.data.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, Split

_FOREIGN_NAME = re.compile(r"(?:^|.*[_-])(?P<split>val|train)(?:[_-]\d+)?\.(?:npy|bin)")
_BIN_HEADER_INTS = 256
_BIN_MAGIC = 20240520
_BIN_VERSION = 1
_IDS_PER_CHECK = 1 << 22
_SPARE_BYTES = 1 << 20  # for the manifest, and what else a file system wants


@dataclass(frozen=True)
class Shard:
    """A file of token ids.

    Attributes:
        path: the file.
        split: "val" or "train".
        tokens: how many ids it holds.
        documents: how many documents begin in it; None where no manifest says.
        sha256: of the file; None where no manifest says.
    """

    path: Path
    split: Split
    tokens: int
    documents: int | None = None
    sha256: str | None = None

    def read(self) -> np.ndarray:
        """Return the ids, (tokens,), read-only and mapped from the file: pages come in as they are touched."""
        dtype, tokens, offset = _layout(self.path)
        return np.memmap(self.path, dtype=dtype, mode="r", offset=offset, shape=(tokens,))


class ShardReader:
    """A shard opened for short reads anywhere in it.

    Reads are system calls: a memory map reads ahead around each page that is touched first, which costs a hundred times
    as much when windows are shuffled, and it ends the process where a network disk fails.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._dtype, self._tokens, self._offset = _layout(shard.path)
        self._descriptor = os.open(shard.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, first: int, count: int) -> np.ndarray:
        """Return `count` ids from number `first` on, (count,), read-only.

        Raises:
            InputError: the file has become shorter.
        """
        size = self._dtype.itemsize
        content = os.pread(self._descriptor, count * size, self._offset + first * size)
        if len(content) < count * size:
            end = first + len(content) // size
            raise _broken_shard(self._shard.path, f"{self._tokens:,} tokens", f"the end of the file after {end:,}")
        return np.frombuffer(content, dtype=self._dtype)


@dataclass(frozen=True)
class ShardFolder:
    """A folder of shards that can be read now; while a producer fills it, open it again to see more.

    Attributes:
        path: the folder.
        shards: those that are whole, in order.
        manifest: None for a folder that another program wrote.
    """

    path: Path
    shards: tuple[Shard, ...]
    manifest: Manifest | None

    @classmethod
    def open(cls, folder: str | Path) -> "ShardFolder":
        """Return the folder's shards after a look at each header and size.

        Raises:
            InputError: the folder holds no shards, or one is missing, cut off, or not what the manifest says.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest is None:
            return cls(folder, _foreign_shards(folder), None)
        shards = []
        for record in manifest.shards:
            shard = Shard(folder / record.file, record.split, record.tokens, record.documents, record.sha256)
            dtype, tokens, _ = _layout(shard.path)
            if tokens != record.tokens or dtype != np.dtype(manifest.dtype).newbyteorder("<"):
                raise _broken_shard(
                    shard.path,
                    f"{record.tokens:,} tokens of {manifest.dtype} (as {MANIFEST_NAME} says)",
                    f"{tokens:,} of {dtype.name}",
                )
            shards.append(shard)
        return cls(folder, tuple(shards), manifest)

    @property
    def train_shards(self) -> list[Shard]:
        """Return the training shards in order."""
        return [shard for shard in self.shards if shard.split == "train"]

    @property
    def val_shard(self) -> Shard:
        """Return the validation shard, the first of several.

        Raises:
            InputError: there is none, or none yet.
        """
        for shard in self.shards:
            if shard.split == "val":
                return shard
        when = "yet; it is the first that the producer writes" if self.manifest else "; give a folder with one"
        raise InputError(f"expected a validation shard in {self.path}, found none {when}")

    @property
    def complete(self) -> bool:
        """Return whether no more shards will come."""
        return self.manifest is None or self.manifest.complete

    def check_ids(self, vocab_size: int, shards: Sequence[Shard] | None = None) -> None:
        """Read every id of `shards` (of all, when None): what to do with a folder that has no manifest.

        Raises:
            InputError: an id is not below `vocab_size`.
        """
        for shard in self.shards if shards is None else shards:
            ids = shard.read()
            for start in range(0, len(ids), _IDS_PER_CHECK):
                largest = int(ids[start : start + _IDS_PER_CHECK].max())
                if largest >= vocab_size:
                    raise InputError(
                        f"expected ids below the vocabulary size {vocab_size:,} in {shard.path}, found {largest:,}; "
                        "give the tokenizer that the shards were made with"
                    )


class ShardWriter:
    """Cuts a stream of ids into shards, each on disk as soon as it is full, and keeps the manifest in step.

    Args:
        folder: exists already.
        manifest: of a folder that may hold shards already; writing goes on behind them.
        news: is asked, when so many documents have begun, what else the manifest is to say.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, news: Callable[[int], dict[str, Any]] = lambda documents: {}
    ) -> None:
        self.manifest = manifest
        self._news = news
        self._folder = folder
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._buffer = self._empty()
        self._filled = 0

    @property
    def tokens(self) -> int:
        """Return the tokens taken so far."""
        return self.manifest.tokens + self._filled

    @property
    def full(self) -> bool:
        """Return whether `max_tokens` training tokens have been taken."""
        return self._room() == 0

    def add(self, ids: np.ndarray) -> None:
        """Take `ids`, (tokens,), up to the limit of tokens; write each shard that they fill."""
        room = self._room()
        if room is not None:
            ids = ids[:room]
        while len(ids):
            taken = min(len(ids), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = ids[:taken]
            self._filled += taken
            ids = ids[taken:]
            if self._filled == len(self._buffer):
                self._write_shard()

    def finish(self) -> Manifest:
        """Write the last shard, and mark the folder complete.

        Raises:
            InputError: the corpus did not fill the validation shard and leave something to train on.
        """
        needed = self.manifest.val_tokens + 2  # an input and its target
        if self.tokens < needed:
            found = self.tokens
            self.discard()
            raise InputError(
                f"expected a corpus of at least {needed:,} tokens (val_tokens={self.manifest.val_tokens:,} and "
                f"something to train on), found {found:,}; give a larger one, or a smaller --val_tokens"
            )
        if self._filled:
            self._write_shard()
        self.manifest = replace(self.manifest, complete=True, resume=None)
        self.manifest.write(self._folder)
        return self.manifest

    def discard(self) -> None:
        """Remove the shards: what a corpus too small for validation and training has given is of no use."""
        for shard in self.manifest.shards:
            (self._folder / shard.file).unlink(missing_ok=True)
        self.manifest = replace(self.manifest, shards=())
        self.manifest.write(self._folder)

    def _room(self) -> int | None:
        if self.manifest.max_tokens is None:
            return None
        return max(0, self.manifest.val_tokens + self.manifest.max_tokens - self.tokens)

    def _size_of_next(self) -> int:
        return self.manifest.shard_tokens if self.manifest.shards else self.manifest.val_tokens

    def _empty(self) -> np.ndarray:
        tokens = self._size_of_next()
        try:
            return np.empty(tokens, dtype=self._dtype)
        except MemoryError:
            raise InputError(
                f"expected memory for a shard of {tokens:,} tokens, found too little; give smaller --shard_tokens and "
                "--val_tokens, and another --output"
            ) from None

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
        self.manifest = replace(self.manifest, shards=(*self.manifest.shards, record))
        self.manifest = replace(self.manifest, **self._news(self.manifest.documents))
        self.manifest.write(self._folder)
        self._filled = 0
        if len(self._buffer) != self._size_of_next():
            self._buffer = self._empty()


def require_space(folder: Path, needed_bytes: int) -> None:
    """Look at the disk before something is written to it.

    Raises:
        OSError: as the write would raise it.
    """
    free = shutil.disk_usage(folder).free
    needed = needed_bytes + _SPARE_BYTES
    if free < needed:
        left, wanted = math.floor(free / 1e5) / 10, math.ceil(needed / 1e5) / 10  # so that they never look alike
        raise OSError(errno.ENOSPC, f"{left:,.1f} MB of disk space left where {wanted:,.1f} MB are needed")


def _broken_shard(path: Path, expected: str, found: str) -> InputError:
    return InputError(
        f"expected {expected} in {path}, found {found}; "
        "delete the folder and run python -m training.prepare again, or fetch the file again"
    )


def _layout(path: Path) -> tuple[np.dtype, int, int]:
    """Return dtype, number of tokens and where they begin, after comparing with the size of the file."""
    try:
        with path.open("rb") as stream:
            dtype, tokens, offset = (_bin_header if path.suffix == ".bin" else _npy_header)(stream, path)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise _broken_shard(path, "a shard", f"no file that can be read ({error.strerror})") from None
    if size != offset + tokens * dtype.itemsize:
        found = (size - offset) // dtype.itemsize
        raise _broken_shard(path, f"{tokens:,} tokens (as its header says)", f"room for {found:,}")
    if tokens == 0:
        raise _broken_shard(path, "tokens", "none")
    return dtype, tokens, offset


def _npy_header(stream: BinaryIO, path: Path) -> tuple[np.dtype, int, int]:
    expected = "a one-dimensional .npy array of uint16 or uint32"
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    except ValueError as error:
        raise _broken_shard(path, expected, f"another file ({' '.join(str(error).split())[:120]})") from None
    if len(shape) != 1 or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise _broken_shard(path, expected, f"shape {shape} of {dtype}")
    return dtype, shape[0], stream.tell()


def _bin_header(stream: BinaryIO, path: Path) -> tuple[np.dtype, int, int]:
    """Read llm.c's header (karpathy/llm.c, dev/data/data_common.py)."""
    size = 4 * _BIN_HEADER_INTS
    content = stream.read(size)
    header = np.frombuffer(content, dtype="<i4") if len(content) == size else np.zeros(3, dtype="<i4")
    if header[0] != _BIN_MAGIC or header[1] != _BIN_VERSION or header[2] < 0:
        raise _broken_shard(
            path,
            f"llm.c's GPT-2 shards (magic {_BIN_MAGIC}, version {_BIN_VERSION})",
            f"magic {header[0]}, version {header[1]}",
        )
    return np.dtype("<u2"), int(header[2]), size


def foreign_split(name: str) -> Split | None:
    """Return the split of a shard of another program, by its name; None for other files."""
    match = _FOREIGN_NAME.fullmatch(PurePosixPath(name).name)
    return cast(Split, match["split"]) if match else None


def holds_foreign_shards(folder: str | Path) -> bool:
    """Return whether `folder` holds shards and no manifest: another program wrote them."""
    folder = Path(folder)
    return not (folder / MANIFEST_NAME).exists() and any(foreign_split(path.name) for path in folder.glob("*"))


def _foreign_shards(folder: Path) -> tuple[Shard, ...]:
    """Return the shards of a folder without manifest, by their names: *_val_*.npy, *_train_*.npy, or .bin."""
    splits = {path: foreign_split(path.name) for path in sorted(folder.glob("*"))}
    found = {path: split for path, split in splits.items() if split}
    if not found:
        what = "a folder without any" if folder.is_dir() else "no such folder"
        raise InputError(
            f"expected shards (*_val_*.npy and *_train_*.npy, or .bin) in {folder}, found {what}; "
            "make them with python -m training.prepare"
        )
    if len({path.suffix for path in found}) > 1:
        raise InputError(f"expected shards of one kind in {folder}, found both .npy and .bin; keep one of them")
    return tuple(Shard(path, split, _layout(path)[1]) for path, split in found.items())
