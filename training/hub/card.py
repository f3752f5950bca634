"""The model card: README.md of a model folder, from the run's records and `templates/model_card.md.jinja`."""

import importlib.metadata
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from common.durations import format_duration
from evaluation.results.references import SIZES, VALIDATION_LOSS, Reference, one_per_size, published
from evaluation.results.results_file import Results
from gpt2_scratch.export import native_card
from training.data.sources.base import DEFAULT_HUB_CONFIG
from training.hub.card_edits import with_edits_of
from training.hub.provenance import ENGLISH_CORPORA, Provenance
from training.monitoring.run_history import RunFacts
from training.monitoring.samples import TEMPERATURE, TOP_K
from training.recipe import Recipe

_TEMPLATE = Path(__file__).with_name("templates") / "model_card.md.jinja"
_FOLDER = '"path/to/this/folder"'  # used for the model until it has an id on the Hub
_NATIVE = 'Programs that know GPT-2 but not this code load the same weights with `revision="native"`.'

# The dataset of each task: its id on the Hub, its config there, its name, and the short name in tables.
_TASK_DATASETS = {
    "hellaswag": ("Rowan/hellaswag", None, "HellaSwag", "HellaSwag"),
    "lambada": ("EleutherAI/lambada_openai", None, "LAMBADA", "LAMBADA"),
    "cbt_cn": ("cam-cst/cbt", "CN", "Children's Book Test, common nouns", "CBT-CN"),
    "cbt_ne": ("cam-cst/cbt", "NE", "Children's Book Test, named entities", "CBT-NE"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "WikiText-2", "WikiText-2"),
}
_LOWER_IS_BETTER = ("loss", "bits_per_byte", "perplexity")


@dataclass(frozen=True)
class Score:
    """A result of the model, its short name, and published results of OpenAI's models under the same protocol."""

    short_name: str
    result: EvalResult
    references: tuple[Reference, ...] = ()


def write_model_card(
    folder: Path, recipe: Recipe, facts: RunFacts, config: PreTrainedConfig, *, earlier: Path | None = None
) -> None:
    """Write the README.md of a model folder; edits of the card in the folder `earlier` stay."""
    card = model_card(recipe, facts, config, Provenance.of(recipe), curves=(folder / "curves.png").is_file())
    path = earlier and earlier / "README.md"
    existing = path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else None
    (folder / "README.md").write_text(with_edits_of(existing, card)[0], encoding="utf-8")


def card_for_repository(card: str, repo_id: str, *, branch: str, has_native: bool) -> str:
    """Return a model folder's card for the Hub: with the model's id, and with how to load its native branch."""
    if branch != "main":
        return native_card(card).replace(_FOLDER, f'"{repo_id}", revision="{branch}"')
    if has_native:
        card = card.replace("\n## Results\n", f"\n{_NATIVE}\n\n## Results\n", 1)
    return card.replace(_FOLDER, f'"{repo_id}"')


def model_card(
    recipe: Recipe, facts: RunFacts, config: PreTrainedConfig, provenance: Provenance, *, curves: bool = True
) -> str:
    """Return the card of a run's model; with `curves`, it shows the curves.png in its folder."""
    scores = [*_validation_scores(recipe, facts, provenance), *task_scores(facts.task_results)]
    metadata = ModelCardData(
        language="en" if provenance.corpus in ENGLISH_CORPORA else None,
        license=provenance.license(recipe),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2_scratch"],
        datasets=[provenance.dataset] if provenance.dataset else None,
        base_model=provenance.base_model,
        model_name=facts.name if scores else None,
        widget=[{"text": prompt} for prompt in recipe.sample_prompts if prompt.strip()] or None,
        eval_results=[score.result for score in scores] or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        recipe=recipe,
        facts=facts,
        config=config,
        provenance=provenance,
        scores=scores,
        sizes=SIZES,
        lower_is_better=_LOWER_IS_BETTER,
        curves=curves,
        kit=_kit(),
        new_tokens=min(40, config.n_positions // 2),
        temperature=TEMPERATURE,
        top_k=TOP_K,
        format_duration=format_duration,
    )
    return f"{card}\n"


def _validation_scores(recipe: Recipe, facts: RunFacts, provenance: Provenance) -> list[Score]:
    of = provenance.dataset or provenance.corpus
    about = {
        "dataset_type": provenance.dataset or "text",
        "dataset_name": f"held-out text of {of}" if of else "held-out text",
    }
    windows = f"non-overlapping windows of {recipe.seq_len:,} tokens"
    measured = (
        ("loss", "Loss", "loss in nats per token", facts.val_loss, _published_losses(recipe, provenance)),
        ("bits_per_byte", "Bits per byte", "bits per byte of UTF-8", facts.bits_per_byte, ()),
    )
    return [
        Score(short_name, _result(metric, f"{name}, {windows}", value, **about), references)
        for metric, short_name, name, value, references in measured
        if value is not None
    ]


def _published_losses(recipe: Recipe, provenance: Provenance) -> tuple[Reference, ...]:
    """Return OpenAI's losses if ours is of the same text, tokens and windows, and nothing otherwise.

    They are of the first 10,485,760 tokens of FineWeb-Edu's sample, as build-nanogpt splits it (20 times 64 windows on
    8 processes). Other projects split their corpora differently.
    """
    is_same = (
        recipe.tokenizer == "gpt2"
        and provenance.corpus == "fineweb-edu"
        and recipe.corpus_config in (None, DEFAULT_HUB_CONFIG)
        and recipe.seq_len == 1024
        and recipe.eval_tokens == 10_485_760 < recipe.validation_shard_tokens
    )
    return VALIDATION_LOSS["fineweb-edu"] if is_same else ()


def task_scores(results: Results | None) -> list[Score]:
    """Return the results of the evaluation tasks, each with its protocol."""
    scores = []
    for task_result in results.tasks if results is not None else ():
        task, _, protocol = task_result.task.partition(":")
        dataset, config, dataset_name, short_name = _TASK_DATASETS.get(task, ("text", None, task, task))
        about = {"dataset_type": dataset, "dataset_config": config, "dataset_name": dataset_name}
        limit = results.limit if results is not None else None
        items = f", first {task_result.items:,} items" if limit else ""
        for name, metric in task_result.metrics.items():
            if math.isfinite(metric.value):
                result = _result(metric.module, f"{name}, protocol {protocol}{items}", metric.value, **about)
                # Published results are of all items.
                references = () if limit else tuple(one_per_size(published(task_result.task, name)).values())
                scores.append(Score(f"{short_name} {name}", result, references))
    return scores


def _result(metric: str, name: str, value: float, **dataset: Any) -> EvalResult:
    return EvalResult("text-generation", metric_type=metric, metric_name=name, metric_value=round(value, 4), **dataset)


def _kit() -> str:
    """Return the name of this kit, with a link if the installed package's metadata state its source or homepage."""
    name = "gpt2-scratch"
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return name
    urls = dict(url.split(", ", 1) for url in metadata.get_all("Project-URL") or ())
    url = urls.get("Source") or urls.get("Homepage") or next(iter(metadata.get_all("Home-page") or ()), None)
    return f"[{name}]({url})" if url else name
