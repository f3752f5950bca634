"""Nodes wait for each other's data, and verify that data, recipe and checkpoint match before a run starts.

Each node may have its own shard folder and its own errors. A node that just exited would leave the others waiting in
their first collective call, so all of this goes through `Ranks`. On one node, the launcher ends all processes when one
fails.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from itertools import chain

from common.cli_errors import InputError
from common.ranks import Ranks
from training.data.producing.background_producer import BackgroundProducer
from training.data.shards.shard_reader import Shard, ShardFolder
from training.data.tokenization.tokenizer import Tokenizer

_POLL_SECONDS = 0.3
_COMPARED_IDS = 1 << 20  # of a shard without a hash in a manifest


def has_several_nodes() -> bool:
    """Whether the run has processes on other nodes."""
    return os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")


def wait_for_shards(is_ready: Callable[[], bool], producer: BackgroundProducer, ranks: Ranks) -> None:
    """Wait until every node has the shards that a run starts with.

    Once they are complete, a failing producer is no reason to abort, as during training.

    Raises:
        InputError: a producer failed permanently, or another node failed.
    """
    while True:
        ready = is_ready()
        if not ready and producer.failure is not None:
            raise InputError(producer.failure)
        if all(ranks.gather(ready)):
            producer.training_started()
            return
        time.sleep(_POLL_SECONDS)


def check_nodes_match(identity: Mapping[str, object], ranks: Ranks) -> None:
    """Compare what determines the data and the steps of a run across all ranks.

    Raises:
        InputError: two ranks differ, or another node failed.
    """
    every_rank = ranks.gather(dict(identity))
    differences = []
    for name in dict.fromkeys(chain.from_iterable(every_rank)):
        values = [str(known.get(name, "missing")) for known in every_rank]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            differences.append(f"{name} is {values[0]:.16} on rank 0, {values[other]:.16} on rank {other}")
    if differences:
        raise InputError(
            f"the nodes do not match: {'; '.join(differences)}; give every node the same code, recipe and flags, and "
            "share data_dir and output_dir between them, or copy both to every node"
        )


def data_identity(folder: ShardFolder, tokenizer: Tokenizer) -> dict[str, object]:
    """What determines the token ids and their order, as far as it is known when a run starts."""
    names = ("corpus_revision", "dtype", "shard_tokens", "max_tokens")
    return {
        "data: tokenizer": tokenizer.fingerprint,
        **{f"data: {name}": getattr(folder.manifest, name, None) for name in names},
        "data: validation shard": _content(folder.val_shard),
        "data: first training shard": _content(folder.train_shards[0]),
    }


def _content(shard: Shard) -> str:
    if shard.sha256 is not None:
        return shard.sha256
    return hashlib.sha256(f"{shard.tokens} ".encode() + shard.read()[:_COMPARED_IDS].tobytes()).hexdigest()
