"""Fills a shard folder: documents in the corpus's order, tokenised by worker processes, written by this one.

The bytes of the shards depend on the corpus and the tokenizer alone, not on the number of workers nor on how often the
producer was killed: it goes on behind the last whole shard, and finds its place in the document that was under way from
the last end-of-text token on disk.
"""

import contextlib
import errno
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from gpt2_scratch_errors import InputError
from training.atomic import UNFINISHED_SUFFIX, sync
from training.data.corpus import Corpus, open_corpus
from training.data.folder_lock import locked
from training.data.manifest import Manifest, manifest_path
from training.data.reporting import AtMostEvery, Progress
from training.data.request import ShardRequest
from training.data.shards import ShardFolder, ShardWriter
from training.data.tokenizer import Tokenizer, load_tokenizer, parse_train_spec
from training.data.tokenizer_training import train_tokenizer
from training.data.workers import EncodeDocuments, map_in_order

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SECONDS_BETWEEN_WAITING_LINES = 60.0

_CHARACTERS_PER_BATCH = 1 << 18
_DOCUMENTS_PER_BATCH = 1024


def produce(
    output: Path,
    *,
    corpus: str,
    corpus_config: str | None = None,
    text_field: str = "text",
    tokenizer: str = "gpt2",
    shard_tokens: int,
    val_tokens: int,
    max_tokens: int | None = None,
    num_workers: int | None = None,
    wait: bool = False,
    report: Callable[[str], None] = print,
) -> ShardFolder:
    """Return the folder with the corpus's shards, made, finished, or found ready.

    Args:
        output: the shard folder; made if absent.
        corpus: see `open_corpus`.
        corpus_config: part of a Hub dataset.
        text_field: the field or column that holds the text.
        tokenizer: "gpt2", the folder of a saved one, or "train:4096" to train one on the training part of the corpus.
        shard_tokens: tokens in each training shard but the last.
        val_tokens: tokens in the validation shard, which is the beginning of the corpus.
        max_tokens: stop after this many training tokens; None takes the whole corpus.
        num_workers: tokenising processes; 0 tokenises in this one, None takes all cores.
        wait: when another process fills the folder, wait until it has, or take over when it dies.
        report: is given progress, a line at a time, where standard error is no terminal.

    Raises:
        InputError: the corpus or the tokenizer cannot be used, the folder holds something else, or the disk is full.
    """
    if num_workers is not None and num_workers < 0:
        raise InputError(f"expected num_workers of at least 0, found {num_workers}")
    output = Path(output)
    request = ShardRequest(
        corpus=corpus,
        corpus_config=corpus_config,
        text_field=text_field,
        tokenizer=tokenizer,
        shard_tokens=shard_tokens,
        val_tokens=val_tokens,
        max_tokens=max_tokens,
    )
    if request.manifest_in(output) is not None:
        folder = ShardFolder.open(output)
        if folder.complete:
            return folder
    source = open_corpus(request.corpus, request.corpus_config, text_field=text_field, num_workers=num_workers)
    waiting_line = AtMostEvery(SECONDS_BETWEEN_WAITING_LINES, report)

    def waiting() -> None:
        waiting_line(f"another process fills {output}; waiting until it has")

    try:
        with locked(output, on_wait=waiting if wait else None):
            _fill(output, source, request, num_workers, report)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise
        raise InputError(
            f"expected to write {output}, found: {error.strerror}; free space or choose another folder, "
            "and run again: finished shards are kept"
        ) from None
    return ShardFolder.open(output)


def _fill(
    output: Path, source: Corpus, request: ShardRequest, num_workers: int | None, report: Callable[[str], None]
) -> None:
    try:
        manifest = request.manifest_in(output)  # another producer may have been at it until we had the lock
        if manifest is None:
            tokenizer, manifest = _begin(output, source, request, report)
        elif manifest.complete:
            return
        else:
            tokenizer = _take_up(output, source, manifest)
        _remove_unfinished(output, manifest)
        writer = ShardWriter(output, manifest)
        documents = source.documents()
        _go_on_behind_shards(writer, documents, ShardFolder.open(output), tokenizer)
        encode = EncodeDocuments(tokenizer.encoding, tokenizer.end_of_text_id, manifest.dtype)
        encoded = map_in_order(encode, _batches(documents), num_workers=num_workers)
        with Progress(tokens=writer.tokens, report=report) as progress, contextlib.closing(encoded):
            while not writer.full and (ids := next(encoded, None)) is not None:
                writer.add(ids)
                written = writer.manifest
                progress.update(
                    tokens=writer.tokens, documents=written.documents, shards=len(written.shards), share=None
                )
        writer.finish()
    finally:
        left = Manifest.read(output)
        _remove_unfinished(output, left)
        if left is None or not left.shards:
            for path in (manifest_path(output), *(output / name for name in TOKENIZER_FILES)):
                path.unlink(missing_ok=True)


def _begin(
    output: Path, source: Corpus, request: ShardRequest, report: Callable[[str], None]
) -> tuple[Tokenizer, Manifest]:
    """Put tokenizer and manifest into a new folder."""
    vocab_size = parse_train_spec(request.tokenizer)
    if vocab_size is None:
        tokenizer = load_tokenizer(request.tokenizer)
    else:
        tokenizer = train_tokenizer(source, vocab_size, val_tokens=request.val_tokens, report=report)
    manifest = Manifest(
        corpus=source.name,
        corpus_config=request.corpus_config,
        corpus_revision=source.revision,
        text_field=request.text_field,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        shard_tokens=request.shard_tokens,
        val_tokens=request.val_tokens,
        max_tokens=request.max_tokens,
    )
    tokenizer.save(output)
    for name in TOKENIZER_FILES:
        sync(output / name)
    sync(output)
    manifest.write(output)
    return tokenizer, manifest


def _take_up(output: Path, source: Corpus, manifest: Manifest) -> Tokenizer:
    """Return the tokenizer of a folder that was left incomplete, if the corpus is still the same."""
    if manifest.corpus_revision != source.revision:
        raise InputError(
            f"expected the corpus that {output} was begun with, found that '{source.name}' has changed since; "
            "delete the folder and prepare it again"
        )
    tokenizer = Tokenizer.load(output)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise InputError(
            f"expected the tokenizer that {output} was begun with, found another in its tokenizer.json; "
            "delete the folder and prepare it again"
        )
    return tokenizer


def _remove_unfinished(output: Path, manifest: Manifest | None) -> None:
    """Remove what a producer that was killed left: files that are not whole, and a shard not yet in the manifest."""
    for path in output.glob(f"*{UNFINISHED_SUFFIX}"):
        path.unlink()
    if manifest is not None:
        ours = re.compile(re.escape(manifest.corpus) + r"_(val|train)_\d{6}\.npy")
        shards = {shard.file for shard in manifest.shards}
        for path in list(output.iterdir()):
            if ours.fullmatch(path.name) and path.name not in shards:
                path.unlink()


def _go_on_behind_shards(
    writer: ShardWriter, documents: Iterator[str], folder: ShardFolder, tokenizer: Tokenizer
) -> None:
    """Advance `documents` past what the shards hold, and hand the writer the rest of the one that was under way."""
    begun = writer.manifest.documents
    if not begun:
        return
    written: list[np.ndarray] = []  # of the last document, latest first
    for shard in reversed(folder.shards):
        ids = shard.read()
        starts = np.flatnonzero(ids == tokenizer.end_of_text_id)
        written.append(ids[starts[-1] :] if len(starts) else ids)
        if len(starts):
            break
    prefix = np.concatenate(written[::-1])
    document = next(islice(documents, begun - 1, None), None)
    ids = EncodeDocuments(tokenizer.encoding, tokenizer.end_of_text_id, writer.manifest.dtype)([document or ""])
    if document is None or not np.array_equal(ids[: len(prefix)], prefix):
        raise InputError(
            f"expected document {begun:,} of the corpus to go on as {folder.path} has it, found another; "
            "the corpus has changed: delete the folder and prepare it again"
        )
    writer.add(ids[len(prefix) :])


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _CHARACTERS_PER_BATCH or len(batch) == _DOCUMENTS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
