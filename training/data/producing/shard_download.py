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
from training.data.producing.progress import Progress
from training.data.shards.folder_setup import begin_folder, take_up_folder, tidied
from training.data.shards.manifest import Manifest, ShardRecord
from training.data.shards.shard_files import Shard, ShardFolder, foreign_split, require_space
from training.data.shards.shard_spec import ShardSpec
from training.data.sources.hub_corpus import HubCorpus
from training.data.tokenization.tokenizer import load_tokenizer, parse_train_spec

_DOWNLOADS = ".downloads"


def download_ready_shards(output: Path, source: HubCorpus, spec: ShardSpec, report: Callable[[str], None]) -> bool:
    """Fill `output` with the repository's shards; return False where it holds none, but text.

    Raises:
        InputError: the shards are not what the tokenizer makes, or the Hub refuses them.
        OSError: the disk is full.
    """
    begun = spec.read_manifest()
    if begun is not None and begun.complete:
        return True
    if begun is not None:
        source.can_go_on_from(begun.corpus_revision)
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
        with tidied(output):
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
    manifest = spec.read_manifest()
    if manifest is not None:
        take_up_folder(output, source, manifest)
    done = len(manifest.shards) if manifest else 0
    with Progress(tokens=manifest.tokens if manifest else 0, report=report) as progress:
        for number, name in enumerate(names[done:], start=done):
            left = sum(sizes[name] for name in names[number:])
            require_space(output, left if spec.max_tokens is None else sizes[name])
            downloaded = source.download(name, output / _DOWNLOADS)
            if manifest is None:
                tokenizer = load_tokenizer(spec.tokenizer)
                manifest = begin_folder(output, source, spec, tokenizer, dtype=_dtype(downloaded, name))
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


def _dtype(path: Path, name: str) -> str:
    return Shard(path, foreign_split(name) or "train", 0).read().dtype.name


def _add(output: Path, downloaded: Path, name: str, manifest: Manifest, sha256: str | None) -> Manifest:
    """Look through a downloaded shard, move it to its place and name it in the manifest."""
    split = foreign_split(name)
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
    ShardFolder(output, (shard,), None).check_ids(manifest.vocab_size)
    documents = int(np.count_nonzero(ids == manifest.end_of_text_id))
    record = ShardRecord(PurePosixPath(name).name, split, len(ids), documents, digest)
    fsync(downloaded)
    downloaded.replace(output / record.file)
    fsync(output)
    manifest = replace(manifest, shards=(*manifest.shards, record))
    manifest.write(output)
    return manifest
