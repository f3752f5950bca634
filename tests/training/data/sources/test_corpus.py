import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from support.small_corpora import documents_of

from common.cli_errors import InputError
from training.data.sources.base import corpus_name
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
def test_rows_of_a_file_are_documents_in_order_at_every_read(tmp_path, name):
    corpus = open_corpus(str(_write(tmp_path / name)))
    assert documents_of(corpus) == TEXTS
    assert documents_of(corpus) == TEXTS
    assert corpus.name == "c"


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_empty_documents_and_nulls_are_skipped(tmp_path, name):
    path = _write(tmp_path / name, ["a", "", None, " \n", "b"])
    assert documents_of(open_corpus(str(path))) == ["a", "b"]


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_text_field_may_have_another_name(tmp_path, name):
    path = _write(tmp_path / name, field="content")
    assert documents_of(open_corpus(str(path), text_field="content")) == TEXTS


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_missing_text_field_is_an_error_that_lists_the_fields(tmp_path, name):
    path = _write(tmp_path / name, field="texts")
    with pytest.raises(InputError, match=r"no field 'text' in .*, only id, texts; .*; did you mean texts\?"):
        documents_of(open_corpus(str(path)))


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_text_field_without_text_is_an_error_that_names_the_row(tmp_path, name):
    path = _write(tmp_path / name)
    with pytest.raises(InputError, match=r"field 'id' of .*(line|row) 1 holds int, not text"):
        documents_of(open_corpus(str(path), text_field="id"))


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst", "c.json.gz", "c.parquet"])
def test_file_of_another_format_than_its_ending_is_an_error(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"plain text, and enough of it to hold any header\n" * 10)
    with pytest.raises(InputError, match=r"c\..* is not a complete .* file"):
        documents_of(open_corpus(str(path)))


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst", "c.parquet"])
def test_truncated_file_is_an_error(tmp_path, name):
    path = _write(tmp_path / name, [f"document {i * 7919 % 1000}" for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="is not a complete") as caught:
        documents_of(open_corpus(str(path)))
    assert "\n" not in str(caught.value)


def test_invalid_json_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(_json_lines(["a", "b"]) + b"\n{oops\n")
    with pytest.raises(InputError, match=r"c\.jsonl line 4 is not valid JSON"):
        documents_of(open_corpus(str(path)))


def test_number_of_thousands_of_digits_is_an_error(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a", "id": ' + "1" * 5000 + "}\n")
    with pytest.raises(InputError, match=r"c\.jsonl line 1 is not valid JSON .*4300 digits"):
        documents_of(open_corpus(str(tmp_path / "c.jsonl")))


def test_line_that_is_not_an_object_is_an_error(tmp_path):
    (tmp_path / "c.jsonl").write_text('"just text"\n')
    with pytest.raises(InputError, match=r"line 1 is not a JSON object but str"):
        documents_of(open_corpus(str(tmp_path / "c.jsonl")))


@pytest.mark.parametrize("name", ["c.txt", "c.md", "c.jsonl", "c.jsonl.gz"])
def test_invalid_utf8_is_replaced_and_flagged(tmp_path, name):
    content = b'{"text": "good"}\n{"text": "caf\xe9"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    documents = list(open_corpus(str(tmp_path / name)).read())
    assert "caf\ufffd" in documents[-1].text
    assert [document.replaced for document in documents] == ([0, 1] if "json" in name else [1])


def test_invalid_utf8_in_parquet_is_replaced_and_flagged(tmp_path):
    offsets, data = pyarrow.array([0, 4, 8], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"goodcaf\xe9")
    column = pyarrow.StringArray.from_buffers(2, offsets, data)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "c.parquet")
    documents = list(open_corpus(str(tmp_path / "c.parquet")).read())
    assert [(document.text, document.replaced) for document in documents] == [("good", 0), ("caf\ufffd", 1)]


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "null"])
def test_every_type_of_text_column_in_parquet_is_read(tmp_path, kind):
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
            documents_of(corpus)
    else:
        assert documents_of(corpus) == ["a", "b"]


def test_lone_surrogates_become_replacement_characters(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n')
    assert documents_of(open_corpus(str(tmp_path / "c.jsonl"))) == ["a\ufffdb 🙂"]


def test_folder_is_read_recursively_sorted_by_path(tmp_path):
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
    assert documents_of(corpus) == ["a", "bx", "by1", "by2", "z"]
    assert corpus.name == "my-corpus-v2"


def test_revision_depends_on_the_content_and_not_on_the_folder(tmp_path):
    revisions = []
    for folder, text in (("one", "some text"), ("two", "some text"), ("three", "some test")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.txt").write_text(text)
        revisions.append(open_corpus(str(tmp_path / folder)).revision)
    assert revisions[0] == revisions[1] != revisions[2]


def test_revision_depends_on_a_byte_in_the_middle(tmp_path):
    content = bytearray(b"some text " * 100_000)
    (tmp_path / "c.txt").write_bytes(content)
    before = open_corpus(str(tmp_path / "c.txt")).revision
    content[500_000] ^= 1
    (tmp_path / "c.txt").write_bytes(content)
    assert open_corpus(str(tmp_path / "c.txt")).revision != before


@pytest.mark.parametrize("name", [*ROW_FORMATS, "folder"])
def test_reading_from_a_position_starts_with_its_document(tmp_path, name):
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
        position = json.loads(json.dumps(documents[number].position))
        assert list(corpus.read(position)) == documents[number:]


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_content_before_a_position_is_not_read(tmp_path, name):
    texts = [f"{i} " * 2000 for i in range(100)]
    path = _write(tmp_path / name, texts)
    position = list(open_corpus(str(path)).read())[90].position
    content = bytearray(path.read_bytes())
    content[1000 : len(content) // 2] = bytes(len(content) // 2 - 1000)  # reading it would fail
    path.write_bytes(content)
    assert [document.text for document in open_corpus(str(path)).read(position)] == texts[90:]


def test_path_without_documents_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no files that end in"):
        open_corpus(str(tmp_path))
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(InputError, match="holds no files that end in"):
        open_corpus(str(tmp_path))
    (tmp_path / "data.pdf").write_text("a,b")
    with pytest.raises(InputError, match="does not end in"):
        open_corpus(str(tmp_path / "data.pdf"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="holds no documents"):
        documents_of(open_corpus(str(tmp_path)))


@pytest.mark.parametrize("corpus", ["installed-doc", "no/such/file.txt", "", "a/b..c", "x/"])
def test_unknown_corpus_is_an_error_that_lists_the_known_ones(corpus):
    with pytest.raises(InputError, match="installed-docs, fineweb, fineweb-edu, a path, or a Hub dataset"):
        open_corpus(corpus)


def test_misspelled_corpus_gets_a_suggestion():
    with pytest.raises(InputError, match=r"did you mean fineweb-edu\?"):
        open_corpus("fineweb_edu")


def test_config_without_a_hub_dataset_is_an_error():
    with pytest.raises(InputError, match="omit it"):
        open_corpus("installed-docs", corpus_config="sample-10BT")


@pytest.mark.parametrize(
    ("corpus", "name"), [("fineweb-edu", "fineweb-edu"), ("/gone/my_text.jsonl.gz", "my-text"), ("/gone/a.b", "a-b")]
)
def test_corpus_name_does_not_need_the_corpus(corpus, name):
    assert corpus_name(corpus) == name
