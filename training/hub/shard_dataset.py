"""A folder of shards as a dataset on the Hub, from which another machine trains at once.

Shards are uploaded one by one, which may be interrupted and gone on with, and appear together in one commit at the end.
"""

import json
from collections.abc import Callable
from pathlib import Path

from common.atomic_files import file_sha256
from common.cli_errors import InputError
from common.token_files import split_of
from training.data.shards.folder_lifecycle import TOKENIZER_FILES
from training.data.shards.manifest import MANIFEST_NAME
from training.data.shards.shard_reader import Shard, ShardFolder
from training.data.sources.base import HUB_CORPORA
from training.hub.card import ENGLISH_CORPORA
from training.hub.card_merging import section, stamped
from training.hub.repository import claim, refused_in_one_line, with_text_of_the_hub

_WAY_OUT = "and run the same command again: what is there is not sent twice"


def push_shards(path: Path, repo_id: str, *, private: bool, say: Callable[[str], None]) -> None:
    """Make a folder of shards a dataset repository, and check there that every hash is the shard's.

    Args:
        path: a folder of ours that is complete, or one of another program.
        repo_id: as owner/name.
        private: whether a repository that does not exist yet is made private.
        say: is given the lines.

    Raises:
        InputError: the folder is not complete, a shard is not what the manifest says, or the Hub refuses it.
    """
    folder = ShardFolder.open(path)
    if not folder.complete:
        raise InputError(
            f"expected a complete folder of shards, found that {path} is still being filled; finish it first"
        )
    repo_id = claim(repo_id, default_name=path.name, private=private, kind="dataset", way_out=_WAY_OUT)
    with refused_in_one_line(repo_id, _WAY_OUT):
        _push(folder, repo_id, say)


def _push(folder: ShardFolder, repo_id: str, say: Callable[[str], None]) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    there = remote_hashes(repo_id)
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    hashes: dict[str, str] = {}
    for number, shard in enumerate(folder.shards, start=1):
        name = shard.path.name
        hashes[name] = _checked_hash(shard)
        if there.get(name) == hashes[name]:
            continue
        addition = CommitOperationAdd(name, shard.path)
        api.preupload_lfs_files(repo_id, [addition], repo_type="dataset")
        operations.append(addition)
        say(f"{name}: {number} of {len(folder.shards)} shards uploaded")
    for name, content in _small_files(folder).items():
        operations.append(CommitOperationAdd(name, content))
    head = api.dataset_info(repo_id).sha
    assert head is not None
    card = dataset_card(folder, repo_id)
    there = remote_hashes(repo_id, head)
    # Shards of another folder that was pushed here would be trained on too.
    stale = [name for name in sorted(there) if "/" not in name and split_of(name) and name not in hashes]
    operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
    if "README.md" in there:
        card, _ = with_text_of_the_hub(card, repo_id, head, "dataset")
    else:
        card = stamped(card)
    operations.append(CommitOperationAdd("README.md", card.encode()))
    message = f"{len(folder.shards)} shards, {sum(shard.tokens for shard in folder.shards):,} tokens"
    api.create_commit(repo_id, operations, commit_message=message, repo_type="dataset", parent_commit=head)
    there = remote_hashes(repo_id)
    wrong = [name for name, digest in hashes.items() if there.get(name) != digest]
    if wrong:
        raise InputError(f"expected the same hashes on the Hub, found others for {', '.join(wrong[:3])}; push again")
    say(f"{folder.path} is on the Hub: {repo_id}, {message}, every hash compared; to train from it:")
    say("  " + _command(repo_id, _tokenizer(folder, repo_id)))


def remote_hashes(repo_id: str, revision: str | None = None) -> dict[str, str]:
    """The sha256 of a dataset's large files, and an empty text for its small ones."""
    from huggingface_hub import HfApi, RepoFile

    tree = HfApi().list_repo_tree(repo_id, recursive=True, revision=revision, repo_type="dataset")
    return {entry.path: entry.lfs.sha256 if entry.lfs else "" for entry in tree if isinstance(entry, RepoFile)}


def _checked_hash(shard: Shard) -> str:
    digest = file_sha256(shard.path)
    if shard.sha256 is not None and digest != shard.sha256:
        raise InputError(f"expected {shard.path} as the manifest says, found another hash; prepare the folder again")
    return digest


def _small_files(folder: ShardFolder) -> dict[str, bytes]:
    """Tokenizer and manifest; the corpus of local files is called by its name, and not where it lay."""
    names = [name for name in TOKENIZER_FILES if (folder.path / name).is_file()]
    files = {name: (folder.path / name).read_bytes() for name in names}
    if folder.manifest is not None:
        manifest = json.loads((folder.path / MANIFEST_NAME).read_text(encoding="utf-8"))
        files[MANIFEST_NAME] = (json.dumps(manifest, indent=2) + "\n").encode()
    return files


def _tokenizer(folder: ShardFolder, repo_id: str) -> str:
    own = folder.manifest is not None and folder.manifest.tokenizer != "gpt2"
    return repo_id if own else "gpt2"


def dataset_card(folder: ShardFolder, repo_id: str) -> str:
    """The card of a dataset of shards: what is in it, where it comes from, and how to train from it."""
    import yaml

    manifest = folder.manifest
    source = (
        HUB_CORPORA.get(manifest.corpus, manifest.corpus if manifest.corpus.count("/") == 1 else None)
        if manifest
        else None
    )
    tokens = sum(shard.tokens for shard in folder.shards)
    metadata = {
        **({"language": ["en"]} if manifest and manifest.corpus in ENGLISH_CORPORA else {}),
        "task_categories": ["text-generation"],
        "tags": ["gpt2", "tokenized", "gpt2_scratch"],
        **({"size_categories": [_size_category(manifest.documents)]} if manifest else {}),
        **({"source_datasets": [source]} if source else {}),
        "viewer": False,  # arrays of token ids are no table
    }
    rows = [("shards", f"{len(folder.shards):,}"), ("tokens", f"{tokens:,}")]
    if manifest is not None:
        rows += [
            ("documents", f"{manifest.documents:,}"),
            ("corpus", manifest.corpus + (f", {manifest.corpus_config}" if manifest.corpus_config else "")),
            ("revision of the corpus", manifest.corpus_revision),
            ("tokenizer", f"{manifest.tokenizer}, {manifest.vocab_size:,} ids"),
        ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {repo_id.split('/')[-1]}\n",
            section("contents", f"| | |\n| --- | --- |\n{table}\n\n{_layout(folder)}"),
            "## Use\n",
            section("use", _use(folder, repo_id)),
        ]
    )


def _layout(folder: ShardFolder) -> str:
    text = "Each file is a one-dimensional array of token ids. `*_val_*` is for validation."
    if folder.manifest is None:  # another program wrote them
        return text
    return f"""{text} Every document begins with the end-of-text token and
may run on into the next file. `{MANIFEST_NAME}` holds the sha256 of each file."""


def _command(repo_id: str, tokenizer: str) -> str:
    flags = f"--corpus {repo_id} --tokenizer {tokenizer} --data_dir data/shards --output_dir runs/mine"
    return f"accelerate launch training/train.py {flags}"


def _use(folder: ShardFolder, repo_id: str) -> str:
    text = f"""Trains at once, while the rest is downloaded, with gpt2-scratch:

```
{_command(repo_id, _tokenizer(folder, repo_id))}
```"""
    if all(shard.path.suffix == ".npy" for shard in folder.shards):
        text += "\n\nAnywhere else: `numpy.load(file)` gives the ids."
    return text


def _size_category(rows: int) -> str:
    """The Hub's name for a number of documents."""
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]
    return next((name for power, name in enumerate(names) if rows < 10 ** (power + 3)), "10B<n<100B")
