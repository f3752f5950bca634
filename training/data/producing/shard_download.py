"""A Hub repository of ready shards: its files are downloaded ahead, in order, instead of tokenised.

The folder looks as if it had been made here: a manifest names each file as soon as it is whole and looked through. A
download that broke off goes on where it was (`hf_hub_download` keeps the part).
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from common.atomic_files import file_sha256, fsync
from common.cli_errors import InputError
from common.token_files import map_ids, split_of
from training.data.producing.progress import Progress
from training.data.shards.folder_lifecycle import create_folder, removing_partial_files, resume_folder
from training.data.shards.manifest import Manifest, ShardRecord
from training.data.shards.shard_reader import Shard
from training.data.shards.shard_spec import ShardSpec
from training.data.shards.shard_writer import require_space
from training.data.sources.hub_corpus import HubCorpus
from training.data.tokenization.tokenizer import load_tokenizer, parse_train_spec

_DOWNLOADS = ".downloads"


def download_ready_shards(output: Path, source: HubCorpus, spec: ShardSpec, report: Callable[[str], None]) -> bool:
    """Fill `output` with the repository's shards; return False where it holds none, but text.

    Raises:
        InputError: the shards are not what the tokenizer makes, or the Hub refuses them.
        OSError: the disk is full.
    """
    folder = spec.open_folder()
    if folder is not None and folder.complete:
        return True
    if folder is not None and folder.manifest is not None:
        source.can_go_on_from(folder.manifest.corpus_revision)
    names = source.ready_shards()
    if not names:
        return False
    if parse_train_spec(spec.tokenizer) is not None:
        raise InputError(
            f"{source.repository} holds ready shards, so tokenizer {spec.tokenizer} cannot be trained for them; "
            "name the tokenizer that they were made with, such as gpt2"
        )
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        with removing_partial_files(output):
            _download(output, source, names, spec, report)
    finally:
        left = Manifest.read(output)
        if left is None or left.complete:
            shutil.rmtree(output / _DOWNLOADS, ignore_errors=True)
    return True


def _download(
    output: Path, source: HubCorpus, names: list[str], spec: ShardSpec, report: Callable[[str], None]
) -> None:
    sizes = source.file_sizes(names)
    folder = spec.open_folder()
    manifest = folder.manifest if folder else None
    if manifest is not None:
        resume_folder(output, source, manifest)
    done = len(manifest.shards) if manifest else 0
    with Progress(tokens=manifest.tokens if manifest else 0, report=report) as progress:
        for number, name in enumerate(names[done:], start=done):
            left = sum(sizes[name] for name in names[number:])
            require_space(output, left if spec.max_tokens is None else sizes[name])
            downloaded = source.download(name, output / _DOWNLOADS)
            if manifest is None:
                tokenizer = load_tokenizer(spec.tokenizer)
                manifest = create_folder(spec, source, tokenizer, dtype=map_ids(downloaded).dtype.name)
            manifest = _add(output, downloaded, name, manifest, source.hashes.get(name))
            progress.update(
                tokens=manifest.tokens,
                documents=manifest.documents,
                shards=len(manifest.shards),
                share=1 - (left - sizes[name]) / sum(sizes.values()),
            )
            trained = sum(shard.tokens for shard in manifest.shards if shard.split == "train")
            if spec.max_tokens is not None and trained >= spec.max_tokens:
                break
    assert manifest is not None
    replace(manifest, complete=True).write(output)


def _add(output: Path, downloaded: Path, name: str, manifest: Manifest, sha256: str | None) -> Manifest:
    """Look through a downloaded shard, move it to its place and name it in the manifest."""
    split = split_of(name)
    assert split is not None
    digest = file_sha256(downloaded)
    if sha256 not in (None, digest):
        downloaded.unlink()
        raise InputError(f"expected {name} as the Hub has it, found another hash after its download; run it again")
    shard = Shard(downloaded, split, 0)
    ids = shard.read()
    if ids.dtype.name != manifest.dtype:
        raise InputError(
            f"expected ids of {manifest.dtype} in {name} as in the shards before it, found {ids.dtype.name}; "
            "give another --corpus"
        )
    shard.check_ids(manifest.vocab_size)
    documents = int(np.count_nonzero(ids == manifest.end_of_text_id))
    record = ShardRecord(PurePosixPath(name).name, split, len(ids), documents, digest)
    fsync(downloaded)
    downloaded.replace(output / record.file)
    fsync(output)
    manifest = replace(manifest, shards=(*manifest.shards, record))
    manifest.write(output)
    return manifest
