"""How a shard folder begins, how it is taken up again, and that nothing half-written stays in it."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from common.atomic_files import PARTIAL_SUFFIX, fsync
from common.cli_errors import InputError
from training.data.shards.manifest import Manifest, manifest_path
from training.data.shards.shard_spec import ShardSpec
from training.data.sources.base import Corpus
from training.data.tokenization.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def begin_folder(
    output: Path, source: Corpus, spec: ShardSpec, tokenizer: Tokenizer, *, dtype: str | None = None
) -> Manifest:
    """Put tokenizer and manifest into a new folder, and return the manifest.

    Args:
        output: exists already.
        source: what is read.
        spec: what the folder should hold.
        tokenizer: of the shards.
        dtype: of the ids; the smallest that holds the vocabulary when None.
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
    tokenizer.save(output)
    for name in TOKENIZER_FILES:
        fsync(output / name)
    fsync(output)
    manifest.write(output)
    return manifest


def take_up_folder(output: Path, source: Corpus, manifest: Manifest) -> Tokenizer:
    """Return the tokenizer of a folder that was left incomplete, and rid it of what is not whole.

    Raises:
        InputError: the corpus or the tokenizer is no longer the same, or the corpus has no such place.
    """
    if not source.can_go_on_from(manifest.corpus_revision):
        raise InputError(
            f"expected the corpus that {output} was begun with, found that '{source.name}' has changed since; "
            "delete the folder and prepare it again"
        )
    if manifest.resume is not None and not source.is_place(manifest.resume.place):
        raise InputError(
            f"expected a place in '{source.name}' to go on from in {manifest_path(output)}, "
            f"found {manifest.resume.place!r:.40}; delete the folder and prepare it again"
        )
    tokenizer = Tokenizer.load(output)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise InputError(
            f"expected the tokenizer that {output} was begun with, found another in its tokenizer.json; "
            "delete the folder and prepare it again"
        )
    remove_unfinished(output, manifest)
    return tokenizer


@contextlib.contextmanager
def tidied(output: Path) -> Iterator[None]:
    """Leave whole shards only in `output`, and nothing at all without one."""
    try:
        yield
    finally:
        left = Manifest.read(output)
        remove_unfinished(output, left)
        if left is None or not left.shards:
            for path in (manifest_path(output), *(output / name for name in TOKENIZER_FILES)):
                path.unlink(missing_ok=True)


def remove_unfinished(output: Path, manifest: Manifest | None) -> None:
    """Remove what a producer that was killed left: files that are not whole, and a shard not yet in the manifest."""
    for path in output.glob(f"*{PARTIAL_SUFFIX}"):
        path.unlink()
    if manifest is not None:
        ours = re.compile(re.escape(manifest.corpus) + r"_(val|train)_\d{6}\.npy")
        shards = {shard.file for shard in manifest.shards}
        for path in list(output.iterdir()):
            if ours.fullmatch(path.name) and path.name not in shards:
                path.unlink()
