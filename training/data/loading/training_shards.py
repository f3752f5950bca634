"""The training shards and the order of their windows, while a producer may still be adding shards.

A shard counts once the manifest names it, and that happens when it is whole. Epoch 0 takes the shards in their own
order, so the windows of those that are there have their final places already; later epochs need all of them.
"""

import time

from training.data.loading.order import Order, Window
from training.data.shards.shard_reader import Shard, ShardFolder

SECONDS_BETWEEN_LOOKS = 0.5
WITHOUT_END = 1 << 62


class TrainingShards:
    """Training shards in their order; picklable, so that read-ahead processes can follow the folder on their own.

    Args:
        folder: as it was opened; looked at again when a sample lies behind its last shard.
        seq_len: tokens in a window's inputs.
        seed: names the order.

    Raises:
        ValueError: no training shard holds a window.
    """

    def __init__(self, folder: ShardFolder, *, seq_len: int, seed: int) -> None:
        self.seq_len = seq_len
        self.seed = seed
        self._take(folder)

    def _take(self, folder: ShardFolder) -> None:
        self.folder = folder
        self.shards: list[Shard] = folder.train_shards
        self.order = Order([shard.tokens for shard in self.shards], seq_len=self.seq_len, seed=self.seed)

    def holds(self, sample: int) -> bool:
        """Return whether `sample` can be read, after another look at the folder where that may change the answer."""
        if sample >= self.ready():
            self._take(ShardFolder.open(self.folder.path))
        return sample < self.ready()

    def ready(self) -> int:
        """Return how many samples can be read, counted from the first: `WITHOUT_END` once the folder is complete."""
        return WITHOUT_END if self.folder.complete else self.order.windows_in_epoch(0)

    def locate(self, sample: int) -> Window:
        """Return where `sample` is, waiting for its shard if need be."""
        while not self.holds(sample):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return self.order.locate(sample)
