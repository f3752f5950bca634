"""The manifest of a shard folder: where the shards came from, and a record of each."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from common.atomic_files import write_atomically
from common.cli_errors import InputError, one_line, os_error_message
from common.json_files import instance_of, read_json_object
from common.token_files import Split
from training.data.sources.text_files import END_OF_TEXT

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

# Keys that earlier versions did not have: a manifest without news is the one that they wrote.
_OMITTED_AT_DEFAULT = (
    *("document_separator", "encoding", "split_special_tokens"),
    *("replaced_characters", "first_replaced", "special_tokens_in_text"),
)


@dataclass(frozen=True)
class ShardRecord:
    """A complete shard; `documents` counts those that begin in it."""

    file: str
    split: Split
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class ResumePoint:
    """Where the producer resumes reading the corpus.

    Attributes:
        document: index of a document that begins in a complete shard.
        place: the position where the corpus finds a piece of that document; the key of the file format.
        tokens: how many tokens precede it.
    """

    document: int
    place: Any
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """Where the shards came from, and a record of each.

    Attributes:
        document_separator: what separates documents in text files.
        encoding: of text without a byte-order mark; None for UTF-8.
        split_special_tokens: whether special tokens that the text spells are encoded as plain text.
        replaced_documents: how many documents held invalid bytes, which U+FFFD replaced.
        replaced_characters: how many U+FFFD that are.
        first_replaced: where the first of them is.
        special_tokens_in_text: how often the text itself spells a special token.
        resume: where the producer resumes; None for the beginning of the corpus, or when complete.
    """

    corpus: str
    corpus_config: str | None
    corpus_revision: str
    text_field: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_text_id: int
    dtype: Literal["uint16", "uint32"]
    shard_tokens: int
    val_tokens: int
    max_tokens: int | None
    complete: bool = False
    document_separator: str | None = END_OF_TEXT
    encoding: str | None = None
    split_special_tokens: bool = True
    replaced_documents: int = 0
    replaced_characters: int = 0
    first_replaced: str | None = None
    special_tokens_in_text: int = 0
    resume: ResumePoint | None = None
    shards: tuple[ShardRecord, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def tokens(self) -> int:
        """Return the tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Return the documents that begin in any shard."""
        return sum(shard.documents for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder` atomically."""
        values = {
            field.name: value
            for field, value in zip(fields(self), asdict(self).values(), strict=True)
            if field.name not in _OMITTED_AT_DEFAULT or value != field.default
        }
        if (resume := values["resume"]) is not None:
            values["resume"] = {**resume, "sha256": _checksum(resume)}
        write_atomically(folder / MANIFEST_NAME, json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Return the manifest of `folder`, or None when it has none.

        Raises:
            InputError: it is corrupted, or has another format version.
        """
        path = folder / MANIFEST_NAME
        try:
            data = read_json_object(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise _invalid(path, one_line(error)) from None
        except OSError as error:  # such as its permissions, which are no reason to delete it
            raise InputError(os_error_message(error) or f"cannot read {path} ({error})") from None
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format_version {version!r:.40}, this program reads {FORMAT_VERSION}; "
                "use the program that wrote the folder, or prepare it again in another one"
            )
        try:
            return _parse(data)
        except ValueError as error:
            raise _invalid(path, one_line(error)) from None


def _parse(data: dict[str, Any]) -> Manifest:
    """Return the manifest with the values in `data`, or raise a ValueError that says what is invalid."""
    records, resume = data.get("shards", []), data.get("resume")
    if not isinstance(records, list):
        raise ValueError("shards is not a list")
    shards = tuple(instance_of(ShardRecord, record) for record in records)
    if isinstance(resume, dict):
        checksum = resume.pop("sha256", None)
        if checksum is not None and checksum != _checksum(resume):
            raise ValueError("resume has another sha256")
        resume = resume if checksum else None  # an earlier version: the producer reads the corpus from its beginning
    resume = None if resume is None else instance_of(ResumePoint, resume)
    manifest = instance_of(Manifest, {**data, "shards": shards, "resume": resume})
    splits, names = [shard.split for shard in shards], {shard.file for shard in shards}
    counts = [min(shard.tokens - 1, shard.documents) for shard in shards]
    out_of_range = not 0 <= manifest.end_of_text_id < manifest.vocab_size
    problems = {
        f"end_of_text_id {manifest.end_of_text_id} with vocab_size {manifest.vocab_size}": out_of_range,
        "shard_tokens or val_tokens below 1": min(manifest.shard_tokens, manifest.val_tokens) < 1,
        "validation shards must precede training shards": splits != sorted(splits, reverse=True)
        or splits[:1] == ["train"],
        "complete, but without a training shard": manifest.complete and splits and "train" not in splits,
        "a shard has no tokens, or a negative number of documents": min(counts, default=0) < 0,
        "two shards have the same file": len(names) < len(shards),
        "a shard's file is not a file name": any(Path(name).name != name or not name.isprintable() for name in names),
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(problem)
    return manifest


def _checksum(resume: dict[str, Any]) -> str:
    """Return a hash: nothing else would show that a position is wrong."""
    return hashlib.sha256(json.dumps(resume, sort_keys=True).encode()).hexdigest()


def _invalid(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a valid manifest: {reason}; delete the folder and prepare it again")
