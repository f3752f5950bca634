"""The loss on the first validation shard of a shard folder, in this project's format or llm.c's."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from common.cli_errors import InputError, one_line
from common.token_files import map_ids, split_of
from evaluation.tasks.task_types import Encoder, Item, Metric, Request, TextTask, data_hash


class Validation(TextTask):
    """Loss, perplexity and bits per byte."""

    name = "validation"
    protocol = "windows"
    description = (
        "The first validation shard in windows of n_positions tokens that do not overlap; each token is scored after "
        "the earlier ones of its window, as in training. In bits per byte, special tokens add bits but no bytes."
    )
    source = "karpathy/build-nanogpt train_gpt2.py; bits per byte: karpathy/nanochat"
    metrics: ClassVar = (
        Metric("loss", "loss", "log_likelihood", "tokens"),
        Metric("ppl", "perplexity", "log_likelihood", "tokens"),
        Metric("bits_per_byte", "bits_per_byte", "log_likelihood", "bytes"),
    )

    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """See `Task.items`."""
        if data_dir is None:
            raise InputError("the task validation needs a shard folder; pass --data_dir")
        shards = sorted(path for path in data_dir.glob("*") if split_of(path.name) == "val")
        if not shards:
            raise InputError(
                f"no validation shard (*_val_*.npy or .bin) in {data_dir}; make shards with python -m "
                "training.prepare, or pass their folder as --data_dir"
            )
        shard = map_ids(shards[0])
        if len(shard) < 2:
            raise InputError(
                f"{shards[0]} holds a single token, so there is nothing to predict; download it or prepare it again"
            )
        items = []
        for index, start in enumerate(range(0, len(shard) - 1, n_positions)[:limit]):
            ids = tuple(shard[start : start + n_positions + 1].tolist())
            scored = [token for token in ids[1:] if token != encoder.end_of_text_id]
            try:
                text = encoder.decode_bytes(scored)
            except (KeyError, TypeError, IndexError, OverflowError):  # ids that the tokenizer does not have
                raise _another_tokenizer(shards[0]) from None
            if not index:
                _check_tokenizer(shards[0], scored, text)
            items.append(Item(index, (Request(ids[:1], ids[1:]),), extra={"bytes": len(text)}, data=data_hash(ids)))
        return items


def _check_tokenizer(shard: Path, ids: Sequence[int], text: bytes) -> None:
    """Raise an `InputError` if the tokenizer next to the shard, if there is one, reads another text from its ids."""
    path = shard.parent / "tokenizer.json"
    if not path.is_file():  # shards of another program
        return
    import tokenizers

    try:
        own = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no subclass
        raise InputError(f"cannot read {path} ({one_line(error, 120)}); restore it, or delete it") from None
    # A window may begin or end inside a character, which the libraries replace differently.
    if own.decode(ids).replace("\ufffd", "") != text.decode(errors="replace").replace("\ufffd", ""):
        raise _another_tokenizer(shard)


def _another_tokenizer(shard: Path) -> InputError:
    return InputError(
        f"{shard} was made with another tokenizer than the model's; pass a --data_dir that was made with the model's"
    )
