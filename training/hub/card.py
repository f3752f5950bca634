"""The page of a model folder: README.md, the card that the Hub shows, made from what the run knows.

What is generated stands between marks, and only that is replaced when the card is written again: what a person wrote
around it, here or on the Hub, stays, and so do the metadata that a person changed.
"""

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from common.durations import format_duration
from evaluation.results.references import VALIDATION_LOSS, Reference
from training.data.sources.base import DEFAULT_HUB_CONFIG, HUB_CORPORA
from training.hub.card_merging import merged, section
from training.hub.costs import running_costs
from training.monitoring.samples import TEMPERATURE, TOP_K
from training.recipe import Recipe

PLACE = "path/to/this/folder"  # until the model has an id
LOCAL_FILES = "local files"  # whose they are and where they lie is nobody's business

ENGLISH_CORPORA = ("fineweb", "fineweb-edu", "installed-docs")
_LIMITS = {
    "fineweb": """The text is English of the web (Common Crawl of 2013 to 2024, filtered and deduplicated by FineWeb):
its opinions, prejudices and mistakes are in the model, and so may be names and addresses that stood on public pages.
Other languages, code and anything that happened later are hardly in it.""",
    "installed-docs": """The text is the documentation of Python packages: the model knows their vocabulary and their
tone, and little else.""",
}
_LIMITS["fineweb-edu"] = f"""{_LIMITS["fineweb"]} Pages were chosen by a classifier for educational value, which favours
the manner of schoolbooks, and the subjects and dialects that they treat."""
_OTHER_LIMITS = "Whatever is missing, wrong or one-sided in the text that it was trained on is so in the model."


@dataclass(frozen=True)
class Score:
    """One measured figure.

    Attributes:
        metric: the Hub's name of the metric.
        name: what was measured, protocol included.
        value: as measured.
        dataset_type, dataset_name: what it was measured on, as an id of the Hub where there is one, and in words.
        references: published figures of OpenAI's models by the same protocol.
    """

    metric: str
    name: str
    value: float
    dataset_type: str
    dataset_name: str
    references: tuple[Reference, ...] = ()


@dataclass(frozen=True)
class RunFacts:
    """What a run knows about itself.

    Attributes:
        name: of the run.
        device, devices: what it ran on, None where nobody knows any more, and on how many of them.
        earlier_hardware: what earlier starts ran on, in words, where that was something else; what their hours cost is
            then not known.
        seconds: of training, without validation, samples and saving; None when nothing was logged.
        val_loss, bits_per_byte: of the last validation; None before the first.
        val_step: the step after which that was, which may lie before the last.
        gzip_bits_per_byte: what `gzip -9` needs for the same text.
        samples: drawn last.
        gpt2_tokens: whether the tokenizer is GPT-2's, without which losses per token cannot be compared.
        scores: of the evaluation tasks.
        corpus: what the shards are of, as far as it is known: a corpus with a name of ours, a dataset's id on the Hub,
            or `LOCAL_FILES`; None for shards that do not say.
        base_model: the Hub's id of what training started from; None for a folder, which has none.
    """

    name: str
    parameters: int
    steps: int
    tokens: int
    device: str | None
    val_loss: float | None
    bits_per_byte: float | None
    gzip_bits_per_byte: float | None
    samples: list[str]
    devices: int = 1
    seconds: float | None = None
    gpt2_tokens: bool = False
    scores: list[Score] = field(default_factory=list)
    corpus: str | None = None
    base_model: str | None = None
    val_step: int | None = None
    earlier_hardware: tuple[str, ...] = ()


def write_model_card(
    folder: Path, recipe: Recipe, facts: RunFacts, config: PreTrainedConfig, *, kept: str | None = None
) -> None:
    """Write `folder/README.md`: metadata for the Hub, how to load the model, its results, recipe and samples.

    Args:
        folder: holds the model.
        recipe: of the run.
        facts: what the run knows.
        config: of the model.
        kept: an earlier card, whose text around the generated sections stays.
    """
    card = model_card(recipe, facts, config, curves=(folder / "curves.png").is_file())
    ModelCard(merged(card, kept) if kept is not None else card, ignore_metadata_errors=True).save(folder / "README.md")


def earlier_card(folder: Path) -> str | None:
    """The card that a model folder has; a person may have edited it."""
    path = folder / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def model_card(recipe: Recipe, facts: RunFacts, config: PreTrainedConfig, *, curves: bool = True) -> str:
    """The whole card as a run generates it; `curves` tells whether there is a picture of them beside it."""
    scores = _scores(recipe, facts)
    dataset = _hub_dataset(facts)
    data = ModelCardData(
        language="en" if facts.corpus in ENGLISH_CORPORA else None,
        license="mit" if _is_free(recipe, facts) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2_scratch"],
        datasets=[dataset] if dataset else None,
        base_model=facts.base_model,
        model_name=facts.name if scores else None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=score.dataset_type,
                dataset_name=score.dataset_name,
                metric_type=score.metric,
                metric_name=score.name,
                metric_value=round(score.value, 4),
            )
            for score in scores
        ]
        or None,
    )
    metadata = data.to_dict()
    metadata.pop("model_name", None)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n# {facts.name}\n",
        section("summary", _summary(recipe, facts, config)),
        "## Use\n",
        section("use", _use(config)),
        "## Results\n",
        section("results", _results(facts, scores, curves)),
        "## Samples\n",
        section("samples", _samples(facts)),
        "## Training\n",
        section("training", _training(recipe, facts, config)),
        "## Limits\n",
        section("limits", _limits(recipe, facts)),
    ]
    return "\n".join(parts)


_OPENAI = "openai-community/gpt2"  # and -medium, -large, -xl


def _is_free(recipe: Recipe, facts: RunFacts) -> bool:
    """Whether every licence is known: FineWeb's allows this one, and OpenAI's weights have it."""
    known_base = recipe.init_from is None or (facts.base_model or "").startswith(_OPENAI)
    return known_base and facts.corpus in HUB_CORPORA


def _hub_dataset(facts: RunFacts) -> str | None:
    """The Hub's id of the corpus."""
    corpus = facts.corpus or ""
    return HUB_CORPORA.get(corpus, corpus if "/" in corpus else None)


def _corpus(recipe: Recipe, facts: RunFacts) -> str:
    dataset = _hub_dataset(facts)
    if dataset is None:
        return facts.corpus or "shards of token ids that do not say what they are of"
    link = f"[{dataset}](https://huggingface.co/datasets/{dataset})"
    return link + (f" ({recipe.corpus_config})" if recipe.corpus_config else "")


def _scores(recipe: Recipe, facts: RunFacts) -> list[Score]:
    """The figures of the validation text, and then those of the tasks."""
    if facts.val_loss is None:
        return facts.scores
    dataset = _hub_dataset(facts)
    kind = dataset or "text"
    name = f"held-out text of {dataset or facts.corpus}" if facts.corpus else "held-out text"
    how = f"windows of {recipe.seq_len:,} tokens side by side"
    if facts.val_step is not None:
        how += f", after step {facts.val_step:,}"
    published = _published_losses(recipe, facts)
    found = [Score("loss", f"loss, nats per token, {how}", facts.val_loss, kind, name, published)]
    if facts.bits_per_byte is not None:
        found.append(Score("bits_per_byte", f"bits per byte of UTF-8, {how}", facts.bits_per_byte, kind, name))
    return [*found, *facts.scores]


def _published_losses(recipe: Recipe, facts: RunFacts) -> tuple[Reference, ...]:
    """OpenAI's losses, where ours is of the same text in the same windows: the first 10,485,760 tokens of FineWeb-Edu's
    sample (20 times 64 windows on 8 processes in build-nanogpt). Other projects split their corpora in their own ways.
    """
    same = (
        facts.gpt2_tokens
        and facts.corpus == "fineweb-edu"
        and recipe.corpus_config in (None, DEFAULT_HUB_CONFIG)
        and recipe.seq_len == 1024
        and recipe.eval_tokens == 10_485_760 < recipe.validation_shard_tokens
    )
    return VALIDATION_LOSS["fineweb-edu"] if same else ()


def _summary(recipe: Recipe, facts: RunFacts, config: PreTrainedConfig) -> str:
    base = facts.base_model
    start = (
        f"[{base}](https://huggingface.co/{base})" if base else "an earlier model" if recipe.init_from else "scratch"
    )
    hardware = f", on {_hardware(facts)}" if facts.device else ""
    return f"""A GPT-2 with {_size(facts.parameters)} parameters ({config.n_layer} layers, {config.n_head} heads,
width {config.n_embd}, {config.n_positions:,} positions), trained from {start} on {_corpus(recipe, facts)}:
{facts.steps:,} steps of {recipe.tokens_per_step:,} tokens, {facts.tokens:,} tokens in all{hardware}."""


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f}M" if parameters >= 1_000_000 else f"{parameters:,}"


def _hardware(facts: RunFacts) -> str:
    return ", then ".join([*facts.earlier_hardware, hardware_words(str(facts.device), facts.devices)])


def hardware_words(device: str, devices: int) -> str:
    """So many of a device, as the card has it."""
    return f"{devices} × {device}" if devices > 1 else device


def _use(config: PreTrainedConfig) -> str:
    room = min(40, config.n_positions // 2)
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{PLACE}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{PLACE}")
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens={room})[0]))
```

With the `gpt2-scratch` package installed, `import gpt2_scratch` takes the place of `trust_remote_code=True`."""


def _results(facts: RunFacts, scores: list[Score], curves: bool) -> str:
    picture = "\n![Loss against tokens](curves.png)" if curves else ""
    if not scores:
        return f"Nothing was measured yet.\n{picture}"
    sizes = sorted({reference.size for score in scores for reference in score.references}, key=_SIZES.index)
    heading = ["measured", "this model", *(f"OpenAI GPT-2 {size}" for size in sizes)]
    rows = [heading, ["---"] * len(heading)]
    for score in scores:
        published = {reference.size: f"{reference.value:.4f}" for reference in score.references}
        rows.append(
            [
                f"{score.dataset_name}: {score.name}",
                f"{score.value:.4f}",
                *(published.get(size, "") for size in sizes),
            ]
        )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    sources = sorted({reference.source for score in scores for reference in score.references})
    text = f"{table}\n"
    if sources:
        text += f"\nOpenAI's figures are by the same protocol on the same text; from {'; '.join(sources)}.\n"
    if facts.gzip_bits_per_byte is not None:
        text += f"\n`gzip -9` needs {facts.gzip_bits_per_byte:.4f} bits per byte for the held-out text.\n"
    return text + picture


_SIZES = ("124M", "355M", "774M", "1.5B")


def _samples(facts: RunFacts) -> str:
    if not facts.samples:
        return "None was drawn yet."
    how = f"Each begins with its prompt; drawn at temperature {TEMPERATURE} from the {TOP_K} likeliest tokens.\n\n"
    return how + "\n\n".join(f"```text\n{sample.strip().replace('```', '` ` `')}\n```" for sample in facts.samples)


def _training(recipe: Recipe, facts: RunFacts, config: PreTrainedConfig) -> str:
    shown = {key: value for key, value in recipe.values_on_card().items() if value not in (None, [])}
    if not recipe.eval_tasks:
        del shown["eval_task_steps"]
    knobs = "\n".join(f"| `{key}` | {value} |" for key, value in shown.items() if not _is_path(value))
    lines = [f"- Hardware: {_hardware(facts)}"] if facts.device else []
    lines += [f"- Tokens: {facts.tokens:,} in {facts.steps:,} steps", f"- Tokenizer: {_tokenizer(recipe, config)}"]
    if facts.seconds is not None:
        lines.append(
            f"- Time: {format_duration(facts.seconds)} of training steps "
            f"({facts.tokens / facts.seconds:,.0f} tokens/s); validation, samples and checkpoints come on top"
        )
        if not facts.earlier_hardware:
            lines += [f"- {line}" for line in running_costs(facts.device or "", facts.devices, facts.seconds)]
    return "\n".join(lines) + f"\n\n| key of the recipe | value |\n| --- | --- |\n{knobs}"


def _tokenizer(recipe: Recipe, config: PreTrainedConfig) -> str:
    if recipe.tokenizer == "gpt2":
        return "GPT-2's byte-level BPE"
    trained = " trained on this corpus" if recipe.tokenizer.startswith("train:") else " of its own"
    return f"a byte-level BPE{trained}, {config.vocab_size:,} ids"


def _is_path(value: object) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value or value.startswith(("~", ".")))


def _limits(recipe: Recipe, facts: RunFacts) -> str:
    own = _LIMITS.get(facts.corpus or "", _OTHER_LIMITS)
    if recipe.init_from is not None:
        own += "\nWhat the model that it was trained from had learnt before is in it too."
    return f"""A base model: it continues text, and says what is likely there rather than what is true. Nothing was done
to make it safe, polite or helpful, and it should not face the public or decide anything about people as it is.

{own}"""
