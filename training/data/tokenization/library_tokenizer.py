"""Tokenizers of other kinds, encoded by the `tokenizers` library: other pre-tokenization, unigram, added words.

The ids are those that `AutoTokenizer` gives for the folder that is saved with the model, by construction: the folder is
saved and loaded again, and its own backend encodes. It is several times slower than tiktoken.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.cli_errors import InputError, one_line
from common.tokenizer_json import unicode_to_bytes
from training.data.sources.pieces import is_between_words
from training.data.tokenization.encoding import LibraryEncoding
from training.data.tokenization.tokenizer import Tokenizer
from training.data.tokenization.tokenizer_files import write_tokenizer_config

_PROBE = (
    "It's the  first line of 12 words — naïve café 数学 🙂\n\n\tand the second one, they'll say: I am 3,5 m "
    "tall. def f(x): return  x\r\n   in the end "
)


class LibraryTokenizer(Tokenizer):
    """A tokenizer that `AutoTokenizer` loads from a folder, and that only the `tokenizers` library encodes.

    Raises:
        InputError: `AutoTokenizer` cannot load the folder without its own code, or no token ends a text.
    """

    def __init__(self, folder: Path) -> None:
        with converted(folder) as saved, _one_line_errors(folder):
            auto = _load(saved)
            self._files = {path.name: path.read_text(encoding="utf-8") for path in sorted(saved.iterdir())}
            self._auto = auto
            backend = auto.backend_tokenizer.to_str()
        if auto.eos_token_id is None:
            raise InputError(f"{folder} names no token for the end of a text; set eos_token in tokenizer_config.json")
        self.ranks = {}
        self.special_tokens = {token: auto.convert_tokens_to_ids(token) for token in auto.all_special_tokens}
        self.vocab_size = max(auto.get_vocab().values()) + 1
        self.end_of_text_id = auto.eos_token_id
        self.pad_token_id = auto.pad_token_id
        self.bos_ids = () if auto.bos_token_id in (None, auto.eos_token_id) else (auto.bos_token_id,)
        data = json.loads(self._files["tokenizer.json"])
        content = {key: value for key, value in data.items() if key not in ("version", "truncation", "padding")}
        content |= {"eos": auto.eos_token_id, "bos": auto.bos_token_id}
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        kind = data["model"].get("type", "BPE").lower()
        self.name = f"{'library-bpe' if kind == 'bpe' else kind}-{self.vocab_size}"
        self.bpe = LibraryEncoding(backend)
        self._byte_level = "ByteLevel" in json.dumps(data.get("decoder"))
        added = data.get("added_tokens", [])
        self._added = {token["id"]: token["content"] for token in added}
        # A token that takes the space after it, or holds one, could cross every cut.
        self._can_be_cut = not any(token["rstrip"] or " " in token["content"] for token in added) and self._probe()

    def can_cut(self, left: str, right: str) -> bool:
        """Return whether two pieces can be encoded apart: between words, where a probe found no difference."""
        return self._can_be_cut and is_between_words(left, right)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        return str(self._auto.decode(list(ids), clean_up_tokenization_spaces=False))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of `ids`: exact for byte-level tokenizers, of the decoded text for others."""
        if not self._byte_level:
            return self.decode(ids).encode()
        return b"".join(self._token_bytes(token) for token in ids)

    def token_byte_lengths(self) -> np.ndarray:
        """Return the number of bytes of each token, (vocab_size,); 0 for special tokens."""
        special = set(self.special_tokens.values())
        known = [token for token in self._auto.get_vocab().values() if token not in special]
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        lengths[known] = [len(self._token_bytes(token)) for token in known]
        return lengths

    def save(self, folder: str | Path, *, model_max_length: int | None = None) -> None:
        """Write the files that `AutoTokenizer` loads: with pad token, chat template and what else the folder had."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self._files.items():
            if name != "tokenizer_config.json":
                (folder / name).write_text(text, encoding="utf-8")
        config = json.loads(self._files["tokenizer_config.json"])
        if config.get("tokenizer_class") == "TokenizersBackend":  # which transformers 4 does not know
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config = {"model_input_names": ["input_ids", "attention_mask"]} | config
        write_tokenizer_config(folder, config, model_max_length)

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        text = str(self._auto.convert_ids_to_tokens(token))
        if self._byte_level:
            return bytes(map(unicode_to_bytes().__getitem__, text))
        if len(text) == 6 and text.startswith("<0x"):  # a byte that has no other token
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    def _probe(self) -> bool:
        text = _PROBE * 2
        whole = self.bpe.encode(text).tolist()
        cuts = [i for i in range(1, len(text) - 2) if is_between_words(text[:i], text[i:])]
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [token for part in parts for token in self.bpe.encode(part).tolist()] == whole


@contextlib.contextmanager
def converted(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder with the tokenizer as transformers saves it: with a `tokenizer.json`."""
    with tempfile.TemporaryDirectory() as name:
        with _one_line_errors(folder):
            _load(folder).save_pretrained(name)
        yield Path(name)


def _load(folder: Path) -> Any:
    """Return the folder's tokenizer as transformers loads it; `vocab.json` and `merges.txt` alone are GPT-2's kind."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    alone = not (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists()
    if alone and not (folder / "config.json").exists():
        return GPT2Tokenizer.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the tokenizers library raises bare ones
        raise InputError(
            f"transformers cannot load the tokenizer in {folder} ({one_line(error, 160)}); give 'gpt2', 'train:4096', "
            "or a folder that AutoTokenizer loads"
        ) from None
