"""The producer: fills a shard folder with the tokens of a corpus.

Worker processes tokenize and this process writes, in the corpus's order. The bytes of the shards depend on the corpus
and the tokenizer alone, not on the number of workers or on interruptions: a producer resumes after the last complete
shard, inside the document that was interrupted. A Hub repository of ready shards is downloaded instead.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.cli_errors import InputError
from common.folder_lock import locked
from common.hub_retry import hub_cache_error, is_disk_error
from common.rate_limited_log import RateLimitedLog
from common.worker_processes import map_in_order
from training.data.producing.content_check import check_content
from training.data.producing.progress import ProducerProgress
from training.data.producing.shard_download import download_shards, list_ready_shards
from training.data.shards.manifest import Manifest, ResumePoint
from training.data.shards.shard_reader import ShardFolder
from training.data.shards.shard_spec import ShardSpec
from training.data.shards.shard_writer import (
    ShardWriter,
    create_folder,
    removing_partial_files,
    require_space,
    resume_folder,
)
from training.data.sources.base import Corpus, Document, Position
from training.data.sources.hub_corpus import HubCorpus
from training.data.sources.open_corpus import open_corpus
from training.data.tokenization.bpe import EncodeDocuments
from training.data.tokenization.tokenizer import Tokenizer, load_tokenizer, parse_train_spec
from training.data.tokenization.tokenizer_training import train_tokenizer

SECONDS_BETWEEN_WAITING_LINES = 60.0

_CHARACTERS_PER_BATCH = 1 << 18
_DOCUMENTS_PER_BATCH = 1024


def produce(
    spec: ShardSpec, *, num_workers: int | None = None, wait: bool = False, report: Callable[[str], None] = print
) -> ShardFolder:
    """Return the complete folder that `spec` describes: found complete, resumed, or filled from the start.

    Args:
        spec: what the folder should hold.
        num_workers: tokenizing processes; 0 tokenizes in this process, None uses all cores.
        wait: while another process fills the folder, wait, and take over if that process exits.
        report: receives progress lines where standard error is not a terminal, and a summary.

    Raises:
        InputError: the corpus or tokenizer cannot be used, the folder holds something else, or the disk is full.
    """
    if num_workers is not None and num_workers < 0:
        raise InputError(f"num_workers must be at least 0, found {num_workers}")
    started = time.perf_counter()
    folder = spec.open_folder()
    if folder is None or not folder.complete:
        _lock_and_fill(spec, num_workers, wait, report)
        folder = ShardFolder.open(spec.folder)
    else:
        check_content(spec, folder, report)
    manifest, ids = folder.manifest, folder.val_shard.read()
    assert manifest is not None  # a folder of ours
    bytes_per_token = Tokenizer.load(folder.path).token_byte_lengths()[ids].sum() / len(ids)
    report(
        f"{folder.path}: {len(manifest.shards)} shards, {manifest.documents:,} documents, "
        f"{manifest.tokens:,} tokens of {manifest.tokenizer}, "
        f"{bytes_per_token:.2f} bytes per token in validation, {time.perf_counter() - started:.1f} s"
    )
    return folder


def _lock_and_fill(spec: ShardSpec, num_workers: int | None, wait: bool, report: Callable[[str], None]) -> None:
    corpus = open_corpus(
        spec.corpus, spec.corpus_config, text_field=spec.text_field, num_workers=num_workers, report=report
    )
    log = RateLimitedLog(SECONDS_BETWEEN_WAITING_LINES, report)
    on_wait = functools.partial(log, f"another process is filling {spec.folder}; waiting for it") if wait else None
    try:
        with locked(spec.folder, on_wait=on_wait), removing_partial_files(spec.folder):
            folder = spec.open_folder()  # again: another producer may have written to it until now
            if folder is None or not folder.complete:
                _fill(spec, corpus, folder, num_workers, report)
    except OSError as error:
        if not is_disk_error(error):
            raise
        raise hub_cache_error(error) or InputError(
            f"cannot write to {spec.folder}: {error.strerror}; free space or choose another folder, and run again: "
            "complete shards are kept"
        ) from None


def _fill(
    spec: ShardSpec, corpus: Corpus, folder: ShardFolder | None, num_workers: int | None, report: Callable[[str], None]
) -> None:
    manifest, tokenizer = None, None
    if folder is not None and (manifest := folder.manifest) is not None:
        corpus, tokenizer = resume_folder(folder, manifest, corpus)
    if isinstance(corpus, HubCorpus) and (files := list_ready_shards(corpus)):
        download_shards(spec, corpus, files, manifest, report)
        return
    if manifest is None or tokenizer is None:
        vocab_size = parse_train_spec(spec.tokenizer)
        if vocab_size is None:
            tokenizer = load_tokenizer(spec.tokenizer)
        else:
            tokenizer = train_tokenizer(corpus, vocab_size, val_tokens=spec.val_tokens, report=report)
        manifest = create_folder(spec, corpus, tokenizer)
    _check_disk_space(spec, corpus, manifest)
    corpus_progress = _CorpusProgress(manifest)
    writer = ShardWriter(spec.folder, manifest, corpus_progress.at_shard_end)
    encode = EncodeDocuments(tokenizer.bpe, tokenizer.end_of_text_id, manifest.dtype)
    documents = corpus.read(manifest.resume.position if manifest.resume else None)
    if folder is not None and manifest.documents:
        _skip_written(documents, writer, folder, encode)
    # The workers draw batches ahead of the writer; tee keeps those in between.
    ahead, written = itertools.tee(batches(documents, manifest.documents))
    encoded = map_in_order(encode, (batch.texts for batch in ahead), num_workers=num_workers)
    with ProducerProgress(writer.tokens, report) as progress, contextlib.closing(encoded):
        for batch, ids in zip(written, encoded, strict=True):
            corpus_progress.add(batch)
            writer.add(ids)
            progress.show(writer.manifest, writer.tokens, _fraction_done(writer, corpus, batch))
            if writer.full:
                break
    replaced = writer.finish().replaced_documents
    if replaced:
        report(f"{replaced:,} documents held invalid UTF-8, which was replaced by U+FFFD")


def _check_disk_space(spec: ShardSpec, corpus: Corpus, manifest: Manifest) -> None:
    """Raise an OSError where the shards certainly do not fit on the disk."""
    bounds = [bound for bound in (corpus.min_tokens(), spec.max_tokens) if bound is not None]
    next_shard = manifest.shard_tokens if manifest.shards else manifest.val_tokens
    tokens = max(0, min(bounds) - manifest.tokens) if bounds else next_shard
    require_space(spec.folder, tokens * np.dtype(manifest.dtype).itemsize)


def _fraction_done(writer: ShardWriter, corpus: Corpus, batch: "Batch") -> float | None:
    """Return how much of the folder is done, by its limit of tokens or by the position in the corpus."""
    of_corpus = None if batch.position is None else corpus.fraction_before(batch.position)
    limit = writer.manifest.max_tokens
    if limit is None:
        return of_corpus
    return max(of_corpus or 0.0, writer.tokens / (writer.manifest.val_tokens + limit))


def _skip_written(
    documents: Iterator[Document], writer: ShardWriter, folder: ShardFolder, encode: EncodeDocuments
) -> None:
    """Advance `documents` past those in complete shards, and give the writer the rest of the last one."""
    count = writer.manifest.documents
    parts: list[np.ndarray] = []  # of the last document, which may span several shards
    for shard in reversed(folder.shards):
        ids = shard.read()
        starts = np.flatnonzero(ids == encode.end_of_text_id)
        parts.insert(0, ids[starts[-1] :] if len(starts) else ids)
        if len(starts):
            break
    written = np.concatenate(parts)
    first = writer.manifest.resume.document if writer.manifest.resume else 0
    document = next(itertools.islice(documents, count - 1 - first, None), None)
    ids = encode([document.text if document else ""])
    if document is None or not np.array_equal(ids[: len(written)], written):
        raise InputError(
            f"document {count:,} of the corpus differs from the one in {folder.path}; "
            "the corpus has changed: delete the folder and prepare it again"
        )
    writer.add(ids[len(written) :])


@dataclass
class Batch:
    """Documents from index `first` on, encoded together; `replaced` are the indices of those with invalid UTF-8."""

    first: int
    position: Position | None
    texts: list[str] = field(default_factory=list)
    characters: int = 0
    replaced: list[int] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Return whether the batch is large enough to encode."""
        return self.characters >= _CHARACTERS_PER_BATCH or len(self.texts) >= _DOCUMENTS_PER_BATCH


def batches(documents: Iterable[Document], first: int) -> Iterator[Batch]:
    """Yield the documents, the first of which has index `first`, in batches; each begins at a position if it can."""
    batch = None
    for index, document in enumerate(documents, start=first):
        if batch is None or batch.full or (batch.position is None and document.position is not None):
            if batch is not None:
                yield batch
            batch = Batch(index, document.position)
        batch.texts.append(document.text)
        batch.characters += len(document.text)
        if document.replaced:
            batch.replaced.append(index)
    if batch is not None:
        yield batch


class _CorpusProgress:
    """The state of the corpus after each shard, for the manifest: where to resume, and how many texts were repaired."""

    def __init__(self, manifest: Manifest) -> None:
        self._resume = manifest.resume
        self._replaced, self._documents = manifest.replaced_documents, manifest.documents
        self._batches: list[Batch] = []

    def add(self, batch: Batch) -> None:
        """Register the batch that the writer gets next."""
        batch.texts.clear()
        self._batches.append(batch)

    def at_shard_end(self, documents: int) -> dict[str, Any]:
        """Return the manifest's new values when `documents` documents begin in complete shards."""
        for batch in self._batches:
            self._replaced += sum(self._documents <= index < documents for index in batch.replaced)
            if batch.position is not None and batch.first < documents:
                self._resume = ResumePoint(batch.first, batch.position)
        self._documents = documents
        del self._batches[:-1]  # the last one may continue in the next shard
        return {"resume": self._resume, "replaced_documents": self._replaced}
