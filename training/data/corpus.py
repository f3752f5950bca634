"""A corpus: named documents in a fixed order, read again from the start whenever somebody asks.

Three kinds: documentation strings of the installed packages (no download), files and folders, and FineWeb from the Hub.
Files and the Hub are streamed: memory holds a row group or a line, except that a text file is one document.
"""

import difflib
import functools
import hashlib
import io
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt2_scratch_errors import InputError
from training.data.installed_docs import gather_docstrings, installed_revision, package_roots

INSTALLED_DOCS = "installed-docs"
HUB_CORPORA = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
DEFAULT_HUB_CONFIG = "sample-10BT"

_TEXT_ENDINGS = (".txt", ".md")
_JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
_PARQUET_ENDING = ".parquet"
FILE_ENDINGS = (*_TEXT_ENDINGS, *_JSONL_ENDINGS, _PARQUET_ENDING)

_ROWS_PER_BATCH = 1000
_FINGERPRINTED_BYTES = 65_536


class Corpus(ABC):
    """Documents in a fixed order.

    Attributes:
        name: safe in file names; the shards' prefix.
        revision: changes when the content does.
    """

    name: str

    @functools.cached_property
    def revision(self) -> str:
        """Return what identifies the content."""
        return self._revision()

    def documents(self) -> Iterator[str]:
        """Yield the documents that are not empty, from the first, each valid Unicode.

        Raises:
            InputError: the source is broken, or holds no document.
        """
        empty = True
        for text in self._texts():
            if text and not text.isspace():
                empty = False
                yield _without_lone_surrogates(text)
        if empty:
            raise InputError(f"expected documents in the corpus '{self.name}', found none; give another --corpus")

    @abstractmethod
    def _revision(self) -> str: ...

    @abstractmethod
    def _texts(self) -> Iterable[str]: ...


def open_corpus(
    corpus: str, corpus_config: str | None = None, *, text_field: str = "text", num_workers: int | None = None
) -> Corpus:
    """Return the corpus that is meant.

    Args:
        corpus: `installed-docs`, `fineweb`, `fineweb-edu`, or the path of a file or folder.
        corpus_config: which part of a Hub dataset; `sample-10BT` when None.
        text_field: the field or column that holds the text in JSON lines and Parquet.
        num_workers: processes for gathering installed-docs; all cores when None.

    Raises:
        InputError: there is no such corpus.
    """
    if corpus in HUB_CORPORA:
        return HubCorpus(corpus, HUB_CORPORA[corpus], corpus_config or DEFAULT_HUB_CONFIG, text_field)
    if corpus_config is not None:
        raise InputError(
            f"expected --corpus_config with {' or '.join(HUB_CORPORA)} only, "
            f"found '{corpus_config}' with '{corpus}'; leave it out"
        )
    if corpus == INSTALLED_DOCS:
        return InstalledDocs(num_workers=num_workers)
    path = Path(corpus)
    if not corpus or not path.exists():
        known = [INSTALLED_DOCS, *HUB_CORPORA]
        nearest = difflib.get_close_matches(corpus, known, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise InputError(
            f"expected a corpus, found '{corpus}', which is neither a name nor a file or folder that exists; "
            f"{hint}give {', '.join(known)}, or a path"
        )
    return FileCorpus(path, text_field)


def corpus_name(corpus: str) -> str:
    """Return the name that a corpus has in shards and manifest, whether or not it can be read here."""
    if corpus in (INSTALLED_DOCS, *HUB_CORPORA):
        return corpus
    name = Path(corpus).resolve().name
    endings = [ending for ending in FILE_ENDINGS if name.lower().endswith(ending)]
    stem = name.removesuffix(name[-len(max(endings, key=len)) :]) if endings else name
    # An underscore would blur NAME_val_000000.npy.
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-") or "corpus"


class InstalledDocs(Corpus):
    """Documentation strings of the standard library and of the installed packages, gathered once."""

    name = INSTALLED_DOCS

    def __init__(self, *, num_workers: int | None = None) -> None:
        self._num_workers = num_workers

    def _revision(self) -> str:
        return installed_revision(package_roots())

    @functools.cached_property
    def _docstrings(self) -> list[str]:
        return gather_docstrings(package_roots(), num_workers=self._num_workers)

    def _texts(self) -> list[str]:
        return self._docstrings


class FileCorpus(Corpus):
    """A file, or the files below a folder in the order of their relative paths; hidden ones are left out.

    A .txt or .md file is one document; JSON lines and Parquet hold one a row.
    """

    def __init__(self, path: Path, text_field: str = "text") -> None:
        path = path.resolve()
        self._text_field = text_field
        if path.is_dir():
            visible = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path))]
            self._files = sorted(
                (file for file in visible if file.is_file() and file.name.lower().endswith(FILE_ENDINGS)),
                key=lambda file: file.relative_to(path).parts,
            )
            self._root = path
            if not self._files:
                raise InputError(f"expected files that end in {', '.join(FILE_ENDINGS)} in {path}, found none")
        else:
            if not path.name.lower().endswith(FILE_ENDINGS):
                raise InputError(f"expected a file that ends in {', '.join(FILE_ENDINGS)}, found {path}; rename it")
            self._files = [path]
            self._root = path.parent
        self.name = corpus_name(str(path))

    def _revision(self) -> str:
        """Return a hash of names, sizes, and the first and last 64 KiB of each file."""
        digest = hashlib.sha256()
        for file in self._files:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(self._root).as_posix()}\0{size}\0".encode())
            with _opened(file) as stream:
                digest.update(stream.read(_FINGERPRINTED_BYTES))
                stream.seek(max(0, size - _FINGERPRINTED_BYTES))
                digest.update(stream.read(_FINGERPRINTED_BYTES))
        return digest.hexdigest()

    def _texts(self) -> Iterator[str]:
        for file in self._files:
            ending = file.name.lower()
            if ending.endswith(_TEXT_ENDINGS):
                yield _read_text(file)
            elif ending.endswith(_JSONL_ENDINGS):
                yield from _read_json_lines(file, self._text_field)
            else:
                yield from _read_parquet(file, self._text_field)


class HubCorpus(Corpus):
    """A dataset on the Hub, streamed at one commit. Nothing is asked of the Hub before it is needed."""

    def __init__(self, name: str, repository: str, config: str, text_field: str = "text") -> None:
        self.name = name
        self._repository = repository
        self._config = config
        self._text_field = text_field

    def _revision(self) -> str:
        """Return the commit that `main` stands for."""
        import huggingface_hub

        try:
            card = huggingface_hub.hf_hub_download(self._repository, "README.md", repo_type="dataset")
        except _network_errors() as error:
            raise self._unreachable(error) from None
        return Path(card).parent.name  # …/snapshots/<commit>/README.md

    def _texts(self) -> Iterator[str]:
        import datasets

        try:
            rows = iter(
                datasets.load_dataset(
                    self._repository, name=self._config, split="train", streaming=True, revision=self.revision
                )
            )
        except ValueError as error:  # what `datasets` raises for an unknown config, with the list of those that exist
            raise InputError(
                f"expected a config of {self._repository}, found '{self._config}': {_one_line(error)}"
            ) from None
        except _network_errors() as error:
            raise self._unreachable(error) from None
        number = 0
        while True:
            try:
                row = next(rows, None)
            except _network_errors() as error:
                raise self._unreachable(error) from None
            if row is None:
                return
            number += 1
            yield _text_of(row, self._text_field, f"{self._repository} row {number:,}")

    def _unreachable(self, error: BaseException) -> InputError:
        return InputError(
            f"expected to stream {self._repository} ({self._config}) from the Hub, found that it cannot be reached "
            f"({type(error).__name__}: {_one_line(error)}); run the same command again when it can: finished shards "
            f"are kept; --corpus {INSTALLED_DOCS} or a path needs no network"
        )


def _network_errors() -> tuple[type[BaseException], ...]:
    """Return what the Hub's client raises when there is no connection, whichever HTTP library it has loaded."""
    from huggingface_hub.errors import HfHubHTTPError

    transports = [sys.modules[name].TransportError for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, HfHubHTTPError, *transports)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _without_lone_surrogates(text: str) -> str:
    """Return `text` with pairs of surrogates joined and lone ones as U+FFFD: JSON and Python escapes can write them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _opened(file: Path) -> io.BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise InputError(f"expected to read {file}, found: {error.strerror}") from None


def _read_text(file: Path) -> str:
    with _opened(file) as stream:
        content = stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _not_utf8(file, line) from None


def _not_utf8(file: Path, line: int) -> InputError:
    return InputError(f"expected UTF-8 text in {file}, found other bytes in line {line:,}; convert the file to UTF-8")


def _lines(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file that may be compressed."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower())
    if compression is None:
        with _opened(file) as stream:
            yield from stream
        return
    import pyarrow

    with _opened(file) as stream:
        try:
            # pyarrow notices a cut-off file in either format; `zstandard` takes it for the end.
            yield from io.BufferedReader(pyarrow.CompressedInputStream(stream, compression))
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(
                f"expected a whole {compression} file, found {file} broken ({_one_line(error)}); fetch it again"
            ) from None


def _read_json_lines(file: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise _not_utf8(file, number) from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(
                f"expected a JSON object in {file} line {number:,}, found text that is not JSON ({error})"
            ) from None
        yield _text_of(row, text_field, f"{file} line {number:,}")


def _read_parquet(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    with _opened(file) as stream:
        try:
            parquet = pyarrow.parquet.ParquetFile(stream)
            schema = parquet.schema_arrow
            if text_field not in schema.names:
                raise _no_field(text_field, schema.names, str(file))
            number = 0
            for batch in parquet.iter_batches(batch_size=_ROWS_PER_BATCH, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield _text_of({text_field: text}, text_field, f"{file} row {number:,}")
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(
                f"expected a whole Parquet file, found {file} broken ({_one_line(error)}); fetch it again"
            ) from None


def _text_of(row: Any, text_field: str, place: str) -> str:
    """Return the text of a row; a null stands for an empty document."""
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object in {place}, found {type(row).__name__}")
    if text_field not in row:
        raise _no_field(text_field, list(row), place)
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"expected text in the field '{text_field}' of {place}, found {type(text).__name__}; "
            "name another --text_field"
        )
    return text


def _no_field(text_field: str, fields: list[str], place: str) -> InputError:
    nearest = difflib.get_close_matches(text_field, fields, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    there = ", ".join(fields) or "no field at all"
    return InputError(
        f"expected the field '{text_field}' in {place}, found {there}; {hint}name the field with --text_field"
    )
