"""Documentation strings of the Python packages on this machine: a corpus without a download.

The files of the standard library and of site-packages are parsed with `ast`, 15,000 in about 15 s on two cores.
Documents are sorted by the sha256 of their text, so the validation shard at the beginning is a random sample of all
packages, independent of paths and file order. Exact duplicates are dropped; near duplicates are common in such packages
and stay, in training and in validation.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.worker_processes import map_in_order
from training.data.sources.base import INSTALLED_DOCS, Corpus, Piece, Position

MIN_DOCSTRING_CHARACTERS = 32  # "Return the name." teaches nothing
_FILES_PER_TASK = 64
_STATEMENT_FIELDS = ("body", "handlers", "orelse", "finalbody", "cases")


class InstalledDocs(Corpus):
    """The docstrings of the installed packages, gathered once. A position is the index of a docstring."""

    name = INSTALLED_DOCS

    def __init__(self, *, num_workers: int | None = None) -> None:
        self._num_workers = num_workers

    @functools.cached_property
    def revision(self) -> str:
        """Return a hash of the Python version and the installed packages."""
        return installed_revision(package_roots())

    def fraction_before(self, position: Position) -> float:
        """Return the fraction of the docstrings before a position."""
        return float(position / len(self._docstrings))

    @functools.cached_property
    def _docstrings(self) -> list[str]:
        return gather_docstrings(package_roots(), num_workers=self._num_workers)

    def _read(self, start: Position | None) -> Iterator[Piece]:
        for index in range(start or 0, len(self._docstrings)):
            yield Piece(self._docstrings[index], index)


def package_roots() -> list[Path]:
    """Return the folders of the interpreter's standard library and installed packages."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib")))


def installed_revision(roots: Sequence[Path]) -> str:
    """Return a hash of the Python version and of the names and versions of the distributions in `roots`."""
    distributions = importlib.metadata.distributions(path=[str(root) for root in roots])
    packages = sorted({f"{distribution.name}=={distribution.version}" for distribution in distributions})
    return hashlib.sha256("\n".join([platform.python_version(), *packages]).encode()).hexdigest()


def gather_docstrings(roots: Sequence[Path], *, num_workers: int | None = None) -> list[str]:
    """Return the docstrings of all source files below `roots` that can be parsed, without duplicates, by hash."""
    paths = list(_source_files(roots))
    tasks = [paths[i : i + _FILES_PER_TASK] for i in range(0, len(paths), _FILES_PER_TASK)]
    # Starting a process takes longer than a single task.
    results = map_in_order(_docstrings_of_files, tasks, num_workers=0 if len(tasks) < 2 else num_workers)
    texts = {docstring for docstrings in results for docstring in docstrings}
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())


def docstrings_of_source(source: bytes) -> list[str]:
    """Return the docstrings of a source file in source order; none if it does not parse or has no triple quotes."""
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # MemoryError: nested too deeply for the parser
        return []
    return list(_docstrings(tree))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    remaining: list[ast.AST] = [tree]
    while remaining:
        node = remaining.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (ast.get_docstring(node) or "").strip()
            if len(docstring) >= MIN_DOCSTRING_CHARACTERS:
                yield docstring
        for name in reversed(_STATEMENT_FIELDS):
            children = getattr(node, name, None)
            if isinstance(children, list):  # a lambda's body is an expression
                remaining.extend(reversed(children))


def _docstrings_of_files(paths: Sequence[str]) -> list[str]:
    docstrings: list[str] = []
    for path in paths:
        with contextlib.suppress(OSError):  # a dangling link, or no permission
            docstrings += docstrings_of_source(Path(path).read_bytes())
    return docstrings


def _source_files(roots: Sequence[Path]) -> Iterator[str]:
    for root in roots:
        for folder, subfolders, files in os.walk(root):
            if folder == str(root):
                # Without a virtual environment, site-packages lies inside the standard library's folder.
                subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
            yield from (str(Path(folder, file)) for file in files if file.endswith(".py"))
