"""Open the corpus that `--corpus` names: installed-docs, FineWeb, a path, or a Hub dataset."""

import re
from collections.abc import Callable
from pathlib import Path

from common.cli_errors import InputError, did_you_mean
from training.data.sources.base import (
    DEFAULT_HUB_CONFIG,
    HUB_CORPORA,
    INSTALLED_DOCS,
    Corpus,
    corpus_name,
)
from training.data.sources.files import FileCorpus
from training.data.sources.formats import FILE_ENDINGS
from training.data.sources.hub_corpus import HubCorpus
from training.data.sources.installed_docs import InstalledDocs
from training.data.sources.text_files import END_OF_TEXT

_REPOSITORY_ID = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)


def open_corpus(
    corpus: str,
    corpus_config: str | None = None,
    *,
    text_field: str = "text",
    document_separator: str | None = END_OF_TEXT,
    encoding: str | None = None,
    num_workers: int | None = None,
    report: Callable[[str], None] = print,
) -> Corpus:
    """Return the corpus called `installed-docs`, `fineweb`, `fineweb-edu`, a path, or a Hub dataset (owner/name).

    Nothing is requested from the Hub yet. The first five arguments are the recipe's keys.

    Args:
        num_workers: processes that gather installed-docs; None uses all cores.
        report: receives a line per minute while the Hub is unreachable.

    Raises:
        InputError: there is no such corpus.
    """
    path = Path(corpus)
    exists = bool(corpus) and path.exists()
    if corpus in HUB_CORPORA or (not exists and is_repository_id(corpus)):
        config = corpus_config or (DEFAULT_HUB_CONFIG if corpus in HUB_CORPORA else None)
        repository = HUB_CORPORA.get(corpus, corpus)
        return HubCorpus(repository, config, name=corpus_name(corpus), text_field=text_field, report=report)
    if corpus_config is not None:
        raise InputError(f"--corpus_config {corpus_config} needs a Hub dataset, and '{corpus}' is not one; omit it")
    if corpus == INSTALLED_DOCS:
        return InstalledDocs(num_workers=num_workers)
    if not exists:
        known = [INSTALLED_DOCS, *HUB_CORPORA]
        raise InputError(
            f"unknown corpus '{corpus}': neither a name nor an existing file or folder; "
            f"give {', '.join(known)}, a path, or a Hub dataset as owner/name{did_you_mean(corpus, known)}"
        )
    return FileCorpus(path, text_field, separator=document_separator, encoding=encoding)


def check_outside_corpus(folder: Path, corpus: str, name: str) -> None:
    """Raise an `InputError` if `folder`, called `name`, is inside a corpus that is a folder."""
    path = Path(corpus).resolve()
    if corpus not in ("", INSTALLED_DOCS, *HUB_CORPORA) and path.is_dir() and folder.resolve().is_relative_to(path):
        raise InputError(
            f"{name} {folder.resolve()} is inside corpus {corpus}, which would change while it is read; "
            "choose separate folders"
        )


def is_repository_id(corpus: str) -> bool:
    """Return whether `corpus` reads as owner/name on the Hub rather than as a file path."""
    return bool(_REPOSITORY_ID.fullmatch(corpus)) and not corpus.lower().endswith(FILE_ENDINGS)
