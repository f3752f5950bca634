"""What a shard folder is asked to hold, and whether it does."""

from dataclasses import asdict, dataclass
from pathlib import Path

from common.cli_errors import InputError
from training.data.shards.manifest import Manifest
from training.data.shards.shard_files import holds_foreign_shards
from training.data.sources.base import DEFAULT_HUB_CONFIG, HUB_CORPORA, corpus_name
from training.data.tokenization.tokenizer import load_tokenizer, parse_train_spec

LARGEST_SHARD = 1 << 32  # tokens; a shard is put together in memory


@dataclass(frozen=True, kw_only=True)
class ShardRequest:
    """What the folder is to hold; the fields are the flags of `python -m training.prepare`.

    Raises:
        InputError: a size that cannot be, or a tokenizer that cannot be trained.
    """

    corpus: str
    corpus_config: str | None = None
    text_field: str = "text"
    tokenizer: str = "gpt2"
    shard_tokens: int
    val_tokens: int
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.corpus in HUB_CORPORA and self.corpus_config is None:
            object.__setattr__(self, "corpus_config", DEFAULT_HUB_CONFIG)
        parse_train_spec(self.tokenizer)
        for name, smallest in (("shard_tokens", 2), ("val_tokens", 1), ("max_tokens", 2)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"expected {name} of at least {smallest}, found {value}")
        for name in ("shard_tokens", "val_tokens"):
            value = getattr(self, name)
            if value > LARGEST_SHARD:
                raise InputError(f"expected {name} of at most {LARGEST_SHARD:,}, found {value:,}")

    def flags(self) -> list[str]:
        """Return the request as the command line of `python -m training.prepare`, without the output folder."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return [text for name, value in given.items() for text in (f"--{name}", str(value))]

    def differences(self, manifest: Manifest) -> list[str]:
        """Return how the manifest's folder differs, a phrase each."""
        asked = {
            "corpus": corpus_name(self.corpus),
            "corpus_config": self.corpus_config,
            "text_field": self.text_field,
            "shard_tokens": self.shard_tokens,
            "val_tokens": self.val_tokens,
        }
        found = [
            f"{name} {getattr(manifest, name)} instead of {value}"
            for name, value in asked.items()
            if getattr(manifest, name) != value
        ]
        vocab_size = parse_train_spec(self.tokenizer)
        if vocab_size is not None or self.tokenizer == "gpt2":
            name = f"bpe-{vocab_size}" if vocab_size is not None else "gpt2"
            same = manifest.tokenizer == name
        else:
            same = manifest.tokenizer_fingerprint == load_tokenizer(self.tokenizer).fingerprint
        if not same:
            found.append(f"tokenizer {manifest.tokenizer} instead of {self.tokenizer}")
        # A complete folder that was cut later, or not at all, has all that is asked for and more.
        had, wanted = manifest.max_tokens, self.max_tokens
        enough = had is None or (wanted is not None and wanted <= had)
        if had != wanted and not (manifest.complete and enough):
            found.append(f"max_tokens {had} instead of {wanted}")
        return found

    def manifest_in(self, output: Path) -> Manifest | None:
        """Return the folder's manifest, None when it has none, after comparing it with what is asked for.

        Raises:
            InputError: the folder holds something else.
        """
        if output.exists() and not output.is_dir():
            raise InputError(f"expected a folder to write to, found the file {output}; give another --output")
        manifest = Manifest.read(output)
        if manifest is None:
            if holds_foreign_shards(output):
                raise InputError(
                    f"expected an empty folder or one of ours, found shards without a manifest in {output}; "
                    "train on them as they are, or give another --output"
                )
            return None
        if differences := self.differences(manifest):
            raise InputError(
                f"expected what was asked for in {output}, found {', '.join(differences)}; "
                "ask for the same, give another folder, or delete this one"
            )
        return manifest
