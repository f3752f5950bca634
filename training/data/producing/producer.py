"""Fills a shard folder: documents in the corpus's order, tokenised by worker processes, written by this one.

The bytes of the shards depend on the corpus and the tokenizer alone, not on the number of workers nor on how often the
producer was killed: it goes on behind the last whole shard, and finds its place in the document that was under way from
the last end-of-text token on disk.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.cli_errors import InputError
from common.folder_lock import locked
from common.hub_retry import DISK_ERRORS, hub_cache_error
from common.rate_limited_log import RateLimitedLog
from training.data.producing.progress import Progress
from training.data.producing.shard_download import download_ready_shards
from training.data.producing.workers import EncodeDocuments, map_in_order
from training.data.shards.folder_lifecycle import create_folder, removing_partial_files, resume_folder
from training.data.shards.manifest import Manifest, ResumePoint
from training.data.shards.shard_reader import ShardFolder
from training.data.shards.shard_spec import ShardSpec
from training.data.shards.shard_writer import ShardWriter, require_space
from training.data.sources.base import Corpus, Document, Place
from training.data.sources.hub_corpus import HubCorpus
from training.data.sources.open_corpus import open_corpus
from training.data.tokenization.tokenizer import Tokenizer, load_tokenizer, parse_train_spec
from training.data.tokenization.tokenizer_training import train_tokenizer

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
    spec = ShardSpec(
        folder=output,
        corpus=corpus,
        corpus_config=corpus_config,
        text_field=text_field,
        tokenizer=tokenizer,
        shard_tokens=shard_tokens,
        val_tokens=val_tokens,
        max_tokens=max_tokens,
    )
    folder = spec.open_folder()
    if folder is not None and folder.complete:
        return folder
    source = open_corpus(spec.corpus, spec.corpus_config, text_field=text_field, num_workers=num_workers, report=report)
    waiting_line = RateLimitedLog(SECONDS_BETWEEN_WAITING_LINES, report)

    def waiting() -> None:
        waiting_line(f"another process fills {output}; waiting until it has")

    try:
        with locked(output, on_wait=waiting if wait else None):
            if not (isinstance(source, HubCorpus) and download_ready_shards(output, source, spec, report)):
                _fill(output, source, spec, num_workers, report)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise hub_cache_error(error) or InputError(
            f"expected to write {output}, found: {error.strerror}; free space or choose another folder, "
            "and run again: finished shards are kept"
        ) from None
    return ShardFolder.open(output)


def _fill(
    output: Path, source: Corpus, spec: ShardSpec, num_workers: int | None, report: Callable[[str], None]
) -> None:
    """Put the shards of the corpus's documents into `output`."""
    with removing_partial_files(output):
        folder = spec.open_folder()  # another producer may have changed it before we got the lock
        manifest = folder.manifest if folder else None
        if manifest is None:
            tokenizer = _tokenizer_for(source, spec, report)
            manifest = create_folder(spec, source, tokenizer)
        elif manifest.complete:
            return
        else:
            tokenizer = resume_folder(output, source, manifest)
        _look_at_the_disk(output, source, manifest)
        places = _Places(manifest)
        writer = ShardWriter(output, manifest, manifest_changes=places.news)
        documents = source.read(manifest.resume.place if manifest.resume else None)
        _go_on_behind_shards(writer, documents, ShardFolder.open(output), tokenizer)
        noted = places.noted(batches(documents, manifest.documents))
        encode = EncodeDocuments(tokenizer.bpe, tokenizer.end_of_text_id, manifest.dtype)
        encoded = map_in_order(encode, (batch.texts for batch in noted), num_workers=num_workers)
        with Progress(tokens=writer.tokens, report=report) as progress, contextlib.closing(encoded):
            while not writer.full and (ids := next(encoded, None)) is not None:
                batch = places.reach_next()
                writer.add(ids)
                written = writer.manifest
                progress.update(
                    tokens=writer.tokens,
                    documents=written.documents,
                    shards=len(written.shards),
                    share=_share_done(writer, source, batch),
                )
        replaced = writer.finish().replaced_documents
        if replaced:
            report(f"{replaced:,} documents held bytes that are not UTF-8; U+FFFD stands for these now")


def _tokenizer_for(source: Corpus, spec: ShardSpec, report: Callable[[str], None]) -> Tokenizer:
    vocab_size = parse_train_spec(spec.tokenizer)
    if vocab_size is None:
        return load_tokenizer(spec.tokenizer)
    return train_tokenizer(source, vocab_size, val_tokens=spec.val_tokens, report=report)


def _look_at_the_disk(output: Path, source: Corpus, manifest: Manifest) -> None:
    """Refuse to begin what surely does not fit.

    Raises:
        OSError: no space.
    """
    known = [number for number in (source.least_tokens(), manifest.max_tokens) if number is not None]
    next_shard = manifest.shard_tokens if manifest.shards else manifest.val_tokens
    tokens = max(0, min(known) - manifest.tokens) if known else next_shard
    require_space(output, tokens * np.dtype(manifest.dtype).itemsize)


def _share_done(writer: ShardWriter, source: Corpus, batch: "Batch") -> float | None:
    """Return how much of the folder is done, by its limit of tokens or by the place in the corpus."""
    limit = writer.manifest.max_tokens
    by_corpus = source.share_before(batch.place) if batch.place is not None else None
    if limit is None:
        return by_corpus
    return max(by_corpus or 0.0, writer.tokens / (writer.manifest.val_tokens + limit))


def _go_on_behind_shards(
    writer: ShardWriter, documents: Iterator[Document], folder: ShardFolder, tokenizer: Tokenizer
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
    first = writer.manifest.resume.document if writer.manifest.resume else 0
    document = next(islice(documents, begun - 1 - first, None), None)
    encode = EncodeDocuments(tokenizer.bpe, tokenizer.end_of_text_id, writer.manifest.dtype)
    ids = encode([document.text if document else ""])
    if document is None or not np.array_equal(ids[: len(prefix)], prefix):
        raise InputError(
            f"expected document {begun:,} of the corpus to go on as {folder.path} has it, found another; "
            "the corpus has changed: delete the folder and prepare it again"
        )
    writer.add(ids[len(prefix) :])


@dataclass
class Batch:
    """Documents that a worker encodes together.

    Attributes:
        first: number of the first, counted from 0.
        place: of the first, where it has one.
        texts: theirs.
        replaced: numbers of those whose bytes were no UTF-8.
    """

    first: int
    place: Place | None
    texts: list[str] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)


def batches(documents: Iterable[Document], first: int) -> Iterator[Batch]:
    """Yield the documents, whose numbers go on from `first`, in batches that begin with a place where there is one."""
    batch, characters = Batch(first, None), 0
    for number, document in enumerate(documents, start=first):
        if batch.texts and batch.place is None and document.place is not None:
            yield batch
            batch, characters = Batch(number, None), 0
        if not batch.texts:
            batch.place = document.place
        if document.replaced:
            batch.replaced.append(number)
        batch.texts.append(document.text)
        characters += len(document.text)
        if characters >= _CHARACTERS_PER_BATCH or len(batch.texts) == _DOCUMENTS_PER_BATCH:
            yield batch
            batch, characters = Batch(number + 1, None), 0
    if batch.texts:
        yield batch


class _Places:
    """What the manifest says of the corpus when a shard is whole: where to go on, and how many documents were mended.

    Batches are noted as they are read, ahead of the writer, and reached as their ids come back.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._resume = manifest.resume
        self._counted, self._documents = manifest.replaced_documents, manifest.documents
        self._ahead: deque[Batch] = deque()
        self._reached: deque[Batch] = deque()

    def noted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on and remember them."""
        for batch in batches:
            self._ahead.append(batch)
            yield batch

    def reach_next(self) -> Batch:
        """Return the next batch, of which the writer gets the ids now."""
        batch = self._ahead.popleft()
        batch.texts.clear()
        self._reached.append(batch)
        return batch

    def news(self, documents: int) -> dict[str, Any]:
        """Return the manifest's changes when `documents` have begun in whole shards."""
        for batch in self._reached:
            self._counted += sum(self._documents <= number < documents for number in batch.replaced)
            if batch.place is not None and batch.first < documents:
                self._resume = ResumePoint(batch.first, batch.place)
        self._documents = documents
        while len(self._reached) > 1:  # the last one may go on into the next shard
            self._reached.popleft()
        return {"resume": self._resume, "replaced_documents": self._counted}
