"""The loss on a shard folder's validation tokens: shards of token ids, as training and other projects write them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from common.cli_errors import InputError
from common.token_files import map_ids, split_of
from evaluation.tasks.task_types import Encoder, Figure, Item, LogLikelihood, Request, Task, data_hash


class Validation(Task):
    """Loss, perplexity and bits per byte."""

    name = "validation"
    protocol = "windows"
    description = (
        "The first validation shard in windows of n_positions tokens that do not overlap, each token scored behind "
        "those of its window, as training does. Bits per byte of text: special tokens cost bits and have no bytes."
    )
    source = "karpathy/build-nanogpt train_gpt2.py; bits per byte: karpathy/nanochat"
    figures: ClassVar = (
        Figure("loss", "loss", "log_likelihood", "tokens"),
        Figure("ppl", "perplexity", "log_likelihood", "tokens"),
        Figure("bits_per_byte", "bits_per_byte", "log_likelihood", "bytes"),
    )

    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """Return the first `limit` items, as `Task.items` says."""
        if data_dir is None:
            raise InputError("expected a shard folder for the task validation, found none; name it by --data_dir")
        shard = read_validation_shard(data_dir)
        items = []
        for index, start in enumerate(range(0, len(shard) - 1, n_positions)):
            if index == limit:
                break
            ids = tuple(shard[start : start + n_positions + 1].tolist())
            text = encoder.decode_bytes([token for token in ids[1:] if token != encoder.end_of_text_id])
            request = Request(ids[:1], ids[1:])
            items.append(Item(index, (request,), facts={"bytes": len(text)}, data=data_hash(ids)))
        return items

    def predict(self, item: Item, answers: Sequence[LogLikelihood]) -> dict[str, Any]:
        """Return the record, as `Task.predict` says."""
        answer = answers[0]
        return {
            "index": item.index,
            "log_likelihood": answer.sum,
            "tokens": answer.tokens,
            "bytes": item.facts["bytes"],
        }


def read_validation_shard(folder: Path) -> np.ndarray:
    """Return the token ids of a folder's first validation shard, (tokens,), mapped from the file.

    Raises:
        InputError: there is none, or it is cut or of another form.
    """
    shards = sorted(path for path in folder.glob("*") if split_of(path.name) == "val")
    if not shards:
        raise InputError(
            f"expected a validation shard (*_val_*.npy, or .bin) in {folder}, found none; make shards with "
            "python -m training.prepare, or name their folder by --data_dir"
        )
    ids = map_ids(shards[0])
    if len(ids) < 2:
        raise InputError(f"{shards[0]} holds a single token, and nothing to predict; download or make it again")
    return ids
