"""A shard folder as a dataset on the Hub, which another machine can train from immediately.

Shards are uploaded one by one, so an interrupted push resumes, and they appear together in one commit.
"""

import functools
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, HfApi, RepoFile

from common.atomic_files import file_sha256
from common.cli_errors import InputError
from common.token_files import split_of
from training.data.shards.manifest import MANIFEST_NAME, Manifest
from training.data.shards.shard_reader import ShardFolder
from training.data.shards.shard_writer import TOKENIZER_FILES
from training.hub.hub_errors import input_errors
from training.hub.provenance import ENGLISH_CORPORA, hub_dataset
from training.hub.repository import ensure_repository, push_files

_ADVICE = "and run the same command again: uploaded shards are not sent twice"
_TEMPLATE = Path(__file__).with_name("templates") / "shard_dataset_card.md.jinja"
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


def push_shards(path: Path, repo_id: str, *, private: bool) -> None:
    """Push a shard folder as a dataset, and compare every hash on the Hub with the shard's.

    Raises:
        InputError: the folder is incomplete, a shard does not match the manifest, or the Hub refuses the push.
    """
    folder = ShardFolder.open(path)
    if not folder.complete:
        raise InputError(f"the shard folder {path} is not complete; finish preparing it first")
    repo_id = ensure_repository(repo_id, default_name=path.name, private=private, kind="dataset", advice=_ADVICE)
    hashes = {}
    for shard in folder.shards:
        shard.check_hash()
        hashes[shard.path.name] = shard.sha256 or file_sha256(shard.path)
    message = f"{len(folder.shards)} shards, {sum(shard.tokens for shard in folder.shards):,} tokens"
    with input_errors(repo_id, _ADVICE):
        on_hub = remote_hashes(repo_id)
        names = [name for name, sha256 in hashes.items() if on_hub.get(name) != sha256]
        names += [name for name in (*TOKENIZER_FILES, MANIFEST_NAME) if (path / name).is_file()]
        push_files(
            repo_id,
            {name: path / name for name in names},
            message,
            kind="dataset",
            card=dataset_card(folder, repo_id),
            # Shards of another folder would be trained on too.
            is_stale=lambda name: "/" not in name and split_of(name) is not None and name not in hashes,
            report=functools.partial(print, flush=True),
        )
        on_hub = remote_hashes(repo_id)
    wrong = [name for name, sha256 in hashes.items() if on_hub.get(name) != sha256]
    if wrong:
        raise InputError(f"the Hub has other hashes for {', '.join(wrong[:3])}; push again")
    print(f"{path} is on the Hub: {repo_id}, {message}, every hash compared. Train from it with")
    print(f"  {_train_command(repo_id, folder.manifest)}")


def remote_hashes(repo_id: str) -> dict[str, str]:
    """Return the sha256 of a dataset's large files, and an empty string for small ones."""
    tree = HfApi().list_repo_tree(repo_id, recursive=True, repo_type="dataset")
    return {entry.path: entry.lfs.sha256 if entry.lfs else "" for entry in tree if isinstance(entry, RepoFile)}


def dataset_card(folder: ShardFolder, repo_id: str) -> str:
    """Return the card of a shard dataset: what it holds, where it comes from, and how to train from it."""
    manifest = folder.manifest
    metadata = DatasetCardData(
        task_categories=["text-generation"], tags=["gpt2", "tokenized", "gpt2_scratch"], viewer=False
    )
    if manifest is not None:
        metadata.language = ["en"] if manifest.corpus in ENGLISH_CORPORA else None
        metadata.size_categories = [_SIZES[min(max(len(str(manifest.documents)) - 3, 0), len(_SIZES) - 1)]]
        dataset = hub_dataset(manifest.corpus)
        metadata.source_datasets = [dataset] if dataset else None
    card = DatasetCard.from_template(
        metadata,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        name=repo_id.split("/")[-1],
        shards=folder.shards,
        manifest=manifest,
        command=_train_command(repo_id, manifest),
    )
    return f"{card}\n"


def _train_command(repo_id: str, manifest: Manifest | None) -> str:
    tokenizer = repo_id if manifest is not None and manifest.tokenizer != "gpt2" else "gpt2"
    flags = f"--corpus {repo_id} --tokenizer {tokenizer} --data_dir data/shards --output_dir runs/mine"
    return f"accelerate launch training/train.py {flags}"
