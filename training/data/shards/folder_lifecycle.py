"""The life cycle of a shard folder: created, partial, resumed, complete. Partial files are deleted."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from common.atomic_files import PARTIAL_SUFFIX, fsync
from common.cli_errors import InputError
from training.data.shards.manifest import MANIFEST_NAME, Manifest
from training.data.shards.shard_spec import ShardSpec
from training.data.sources.base import Corpus
from training.data.tokenization.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def create_folder(spec: ShardSpec, source: Corpus, tokenizer: Tokenizer, *, dtype: str | None = None) -> Manifest:
    """Write the tokenizer and a manifest without shards into the spec's folder, which exists; return the manifest.

    `dtype` of the ids is by default the smallest that holds the vocabulary.
    """
    manifest = Manifest(
        corpus=source.name,
        corpus_config=spec.corpus_config,
        corpus_revision=source.revision,
        text_field=spec.text_field,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        dtype=dtype or ("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"),
        shard_tokens=spec.shard_tokens,
        val_tokens=spec.val_tokens,
        max_tokens=spec.max_tokens,
    )
    tokenizer.save(spec.folder)
    for name in TOKENIZER_FILES:
        fsync(spec.folder / name)
    fsync(spec.folder)
    manifest.write(spec.folder)
    return manifest


def resume_folder(folder: Path, source: Corpus, manifest: Manifest) -> tuple[Corpus, Tokenizer]:
    """Remove the partial files of a folder; return the corpus at the folder's revision, and the tokenizer.

    Raises:
        InputError: the corpus or the tokenizer has changed, or the corpus has no such position.
    """
    corpus = source.at_revision(manifest.corpus_revision)
    if corpus is None:
        raise InputError(
            f"the corpus '{source.name}' has changed since {folder} was created; delete the folder and prepare it again"
        )
    if manifest.resume is not None and not corpus.is_position(manifest.resume.position):
        raise InputError(
            f"{folder / MANIFEST_NAME} resumes '{source.name}' from a position that it does not have, "
            f"{manifest.resume.position!r:.40}; delete the folder and prepare it again"
        )
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise InputError(
            f"tokenizer.json in {folder} is not the tokenizer that made its shards; "
            "delete the folder and prepare it again"
        )
    _remove_partial_files(folder, manifest)
    return corpus, tokenizer


@contextlib.contextmanager
def removing_partial_files(folder: Path) -> Iterator[None]:
    """On exit, delete partial files, and manifest and tokenizer too if no shard was completed."""
    try:
        yield
    finally:
        manifest = Manifest.read(folder)
        _remove_partial_files(folder, manifest)
        if manifest is None or not manifest.shards:
            for name in (MANIFEST_NAME, *TOKENIZER_FILES):
                (folder / name).unlink(missing_ok=True)


def _remove_partial_files(folder: Path, manifest: Manifest | None) -> None:
    """Delete what a killed producer left: partial files, and a shard that is not in the manifest yet."""
    for path in folder.glob(f"*{PARTIAL_SUFFIX}"):
        path.unlink()
    if manifest is not None:
        shard_name = re.compile(re.escape(manifest.corpus) + r"_(val|train)_\d{6}\.npy")
        listed = {shard.file for shard in manifest.shards}
        for path in list(folder.iterdir()):
            if shard_name.fullmatch(path.name) and path.name not in listed:
                path.unlink()
