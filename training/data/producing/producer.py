"""The producer: fills a shard folder with the tokens of a corpus.

Worker processes tokenize and this process writes, in the corpus's order. The bytes of the shards depend on the corpus
and the tokenizer alone, not on the number of workers or on interruptions: a producer resumes after the last complete
shard, inside the document that was interrupted. Memory does not grow with a file or a document. A Hub repository of
ready shards is downloaded instead.
"""

import contextlib
import functools
import itertools
import re
import time
from collections.abc import Callable

import numpy as np

from common.cli_errors import InputError, advice_on
from common.folder_lock import locked
from common.hub_retry import disk_error_kind, hub_cache_error, is_disk_error
from common.rate_limited_log import RateLimitedLog
from common.worker_processes import map_in_order
from training.data.producing.batches import Batch, CorpusProgress, batches, joined, summary
from training.data.producing.progress import ProducerProgress
from training.data.producing.shard_download import download_shards, find_ready_shards
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
from training.data.sources.base import Corpus
from training.data.sources.hub_corpus import HubCorpus
from training.data.sources.text_files import END_OF_TEXT
from training.data.tokenization.encoding import EncodePieces
from training.data.tokenization.tokenizer import load_tokenizer, parse_train_spec
from training.data.tokenization.tokenizer_training import train_tokenizer

SECONDS_BETWEEN_WAITING_LINES = 60.0


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
        spec.check_content(folder, report)
    manifest, tokenizer = folder.manifest, folder.load_tokenizer(str(folder.path))
    assert manifest is not None  # a folder of ours
    folder.val_shard.check_ids(tokenizer.vocab_size)
    ids = folder.val_shard.read()
    bytes_per_token = tokenizer.token_byte_lengths()[ids].sum() / len(ids)
    report(
        f"{folder.path}: {len(manifest.shards)} shards, {manifest.documents:,} documents, "
        f"{manifest.tokens:,} tokens of {manifest.tokenizer}, "
        f"{bytes_per_token:.2f} bytes per token in validation, {time.perf_counter() - started:.1f} s"
    )
    return folder


def _lock_and_fill(spec: ShardSpec, num_workers: int | None, wait: bool, report: Callable[[str], None]) -> None:
    corpus = spec.open_corpus(num_workers=num_workers, report=report)
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
        raise hub_cache_error(error) or disk_error_kind(error)(
            f"cannot write to {spec.folder}: {error.strerror}; {advice_on(error)}: complete shards are kept"
        ) from None


def _fill(
    spec: ShardSpec, corpus: Corpus, folder: ShardFolder | None, num_workers: int | None, report: Callable[[str], None]
) -> None:
    manifest, tokenizer = None, None
    if folder is not None and (manifest := folder.manifest) is not None:
        corpus, tokenizer = resume_folder(folder, manifest, corpus)
    if isinstance(corpus, HubCorpus) and (shards := find_ready_shards(corpus)):
        download_shards(spec, corpus, shards, manifest, report)
        return
    for line in corpus.notes():
        report(line)
    if manifest is None or tokenizer is None:
        vocab_size = parse_train_spec(spec.tokenizer)
        if vocab_size is None:
            tokenizer = load_tokenizer(spec.tokenizer)
        else:
            tokenizer = train_tokenizer(corpus, vocab_size, val_tokens=spec.val_tokens, report=report)
        manifest = create_folder(spec, corpus, tokenizer)
    _check_disk_space(spec, corpus, manifest)
    resume = manifest.resume or ResumePoint(0, None, 0)
    corpus_progress = CorpusProgress(corpus, manifest)
    writer = ShardWriter(spec.folder, manifest, corpus_progress.at_shard_end)
    encode = EncodePieces(tokenizer.bpe, tokenizer.document_start, manifest.dtype, spec.split_special_tokens)
    special_tokens = re.compile("|".join(map(re.escape, sorted({*tokenizer.special_tokens, END_OF_TEXT}))))
    pieces = joined(corpus.read(resume.place), tokenizer.can_cut)
    # The workers draw batches ahead of the writer; tee keeps those in between.
    ahead, written = itertools.tee(batches(pieces, resume.document, special_tokens))
    encoded = map_in_order(encode, (batch.pieces for batch in ahead), num_workers=num_workers)
    at = resume.tokens
    with ProducerProgress(writer.tokens, report) as progress, contextlib.closing(encoded):
        for batch, (ids, lengths) in zip(written, encoded, strict=True):
            corpus_progress.add(batch, at, lengths)
            repeated = max(0, min(manifest.tokens - at, len(ids)))  # in complete shards already
            if repeated and folder is not None and not np.array_equal(folder.read(at, repeated), ids[:repeated]):
                raise _changed(folder)
            at += len(ids)
            writer.add(ids[repeated:])
            progress.show(writer.manifest, writer.tokens, _fraction_done(writer, corpus, batch))
            if writer.full:
                break
        else:
            if folder is not None and at < manifest.tokens:
                raise _changed(folder)
    for line in summary(writer.finish()):
        report(line)


def _changed(folder: ShardFolder) -> InputError:
    return InputError(
        f"the text of the corpus differs from the shards in {folder.path}; "
        "the corpus has changed: delete the folder and prepare it again"
    )


def _check_disk_space(spec: ShardSpec, corpus: Corpus, manifest: Manifest) -> None:
    """Raise an OSError where the shards certainly do not fit on the disk."""
    bounds = [bound for bound in (corpus.min_tokens(), spec.max_tokens) if bound is not None]
    next_shard = manifest.shard_tokens if manifest.shards else manifest.val_tokens
    tokens = max(0, min(bounds) - manifest.tokens) if bounds else next_shard
    require_space(spec.folder, tokens * np.dtype(manifest.dtype).itemsize)


def _fraction_done(writer: ShardWriter, corpus: Corpus, batch: Batch) -> float | None:
    """Return how much of the folder is done, by its limit of tokens or by the position in the corpus."""
    of_corpus = None if batch.position is None else corpus.fraction_before(batch.position)
    limit = writer.manifest.max_tokens
    if limit is None:
        return of_corpus
    return max(of_corpus or 0.0, writer.tokens / (writer.manifest.val_tokens + limit))
