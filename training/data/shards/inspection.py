"""What is in a shard folder, ours or another program's, as a person wants to read it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.atomic_files import file_sha256
from common.cli_errors import InputError
from training.data.shards.manifest import Manifest
from training.data.shards.shard_files import Shard, ShardFolder
from training.data.tokenization.tokenizer import Tokenizer, load_tokenizer

_SHOWN_IDS = 200
_SHOWN_LINES = 3
_SHOWN_CHARACTERS = 110


def inspect(path: Path, *, tokenizer: str = "gpt2", verify: bool = False) -> Iterator[str]:
    """Yield lines about a folder: where it comes from, its shards, how its text begins.

    Args:
        path: the shard folder; a producer may be at work on it.
        tokenizer: to decode a folder that does not bring its own.
        verify: read every byte: hashes against the manifest, ids against the vocabulary.

    Raises:
        InputError: the folder holds no shards, or one is not what the manifest says.
    """
    folder = ShardFolder.open(path)
    own = (path / "tokenizer.json").exists()
    vocabulary = Tokenizer.load(path) if own else load_tokenizer(tokenizer)
    yield from _origin(folder, vocabulary, own)
    yield f"{'file':32} {'split':5} {'tokens':>15} {'documents':>12}" + ("  verified" if verify else "")
    documents = 0
    for shard in folder.shards:
        begun = shard.documents
        checked = ""
        if verify:
            begun = _verify(folder, shard, vocabulary)
            checked = "  sha256 and ids" if shard.sha256 else "  ids"
        documents += begun or 0
        yield f"{shard.path.name:32} {shard.split:5} {shard.tokens:15,} {_number(begun):>12}{checked}"
    tokens = sum(shard.tokens for shard in folder.shards)
    counted = verify or folder.manifest is not None
    yield f"{'in all':32} {'':5} {tokens:15,} {_number(documents if counted else None):>12}"
    for split in ("val", "train"):
        shards = [shard for shard in folder.shards if shard.split == split]
        if shards:
            yield f"{split} begins:"
            yield from _beginning(shards[0], vocabulary)


def _origin(folder: ShardFolder, vocabulary: Tokenizer, own: bool) -> Iterator[str]:
    manifest = folder.manifest
    if manifest is None:
        yield f"{folder.path}: shards of another program, without a manifest"
        yield f"tokenizer: not said; read here as {vocabulary.name} with {vocabulary.vocab_size:,} ids"
        return
    state = "complete" if manifest.complete else "not complete: run the producer again, or train while it works"
    yield f"{folder.path}: {state}"
    config = f" ({manifest.corpus_config})" if manifest.corpus_config else ""
    yield f"corpus: {manifest.corpus}{config}, revision {manifest.corpus_revision[:12]}"
    if manifest.replaced_documents:
        yield f"documents with bytes that were no UTF-8: {manifest.replaced_documents:,}"
    kept = "with it in the folder" if own else "which is missing in the folder"
    yield f"tokenizer: {manifest.tokenizer} with {manifest.vocab_size:,} ids as {manifest.dtype}, {kept}"
    _compare_tokenizer(manifest, vocabulary, folder.path)


def _compare_tokenizer(manifest: Manifest, vocabulary: Tokenizer, path: Path) -> None:
    if vocabulary.fingerprint != manifest.tokenizer_fingerprint:
        raise InputError(
            f"expected the tokenizer {manifest.tokenizer} that the shards in {path} were made with, found "
            f"{vocabulary.name}; put its tokenizer.json into the folder, or name it with --tokenizer"
        )


def _verify(folder: ShardFolder, shard: Shard, vocabulary: Tokenizer) -> int:
    """Return the documents that begin in a shard, after reading all of it."""
    if shard.sha256 is not None and file_sha256(shard.path) != shard.sha256:
        raise InputError(
            f"expected {shard.path} with the sha256 that the manifest says, found other bytes; "
            "delete the folder and run python -m training.prepare again, or fetch the file again"
        )
    folder.check_ids(vocabulary.vocab_size, [shard])
    begun = int(np.count_nonzero(shard.read() == vocabulary.end_of_text_id))
    if shard.documents is not None and shard.documents != begun:
        raise InputError(
            f"expected {shard.documents:,} documents in {shard.path} as the manifest says, found {begun:,}; "
            "delete the folder and prepare it again"
        )
    return begun


def _beginning(shard: Shard, vocabulary: Tokenizer) -> Iterator[str]:
    ids = shard.read()[:_SHOWN_IDS].tolist()
    if max(ids) >= vocabulary.vocab_size:
        yield f"  | (ids up to {max(ids):,}: not of {vocabulary.name}; name another --tokenizer)"
        return
    lines = [line for line in vocabulary.decode(ids).splitlines() if line.strip()]
    for line in lines[:_SHOWN_LINES]:
        yield f"  | {line[:_SHOWN_CHARACTERS]}{'…' if len(line) > _SHOWN_CHARACTERS else ''}"


def _number(number: int | None) -> str:
    return "not counted" if number is None else f"{number:,}"
