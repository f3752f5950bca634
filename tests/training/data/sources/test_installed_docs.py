"""Documentation strings of installed packages as a corpus."""

from pathlib import Path

import pytest
from support.small_corpora import documents_of

from training.data.sources.installed_docs import docstrings_of_source, gather_docstrings, installed_revision
from training.data.sources.open_corpus import open_corpus


def _package(root: Path, name: str, source: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(source)


LONG = "A sentence that is long enough to teach something, number"


def test_docstrings_come_in_source_order_without_the_short_ones():
    source = f'''"""{LONG} 1."""
class A:
    """{LONG} 2.

    Source:
        indented
    """
    def short(self):
        """Too short."""
    async def b(self):
        """{LONG} 3."""
        def inner():
            """{LONG} 4."""
if True:
    try:
        def c(): "{LONG} 5."
    except ImportError:
        def d(): "{LONG} 6."
x = """Not a docstring, however long the text may be that it holds."""
'''
    assert docstrings_of_source(source.encode()) == [
        f"{LONG} 1.",
        f"{LONG} 2.\n\nSource:\n    indented",
        *(f"{LONG} {i}." for i in range(3, 7)),
    ]


@pytest.mark.parametrize(
    "source",
    [b'"""broken" (', b'"""null \x00 bytes"""', b'"""latin \xe9 without a cookie, in a text that is long enough"""'],
)
def test_source_that_does_not_parse_has_no_docstrings(source):
    assert docstrings_of_source(source) == []


def test_invalid_escapes_in_other_code_cause_no_warnings():
    assert len(docstrings_of_source(rb'"""An old docstring with a regular expression \d in it."""')) == 1


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    stdlib, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for i in range(150):
        _package(stdlib, f"module{i}.py", f'"""{LONG} {i}."""\ndef f():\n    """{LONG} f{i}."""\n')
        _package(site, f"pkg{i % 7}/m{i}.py", f'"""{LONG} s{i}."""\n')
    _package(site, "copy.py", f'"""{LONG} 0."""\n')
    _package(site, "broken.py", '"""broken')
    return [stdlib, site]


def test_each_docstring_appears_once(roots):
    docstrings = gather_docstrings(roots, num_workers=0)
    assert len(docstrings) == len(set(docstrings)) == 450


def test_every_part_of_the_corpus_samples_all_packages(roots):
    docstrings = gather_docstrings(roots, num_workers=0)
    for start in range(0, 450, 90):
        # A third is from site-packages: 30 of 90, give or take a few standard deviations of 4.
        assert 15 < sum(f"{LONG} s" in docstring for docstring in docstrings[start : start + 90]) < 45


def test_docstrings_do_not_depend_on_processes_or_location(roots, tmp_path):
    docstrings = gather_docstrings(roots, num_workers=0)
    assert gather_docstrings(roots, num_workers=2) == docstrings
    moved = (tmp_path / "lib").rename(tmp_path / "elsewhere")
    assert gather_docstrings([moved, moved / "site-packages"], num_workers=0) == docstrings


def test_revision_of_installed_docs_depends_on_the_packages(tmp_path):
    (tmp_path / "a-1.0.dist-info").mkdir()
    metadata = tmp_path / "a-1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: a\nVersion: 1.0\n")
    before = installed_revision([tmp_path])
    assert installed_revision([tmp_path]) == before
    metadata.write_text("Metadata-Version: 2.1\nName: a\nVersion: 1.1\n")
    assert installed_revision([tmp_path]) != before


def test_installed_docs_are_gathered_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "training.data.sources.installed_docs.gather_docstrings", lambda *_, **__: calls.append(1) or ["a document"]
    )
    corpus = open_corpus("installed-docs")
    assert documents_of(corpus) == documents_of(corpus) == ["a document"]
    assert calls == [1]
