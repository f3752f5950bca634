"""Reading a shard folder: its shards, its manifest and its tokenizer.

`NAME_val_000000.npy`, `NAME_train_000001.npy`, …: one-dimensional little-endian ids, `uint16` while the vocabulary
fits. Every document begins with the end-of-text token and may continue in the next shard; shard 0 is validation.
Folders without a manifest, written by build-nanogpt, llm.c or modded-nanogpt, are read as they are.
Opening a folder reads headers and sizes only.
"""

import functools
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.atomic_files import file_sha256
from common.cli_errors import InputError, os_error_message
from common.token_files import Split, map_ids, read_header, split_of, unusable_file
from training.data.shards.manifest import MANIFEST_NAME, Manifest
from training.data.tokenization.tokenizer import Tokenizer, load_tokenizer

_IDS_PER_CHECK = 1 << 22


@dataclass(frozen=True)
class Shard:
    """A file of token ids.

    Attributes:
        documents: how many documents begin in it; None without a manifest.
        sha256: hash of the file; None without a manifest.
    """

    path: Path
    split: Split
    tokens: int
    documents: int | None = None
    sha256: str | None = None

    def read(self) -> np.ndarray:
        """Return the ids, (tokens,), read-only and memory-mapped."""
        return map_ids(self.path)

    def check_hash(self) -> None:
        """Raise an `InputError` if the file is not the one that the manifest describes.

        A file of the same size and time of modification is read only once by a process.
        """
        if self.sha256 is None:
            return
        try:
            status = self.path.stat()
            same = _has_hash(self.path, self.sha256, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise InputError(os_error_message(error) or f"cannot read {self.path} ({error})") from None
        if not same:
            raise InputError(
                f"{self.path} is corrupted: its sha256 is not the manifest's; "
                "delete the folder and run python -m training.prepare again, or download the file again"
            )

    def check_ids(self, vocab_size: int) -> None:
        """Read the complete shard, and raise an `InputError` if an id is not below `vocab_size`."""
        ids = self.read()
        for start in range(0, len(ids), _IDS_PER_CHECK):
            largest = int(ids[start : start + _IDS_PER_CHECK].max())
            if largest >= vocab_size:
                raise InputError(
                    f"{self.path} holds token id {largest:,}, but the vocabulary has {vocab_size:,} ids; "
                    "name the tokenizer that made the shards"
                )


@functools.cache
def _has_hash(path: Path, sha256: str, size: int, modified_ns: int) -> bool:
    return file_sha256(path) == sha256


class ShardReader:
    """An open shard for short reads at any offset.

    It reads with system calls: a memory map reads ahead around each page, which costs a hundred times as much when
    windows are shuffled, and a failing network disk would kill the process.
    """

    def __init__(self, shard: Shard) -> None:
        self._path = shard.path
        self._header = read_header(shard.path)
        self._descriptor = os.open(shard.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, first: int, count: int) -> np.ndarray:
        """Return `count` ids from offset `first` on, (count,), read-only; an `InputError` if the file is truncated."""
        size = self._header.dtype.itemsize
        content = os.pread(self._descriptor, count * size, self._header.offset + first * size)
        if len(content) < count * size:
            end = first + len(content) // size
            raise unusable_file(self._path, f"its header says {self._header.tokens:,} tokens, it ends after {end:,}")
        return np.frombuffer(content, dtype=self._header.dtype)


@dataclass(frozen=True)
class ShardFolder:
    """The shards that a folder holds now; open it again to see those that a producer has added.

    Attributes:
        shards: the complete shards, in order.
        manifest: None for a folder that another program wrote.
    """

    path: Path
    shards: tuple[Shard, ...]
    manifest: Manifest | None

    @classmethod
    def open(cls, path: str | Path) -> "ShardFolder":
        """Return the folder after checking each shard's header and size.

        Raises:
            InputError: the folder holds no shards, or one is missing, truncated, or not what the manifest says.
        """
        path = Path(path)
        folder = cls.find(path)
        if folder is None:
            what = "holds no shards (*_val_*.npy and *_train_*.npy, or .bin)" if path.is_dir() else "does not exist"
            raise InputError(f"{path} {what}; make shards with python -m training.prepare")
        return folder

    @classmethod
    def find(cls, path: Path) -> "ShardFolder | None":
        """Return the folder as `open` does; None where `path` holds neither a manifest nor shards."""
        manifest = Manifest.read(path)
        if manifest is None:
            shards = _shards_by_name(path)
            return cls(path, shards, None) if shards else None
        shards = tuple(
            Shard(path / record.file, record.split, record.tokens, record.documents, record.sha256)
            for record in manifest.shards
        )
        for shard in shards:
            header = read_header(shard.path)
            if header.tokens != shard.tokens or header.dtype != np.dtype(manifest.dtype).newbyteorder("<"):
                raise unusable_file(
                    shard.path,
                    f"{MANIFEST_NAME} says {shard.tokens:,} tokens of {manifest.dtype}, "
                    f"its header {header.tokens:,} of {header.dtype.name}",
                )
        return cls(path, shards, manifest)

    @property
    def train_shards(self) -> list[Shard]:
        """Return the training shards in order."""
        return [shard for shard in self.shards if shard.split == "train"]

    @property
    def val_shard(self) -> Shard:
        """Return the validation shard, the first of several; an `InputError` where there is none, or none yet."""
        for shard in self.shards:
            if shard.split == "val":
                return shard
        when = " yet; the producer writes it first" if self.manifest else "; choose a folder that has one"
        raise InputError(f"{self.path} holds no validation shard{when}")

    @property
    def complete(self) -> bool:
        """Return whether all shards are there."""
        return self.manifest is None or self.manifest.complete

    def read(self, first: int, count: int) -> np.ndarray:
        """Return `count` ids from token `first` of all shards on, or as many as there are."""
        parts = [np.empty(0, dtype=np.uint32)]
        for shard in self.shards:
            if 0 <= first < shard.tokens and count > 0:
                parts.append(shard.read()[first : first + count])
                count -= len(parts[-1])
                first = 0
            else:
                first -= shard.tokens
        return np.concatenate(parts)

    def can_train(self, all_shards: bool) -> bool:
        """Return whether the validation shard and a training shard are complete, or all shards if `all_shards`."""
        return self.complete or (bool(self.train_shards) and not all_shards)

    def load_tokenizer(self, name: str) -> Tokenizer:
        """Return the tokenizer in the folder, or the one called `name`; it must be the one that made the shards."""
        own = (self.path / "tokenizer.json").exists()
        tokenizer = Tokenizer.load(self.path) if own else load_tokenizer(name)
        if self.manifest is not None and tokenizer.fingerprint != self.manifest.tokenizer_fingerprint:
            raise InputError(
                f"the shards in {self.path} were made with the tokenizer {self.manifest.tokenizer}, not with "
                f"{tokenizer.name}; restore its tokenizer.json in the folder, or prepare the corpus again"
            )
        sizes = (tokenizer.vocab_size, tokenizer.end_of_text_id)
        if self.manifest is not None and sizes != (self.manifest.vocab_size, self.manifest.end_of_text_id):
            raise InputError(
                f"{self.path / MANIFEST_NAME} is not a valid manifest: its vocab_size and end_of_text_id are not those "
                "of the tokenizer; delete the folder and prepare it again"
            )
        return tokenizer


def _shards_by_name(path: Path) -> tuple[Shard, ...]:
    """Return the shards of a folder without a manifest: *_val_*.npy, *_train_*.npy, or .bin."""
    splits = {file: split for file in sorted(path.glob("*")) if (split := split_of(file.name))}
    if len({file.suffix for file in splits}) > 1:
        raise InputError(f"{path} holds both .npy and .bin shards; keep one of the two formats")
    return tuple(Shard(file, split, read_header(file).tokens) for file, split in splits.items())
