"""Text files: pieces with the ids of the complete text, separators, encodings, positions."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_corpora import documents_of

from common.cli_errors import InputError
from training.data.sources import pieces, text_files
from training.data.sources.open_corpus import open_corpus
from training.data.sources.pieces import pieces_of
from training.data.sources.text_files import Separator, read_pieces
from training.data.tokenization.tokenizer import Tokenizer, train_bpe

relaxed = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2028\u202f\u3000\x1c\x1f\u200b\ufeff"
text_like = st.one_of(
    st.text(max_size=80),
    st.text(alphabet=f"{WHITE_SPACE}ab'sé1.,²数𝟙\u0301", max_size=80),
    st.lists(
        st.sampled_from(["the", " the", "it's", "  ", "\n\n", "\r\n", "e\u0301", "12", "数学。", "<|endoftext|>"])
    ).map("".join),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the model's words, it's 12 naïve e\u0301 数学。 \n\n  \u3000 " * 20], 290)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 4)
    monkeypatch.setattr(pieces, "LOOK_AHEAD", 5)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 7)


@relaxed
@given(text=text_like)
def test_pieces_have_the_ids_of_the_complete_text(tokenizer, text):
    found = list(pieces_of(text))
    assert "".join(found) == text
    assert [token for piece in found for token in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_text_without_any_space_is_cut_only_at_the_limit(monkeypatch):
    assert list(pieces_of("x" * 99)) == ["x" * 99]
    monkeypatch.setattr(pieces, "MAX_PIECE_CHARACTERS", 40)
    assert [len(piece) for piece in pieces_of("x" * 99)] == [40, 40, 19]
    assert list(pieces_of("one two three four")) == ["one two", " three", " four"]


def _read(content: bytes, encoding: str, separator: str | None, offset: int = 0, *rest: int):
    stream = io.BytesIO(content)
    stream.seek(offset)
    return list(read_pieces(stream, encoding, Separator(separator), offset, *rest))


def _documents(content: str, separator: str | None, encoding: str = "utf-8") -> list[str]:
    documents: list[str] = []
    for piece in _read(content.encode(encoding), encoding, separator):
        documents += [""] * piece.starts
        documents[-1] += piece.text
    return documents


@relaxed
@given(text=text_like, encoding=st.sampled_from(["utf-8", "utf-16-le", "utf-32-be"]))
def test_text_is_read_in_the_pieces_that_it_has_in_memory(text, encoding):
    assert [piece.text for piece in _read(text.encode(encoding), encoding, None)] == list(pieces_of(text))


@relaxed
@given(
    text=text_like,
    separator=st.sampled_from([None, "<|endoftext|>", "\n", "\n\n", "the"]),
    encoding=st.sampled_from(["utf-8", "utf-16-be"]),
)
def test_reading_from_any_piece_gives_the_pieces_from_there(text, separator, encoding):
    content = text.encode(encoding)
    found = _read(content, encoding, separator)
    for number, piece in enumerate(found):
        rest = _read(content, encoding, separator, *piece.position)
        assert [(each.text, each.starts) for each in rest] == [(each.text, each.starts) for each in found[number:]]


@pytest.mark.parametrize(
    ("text", "separator", "documents"),
    [
        ("one\n<|endoftext|>\ntwo\nlines\n", "<|endoftext|>", ["one", "two\nlines\n"]),
        ("one\r\n<|endoftext|> \r\ntwo\r\n<|endoftext|>", "<|endoftext|>", ["one", "two"]),
        ("<|endoftext|>\none\n<|endoftext|>\n<|endoftext|>\n\ntwo", "<|endoftext|>", ["one", "\ntwo"]),
        ("in <|endoftext|> a line\n<|endoftext|>s\n", "<|endoftext|>", ["in <|endoftext|> a line\n<|endoftext|>s\n"]),
        ("one\n<|endoftext|>\ntwo", None, ["one\n<|endoftext|>\ntwo"]),
        ("one\n\ntwo\nlines\r\n\r\nthree", r"\n\n", ["one", "two\nlines", "three"]),
        ("one\n\n\n\ntwo", "\n\n", ["one", "two"]),
        ("one\ntwo\n", r"\n", ["one", "two"]),
        ("one\n---\ntwo --- three\n---", "---", ["one", "two --- three"]),
        ("a.*\nb\n.*\nc", ".*", ["a.*\nb", "c"]),
    ],
)
def test_separator_divides_a_text_file_into_documents(text, separator, documents):
    assert _documents(text, separator) == documents


@relaxed
@given(parts=st.lists(st.text(alphabet="ab <|\n", max_size=20), max_size=6))
def test_documents_do_not_depend_on_where_pieces_and_blocks_end(parts):
    text = "\n<|endoftext|>\n".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARACTERS", 1000)
        patch.setattr(text_files, "_BLOCK_BYTES", 1000)
        expected = _documents(text, "<|endoftext|>")
    assert _documents(text, "<|endoftext|>") == expected


TEXT = "naïve café — “quoted” words\nand more of them in a second line"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c.csv", "c.json"])
def test_encodings_are_recognized_or_named(tmp_path, encoding, name):
    content = {
        "c.txt": TEXT,
        "c.jsonl": f'{{"text": "{TEXT}"}}\n{{"text": "two"}}\n'.replace("\nand", "\\nand"),
        "c.csv": f'id,text\n1,"{TEXT}"\n2,two\n',
        "c.json": f'[{{"text": "{TEXT}"}}, {{"text": "two"}}]'.replace("\nand", "\\nand"),
    }[name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    corpus = open_corpus(str(tmp_path / name), encoding="cp1252" if encoding == "cp1252" else None)
    assert documents_of(corpus) == [TEXT, "two"][: 1 + (name != "c.txt")]


def test_binary_file_is_refused_and_a_stray_nul_is_text(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes(bytes(range(256)) + bytes(1000))
    with pytest.raises(InputError, match=rf"{path} holds NUL bytes, so it is not text in UTF-8; name its encoding"):
        documents_of(open_corpus(str(path)))
    path.write_bytes(b"some words " * 100 + b"\0" + b" and more")
    assert documents_of(open_corpus(str(path))) == ["some words " * 100 + "\0 and more"]


def test_unknown_encoding_is_an_error(tmp_path, settings):
    from training.data.shards.shard_spec import ShardSpec

    with pytest.raises(InputError, match="unknown encoding 'cp9999'; give one that Python knows, such as cp1252"):
        ShardSpec(folder=tmp_path, **settings, encoding="cp9999")


def test_replaced_characters_are_counted_as_a_decoder_replaces_them(tmp_path):
    content = b"fine words here, then caf\xe9 and \xe2\x82 cut short \xff\xfe\xef\xbf\xbd and " + "é".encode() * 9
    (tmp_path / "c.txt").write_bytes(content)
    corpus = open_corpus(str(tmp_path / "c.txt"))
    assert "".join(documents_of(corpus)) == content.decode("utf-8", "replace")
    assert sum(piece.replaced for piece in corpus.read()) == 4


def test_long_rows_are_read_in_pieces(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "one two three four"}\n{"text": "five"}\n')
    found = [(piece.text, piece.starts, piece.position) for piece in open_corpus(str(tmp_path / "c.jsonl")).read()]
    assert [text for text, *_ in found] == [*pieces_of("one two three four"), "five"]
    assert [starts for _, starts, _ in found] == [True, *[False] * (len(found) - 2), True]
    assert [position is None for *_, position in found] == [False, *[True] * (len(found) - 2), False]
    assert len(found) > 2


def test_trained_vocabulary_is_the_same_from_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.data.tokenization.tokenizer_training import train_tokenizer

    text = Path(np.__file__).read_text()
    (tmp_path / "c.txt").write_text(text)
    found = []
    for size in (4, 1 << 16):
        monkeypatch.setattr(pieces, "PIECE_CHARACTERS", size)
        corpus = open_corpus(str(tmp_path / "c.txt"))
        found.append(train_tokenizer(corpus, 300, val_tokens=500, report=lambda line: None).fingerprint)
    assert found[0] == found[1]
