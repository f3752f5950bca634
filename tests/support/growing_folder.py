"""A shard folder that grows when a test says so."""

import dataclasses
import shutil
from pathlib import Path

from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder


class GrowingFolder:
    """A copy of a complete shard folder, of which the manifest names the first shards only."""

    def __init__(self, complete: Path, path: Path) -> None:
        shutil.copytree(complete, path)
        self.path = path
        manifest = Manifest.read(path)
        assert manifest is not None
        self.whole = manifest

    def show(self, shards: int, *, complete: bool = False) -> ShardFolder:
        dataclasses.replace(self.whole, shards=self.whole.shards[:shards], complete=complete).write(self.path)
        for record in self.whole.shards[shards:]:  # what is not in the manifest may be in any state
            (self.path / record.file).unlink(missing_ok=True)
        return ShardFolder.open(self.path)


def restore(growing: GrowingFolder, complete: Path, shards: int) -> None:
    """Let the folder have its first `shards` shards, as the producer would."""
    for record in growing.whole.shards[:shards]:
        if not (growing.path / record.file).exists():
            shutil.copy(complete / record.file, growing.path / record.file)
    every = shards == len(growing.whole.shards)
    dataclasses.replace(growing.whole, shards=growing.whole.shards[:shards], complete=every).write(growing.path)
