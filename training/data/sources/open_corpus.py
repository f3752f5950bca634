"""Which corpus is meant by what a person writes: a name, a path, or a dataset of the Hub."""

import re
from collections.abc import Callable
from pathlib import Path

from common.cli_errors import InputError
from common.suggestions import did_you_mean
from training.data.sources.base import (
    DEFAULT_HUB_CONFIG,
    FILE_ENDINGS,
    HUB_CORPORA,
    INSTALLED_DOCS,
    Corpus,
    InstalledDocs,
    corpus_name,
)
from training.data.sources.files import FileCorpus
from training.data.sources.hub_corpus import HubCorpus

_HUB_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def open_corpus(
    corpus: str,
    corpus_config: str | None = None,
    *,
    text_field: str = "text",
    num_workers: int | None = None,
    report: Callable[[str], None] = print,
) -> Corpus:
    """Return the corpus that is meant; the Hub is asked nothing yet.

    Args:
        corpus: `installed-docs`, `fineweb`, `fineweb-edu`, the path of a file or folder, or a dataset's `owner/name`.
        corpus_config: which part of a Hub dataset; for FineWeb `sample-10BT` when None.
        text_field: the field or column that holds the text in JSON lines, Parquet and Hub datasets.
        num_workers: processes for gathering installed-docs; all cores when None.
        report: is told, a line a minute, that the Hub cannot be reached.

    Raises:
        InputError: there is no such corpus.
    """
    path = Path(corpus)
    exists = bool(corpus) and path.exists()
    if corpus in HUB_CORPORA or (not exists and is_repository_id(corpus)):
        default = DEFAULT_HUB_CONFIG if corpus in HUB_CORPORA else None
        return HubCorpus(
            HUB_CORPORA.get(corpus, corpus),
            corpus_config or default,
            name=corpus_name(corpus),
            text_field=text_field,
            report=report,
        )
    if corpus_config is not None:
        raise InputError(
            f"expected --corpus_config with a dataset of the Hub only, found '{corpus_config}' with '{corpus}'; "
            "leave it out"
        )
    if corpus == INSTALLED_DOCS:
        return InstalledDocs(num_workers=num_workers)
    if not exists:
        known = [INSTALLED_DOCS, *HUB_CORPORA]
        raise InputError(
            f"expected a corpus, found '{corpus}', which is neither a name nor a file or folder that exists; "
            f"give {', '.join(known)}, a path, or a dataset of the Hub as owner/name{did_you_mean(corpus, known)}"
        )
    return FileCorpus(path, text_field)


def is_repository_id(corpus: str) -> bool:
    """Return whether this reads as owner/name of the Hub rather than as the path of a file."""
    return bool(_HUB_REPOSITORY.fullmatch(corpus)) and not corpus.lower().endswith(FILE_ENDINGS) and corpus[0] != "."
