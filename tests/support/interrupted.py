"""A producer that is interrupted."""

import contextlib

from common.atomic_files import PARTIAL_SUFFIX
from training.data.producing import producer
from training.data.shards.shard_writer import ShardWriter


class KilledError(Exception):
    pass


def interrupt_after(monkeypatch, shards: int) -> None:
    """Make the producer die after `shards` shards and leave the files that a kill would leave."""
    real = ShardWriter._write_shard

    def write_shard(self) -> None:
        if len(self.manifest.shards) == shards:
            (self._folder / f"c_train_{shards:06d}.npy{PARTIAL_SUFFIX}").write_bytes(b"half")
            (self._folder / f"c_train_{shards:06d}.npy").write_bytes(b"complete, but not in the manifest")
            raise KilledError
        real(self)

    monkeypatch.setattr(ShardWriter, "_write_shard", write_shard)
    monkeypatch.setattr(producer, "removing_partial_files", contextlib.nullcontext)
