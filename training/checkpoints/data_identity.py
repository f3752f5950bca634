"""Whether a checkpoint's run was trained on the data that a resumed run would read."""

from common.cli_errors import InputError
from training.checkpoints.checkpoint_folder import TrainerState
from training.data.loading.order import Order
from training.data.shards.shard_reader import ShardFolder
from training.data.tokenization.tokenizer import Tokenizer
from training.recipe import Recipe


def shard_identities(folder: ShardFolder) -> list[str]:
    """What a checkpoint records of its shards, validation first: their hashes, or their sizes without a manifest."""
    return [shard.sha256 or f"{shard.tokens} tokens" for shard in [folder.val_shard, *folder.train_shards]]


def refuse_other_data(state: TrainerState, folder: ShardFolder, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Check that the shard folder holds the checkpoint's data. Shards that were added since are allowed in epoch 0.

    Raises:
        InputError: another tokenizer, other shards, or shards that were added after the first epoch.
    """
    if state.tokenizer_fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"data_dir {recipe.data_dir} was made with another tokenizer than the checkpoint's data; "
            "set data_dir to that run's data"
        )
    seen, found = state.shards, shard_identities(folder)
    common = min(len(seen), len(found))
    same = seen[:common] == found[:common] and (len(found) >= len(seen) or not folder.complete)
    if same and len(found) > len(seen):
        # Epoch 0 reads the shards in their own order, so more of them change nothing; later epochs permute them.
        earlier = [shard.tokens for shard in folder.train_shards[: len(seen) - 1]]
        windows = Order(earlier, seq_len=recipe.seq_len, seed=recipe.seed).windows_in_epoch(0)
        same = state.tokens <= windows * recipe.seq_len
    if not same:
        raise InputError(
            f"data_dir {recipe.data_dir} holds other shards than the checkpoint's run used "
            f"({_first_difference(seen, found)}); set data_dir to that run's data"
        )


def _first_difference(seen: list[str], found: list[str]) -> str:
    for number, (then, now) in enumerate(zip(seen, found, strict=False)):
        if then != now:
            which = f"training shard {number}" if number else "the validation shard"
            return f"{which} was {_shortened(then)}, now {_shortened(now)}"
    return f"{len(seen) - 1} training shards then, {len(found) - 1} now"


def _shortened(identity: str) -> str:
    return identity if identity.endswith("tokens") else f"sha256 {identity[:12]}…"
