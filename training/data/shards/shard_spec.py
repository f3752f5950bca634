"""Shard folder spec: what a shard folder should hold, and how an existing one differs."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.cli_errors import InputError, TemporaryError
from common.folder_lock import LOCK_NAME
from training.data.shards.manifest import MANIFEST_NAME, Manifest
from training.data.shards.shard_reader import ShardFolder
from training.data.sources.base import DEFAULT_HUB_CONFIG, HUB_CORPORA, INSTALLED_DOCS, Corpus, corpus_name
from training.data.sources.open_corpus import check_outside_corpus, open_corpus
from training.data.sources.text_files import END_OF_TEXT, check_encoding
from training.data.tokenization.tokenizer import load_tokenizer, parse_train_spec

# Fields of the spec that a manifest has unchanged.
RECORDED = (
    *("corpus_config", "text_field", "document_separator", "encoding", "split_special_tokens"),
    *("shard_tokens", "val_tokens"),
)
MAX_SHARD_TOKENS = 1 << 32  # a shard is assembled in memory


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """What a shard folder should hold; the fields are the flags of `python -m training.prepare`.

    Raises:
        InputError: a size is out of range, or the vocabulary size of `train:` is not a number that BPE can reach.
    """

    folder: Path
    corpus: str
    corpus_config: str | None = None
    text_field: str = "text"
    document_separator: str | None = END_OF_TEXT
    encoding: str | None = None
    split_special_tokens: bool = True
    tokenizer: str = "gpt2"
    shard_tokens: int
    val_tokens: int
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.corpus in HUB_CORPORA and self.corpus_config is None:
            object.__setattr__(self, "corpus_config", DEFAULT_HUB_CONFIG)
        parse_train_spec(self.tokenizer)
        check_encoding(self.encoding)
        for name, smallest in (("shard_tokens", 2), ("val_tokens", 1), ("max_tokens", 2)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"{name} must be at least {smallest}, found {value}")
            if name != "max_tokens" and value > MAX_SHARD_TOKENS:
                raise InputError(f"{name} must be at most {MAX_SHARD_TOKENS:,}, found {value:,}")

    def open_corpus(self, *, num_workers: int | None = None, report: Callable[[str], None] = print) -> Corpus:
        """Return the corpus; see `open_corpus`."""
        return open_corpus(
            self.corpus,
            self.corpus_config,
            text_field=self.text_field,
            document_separator=self.document_separator,
            encoding=self.encoding,
            num_workers=num_workers,
            report=report,
        )

    def to_json(self) -> str:
        """Return the spec as JSON text; `from_json` reads it."""
        return json.dumps({**asdict(self), "folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> "ShardSpec":
        """Return the spec that `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "folder": Path(fields["folder"])})

    @property
    def recorded(self) -> dict[str, Any]:
        """Return the fields that a manifest has unchanged, by name."""
        return {name: getattr(self, name) for name in RECORDED}

    def _has_tokenizer(self, manifest: Manifest, report: Callable[[str], None]) -> bool:
        """Return whether the tokenizer made the manifest's shards; complete ones can be used where the Hub is down."""
        if (vocab_size := parse_train_spec(self.tokenizer)) is not None:
            return manifest.tokenizer == f"bpe-{vocab_size}"
        if self.tokenizer == "gpt2":
            return manifest.tokenizer == "gpt2"
        try:
            return manifest.tokenizer_fingerprint == load_tokenizer(self.tokenizer).fingerprint
        except TemporaryError as error:
            if not manifest.complete:
                raise
            report(f"{self.folder} was not compared with its tokenizer: {error}")
            return True

    def _differences(self, manifest: Manifest, report: Callable[[str], None]) -> list[str]:
        """Return how the manifest's folder differs from the spec, one phrase per difference."""
        wanted = {"corpus": corpus_name(self.corpus), **self.recorded}
        found = [
            f"{name} {getattr(manifest, name)} instead of {value}"
            for name, value in wanted.items()
            if getattr(manifest, name) != value
        ]
        if not self._has_tokenizer(manifest, report):
            found.append(f"tokenizer {manifest.tokenizer} instead of {self.tokenizer}")
        # A complete folder with a higher limit, or none, holds everything the spec requires.
        limit = manifest.max_tokens
        enough = limit is None or (self.max_tokens is not None and self.max_tokens <= limit)
        if limit != self.max_tokens and not (manifest.complete and enough):
            found.append(f"max_tokens {limit} instead of {self.max_tokens}")
        return found

    def open_folder(self) -> ShardFolder | None:
        """Return the shard folder, checked by `check`; None where it holds nothing yet."""
        folder = ShardFolder.find(self.folder)
        self.check(folder)
        return folder

    def check(self, folder: ShardFolder | None, report: Callable[[str], None] = print) -> None:
        """Raise an `InputError` if `folder`, from `ShardFolder.find`, is a file, or holds other files or shards.

        So does a folder inside the corpus.
        """
        check_outside_corpus(self.folder, self.corpus, "the shard folder")
        if folder is None:
            if self.folder.is_file():
                raise InputError(f"{self.folder} is a file, not a folder; choose another folder")
            names = {path.name for path in self.folder.glob("*")}
            if names and not names & {LOCK_NAME, MANIFEST_NAME}:  # otherwise a producer is at work
                raise InputError(f"{self.folder} holds other files than shards; choose another folder")
            return
        if folder.manifest is None:
            raise InputError(
                f"{folder.path} holds shards without a manifest, made by another program; "
                "train on them as they are, or choose another folder"
            )
        if differences := self._differences(folder.manifest, report):
            raise InputError(
                f"{folder.path} holds other shards than requested: {', '.join(differences)}; "
                "request the same, choose another folder, or delete this one"
            )

    def check_content(self, folder: ShardFolder, report: Callable[[str], None]) -> None:
        """Compare the content of the corpus with what a complete folder was made of; report where that is impossible.

        Local files cost a hash of at most 256 MiB, a Hub dataset one request: each of its commits is accepted. Shards
        of `installed-docs` outlive the packages that they were made of: a run can be resumed after an upgrade.

        Raises:
            InputError: the corpus has other content: a folder is keyed by content, not by a name.
        """
        assert folder.manifest is not None  # a folder of ours
        made_of = folder.manifest.corpus_revision
        try:
            corpus = self.open_corpus(report=report)
            if corpus.holds(made_of):
                return
            found = corpus.revision
        except InputError as error:
            report(f"{folder.path} was not compared with its corpus: {error}")
            return
        difference = (
            f"{folder.path} was made of other content: revision {made_of[:12]} of '{folder.manifest.corpus}', "
            f"but '{self.corpus}' is now at {found[:12]}"
        )
        if corpus.name != INSTALLED_DOCS:
            raise InputError(
                f"{difference}; use another folder (--data_dir in training, --output in training.prepare), "
                "or delete this one to prepare it again"
            )
        report(f"{difference}; its shards are used as they are, delete the folder to prepare it again")
