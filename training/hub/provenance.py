"""What a model was trained from, limited to what the card may disclose: paths and private files stay unnamed."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from training.data.shards.manifest import Manifest
from training.data.sources.base import HUB_CORPORA, INSTALLED_DOCS, corpus_name
from training.data.sources.open_corpus import is_repository_id
from training.recipe import Recipe

ENGLISH_CORPORA = (*HUB_CORPORA, INSTALLED_DOCS)
LOCAL_FILES = "local files"

_DIGITS_OF_A_COMMIT = 40  # a hash of files has 64
_OPENAI = "openai-community/"


def hub_dataset(corpus: str | None) -> str | None:
    """Return the Hub's id of a corpus; None for one that is not on the Hub."""
    corpus = corpus or ""
    return HUB_CORPORA.get(corpus, corpus if "/" in corpus else None)


@dataclass(frozen=True)
class Provenance:
    """The training text and the base model."""

    corpus: str | None  # one of ours, a dataset's id on the Hub, or `LOCAL_FILES`; None for shards of another program
    base_model: str | None = None  # its id on the Hub; None for random weights, and for a folder

    @classmethod
    def of(cls, recipe: Recipe) -> "Provenance":
        """Return the provenance of a run's model, by its recipe and the manifest of its shards."""
        return cls(_known_corpus(recipe), _known_base(recipe.init_from))

    @property
    def dataset(self) -> str | None:
        """The Hub's id of the corpus."""
        return hub_dataset(self.corpus)

    def license(self, recipe: Recipe) -> str | None:
        """Return the license where all inputs are known: FineWeb's license allows MIT, and OpenAI's weights have it."""
        known_base = recipe.init_from is None or (self.base_model or "").startswith(_OPENAI)
        return "mit" if known_base and self.corpus in HUB_CORPORA else None


def _known_corpus(recipe: Recipe) -> str | None:
    """Return the corpus by the manifest: the recipe does not show whether `data/texts` is a dataset or a folder."""
    manifest = Manifest.read(Path(recipe.data_dir))
    if manifest is None or manifest.corpus != corpus_name(recipe.corpus):
        return None
    if recipe.corpus == INSTALLED_DOCS:
        return INSTALLED_DOCS
    is_commit = len(manifest.corpus_revision) == _DIGITS_OF_A_COMMIT
    has_id = recipe.corpus in HUB_CORPORA or is_repository_id(recipe.corpus)
    return recipe.corpus if is_commit and has_id else LOCAL_FILES


def _known_base(init_from: str | None) -> str | None:
    """Return the Hub's id of a base model if it is known to be one: OpenAI's, or one in the Hub's cache."""
    if init_from is None or not is_repository_id(init_from) or Path(init_from).exists():
        return None
    cached = Path(constants.HF_HUB_CACHE) / f"models--{init_from.replace('/', '--')}"
    return init_from if init_from.startswith(_OPENAI) or cached.is_dir() else None
