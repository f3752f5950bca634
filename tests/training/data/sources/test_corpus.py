import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from common.cli_errors import InputError
from training.data.sources.base import corpus_name
from training.data.sources.installed_docs import docstrings_of_source, gather_docstrings, installed_revision
from training.data.sources.open_corpus import open_corpus

TEXTS = ["first document", "zweites\nDokument", "三"]


def _json_lines(texts, field="text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def _write(path: Path, texts=TEXTS, field="text") -> Path:
    name = path.name
    if name.endswith(".parquet"):
        table = pyarrow.table({"id": list(range(len(texts))), field: texts})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        content = _json_lines(texts, field)
        if name.endswith(".gz"):
            content = gzip.compress(content)
        elif name.endswith(".zst"):
            content = zstandard.compress(content)
        path.write_bytes(content)
    return path


ROW_FORMATS = ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.json.gz", "c.parquet"]


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_rows_of_a_file_are_documents_in_order_as_often_as_asked(tmp_path, name):
    corpus = open_corpus(str(_write(tmp_path / name)))
    assert list(corpus.documents()) == TEXTS
    assert list(corpus.documents()) == TEXTS
    assert corpus.name == "c"


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_empty_documents_and_nulls_are_skipped(tmp_path, name):
    path = _write(tmp_path / name, ["a", "", None, " \n", "b"])
    assert list(open_corpus(str(path)).documents()) == ["a", "b"]


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_text_field_may_have_another_name(tmp_path, name):
    path = _write(tmp_path / name, field="content")
    assert list(open_corpus(str(path), text_field="content").documents()) == TEXTS


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_missing_text_field_is_refused_with_the_fields_there_are(tmp_path, name):
    path = _write(tmp_path / name, field="texts")
    with pytest.raises(InputError, match=r"no field 'text' in .*, only id, texts; .*; did you mean texts\?"):
        list(open_corpus(str(path)).documents())


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_text_field_that_holds_no_text_is_refused_with_its_place(tmp_path, name):
    path = _write(tmp_path / name)
    with pytest.raises(InputError, match=r"field 'id' of .*(line|row) 1 holds int, not text"):
        list(open_corpus(str(path), text_field="id").documents())


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst", "c.json.gz", "c.parquet"])
def test_file_that_is_not_what_its_ending_says_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"plain text, and enough of it to hold any header\n" * 10)
    with pytest.raises(InputError, match=r"c\..* is not a complete .* file"):
        list(open_corpus(str(path)).documents())


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst", "c.parquet"])
def test_file_that_was_cut_off_is_refused(tmp_path, name):
    path = _write(tmp_path / name, [f"document {i * 7919 % 1000}" for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="is not a complete") as caught:
        list(open_corpus(str(path)).documents())
    assert "\n" not in str(caught.value)


def test_line_that_is_not_json_is_refused_with_its_number(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(_json_lines(["a", "b"]) + b"\n{oops\n")
    with pytest.raises(InputError, match=r"c\.jsonl line 4 is not valid JSON"):
        list(open_corpus(str(path)).documents())


def test_line_with_a_number_that_python_does_not_read_is_refused(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a", "id": ' + "1" * 5000 + "}\n")
    with pytest.raises(InputError, match=r"c\.jsonl line 1 is not valid JSON .*4300 digits"):
        list(open_corpus(str(tmp_path / "c.jsonl")).documents())


def test_line_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "c.jsonl").write_text('"just text"\n')
    with pytest.raises(InputError, match=r"line 1 is not a JSON object but str"):
        list(open_corpus(str(tmp_path / "c.jsonl")).documents())


@pytest.mark.parametrize("name", ["c.txt", "c.md", "c.jsonl", "c.jsonl.gz"])
def test_invalid_utf8_is_replaced_and_told(tmp_path, name):
    content = b'{"text": "good"}\n{"text": "caf\xe9"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    documents = list(open_corpus(str(tmp_path / name)).read())
    assert "caf\ufffd" in documents[-1].text
    assert [document.replaced for document in documents] == ([False, True] if "json" in name else [True])


def test_invalid_utf8_in_parquet_is_replaced_and_told(tmp_path):
    offsets, data = pyarrow.array([0, 4, 8], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"goodcaf\xe9")
    column = pyarrow.StringArray.from_buffers(2, offsets, data)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "c.parquet")
    documents = list(open_corpus(str(tmp_path / "c.parquet")).read())
    assert [(document.text, document.replaced) for document in documents] == [("good", False), ("caf\ufffd", True)]


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "null"])
def test_text_columns_of_parquet_come_in_several_types(tmp_path, kind):
    texts = pyarrow.array(["a", None, "b"])
    column = {
        "large_string": lambda: texts.cast(pyarrow.large_string()),
        "dictionary": texts.dictionary_encode,
        "null": lambda: pyarrow.nulls(3),
    }[kind]()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "c.parquet")
    corpus = open_corpus(str(tmp_path / "c.parquet"))
    if kind == "null":
        with pytest.raises(InputError, match="corpus 'c' holds no documents"):
            list(corpus.documents())
    else:
        assert list(corpus.documents()) == ["a", "b"]


def test_lone_surrogates_become_replacement_characters(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n')
    assert list(open_corpus(str(tmp_path / "c.jsonl")).documents()) == ["a\ufffdb 🙂"]


def test_folder_is_read_recursively_in_the_order_of_paths(tmp_path):
    root = tmp_path / "my_corpus.v2"
    (root / "b").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "z.txt").write_text("z")
    (root / "a.md").write_text("\ufeffa")
    (root / "b" / "x.txt").write_text("bx")
    (root / "ignored.csv").write_text("no")
    (root / ".hidden" / "h.txt").write_text("no")
    _write(root / "b" / "y.jsonl", ["by1", "by2"])
    corpus = open_corpus(str(root))
    assert list(corpus.documents()) == ["a", "bx", "by1", "by2", "z"]
    assert corpus.name == "my-corpus-v2"


def test_revision_follows_the_content_and_not_the_place(tmp_path):
    revisions = []
    for folder, text in (("one", "some text"), ("two", "some text"), ("three", "some test")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.txt").write_text(text)
        revisions.append(open_corpus(str(tmp_path / folder)).revision)
    assert revisions[0] == revisions[1] != revisions[2]


def test_revision_follows_a_byte_in_the_middle(tmp_path):
    content = bytearray(b"some text " * 100_000)
    (tmp_path / "c.txt").write_bytes(content)
    before = open_corpus(str(tmp_path / "c.txt")).revision
    content[500_000] ^= 1
    (tmp_path / "c.txt").write_bytes(content)
    assert open_corpus(str(tmp_path / "c.txt")).revision != before


@pytest.mark.parametrize("name", [*ROW_FORMATS, "folder"])
def test_reading_from_the_place_of_a_document_begins_with_it(tmp_path, name):
    texts = [f"document {i}\nnaïve {i * 7}" for i in range(23)]
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        for i, text in enumerate(texts):
            if i % 3:
                (path / f"{i:02d}.txt").write_text(text)
            else:
                _write(path / f"{i:02d}.jsonl", [None, text])
    else:
        _write(path, texts)
    corpus = open_corpus(str(path))
    documents = list(corpus.read())
    assert [document.text for document in documents] == texts
    shares = [corpus.fraction_before(document.position) for document in documents]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] < 1
    for number in range(23):
        place = json.loads(json.dumps(documents[number].position))
        assert list(corpus.read(place)) == documents[number:]


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_what_lies_before_a_place_is_not_read_again(tmp_path, name):
    texts = [f"{i} " * 2000 for i in range(100)]
    path = _write(tmp_path / name, texts)
    place = list(open_corpus(str(path)).read())[90].position
    content = bytearray(path.read_bytes())
    content[1000 : len(content) // 2] = bytes(len(content) // 2 - 1000)  # unreadable, for who would try
    path.write_bytes(content)
    assert [document.text for document in open_corpus(str(path)).read(place)] == texts[90:]


def test_folder_without_documents_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no files that end in"):
        open_corpus(str(tmp_path))
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(InputError, match="holds no files that end in"):
        open_corpus(str(tmp_path))
    with pytest.raises(InputError, match="does not end in"):
        open_corpus(str(tmp_path / "data.csv"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="holds no documents"):
        list(open_corpus(str(tmp_path)).documents())


@pytest.mark.parametrize("corpus", ["installed-doc", "no/such/file.txt", ""])
def test_unknown_corpus_is_refused_with_those_there_are(corpus):
    with pytest.raises(InputError, match="installed-docs, fineweb, fineweb-edu, a path, or a Hub dataset"):
        open_corpus(corpus)


def test_unknown_corpus_is_told_the_nearest():
    with pytest.raises(InputError, match=r"did you mean fineweb-edu\?"):
        open_corpus("fineweb_edu")


def test_config_without_a_hub_dataset_is_refused():
    with pytest.raises(InputError, match="omit it"):
        open_corpus("installed-docs", corpus_config="sample-10BT")


@pytest.mark.parametrize(
    ("corpus", "name"), [("fineweb-edu", "fineweb-edu"), ("/gone/my_text.jsonl.gz", "my-text"), ("/gone/a.b", "a-b")]
)
def test_name_of_a_corpus_needs_no_corpus(corpus, name):
    assert corpus_name(corpus) == name


# Installed documentation


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
def test_source_that_does_not_parse_gives_nothing(source):
    assert docstrings_of_source(source) == []


def test_invalid_escapes_in_other_peoples_code_are_no_warnings():
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


def test_any_part_of_the_corpus_is_drawn_from_all_packages(roots):
    docstrings = gather_docstrings(roots, num_workers=0)
    for start in range(0, 450, 90):
        # A third is from site-packages: 30 of 90, give or take a few standard deviations of 4.
        assert 15 < sum(f"{LONG} s" in docstring for docstring in docstrings[start : start + 90]) < 45


def test_docstrings_do_not_depend_on_processes_or_place(roots, tmp_path):
    docstrings = gather_docstrings(roots, num_workers=0)
    assert gather_docstrings(roots, num_workers=2) == docstrings
    moved = (tmp_path / "lib").rename(tmp_path / "elsewhere")
    assert gather_docstrings([moved, moved / "site-packages"], num_workers=0) == docstrings


def test_revision_of_installed_docs_follows_the_packages(tmp_path):
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
    assert list(corpus.documents()) == list(corpus.documents()) == ["a document"]
    assert calls == [1]
