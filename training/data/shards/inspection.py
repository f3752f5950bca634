"""`python -m training.prepare --inspect`: a description of a shard folder, of ours or of another program."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.cli_errors import InputError
from training.data.shards.shard_reader import Shard, ShardFolder
from training.data.tokenization.tokenizer import Tokenizer

_PREVIEW_IDS, _PREVIEW_LINES, _PREVIEW_CHARACTERS = 200, 3, 110


def inspect(path: Path, *, tokenizer: str = "gpt2", verify: bool = False) -> Iterator[str]:
    """Yield lines that describe a folder, to which a producer may be writing: its origin, its shards, and some text.

    Args:
        tokenizer: decodes a folder without a tokenizer.
        verify: read every byte, and compare hashes with the manifest and ids with the vocabulary.
    """
    folder = ShardFolder.open(path)
    vocabulary = folder.load_tokenizer(tokenizer)
    yield from _origin(folder, vocabulary)
    yield f"{'file':32} {'split':5} {'tokens':>15} {'documents':>12}" + ("  verified" if verify else "")
    documents = 0
    for shard in folder.shards:
        count = _verify(shard, vocabulary) if verify else shard.documents
        documents += count or 0
        verified = ("  sha256 and ids" if shard.sha256 else "  ids") if verify else ""
        yield f"{shard.path.name:32} {shard.split:5} {shard.tokens:15,} {_count(count):>12}{verified}"
    tokens = sum(shard.tokens for shard in folder.shards)
    counted = verify or folder.manifest is not None
    yield f"{'total':32} {'':5} {tokens:15,} {_count(documents if counted else None):>12}"
    for split in ("val", "train"):
        if shards := [shard for shard in folder.shards if shard.split == split]:
            yield f"{split} begins:"
            yield from _preview(shards[0], vocabulary)


def _origin(folder: ShardFolder, vocabulary: Tokenizer) -> Iterator[str]:
    manifest = folder.manifest
    if manifest is None:
        yield f"{folder.path}: shards of another program, without a manifest"
        yield f"tokenizer: unknown; decoded here with {vocabulary.name}, {vocabulary.vocab_size:,} ids"
        return
    state = "complete" if manifest.complete else "partial: run the producer again, or train while it runs"
    yield f"{folder.path}: {state}"
    config = f" ({manifest.corpus_config})" if manifest.corpus_config else ""
    yield f"corpus: {manifest.corpus}{config}, revision {manifest.corpus_revision[:12]}"
    if manifest.replaced_documents:
        yield f"documents with invalid UTF-8: {manifest.replaced_documents:,}"
    where = "in the folder" if (folder.path / "tokenizer.json").exists() else "missing in the folder"
    yield f"tokenizer: {manifest.tokenizer} with {manifest.vocab_size:,} ids as {manifest.dtype}, {where}"


def _verify(shard: Shard, vocabulary: Tokenizer) -> int:
    """Read the complete shard, and return how many documents begin in it."""
    shard.check_hash()
    shard.check_ids(vocabulary.vocab_size)
    documents = int(np.count_nonzero(shard.read() == vocabulary.end_of_text_id))
    if shard.documents is not None and shard.documents != documents:
        raise InputError(
            f"{shard.path} holds {documents:,} documents, the manifest says {shard.documents:,}; "
            "delete the folder and prepare it again"
        )
    return documents


def _preview(shard: Shard, vocabulary: Tokenizer) -> Iterator[str]:
    ids = shard.read()[:_PREVIEW_IDS].tolist()
    if max(ids) >= vocabulary.vocab_size:
        yield f"  | (ids up to {max(ids):,} are not in the vocabulary of {vocabulary.name}; choose another --tokenizer)"
        return
    lines = [line for line in vocabulary.decode(ids).splitlines() if line.strip()]
    for line in lines[:_PREVIEW_LINES]:
        yield f"  | {line[:_PREVIEW_CHARACTERS]}{'…' if len(line) > _PREVIEW_CHARACTERS else ''}"


def _count(number: int | None) -> str:
    return "not counted" if number is None else f"{number:,}"
