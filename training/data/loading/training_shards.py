"""The training shards and the order of their windows, while a producer may still be adding shards.

A shard counts once the manifest names it. Epoch 0 takes the shards in their own order, so the windows of the shards
that exist already have their final positions; later epochs need all shards.
"""

import time

from training.data.loading.order import Order, Window
from training.data.shards.shard_reader import Shard, ShardFolder

POLL_SECONDS = 0.5
UNLIMITED = 1 << 62


class TrainingShards:
    """Training shards in order; picklable, so that each loader process can follow the folder by itself.

    Args:
        folder: the opened folder; it is reopened when a sample is after its last shard.
        seq_len: tokens in a window's inputs.
        seed: seed of the data order.

    Raises:
        ValueError: no training shard holds a window.
    """

    def __init__(self, folder: ShardFolder, *, seq_len: int, seed: int) -> None:
        self.seq_len = seq_len
        self.seed = seed
        self._use(folder)

    def _use(self, folder: ShardFolder) -> None:
        self.folder = folder
        self.shards: list[Shard] = folder.train_shards
        self.order = Order([shard.tokens for shard in self.shards], seq_len=self.seq_len, seed=self.seed)

    def refresh(self) -> None:
        """Open the folder again if it was not complete."""
        if not self.folder.complete:
            self._use(ShardFolder.open(self.folder.path))

    def ready(self) -> int:
        """Return how many samples can be read, counted from the first; `UNLIMITED` once the folder is complete."""
        return UNLIMITED if self.folder.complete else self.order.windows_in_epoch(0)

    def locate(self, sample: int) -> Window:
        """Return the window of `sample`; wait until its shard is complete."""
        while sample >= self.ready():
            self.refresh()
            if sample >= self.ready():
                time.sleep(POLL_SECONDS)
        return self.order.locate(sample)
