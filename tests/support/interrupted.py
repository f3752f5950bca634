"""A producer that is interrupted."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from common.atomic_files import PARTIAL_SUFFIX
from support.small_corpora import make_shards
from training.data.producing import producer
from training.data.shards.shard_writer import ShardWriter


class _KilledError(Exception):
    pass


def make_interrupted_shards(folder: Path, shards: int, **settings: Any) -> None:
    """Start `make_shards`, let it die after `shards` shards, and leave the files that a kill would leave."""
    real = ShardWriter._write_shard

    def write_shard(self: ShardWriter) -> None:
        if len(self.manifest.shards) == shards:
            (folder / f"c_train_{shards:06d}.npy{PARTIAL_SUFFIX}").write_bytes(b"half")
            (folder / f"c_train_{shards:06d}.npy").write_bytes(b"complete, but not in the manifest")
            raise _KilledError
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "_write_shard", write_shard)
        patch.setattr(producer, "removing_partial_files", contextlib.nullcontext)
        with pytest.raises(_KilledError):
            make_shards(folder, **settings)
