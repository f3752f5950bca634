"""A shard folder that a test completes shard by shard."""

import dataclasses
import shutil
from pathlib import Path

from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder


class GrowingFolder:
    """A copy of a complete shard folder whose manifest lists only the first shards."""

    def __init__(self, complete: Path, path: Path) -> None:
        shutil.copytree(complete, path)
        self.path = path
        manifest = Manifest.read(path)
        assert manifest is not None
        self.complete_manifest = manifest

    def show(self, shards: int, *, complete: bool = False) -> ShardFolder:
        dataclasses.replace(
            self.complete_manifest, shards=self.complete_manifest.shards[:shards], complete=complete
        ).write(self.path)
        for record in self.complete_manifest.shards[
            shards:
        ]:  # a shard that the manifest does not list may be in any state
            (self.path / record.file).unlink(missing_ok=True)
        return ShardFolder.open(self.path)


def restore(growing: GrowingFolder, complete: Path, shards: int) -> None:
    """Add shards as the producer would, until the folder has its first `shards`."""
    for record in growing.complete_manifest.shards[:shards]:
        if not (growing.path / record.file).exists():
            shutil.copy(complete / record.file, growing.path / record.file)
    complete_now = shards == len(growing.complete_manifest.shards)
    dataclasses.replace(
        growing.complete_manifest, shards=growing.complete_manifest.shards[:shards], complete=complete_now
    ).write(growing.path)
