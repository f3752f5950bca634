"""The manifest of a shard folder: where the shards came from, and which there are."""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from common.atomic_files import write_atomically
from common.cli_errors import InputError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
DTYPES = ("uint16", "uint32")

Split = Literal["val", "train"]


def manifest_path(folder: str | Path) -> Path:
    """Return where the manifest of `folder` stands, or would stand."""
    return Path(folder) / MANIFEST_NAME


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of a shard."""

    file: str
    split: Split
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class ResumePoint:
    """Where reading a corpus can go on to finish its folder.

    Attributes:
        document: number of a document that begins in a whole shard, counted from 0.
        place: where it begins, as the corpus understands it.
    """

    document: int
    place: Any


@dataclass(frozen=True)
class Manifest:
    """Where the shards came from, and which there are.

    Attributes:
        replaced_documents: how many of the documents held bytes that are no UTF-8, which U+FFFD has replaced.
        resume: where the producer goes on; None when it has no better place than the beginning, or is done.
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
        """Put the manifest into `folder`, whole or not at all."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(folder / MANIFEST_NAME, text)

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Return the manifest of `folder`, or None when it has none.

        Raises:
            InputError: it is broken, or of another format version.
        """
        path = folder / MANIFEST_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, OSError) as error:
            raise _broken_manifest(path, f"text that cannot be read ({' '.join(str(error).split())})") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(
                f"expected format_version {FORMAT_VERSION} in {path}, found {version}; "
                "use the program that wrote the folder, or prepare it again in another one"
            )
        try:
            return _manifest_of(data)
        except _UnfitError as error:
            raise _broken_manifest(path, str(error)) from None


class _UnfitError(Exception):
    """What a manifest's content has that no manifest of ours has."""


def _manifest_of(data: dict[str, Any]) -> Manifest:
    """Return the manifest that JSON has given.

    Raises:
        _UnfitError: keys, types or values are not those of a manifest.
    """
    records, resume = data.get("shards", []), data.get("resume")
    if not isinstance(records, list):
        raise _UnfitError("other than a list of shards")
    shards = tuple(_filled_in(ShardRecord, record) for record in records)
    resume = None if resume is None else _filled_in(ResumePoint, resume)
    manifest: Manifest = _filled_in(Manifest, {**data, "shards": shards, "resume": resume})
    splits = [shard.split for shard in shards]
    if manifest.dtype not in DTYPES:
        raise _UnfitError(f"dtype {manifest.dtype}")
    if not 0 <= manifest.end_of_text_id < manifest.vocab_size:
        raise _UnfitError(f"end_of_text_id {manifest.end_of_text_id} of a vocabulary of {manifest.vocab_size}")
    if min(manifest.shard_tokens, manifest.val_tokens) < 1:
        raise _UnfitError("shards without tokens")
    if splits != sorted(splits, reverse=True) or splits[:1] == ["train"]:
        raise _UnfitError("shards in another order than validation, training")
    if manifest.complete and shards and "train" not in splits:
        raise _UnfitError("no training shard, and all are there")
    if any(shard.tokens < 1 or shard.documents < 0 for shard in shards):
        raise _UnfitError("a shard without tokens, or with fewer documents than none")
    if len({shard.file for shard in shards}) < len(shards) or any(
        Path(shard.file).name != shard.file or not shard.file.isprintable() for shard in shards
    ):
        raise _UnfitError("shards that are not each a file of their own in the folder")
    if manifest.resume is not None and not 0 <= manifest.resume.document < max(1, manifest.documents):
        raise _UnfitError(f"document {manifest.resume.document} to go on from, of {manifest.documents}")
    return manifest


def _filled_in(kind: type[Any], data: Any) -> Any:
    """Return a dataclass of the values in `data`, whose names and types must be its own."""
    needed = {item.name for item in fields(kind) if item.default is MISSING}
    hints = get_type_hints(kind)
    if not isinstance(data, dict) or not needed <= set(data) <= set(hints):
        raise _UnfitError("other keys than this format has")
    for name, value in data.items():
        hint = hints[name]
        allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if not any(_is_a(value, kind) for kind in allowed):
            raise _UnfitError(f"{name} {value!r:.40}")
    return kind(**data)


def _is_a(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) is (get_origin(kind) or kind)


def _broken_manifest(path: Path, found: str) -> InputError:
    return InputError(f"expected a manifest in {path}, found {found}; delete the folder and prepare it again")
