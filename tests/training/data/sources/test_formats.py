"""Every kind of file that people bring: CSV, JSON, Arrow, compressed, in folders with other files."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from support.small_corpora import documents_of, make_shards

from common.cli_errors import InputError
from training.data.sources.json_items import json_items
from training.data.sources.open_corpus import open_corpus

TEXTS = ["first, with a comma", 'zweites "Dokument"\nin two lines', "三"] * 3
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def _content(name: str, tmp_path: Path) -> bytes:
    rows = [{"id": i, "text": text, "tags": ["a"], "data": {"text": f"nested {i}"}} for i, text in enumerate(TEXTS)]
    path = tmp_path / "content"
    if name.startswith("c.jsonl"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name.startswith("c.json"):
        return json.dumps({"version": 1, "tags": ["x", "y"], "data": rows, "end": {"a": []}}, indent=1).encode()
    if name.startswith(("c.csv", "c.tsv")):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if "tsv" in name else ",")
            writer.writerows([["id", "text"], *enumerate(TEXTS)])
        return path.read_bytes()
    table = pyarrow.Table.from_pylist(rows)
    if name == "c.parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        new = pyarrow.ipc.new_file if name == "file.arrow" else pyarrow.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path.read_bytes()


NAMES = [
    *(f"c.{kind}{ending}" for kind in ("csv", "tsv", "json", "jsonl") for ending in COMPRESSIONS),
    *("stream.arrow", "file.arrow", "c.parquet"),
]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_documents_and_reading_resumes_at_each(tmp_path, name):
    compress = COMPRESSIONS.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(_content(name, tmp_path)))
    corpus = open_corpus(str(tmp_path / name))
    read = list(corpus.read())
    assert [piece.text for piece in read] == TEXTS
    for number, piece in enumerate(read):
        assert [each.text for each in corpus.read(piece.position)] == TEXTS[number:]
        assert name in corpus.describe(piece.position)


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compressed_text_is_read_from_its_positions(tmp_path, ending, monkeypatch):
    monkeypatch.setattr("training.data.sources.pieces.PIECE_CHARACTERS", 1000)
    monkeypatch.setattr("training.data.sources.text_files._BLOCK_BYTES", 3000)
    text = "".join(f"naïve word {i} of many\n" for i in range(2000))
    path = tmp_path / f"c.txt{ending}"
    path.write_bytes(COMPRESSIONS[ending](text.encode()))
    corpus = open_corpus(str(path))
    read = list(corpus.read())
    assert "".join(piece.text for piece in read) == text
    assert len(read) > 30
    for number in (0, 1, 7, 20, len(read) - 1):
        rest = list(corpus.read(read[number].position))
        assert [(piece.text, piece.starts) for piece in rest] == [(piece.text, piece.starts) for piece in read[number:]]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("kind", ["txt", "csv", "json"])
def test_truncated_compressed_file_is_an_error(tmp_path, ending, kind):
    rows = "".join(f"{i * 7919 % 1000},{i * 104729 % 99991}\n" for i in range(20_000))
    content = {"txt": rows, "csv": "id,text\n" + rows, "json": json.dumps([{"text": rows}] * 3)}[kind]
    path = tmp_path / f"c.{kind}{ending}"
    path.write_bytes(COMPRESSIONS[ending](content.encode())[:-30])
    with pytest.raises(InputError, match=r"is not a complete (gzip|zstd|bz2|xz) file") as caught:
        documents_of(open_corpus(str(path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c.parquet", "stream.arrow"])
def test_nested_field_is_named_with_a_dot(tmp_path, name):
    (tmp_path / name).write_bytes(_content(name, tmp_path))
    assert documents_of(open_corpus(str(tmp_path / name), text_field="data.text")) == [f"nested {i}" for i in range(9)]
    for field, message in (
        ("data.body", r"no field 'data.body' in .*, only id, text, tags, data"),
        ("id.text", "no field 'id.text'"),
        ("tags", r"field 'tags' of .* 1 holds list, not text; .* or join the items of the lists first"),
        ("data", r"field 'data' of .* 1 holds dict, not text"),
    ):
        with pytest.raises(InputError, match=message):
            documents_of(open_corpus(str(tmp_path / name), text_field=field))


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        (' [ {"text": "a"} ] ', ["a"]),
        ('{"text": "a"}', ["a"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ('{"n": 12, "x": [1, 2], "rows": [{"text": "a"}], "y": [{"other": 1}]}', ["a"]),
        ('{\n "rows": [\n  {"text": "a"}\n ]\n}', ["a"]),
    ],
)
def test_json_is_an_array_or_an_object_with_one_or_lines(tmp_path, content, documents):
    (tmp_path / "c.json").write_text(content)
    assert documents_of(open_corpus(str(tmp_path / "c.json"))) == documents


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text":', "is not valid JSON"),
        ('[{"text": "a"} {"text": "b"}]', "expected ,, found {"),
        ('[{"text": "a"}', "expected ,, found its end"),
        ('{"a": 1, "b": {}}', "holds no rows: expected an array of objects"),
        ("", "expected {, found its end"),
        ('["a", "b"]', 'row 1 is not a JSON object but str; write rows as {"text": …}'),
        ("just text", "expected {, found j"),
    ],
)
def test_json_without_rows_is_an_error(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        documents_of(open_corpus(str(tmp_path / "c.json")))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_json_rows_do_not_depend_on_the_blocks_that_are_read(monkeypatch, size):
    monkeypatch.setattr("training.data.sources.json_items._BLOCK_CHARACTERS", size)
    rows = [{"text": 'a "quoted" [word]', "n": 12.5e3, "x": [None, {"y": []}]}, {"text": "é\n", "n": 1}]
    for content in (json.dumps(rows), json.dumps({"n": 123, "rows": rows, "z": [1]}, indent=2)):
        assert list(json_items(io.StringIO(content), Path("c.json"))) == rows


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_csv_has_the_delimiter_that_gives_the_text_field(tmp_path, mark):
    (tmp_path / "c.csv").write_text(f'id{mark}text\n1,5{mark}"a, b; c"\n'.replace("1,5", '"1,5"'))
    assert documents_of(open_corpus(str(tmp_path / "c.csv"))) == ["a, b; c"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (gzip.compress(b"text", mtime=0), "compressed with gzip"),
        (b"PK\3\4x", "a zip archive"),
        (b"%PDF-1.7 x", "a PDF"),
    ],
)
def test_another_kind_of_file_is_not_read_as_text(tmp_path, content, kind):
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"c.txt is {kind}.*, not text; rename it to its real ending, or remove it"):
        documents_of(open_corpus(str(tmp_path / "c.txt")))


def test_csv_that_is_not_a_table_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "c.csv"
    for content, message in (
        ("id,text\n1,a\n2,b,c\n", "c.csv line 3 has 3 fields, its header 2; quote the fields"),
        ('id,text\n1,"a\n', "c.csv line 2 is not valid CSV"),
        ("id,body\n1,a\n", r"no field 'text' in .*c.csv, only id, body"),
        (f'"{"word " * 900}"\n', r"only (word ){40}…; name the field"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            documents_of(open_corpus(str(path)))


def test_folder_of_mixed_kinds_is_read_and_other_files_are_listed(tmp_path, settings):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.txt", "README.md", "sub/paper.pdf", "sub/image.png", "sub/README.txt"):
        (folder / name).write_text(f"content of {name}")
    (folder / "b.csv").write_text("id,text\n1,from a table\n")
    (folder / "settings.json").write_text('[{"learning_rate": 1}]')
    (folder / "dataset_info.json").write_text('[{"text": "not a document"}]')
    (folder / "sub" / "c.jsonl.xz").write_bytes(lzma.compress(b'{"text": "from lines"}\n'))
    assert documents_of(open_corpus(str(folder))) == ["content of a.txt", "from a table", "from lines"]
    lines: list[str] = []
    make_shards(tmp_path / "out", **{**settings, "corpus": str(folder), "val_tokens": 3, "report": lines.append})
    assert lines[0] == (
        f"6 files of {folder} are not read: README.md, dataset_info.json, settings.json, sub/README.txt, "
        "sub/image.png and 1 more"
    )


ARCHIVES = ["c.tar", "c.tar.gz", "c.tgz", "c.tar.bz2", "c.tar.xz", "c.zip"]


def _archive(path: Path, files: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    compression = {"c.tar": "", "c.tgz": "gz"}.get(path.name, path.suffix[1:])
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("in_folder", [False, True])
def test_files_in_an_archive_are_read_and_reading_resumes_at_each_document(tmp_path, name, in_folder):
    files = {
        "texts/one.txt": b"one\n<|endoftext|>\ntwo",
        "texts/.hidden.txt": b"hidden",
        "README.md": b"about",
        "image.png": b"x",
        "rows.jsonl.gz": gzip.compress(b'{"text": "three"}\n{"text": "four"}\n'),
        "table.parquet": _content("c.parquet", tmp_path),
        "more.csv": b"id,text\n1,five\n",
    }
    folder = tmp_path / "corpus"
    folder.mkdir()
    _archive(folder / name, files)
    corpus = open_corpus(str(folder if in_folder else folder / name))
    read = list(corpus.read())
    expected = ["one", "two", "three", "four", *TEXTS, "five"]
    assert [piece.text for piece in read] == expected
    for number, piece in enumerate(read):
        assert 0 <= corpus.fraction_before(piece.position) <= 1
        assert [each.text for each in corpus.read(piece.position)] == expected[number:]
    assert corpus.notes() == [f"2 files of {folder} are not read: {name}/README.md, {name}/image.png"]
    assert corpus.name == ("corpus" if in_folder else "c")


@pytest.mark.parametrize("name", ARCHIVES)
def test_truncated_archive_is_an_error(tmp_path, name):
    content = b"".join(b"%d words\n" % (i * 7919 % 100_003) for i in range(40_000))
    _archive(tmp_path / name, {"a.txt": content, "b.txt": content})
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a complete") as caught:
        documents_of(open_corpus(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_readme_is_a_document_among_others_of_its_kind(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "guide.md").write_text("a guide")
    assert documents_of(open_corpus(str(tmp_path))) == ["about", "a guide"]
