"""The shards and the tokenizer that a run trains on; an incomplete shard folder is filled in the background."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from common.cli_errors import InputError
from common.cpus import usable_cpus
from common.ranks import Ranks
from training.data.producing.background_producer import BackgroundProducer, producer_command
from training.data.shards.shard_reader import ShardFolder
from training.data.shards.shard_spec import ShardSpec
from training.data.tokenization.tokenizer import Tokenizer, load_tokenizer, parse_train_spec
from training.recipe import Recipe

_POLL_SECONDS = 0.3


def open_data(recipe: Recipe, producer: BackgroundProducer, ranks: Ranks) -> tuple[ShardFolder, Tokenizer]:
    """The recipe's shard folder and its tokenizer, once training can start.

    If the folder is incomplete, the first process of a node starts the producer.

    Raises:
        InputError: the corpus, the folder or the tokenizer cannot be used, or they do not match.
    """
    folder, spec = check_data(recipe, producer.report)
    tokenizer = tokenizer_of_foreign_shards(recipe) if spec is None else None
    if spec is not None and (folder is None or not folder.complete) and os.environ.get("LOCAL_RANK", "0") == "0":
        workers = preprocessing_workers(recipe, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        producer.start(producer_command(spec, workers))
    needs_all = recipe.num_train_epochs is not None  # for the length of an epoch

    def can_train() -> bool:
        nonlocal folder
        if folder is None or not folder.can_train(needs_all):
            folder = ShardFolder.find(Path(recipe.data_dir))
        return folder is not None and folder.can_train(needs_all)

    wait_for_shards(can_train, producer, ranks)
    assert folder is not None
    return folder, tokenizer or folder.load_tokenizer(recipe.tokenizer)


def check_data(recipe: Recipe, report: Callable[[str], None]) -> tuple[ShardFolder | None, ShardSpec | None]:
    """The shard folder as it is, None if it holds nothing, and what it should hold, None for another program's shards.

    The first process of a node also opens the corpus, and compares it with a complete folder.

    Raises:
        InputError: the corpus or the folder cannot be used, or they do not match.
    """
    path = Path(recipe.data_dir)
    folder = ShardFolder.find(path)
    if folder is not None and folder.manifest is None:
        return folder, None
    spec = ShardSpec(
        folder=path,
        corpus=recipe.corpus,
        corpus_config=recipe.corpus_config,
        text_field=recipe.text_field,
        document_separator=recipe.document_separator,
        encoding=recipe.encoding,
        split_special_tokens=recipe.split_special_tokens,
        tokenizer=recipe.tokenizer,
        shard_tokens=recipe.shard_tokens,
        val_tokens=recipe.validation_shard_tokens,
        # Set when the folder was prepared, not by the recipe.
        max_tokens=folder.manifest.max_tokens if folder and folder.manifest else None,
    )
    first_on_node = os.environ.get("LOCAL_RANK", "0") == "0"
    spec.check(folder, report if first_on_node else lambda line: None)
    if first_on_node and folder is not None and folder.complete:
        spec.check_content(folder, report)
    elif first_on_node:
        spec.open_corpus()  # raises if it does not exist
    return folder, spec


def wait_for_shards(is_ready: Callable[[], bool], producer: BackgroundProducer, ranks: Ranks) -> None:
    """Wait until every node has the shards that a run starts with.

    A node that just exited would leave the others waiting in their first collective call, so errors go through `ranks`.
    Once the shards are complete, a failing producer is no reason to abort, as during training.

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


def preprocessing_workers(recipe: Recipe, local_processes: int) -> int:
    """Processes that tokenize in the background: the recipe's number, or the cores that training leaves free.

    At least two if there are two cores: they run at lower priority, and have the machine until the first shard exists.
    """
    if recipe.preprocessing_num_workers is not None:
        return recipe.preprocessing_num_workers
    used = local_processes * (1 + recipe.dataloader_num_workers)
    return max(min(2, usable_cpus()), usable_cpus() - used)


def tokenizer_of_foreign_shards(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer, which must exist: shards without a manifest do not say how they were made."""
    if parse_train_spec(recipe.tokenizer) is not None:
        raise InputError(
            f"{recipe.data_dir} holds shards without a manifest, for which tokenizer {recipe.tokenizer} cannot be "
            "trained; set tokenizer to the one that made them, such as gpt2"
        )
    return load_tokenizer(recipe.tokenizer)
