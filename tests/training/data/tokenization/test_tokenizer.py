import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.paths import SHARED_DATA

from common.cli_errors import InputError
from training.data.tokenization.encoding import GPT2_PATTERN, _ids
from training.data.tokenization.tokenizer import Tokenizer, load_tokenizer, parse_train_spec, train_bpe

# What GPT-2's pattern distinguishes: letters, digits, contractions, runs and kinds of white space, repeated characters.
text_like = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="ab '\n\t\r\u00a0\u3000s1t—é🙂", max_size=60),
    st.lists(
        st.sampled_from(["the", " the", "'ll", "  ", "\n\n", "aaaa", "----", "é", "def f(x):", "12", "👩‍👩‍👧"])
    ).map("".join),
)
# Unicode's white space, and the characters that only Python counts as white space.
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000\x1c\x1f\u200b\u180e\ufeff"
relaxed = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def real_text() -> str:
    """Real text that every machine has: the source of two modules."""
    return Path(re.__file__).read_text() + Path(json.__file__).read_text() + "naïve café — 数学 🙂\r\n\t" * 20


@pytest.fixture(scope="module")
def trained(real_text: str) -> Tokenizer:
    return train_bpe([real_text, "aaaaaaa aaaa aaa aa " * 50, "-" * 333], 600)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    cache = SHARED_DATA / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip(f"GPT-2's vocabulary is not at {cache}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return load_tokenizer("gpt2")


@pytest.fixture(scope="module", params=["trained", "gpt2"])
def tokenizer_and_auto(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    tokenizer = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save(folder, model_max_length=1024)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


@relaxed
@given(text=text_like)
def test_tiktoken_and_auto_tokenizer_give_the_same_ids_for_any_text(tokenizer_and_auto, text):
    tokenizer, auto = tokenizer_and_auto
    ids = tokenizer.encode(text)
    assert auto(text, split_special_tokens=True)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


def test_tiktoken_and_auto_tokenizer_give_the_same_ids_for_source_code(tokenizer_and_auto, real_text):
    tokenizer, auto = tokenizer_and_auto
    assert auto.is_fast
    assert auto(real_text)["input_ids"] == tokenizer.encode(real_text)


def test_tiktoken_and_auto_tokenizer_give_the_same_ids_for_english_prose(tokenizer_and_auto):
    path = SHARED_DATA / "fineweb_edu" / "sample_1mb.txt"
    if not path.exists():
        pytest.skip(f"no real text at {path}")
    tokenizer, auto = tokenizer_and_auto
    text = path.read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    assert auto(text)["input_ids"] == ids
    if tokenizer.name == "gpt2":
        assert len(ids) == 217_888


def test_auto_tokenizer_knows_end_of_text_and_model_max_length(tokenizer_and_auto):
    tokenizer, auto = tokenizer_and_auto
    assert auto.eos_token_id == auto.bos_token_id == tokenizer.end_of_text_id == tokenizer.vocab_size - 1
    assert len(auto) == tokenizer.vocab_size
    assert auto.model_max_length == 1024


def test_auto_tokenizer_decodes_ids_from_tiktoken(tokenizer_and_auto, real_text):
    tokenizer, auto = tokenizer_and_auto
    assert auto.decode(tokenizer.encode(real_text)) == real_text


@pytest.fixture(scope="module")
def published(trained: Tokenizer) -> tiktoken.Encoding:
    """The same vocabulary with GPT-2's original pattern."""
    return tiktoken.Encoding(
        "published", pat_str=GPT2_PATTERN, mergeable_ranks=trained.ranks, special_tokens=trained.special_tokens
    )


@relaxed
@given(text=text_like)
def test_faster_pattern_gives_the_same_ids_as_the_published_one(trained, published, text):
    assert published.encode_ordinary(text) == trained.encode(text)


@relaxed
@given(text=st.text(alphabet=f"{WHITE_SPACE}a'sé1.", max_size=30))
def test_faster_pattern_gives_the_same_ids_for_every_white_space(trained, published, text):
    assert published.encode_ordinary(text) == trained.encode(text)


def _ids_unless_refused(encoding: tiktoken.Encoding | None, text: str) -> np.ndarray:
    if encoding is None:
        raise ValueError("Max stack size exceeded for backtracking")
    return _ids(encoding, text)


@relaxed
@given(text=st.text(alphabet=f"{WHITE_SPACE}a'sé1.", max_size=30))
def test_text_cut_before_the_last_space_of_each_run_gets_the_same_ids(trained, published, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained.bpe, "_exact", None)
        patch.setattr("training.data.tokenization.encoding._ids", _ids_unless_refused)
        assert published.encode_ordinary(text) == trained.encode(text)


@pytest.mark.parametrize("space", [" ", "\n", "\n ", "\u3000\t"])
def test_millions_of_spaces_in_a_row_are_encoded(trained, space):
    text = f"before{space * 1_500_000}x after"
    with pytest.raises(ValueError, match="Max stack size exceeded"):
        _ids(trained.bpe._exact, text)
    assert trained.decode(trained.encode(text)) == text


def test_lone_surrogate_is_encoded_as_the_replacement_character(trained):
    assert trained.encode("a\ud800  b") == trained.encode("a\ufffd  b")


def test_saved_tokenizer_loads_unchanged(tokenizer_and_auto, tmp_path):
    tokenizer, _ = tokenizer_and_auto
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.name == tokenizer.name
    assert loaded.encode("It's 12 o'clock — naïve\n") == tokenizer.encode("It's 12 o'clock — naïve\n")


def test_gpt2_has_its_published_ids(gpt2):
    assert gpt2.name == "gpt2"
    assert (gpt2.vocab_size, gpt2.end_of_text_id) == (50_257, 50_256)
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]


def test_saved_merges_of_gpt2_are_the_official_ones(gpt2, tmp_path):
    [official] = [
        file for file in (SHARED_DATA / "tiktoken_cache").iterdir() if file.read_bytes().startswith(b"#version")
    ]
    gpt2.save(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert [" ".join(merge) for merge in merges] == official.read_text(encoding="utf-8").splitlines()[1:]


def test_tiny_shakespeare_has_the_published_number_of_gpt2_tokens(gpt2):
    path = SHARED_DATA / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip(f"no real text at {path}")
    text = path.read_text()
    cut = int(len(text) * 0.9)
    assert [len(gpt2.encode(part)) for part in (text[:cut], text[cut:])] == [301_966, 36_059]


def test_literal_end_of_text_in_a_document_is_plain_text(trained):
    ids = trained.encode("a<|endoftext|>b")
    assert trained.end_of_text_id not in ids
    assert trained.decode(ids) == "a<|endoftext|>b"
    assert trained.decode([trained.end_of_text_id]) == "<|endoftext|>"


def test_trained_vocabulary_is_bytes_then_merges_then_end_of_text(trained):
    assert trained.vocab_size == 600
    assert trained.name == "bpe-600"
    assert trained.end_of_text_id == 599
    assert sorted(trained.decode_bytes([i]) for i in range(256)) == [bytes([i]) for i in range(256)]
    assert all(len(trained.decode_bytes([i])) > 1 for i in range(256, 599))


def test_token_byte_lengths_add_up_to_the_text(trained, real_text):
    lengths = trained.token_byte_lengths()
    assert lengths.shape == (600,)
    assert lengths[trained.end_of_text_id] == 0
    assert lengths[np.array(trained.encode(real_text))].sum() == len(real_text.encode())


def test_training_twice_gives_the_same_tokenizer(real_text):
    assert train_bpe([real_text], 400).fingerprint == train_bpe([real_text], 400).fingerprint
    assert train_bpe([real_text], 400).fingerprint != train_bpe([real_text], 401).fingerprint


def test_smallest_vocabulary_holds_the_bytes_and_end_of_text():
    tokenizer = train_bpe(["some text"], 257)
    assert len(tokenizer.encode("ab")) == 2


def test_vocabulary_without_room_for_the_bytes_is_an_error():
    with pytest.raises(InputError, match=r"at least 257 tokens.*found 256"):
        parse_train_spec("train:256")


@pytest.mark.parametrize("size", ["1000001", "9" * 30, "9" * 5000])
def test_vocabulary_that_no_memory_holds_is_an_error(size):
    with pytest.raises(InputError, match=r"at most 1,000,000, found [19]\d{6,39}; 4096"):
        parse_train_spec(f"train:{size}")


def test_corpus_too_small_for_the_vocabulary_is_an_error_with_the_possible_size():
    with pytest.raises(InputError, match=r"4,096 tokens: it gives 259\b"):
        train_bpe(["abc abc"], 4096)
    train_bpe(["abc abc"], 259)


@pytest.mark.parametrize(("spec", "size"), [("train:4096", 4096), ("gpt2", None), ("some/folder", None)])
def test_train_spec_gives_its_vocabulary_size(spec, size):
    assert parse_train_spec(spec) == size


@pytest.mark.parametrize("spec", ["train:", "train:many", "train:-5", "train:100", "train", "train:²"])
def test_invalid_train_spec_is_an_error(spec):
    with pytest.raises(InputError, match=r"train:4096|at least 257"):
        parse_train_spec(spec)


def test_train_spec_cannot_be_loaded():
    with pytest.raises(InputError, match="only preparing a corpus trains one"):
        load_tokenizer("train:4096")


def test_gpt2_without_network_or_cache_is_a_one_line_error(tmp_path, monkeypatch):
    def no_network(*_: object) -> bytes:
        raise ConnectionError("no route to host")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(InputError, match="TIKTOKEN_CACHE_DIR") as caught:
        load_tokenizer("gpt2")
    assert "\n" not in str(caught.value)


def _edited(trained: Tokenizer, folder: Path, edit) -> Path:
    trained.save(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda data: data.pop("model"), "no BPE model"),
        (lambda data: data.update(added_tokens=[]), "no <|endoftext|>"),
        (lambda data: data.update(normalizer={"type": "Lowercase"}), "changes the text"),
        (lambda data: data["pre_tokenizer"].update(add_prefix_space=True), "changes the text"),
        (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenization"),
        (lambda data: data["model"]["vocab"].update({"zzzz": 9999}), "gaps"),
        (lambda data: data["model"]["merges"].reverse(), "order of its merges"),
        (lambda data: data["model"]["vocab"].update({"\n": 600}), "represents no byte"),
    ],
)
def test_tokenizer_of_another_kind_is_an_error(trained, tmp_path, edit, found):
    with pytest.raises(InputError, match=re.escape(found)):
        Tokenizer.load(_edited(trained, tmp_path, edit))


def test_merges_saved_as_strings_load(trained, tmp_path):
    def old_style(data) -> None:
        data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]

    assert Tokenizer.load(_edited(trained, tmp_path, old_style)).fingerprint == trained.fingerprint


def test_missing_and_corrupted_tokenizer_files_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*tokenizer\.json"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not JSON"):
        load_tokenizer(str(tmp_path))


def test_pieces_are_encoded_as_the_tokenizer_encodes_the_documents():
    from training.data.tokenization.encoding import EncodePieces

    tokenizer = train_bpe(["some words, some more words"] * 9, 264)
    documents = [["some words"], ["<|endoftext|> is text here"], ["naïve", " 数学 🙂"], ["x" * 5000], [" "]]
    expected = [token for text in documents for token in (tokenizer.end_of_text_id, *tokenizer.encode("".join(text)))]
    pieces = [(piece, number == 0) for parts in documents for number, piece in enumerate(parts)]
    ids, lengths = EncodePieces(tokenizer.bpe, tokenizer.document_start, "uint16")(pieces)
    assert ids.dtype == np.uint16
    assert ids.tolist() == expected
    assert lengths.tolist() == [len(tokenizer.encode(text)) + starts for text, starts in pieces]
