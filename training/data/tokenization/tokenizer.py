"""Text to token ids and back: GPT-2's byte-level BPE, or one of the same kind trained on the corpus.

`tiktoken` encodes, because it is several times faster; `tokenizer.json` is what the ecosystem loads. Both give the same
ids. tiktoken merges the adjacent pair whose union has the lowest rank; `tokenizers` follows a list of merges. For a
vocabulary from BPE training they agree if the list holds, for each token, the one split into which tokens of lower rank
merge its bytes: the merges inside a token do not depend on what surrounds it, so no other split ever occurs.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from common.cli_errors import InputError, TemporaryError, one_line
from common.json_files import read_json_object
from common.tokenizer_json import bytes_to_unicode, unicode_to_bytes
from training.data.sources.text_files import END_OF_TEXT
from training.data.tokenization.encoding import GPT2_PATTERN, BytePairEncoding, Encoding
from training.data.tokenization.tokenizer_files import (
    NOT_KEPT,
    TOKENIZER_FILES,
    needs_library,
    read_tokenizer_config,
    write_tokenizer_config,
)

_GPT2_FINGERPRINT = "51d32a77888dd9f57aec65782b437014a7f0bc1afbc94624d0fe3e27b5002601"

_MIN_VOCAB_SIZE, _MAX_VOCAB_SIZE = 257, 1_000_000  # bytes and end of text; more than memory holds aborts the process


class Tokenizer:
    """A byte-level BPE with GPT-2's pre-tokenization.

    `ranks` maps token bytes to ids, where a lower id merges first, and `special_tokens` text, with `end_of_text`.
    `config` holds further settings of `tokenizer_config.json`, and `files` what else is saved, by name.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        *,
        end_of_text: str = END_OF_TEXT,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.ranks = dict(ranks)
        self.special_tokens = dict(special_tokens)
        self.vocab_size: int = len(self.ranks) + len(self.special_tokens)
        self.end_of_text_id: int = self.special_tokens[end_of_text]
        self.bos_ids: tuple[int, ...] = ()  # ids that every text starts with; GPT-2 has none
        self._end_of_text, self._config, self._files = end_of_text, dict(config or {}), dict(files or {})
        self.pad_token_id: int | None = self.special_tokens.get(self._config.get("pad_token", ""))
        self.fingerprint: str = _fingerprint(self.ranks, self.special_tokens)
        self.name: str = "gpt2" if self.fingerprint == _GPT2_FINGERPRINT else f"bpe-{self.vocab_size}"
        self.bpe: Encoding = BytePairEncoding(self.ranks, self.special_tokens)

    @property
    def document_start(self) -> tuple[int, ...]:
        """Return the ids that every document begins with."""
        return (self.end_of_text_id, *self.bos_ids)

    @property
    def token_ids(self) -> dict[str, int | None]:
        """Return the ids that a model's config has of the tokenizer, by their keys there."""
        bos = self.bos_ids[0] if self.bos_ids else self.end_of_text_id
        return {"bos_token_id": bos, "eos_token_id": self.end_of_text_id, "pad_token_id": self.pad_token_id}

    def can_cut(self, left: str, right: str) -> bool:
        """Return whether the ids of two pieces of a document, one after the other, are those of their text."""
        return True  # see `pieces`

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text; a literal `<|endoftext|>` in it does not become the special token."""
        return self.bpe.encode(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, with U+FFFD for invalid UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of `ids`."""
        assert isinstance(self.bpe, BytePairEncoding)  # see `LibraryTokenizer.decode_bytes`
        return self.bpe.decode_bytes(ids)

    def token_byte_lengths(self) -> np.ndarray:
        """Return the number of bytes of each token, (vocab_size,); 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        lengths[list(self.ranks.values())] = list(map(len, self.ranks))
        return lengths

    def save(self, folder: str | Path, *, model_max_length: int | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer.from_pretrained(folder)` loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The library's own `save` raises a bare Exception when the disk is full.
        backend = _backend(self.ranks, self.special_tokens).to_str(pretty=True)
        (folder / "tokenizer.json").write_text(backend, encoding="utf-8")
        for name, text in self._files.items():
            (folder / name).write_text(text, encoding="utf-8")
        config: dict[str, Any] = {
            "bos_token": self._end_of_text,
            "eos_token": self._end_of_text,
            "unk_token": self._end_of_text,
            **self._config,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            # Without these two, transformers 4 also returns token_type_ids, which GPT-2 adds as embeddings.
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "GPT2Tokenizer",
        }
        write_tokenizer_config(folder, config, model_max_length)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Return the tokenizer of a folder: GPT-2's byte-level BPE, or another one that `AutoTokenizer` loads.

        Raises:
            InputError: the folder has no tokenizer, or one whose files contradict each other.
        """
        from training.data.tokenization.library_tokenizer import LibraryTokenizer, converted

        path = Path(folder) / "tokenizer.json"
        if not path.exists() and any((Path(folder) / name).exists() for name in ("vocab.json", "tokenizer.model")):
            with converted(Path(folder)) as name:
                return cls.load(name)
        try:
            data = read_json_object(path)
        except OSError as error:
            raise InputError(
                f"cannot read {path} ({error.strerror}); give 'gpt2', 'train:4096', a folder, or owner/name on the Hub"
            ) from None
        except ValueError as error:
            raise _unsupported(path, f"it is not JSON ({one_line(error, 120)})") from None
        config = read_tokenizer_config(Path(folder))
        end_of_text = config.get("eos_token") or END_OF_TEXT
        is_gpt2 = config.get("tokenizer_class") in (None, "GPT2Tokenizer", "GPT2TokenizerFast")
        try:
            ranks, special_tokens = _parse(data, path, end_of_text)
            if not needs_library(data, config, end_of_text):
                template = Path(folder) / "chat_template.jinja"
                files = {template.name: template.read_text(encoding="utf-8")} if template.exists() else {}
                kept = {key: value for key, value in config.items() if key not in NOT_KEPT}
                return cls(ranks, special_tokens, end_of_text=end_of_text, config=kept, files=files)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            if is_gpt2:  # a class that takes vocabulary and merges, and ignores what else is there
                known = isinstance(error, InputError)
                raise error if known else _unsupported(path, f"its content is not valid ({error!r:.80})") from None
        return LibraryTokenizer(Path(folder))


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer that `spec` names: "gpt2", a folder, or a dataset or model on the Hub.

    Raises:
        InputError: there is no such tokenizer.
        TemporaryError: its files are neither cached nor reachable.
    """
    if spec == "gpt2":
        return _load_gpt2()
    if parse_train_spec(spec) is not None:
        raise InputError(f"'{spec}' names no existing tokenizer; only preparing a corpus trains one")
    if spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and not Path(spec).exists():
        return _load_from_hub(spec)
    return Tokenizer.load(spec)


def _load_from_hub(repo_id: str) -> Tokenizer:
    """Return the tokenizer of a dataset, which holds one next to its shards, or of a model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    from common.hub_retry import hub_cache_error, network_errors

    kind, reason = InputError, "RepositoryNotFoundError"
    # Which tokenizer vocab.json and merges.txt are may stand in the model's config.json only.
    files = [*TOKENIZER_FILES, "config.json"]
    for repo_type in ("dataset", "model"):
        try:
            folder = Path(snapshot_download(repo_id, repo_type=repo_type, allow_patterns=files))
        except (RepositoryNotFoundError, HFValidationError):  # also for private and gated ones
            continue
        except network_errors() as error:
            if (cache_error := hub_cache_error(error)) is not None:
                raise cache_error from None
            kind, reason = TemporaryError, type(error).__name__
            continue
        if any((folder / name).exists() for name in TOKENIZER_FILES):
            return Tokenizer.load(folder)
    raise kind(
        f"no tokenizer {repo_id}: there is no such folder, and no model or dataset on the Hub that has one ({reason}); "
        "check the name, and HF_TOKEN if it is private; or give gpt2, train:4096, or a folder with tokenizer.json"
    )


def parse_train_spec(spec: str) -> int | None:
    """Return the vocabulary size in "train:4096", which must be large enough; None for another tokenizer."""
    kind, _, size = spec.partition(":")
    if kind != "train":
        return None
    if not (size.isascii() and size.isdigit()):
        raise InputError(f"'{spec:.40}' has no vocabulary size; write it as in train:4096")
    if not _MIN_VOCAB_SIZE <= int(size[:9]) <= _MAX_VOCAB_SIZE:  # Python converts no thousands of digits
        raise InputError(
            f"a vocabulary needs at least {_MIN_VOCAB_SIZE} tokens (256 bytes and the end of text) and at most "
            f"{_MAX_VOCAB_SIZE:,}, found {size:.40}; 4096 is a good size for a small corpus"
        )
    return int(size)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE trained on `texts`: the 256 bytes, the merges, and `<|endoftext|>` with the last id.

    Raises:
        InputError: the texts are too short to fill the vocabulary.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,  # a token that occurs once teaches nothing
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    ranks = {_to_bytes(token): rank for token, rank in backend.get_vocab().items()}
    if len(ranks) < vocab_size - 1:
        raise InputError(
            f"the corpus is too small for a vocabulary of {vocab_size:,} tokens: it gives {len(ranks) + 1:,}; "
            "request at most that many, or give a larger corpus"
        )
    return Tokenizer(ranks, {END_OF_TEXT: vocab_size - 1})


def _load_gpt2() -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors), or other bytes than OpenAI's
        raise InputError(
            f"cannot get GPT-2's vocabulary from tiktoken's cache or the network ({type(error).__name__}: "
            f"{one_line(error, 120)}); connect once, set TIKTOKEN_CACHE_DIR to a folder where tiktoken "
            "has cached it, or train a tokenizer (train:4096)"
        ) from None
    return Tokenizer(encoding._mergeable_ranks, encoding._special_tokens)


def _fingerprint(ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> str:
    """Return a sha256 of everything that determines ids, independent of libraries and their versions."""
    tokens = sorted((rank, token.hex()) for token, rank in ranks.items())
    special = sorted((rank, f"special {text.encode().hex()}") for text, rank in special_tokens.items())
    lines = [GPT2_PATTERN, *(f"{rank} {token}" for rank, token in (*tokens, *special))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _to_text(token: bytes) -> str:
    return "".join(map(bytes_to_unicode().__getitem__, token))


def _to_bytes(token: str) -> bytes:
    return bytes(map(unicode_to_bytes().__getitem__, token))


def _split(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that merge into `token`: the result of merging its bytes with lower ranks only."""
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
        lowest = min(pair_ranks)
        if lowest >= limit:
            break
        i = pair_ranks.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise InputError(f"the vocabulary is not from BPE training: no merge of two tokens gives {token!r}")
    return parts[0], parts[1]


def _backend(ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> Any:
    """Return the `tokenizers.Tokenizer` with the same ids."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    in_order = sorted(ranks, key=ranks.__getitem__)
    merges = [_split(token, ranks) for token in in_order if len(token) > 1]
    # Special tokens are in the vocabulary too, as in the official file, because added tokens cannot choose their ids.
    vocab = {_to_text(token): rank for token, rank in ranks.items()} | dict(special_tokens)
    backend = Backend(models.BPE(vocab, [(_to_text(left), _to_text(right)) for left, right in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special_tokens])
    return backend


def _unsupported(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is not a byte-level BPE tokenizer like GPT-2's: {reason}; "
        "give 'gpt2', 'train:4096', or the folder of a tokenizer of this kind"
    )


def _parse(data: dict[str, Any], path: Path, end_of_text: str) -> tuple[dict[bytes, int], dict[str, int]]:
    """Return ranks and special tokens of a `tokenizer.json`."""
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        raise _unsupported(path, "it has no BPE model")
    pre_tokenizer = data.get("pre_tokenizer") or {}
    if pre_tokenizer.get("type") != "ByteLevel" or not pre_tokenizer.get("use_regex", True):
        raise _unsupported(path, "its pre-tokenization differs")
    if pre_tokenizer.get("add_prefix_space") or data.get("normalizer"):
        raise _unsupported(path, "it changes the text before encoding")

    special_tokens = {token["content"]: token["id"] for token in data.get("added_tokens", [])}
    if end_of_text not in special_tokens:
        raise _unsupported(path, f"it has no {end_of_text}")
    try:
        ranks = {_to_bytes(token): rank for token, rank in model["vocab"].items() if token not in special_tokens}
    except KeyError as error:
        raise _unsupported(path, f"a token holds the character {error}, which represents no byte") from None
    if sorted([*ranks.values(), *special_tokens.values()]) != list(range(len(ranks) + len(special_tokens))):
        raise _unsupported(path, "its ids have gaps or duplicates")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise _unsupported(path, "some bytes have no token")

    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    merged_ids = [model["vocab"].get("".join(merge), -1) for merge in merges]
    expected_ids = sorted(rank for token, rank in ranks.items() if len(token) > 1)
    if merged_ids != expected_ids:
        raise _unsupported(path, "its ids do not follow the order of its merges")
    return ranks, special_tokens
