"""A shard folder as a dataset on the Hub, which another machine can train from immediately.

Shards are uploaded one by one, so an interrupted push resumes, and they appear together in one commit.
"""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCardData, HfApi, RepoFile

from common.atomic_files import file_sha256
from common.cli_errors import InputError
from common.token_files import split_of
from training.data.shards.manifest import MANIFEST_NAME, Manifest
from training.data.shards.shard_reader import Shard, ShardFolder
from training.data.shards.shard_writer import TOKENIZER_FILES
from training.hub.card_edits import results_block, with_edits_of
from training.hub.hub_errors import input_errors
from training.hub.provenance import ENGLISH_CORPORA, hub_dataset
from training.hub.repository import ensure_repository, read_card

_ADVICE = "and run the same command again: uploaded shards are not sent twice"
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
    with input_errors(repo_id, _ADVICE):
        _push(folder, repo_id)


def _push(folder: ShardFolder, repo_id: str) -> None:
    api = HfApi()
    on_hub = remote_hashes(repo_id)
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    hashes: dict[str, str] = {}
    for number, shard in enumerate(folder.shards, start=1):
        name = shard.path.name
        hashes[name] = _checked_hash(shard)
        if on_hub.get(name) == hashes[name]:
            continue
        addition = CommitOperationAdd(name, shard.path)
        api.preupload_lfs_files(repo_id, [addition], repo_type="dataset")
        operations.append(addition)
        print(f"{name}: {number} of {len(folder.shards)} shards uploaded", flush=True)
    small = [name for name in (*TOKENIZER_FILES, MANIFEST_NAME) if (folder.path / name).is_file()]
    operations += [CommitOperationAdd(name, (folder.path / name).read_bytes()) for name in small]
    head = api.dataset_info(repo_id).sha
    assert head is not None
    on_hub = remote_hashes(repo_id, head)
    # Shards of another folder would be trained on too.
    stale = [name for name in sorted(on_hub) if "/" not in name and split_of(name) and name not in hashes]
    operations += [CommitOperationDelete(name) for name in stale]
    existing = read_card(repo_id, head, "dataset") if "README.md" in on_hub else None
    card, _ = with_edits_of(existing, dataset_card(folder, repo_id))
    operations.append(CommitOperationAdd("README.md", card.encode()))
    message = f"{len(folder.shards)} shards, {sum(shard.tokens for shard in folder.shards):,} tokens"
    api.create_commit(repo_id, operations, commit_message=message, repo_type="dataset", parent_commit=head)
    on_hub = remote_hashes(repo_id)
    wrong = [name for name, sha256 in hashes.items() if on_hub.get(name) != sha256]
    if wrong:
        raise InputError(f"the Hub has other hashes for {', '.join(wrong[:3])}; push again")
    print(f"{folder.path} is on the Hub: {repo_id}, {message}, every hash compared. Train from it with")
    print(f"  {_train_command(repo_id, folder.manifest)}")


def remote_hashes(repo_id: str, revision: str | None = None) -> dict[str, str]:
    """Return the sha256 of a dataset's large files, and an empty string for small ones."""
    tree = HfApi().list_repo_tree(repo_id, recursive=True, revision=revision, repo_type="dataset")
    return {entry.path: entry.lfs.sha256 if entry.lfs else "" for entry in tree if isinstance(entry, RepoFile)}


def _checked_hash(shard: Shard) -> str:
    sha256 = file_sha256(shard.path)
    if shard.sha256 is not None and sha256 != shard.sha256:
        raise InputError(f"the hash of {shard.path} differs from the manifest's; prepare the folder again")
    return sha256


def dataset_card(folder: ShardFolder, repo_id: str) -> str:
    """Return the card of a shard dataset: what it holds, where it comes from, and how to train from it."""
    manifest = folder.manifest
    layout = "Each file is a one-dimensional array of token ids. `*_val_*` is for validation."
    rows = [("shards", f"{len(folder.shards):,}"), ("tokens", f"{sum(shard.tokens for shard in folder.shards):,}")]
    metadata = DatasetCardData(
        task_categories=["text-generation"], tags=["gpt2", "tokenized", "gpt2_scratch"], viewer=False
    )
    if manifest is not None:
        layout += f""" Every document starts with the end-of-text token and may
continue in the next file. `{MANIFEST_NAME}` holds the sha256 of each file."""
        rows += [
            ("documents", f"{manifest.documents:,}"),
            ("corpus", manifest.corpus + (f", {manifest.corpus_config}" if manifest.corpus_config else "")),
            ("revision of the corpus", manifest.corpus_revision),
            ("tokenizer", f"{manifest.tokenizer}, {manifest.vocab_size:,} ids"),
        ]
        metadata.language = ["en"] if manifest.corpus in ENGLISH_CORPORA else None
        metadata.size_categories = [_SIZES[min(max(len(str(manifest.documents)) - 3, 0), len(_SIZES) - 1)]]
        dataset = hub_dataset(manifest.corpus)
        metadata.source_datasets = [dataset] if dataset else None
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    numpy = "\n\nAnywhere else, `numpy.load(file)` returns the ids."
    return f"""---
{metadata.to_yaml()}
---

# {repo_id.split("/")[-1]}

{results_block("contents", f"| | |{chr(10)}| --- | --- |{chr(10)}{table}")}
{layout}

## Use

With gpt2-scratch, training starts immediately and downloads the shards in the background:

```
{_train_command(repo_id, manifest)}
```{numpy if all(shard.path.suffix == ".npy" for shard in folder.shards) else ""}
"""


def _train_command(repo_id: str, manifest: Manifest | None) -> str:
    tokenizer = repo_id if manifest is not None and manifest.tokenizer != "gpt2" else "gpt2"
    flags = f"--corpus {repo_id} --tokenizer {tokenizer} --data_dir data/shards --output_dir runs/mine"
    return f"accelerate launch training/train.py {flags}"
