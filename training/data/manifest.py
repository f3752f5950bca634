"""The manifest of a shard folder: where the shards came from, and which there are."""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from evaluation.atomic import write_whole
from gpt2_scratch_errors import InputError

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
        write_whole(folder / MANIFEST_NAME, lambda stream: stream.write(text.encode()))

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
        names = {item.name for item in fields(cls)}
        needed = {item.name for item in fields(cls) if item.default is MISSING}
        record_names = {item.name for item in fields(ShardRecord)}
        records = data.get("shards")
        if (
            not needed <= set(data) <= names
            or not isinstance(records, list)
            or any(not isinstance(record, dict) or set(record) != record_names for record in records)
        ):
            raise _broken_manifest(path, "other keys than this format has")
        if data["dtype"] not in DTYPES:
            raise _broken_manifest(path, f"dtype {data['dtype']}")
        shards = tuple(ShardRecord(**record) for record in records)
        resume = data.get("resume")
        return cls(**{**data, "shards": shards, "resume": resume and ResumePoint(**resume)})


def _broken_manifest(path: Path, found: str) -> InputError:
    return InputError(f"expected a manifest in {path}, found {found}; delete the folder and prepare it again")
