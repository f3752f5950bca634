from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode as reference

from common.tokenizer_json import bytes_to_unicode, unicode_to_bytes


def test_characters_are_those_of_transformers_and_tokenizers() -> None:
    assert bytes_to_unicode() == reference()
    assert set(unicode_to_bytes()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_every_byte_returns_from_its_character() -> None:
    assert [unicode_to_bytes()[bytes_to_unicode()[byte]] for byte in range(256)] == list(range(256))
