"""The manifest of a shard folder: where the shards came from, and a record of each."""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from common.atomic_files import write_atomically
from common.cli_errors import InputError, one_line
from common.token_files import Split

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


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
        position: where the corpus finds that document; `place` in the file.
    """

    document: int
    position: Any


@dataclass(frozen=True)
class Manifest:
    """Where the shards came from, and a record of each.

    Attributes:
        replaced_documents: how many documents held invalid UTF-8, which U+FFFD replaced.
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
    dtype: str
    shard_tokens: int
    val_tokens: int
    max_tokens: int | None
    complete: bool = False
    replaced_documents: int = 0
    resume: ResumePoint | None = None
    shards: tuple[ShardRecord, ...] = field(default=())
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
        values = asdict(self)
        if self.resume is not None:
            values["resume"] = {"document": self.resume.document, "place": self.resume.position}
        write_atomically(folder / MANIFEST_NAME, json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Return the manifest of `folder`, or None when it has none.

        Raises:
            InputError: it is corrupted, or has another format version.
        """
        path = folder / MANIFEST_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, OSError) as error:
            raise _invalid(path, one_line(error)) from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format_version {version}, this program reads {FORMAT_VERSION}; "
                "use the program that wrote the folder, or prepare it again in another one"
            )
        try:
            return _parse(data)
        except ValueError as error:
            raise _invalid(path, str(error)) from None


def _parse(data: dict[str, Any]) -> Manifest:
    """Return the manifest with the values in `data`, or raise a ValueError that says what is invalid."""
    records, resume = data.get("shards", []), data.get("resume")
    if not isinstance(records, list):
        raise ValueError("shards is not a list")
    shards = tuple(_dataclass_of(ShardRecord, record) for record in records)
    if isinstance(resume, dict):
        resume = {"position" if key == "place" else key: value for key, value in resume.items()}
    resume = None if resume is None else _dataclass_of(ResumePoint, resume)
    manifest: Manifest = _dataclass_of(Manifest, {**data, "shards": shards, "resume": resume})
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype is {manifest.dtype}")
    if not 0 <= manifest.end_of_text_id < manifest.vocab_size:
        raise ValueError(f"end_of_text_id {manifest.end_of_text_id} with vocab_size {manifest.vocab_size}")
    if min(manifest.shard_tokens, manifest.val_tokens) < 1:
        raise ValueError("shard_tokens or val_tokens below 1")
    splits = [shard.split for shard in shards]
    if splits != sorted(splits, reverse=True) or splits[:1] == ["train"]:
        raise ValueError("validation shards must precede training shards")
    if manifest.complete and shards and "train" not in splits:
        raise ValueError("complete, but without a training shard")
    if any(shard.tokens < 1 or shard.documents < 0 for shard in shards):
        raise ValueError("a shard has no tokens, or a negative number of documents")
    if len({shard.file for shard in shards}) < len(shards):
        raise ValueError("two shards have the same file")
    if any(Path(shard.file).name != shard.file or not shard.file.isprintable() for shard in shards):
        raise ValueError("a shard's file is not a file name")
    if manifest.resume is not None and not 0 <= manifest.resume.document < max(1, manifest.documents):
        raise ValueError(f"resume.document {manifest.resume.document} of {manifest.documents} documents")
    return manifest


def _dataclass_of(kind: type[Any], data: Any) -> Any:
    """Return an instance of `kind` with the values in `data`; keys and types must match its fields."""
    required = {item.name for item in fields(kind) if item.default is MISSING}
    hints = get_type_hints(kind)
    if not isinstance(data, dict) or not required <= set(data) <= set(hints):
        raise ValueError(f"the keys are not those of {kind.__name__}")
    for name, value in data.items():
        hint = hints[name]
        allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if not any(_is_a(value, kind) for kind in allowed):
            raise ValueError(f"{name} is {value!r:.40}")
    return kind(**data)


def _is_a(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) is (get_origin(kind) or kind)


def _invalid(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a valid manifest: {reason}; delete the folder and prepare it again")
