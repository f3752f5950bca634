"""Tokenizer folders of other makers: shards hold the ids that `AutoTokenizer` of the saved folder gives."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_corpora import make_shards
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from common.cli_errors import InputError
from training.data.producing.batches import joined
from training.data.sources import pieces
from training.data.sources.base import Piece
from training.data.sources.pieces import pieces_of
from training.data.tokenization.encoding import BytePairEncoding, EncodePieces
from training.data.tokenization.library_tokenizer import LibraryTokenizer
from training.data.tokenization.tokenizer import Tokenizer, train_bpe

TEXT = "some words of the model, and it's the second line: 12 tokens, naïve café数学 don't they?\n\n  A new one. " * 40
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
relaxed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
text_like = st.lists(
    st.sampled_from(
        [" the", "words", " of", "a", "\n", "\n\n", "  ", "<nl>", " <nl> ", "</s>", "<|end|>", "é", "12", "!", "it's"]
    )
).map("".join)


def _save(backend: Backend, folder: Path, **special: object) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def _added_words(folder: Path) -> Path:
    train_bpe([TEXT], 300).save(folder)
    auto = AutoTokenizer.from_pretrained(folder)
    auto.add_tokens(["<nl>"])
    auto.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<|user|>"]})
    auto.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    auto.save_pretrained(folder)
    return folder


def _unigram(folder: Path) -> Path:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(backend, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _llama_3(folder: Path) -> Path:
    backend = Backend(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|end|>", "<|pad|>"])
    return _save(backend, folder, eos_token="<|end|>", pad_token="<|pad|>")


def _stripping(folder: Path) -> Path:
    train_bpe([TEXT], 300).save(folder)
    auto = AutoTokenizer.from_pretrained(folder)
    auto.add_tokens([AddedToken("<nl>", rstrip=True, lstrip=True)])
    auto.save_pretrained(folder)
    return folder


KINDS = {"added words": _added_words, "unigram": _unigram, "llama 3": _llama_3, "stripping": _stripping}


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A tokenizer of ours, and what `AutoTokenizer` loads from the folder that it saves."""
    tokenizer = Tokenizer.load(KINDS[request.param](tmp_path_factory.mktemp("source")))
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder, model_max_length=64)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


@relaxed
@given(text=text_like)
def test_ids_are_those_of_auto_tokenizer(saved, text):
    tokenizer, auto = saved
    encoding = pickle.loads(pickle.dumps(tokenizer.bpe))
    for split in (True, False):
        expected = auto(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        assert encoding.encode(text, split_special_tokens=split).tolist() == expected
    assert tokenizer.encode(text) == auto(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@relaxed
@given(text=text_like)
def test_pieces_have_the_ids_of_the_complete_text(saved, text):
    tokenizer, _ = saved
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARACTERS", 4)
        patch.setattr(pieces, "LOOK_AHEAD", 5)
        cut = [Piece(part, starts=number == 0) for number, part in enumerate(pieces_of(text))]
    for split in (True, False):
        encode = EncodePieces(tokenizer.bpe, tokenizer.document_start, "uint16", split)
        parts = [(piece.text, piece.starts) for piece in joined(cut, tokenizer.can_cut)]
        assert "".join(part for part, _ in parts) == text
        assert encode(parts)[0].tolist() == (encode([(text, True)])[0].tolist() if text else [])


def test_long_text_is_cut_between_words_and_not_for_words_that_take_spaces(saved):
    tokenizer, auto = saved
    parts = list(
        joined(map(Piece, ["the model", " of words", "\nand"], [None] * 3, [True, False, False]), tokenizer.can_cut)
    )
    strips = any(token.rstrip for token in auto.added_tokens_decoder.values())
    assert [part.text for part in parts] == (["the model of words\nand"] if strips else ["the model", " of words\nand"])


def test_special_tokens_and_lengths_agree_with_auto_tokenizer(saved):
    tokenizer, auto = saved
    assert isinstance(tokenizer, LibraryTokenizer)
    assert auto.model_max_length == 64
    assert tokenizer.end_of_text_id == auto.eos_token_id
    assert tokenizer.token_ids["pad_token_id"] == auto.pad_token_id
    assert tokenizer.vocab_size == len(auto)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.token_byte_lengths()[tokenizer.end_of_text_id] == 0
    expected = len(TEXT.encode()) + (tokenizer.bos_ids != ())  # the unigram model puts a space first
    if "unigram" not in tokenizer.name:
        assert tokenizer.token_byte_lengths()[ids].sum() == expected
        assert tokenizer.decode_bytes(ids) == TEXT.encode()


def test_saved_tokenizer_loads_unchanged(saved, tmp_path):
    tokenizer, _ = saved
    tokenizer.save(tmp_path / "a")
    again = Tokenizer.load(tmp_path / "a")
    assert (again.fingerprint, again.name) == (tokenizer.fingerprint, tokenizer.name)
    again.save(tmp_path / "b")
    assert {path.name: path.read_text() for path in (tmp_path / "a").iterdir()} == {
        path.name: path.read_text() for path in (tmp_path / "b").iterdir()
    }


def test_chat_template_pad_token_and_added_words_are_kept(tmp_path):
    tokenizer = Tokenizer.load(_added_words(tmp_path / "source"))
    tokenizer.save(tmp_path / "saved")
    auto = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert "<nl>" in auto.tokenize("some <nl> words")
    assert auto.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert (auto.pad_token, auto.eos_token, "<|user|>" in auto.all_special_tokens) == ("<pad>", "<|endoftext|>", True)
    assert tokenizer.token_ids == {"bos_token_id": 299, "eos_token_id": 299, "pad_token_id": auto.pad_token_id}


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_the_ids_of_the_folder_and_resume_with_it(tmp_path, settings, kind):
    source = KINDS[kind](tmp_path / "source")
    (tmp_path / "c.jsonl").write_text((json.dumps({"text": "line <nl> with </s> or <|end|> here\n" * 9}) + "\n") * 40)
    for split in (True, False):
        folder = make_shards(
            tmp_path / str(split),
            **{
                **settings,
                "corpus": str(tmp_path / "c.jsonl"),
                "tokenizer": str(source),
                "split_special_tokens": split,
            },
        )
        auto = AutoTokenizer.from_pretrained(folder.path)
        tokenizer = folder.load_tokenizer(str(source))
        text = "line <nl> with </s> or <|end|> here\n" * 9
        document = [
            *tokenizer.document_start,
            *auto(text, add_special_tokens=False, split_special_tokens=split)["input_ids"],
        ]
        assert np.concatenate([shard.read() for shard in folder.shards]).tolist() == document * 40
        spelled = text.count("</s>") * (kind == "unigram") + text.count("<|end|>") * (kind == "llama 3")
        assert folder.manifest.special_tokens_in_text == spelled * 40
        make_shards(
            folder.path,
            **{
                **settings,
                "corpus": str(tmp_path / "c.jsonl"),
                "tokenizer": str(source),
                "split_special_tokens": split,
            },
        )


def test_gpt2_kind_with_another_end_of_text_and_a_template_is_encoded_by_tiktoken_and_kept(tmp_path):
    ours = train_bpe([TEXT], 300)
    Tokenizer(ours.ranks, {"</s>": 299}, end_of_text="</s>").save(tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = Tokenizer.load(tmp_path / "source")
    assert isinstance(tokenizer.bpe, BytePairEncoding)
    tokenizer.save(tmp_path / "saved")
    auto = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (auto.eos_token, auto.eos_token_id) == ("</s>", tokenizer.end_of_text_id) == ("</s>", 299)
    assert auto.chat_template == "{{ messages[0].content }}"
    assert auto("some words", add_special_tokens=False)["input_ids"] == tokenizer.encode("some words")


def test_vocabulary_and_merges_alone_are_a_tokenizer(tmp_path):
    ours = train_bpe([TEXT], 300)
    ours.save(tmp_path / "saved")
    model = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode(TEXT) == ours.encode(TEXT)
    assert GPT2Tokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] == ours.encode(TEXT)
    assert (tokenizer.end_of_text_id, tokenizer.vocab_size) == (299, 300)
    assert isinstance(tokenizer.bpe, BytePairEncoding)


@pytest.mark.parametrize("split", [True, False])
def test_spelled_end_of_text_is_plain_text_unless_special_tokens_are_not_split(split):
    tokenizer = train_bpe([TEXT], 300)
    ids = tokenizer.bpe.encode("a <|endoftext|>  b", split_special_tokens=split).tolist()
    assert ids.count(tokenizer.end_of_text_id) == (not split)
    if not split:
        assert ids == [*tokenizer.encode("a "), 299, *tokenizer.encode("  b")]


def test_tokenizer_without_an_end_of_text_is_an_error(tmp_path):
    backend = Backend(models.WordLevel({"some": 0, "words": 1}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="names no token for the end of a text; set eos_token"):
        Tokenizer.load(_save(backend, tmp_path))


def test_tokenizer_that_transformers_cannot_load_is_a_one_line_error(tmp_path):
    _unigram(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unknown"}}')
    with pytest.raises(InputError, match="transformers cannot load the tokenizer in") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
