"""Documentation strings of the Python packages on this machine: a corpus that needs no download.

Modules, classes and functions of the standard library and of everything in site-packages, read with `ast`: nothing is
imported. It costs some 15 s of two cores for the 15,000 files that come with this project's dependencies.

Documents are ordered by the sha256 of their text. So the beginning of the corpus, which validation takes, is drawn
evenly from all packages, and neither the machine's paths nor the order of its files play a part. Exact duplicates are
dropped; docstrings that differ in a few words are common in such packages and stay, in training and in validation.
"""

import ast
import hashlib
import importlib.metadata
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.data.producing.workers import map_in_order

SHORTEST_DOCSTRING = 32  # characters; "Return the name." teaches nothing
_FILES_PER_TASK = 64

_PARTS_OF_STATEMENTS = ("body", "handlers", "orelse", "finalbody", "cases")


def package_roots() -> list[Path]:
    """Return the folders that hold the running interpreter's standard library and installed packages."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib")))


def installed_revision(roots: Sequence[Path]) -> str:
    """Return a hash of the Python version and of the names and versions of the distributions in `roots`."""
    found = importlib.metadata.distributions(path=[str(root) for root in roots])
    packages = sorted({f"{distribution.name}=={distribution.version}" for distribution in found})
    return hashlib.sha256("\n".join([platform.python_version(), *packages]).encode()).hexdigest()


def gather_docstrings(roots: Sequence[Path], *, num_workers: int | None = None) -> list[str]:
    """Return the docstrings of all source files below `roots`, each text once, in the order of their hashes.

    Files that do not parse, or that hold no triple-quoted string, give none.
    """
    paths = list(_source_files(roots))
    tasks = [paths[i : i + _FILES_PER_TASK] for i in range(0, len(paths), _FILES_PER_TASK)]
    # Fewer processes than tasks: starting one takes longer than a task.
    results = map_in_order(_docstrings_of_files, tasks, num_workers=0 if len(tasks) < 2 else num_workers)
    texts = {docstring for docstrings in results for docstring in docstrings}
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())


def docstrings_of_source(source: bytes) -> list[str]:
    """Return the docstrings in a source file, in source order; none when it does not parse."""
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
            if len(docstring) >= SHORTEST_DOCSTRING:
                yield docstring
        for part in reversed(_PARTS_OF_STATEMENTS):
            children = getattr(node, part, None)
            if isinstance(children, list):  # a lambda's body is an expression
                remaining.extend(reversed(children))


def _docstrings_of_files(paths: Sequence[str]) -> list[str]:
    docstrings: list[str] = []
    for path in paths:
        try:
            source = Path(path).read_bytes()
        except OSError:  # a dangling link, or not ours to read
            continue
        docstrings.extend(docstrings_of_source(source))
    return docstrings


def _source_files(roots: Sequence[Path]) -> Iterator[str]:
    for root in roots:
        for folder, subfolders, files in os.walk(root):
            if folder == str(root):
                # The standard library's folder holds the site-packages of an interpreter without environment.
                subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
            yield from (str(Path(folder, file)) for file in files if file.endswith(".py"))
