"""The model card: README.md of a model folder, generated from the run's records."""

import importlib.metadata
import math
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedConfig

from common.durations import format_duration
from evaluation.results.references import SIZES, VALIDATION_LOSS, Reference, one_per_size, published
from evaluation.results.results_file import Results
from training.data.sources.base import DEFAULT_HUB_CONFIG
from training.hub.card_edits import results_block, with_edits_of
from training.hub.provenance import ENGLISH_CORPORA, Provenance
from training.monitoring.run_history import RunFacts
from training.monitoring.samples import TEMPERATURE, TOP_K
from training.recipe import Recipe

_FOLDER = '"path/to/this/folder"'  # used for the model until it has an id on the Hub
_TESTED_TRANSFORMERS = "5.17 to 5.24"  # the range in setup.cfg
_EXPORT = f"- `python -m gpt2_scratch.export --model {_FOLDER} --output"
_PACKAGE = (  # an export to native GPT-2 drops these lines
    f"The code in this folder works with transformers {_TESTED_TRANSFORMERS}. With the `gpt2-scratch` package "
    "installed, `import gpt2_scratch` replaces `trust_remote_code=True`, and these commands write other forms:\n\n"
    f"{_EXPORT} native --format gpt2`: plain GPT-2, for programs that do not know this code\n"
    f"{_EXPORT} model.gguf --format gguf`: a file for llama.cpp, Ollama and LM Studio\n"
    f"{_EXPORT} renewed --format gpt2_scratch`: with the package's newer code"
)
_NATIVE = 'Programs that know GPT-2 but not this code load the same weights with `revision="native"`.'

_LIMITS = {
    "fineweb": """The training text is English web text (Common Crawl, 2013 to 2024, filtered and deduplicated by
FineWeb). The model reproduces its opinions, biases and errors, and may reproduce names and addresses from public pages.
It has seen little text in other languages, little code, and nothing written later.""",
    "installed-docs": """The training text is the documentation of Python packages. The model knows their vocabulary and
their tone, and little else.""",
}
_LIMITS["fineweb-edu"] = f"""{_LIMITS["fineweb"]} A classifier selected pages for educational value, which favors the
style of textbooks, and the subjects and dialects that they cover."""
_OTHER_LIMITS = "The model inherits whatever is missing, wrong or one-sided in its training text."

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
    existing = None
    if earlier is not None and (earlier / "README.md").is_file():
        existing = (earlier / "README.md").read_text(encoding="utf-8", errors="replace")
    (folder / "README.md").write_text(with_edits_of(existing, card)[0], encoding="utf-8")


def card_for_repository(card: str, repo_id: str, *, branch: str, has_native: bool) -> str:
    """Return a model folder's card for the Hub: with the model's id, and with how to load its native branch."""
    if branch != "main":  # plain GPT-2, without our code
        card = card.replace(f"\n\n{_PACKAGE}", "").replace(", trust_remote_code=True", "")
        return card.replace(_FOLDER, f'"{repo_id}", revision="{branch}"')
    return card.replace(_PACKAGE, f"{_PACKAGE}\n\n{_NATIVE}" if has_native else _PACKAGE).replace(
        _FOLDER, f'"{repo_id}"'
    )


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
    return f"""---
{metadata.to_yaml()}
---

# {facts.name}

{_summary(recipe, facts, config, provenance)}

## Use

{_use(config)}

## Results

{results_block("results", _results(facts, scores, curves))}
## Samples

{_samples(facts)}

## Training

{_training(recipe, facts, config)}

## Limits

{_limits(recipe, provenance)}

## License and citation

The license is the one in this card's metadata. If there is none, the author has not stated it.

```bibtex
@software{{gpt2_scratch,
  title = {{gpt2-scratch: pre-train, study and publish your own GPT-2}},
  year = {{2026}}
}}
@techreport{{radford2019language,
  title = {{Language Models are Unsupervised Multitask Learners}},
  author = {{Radford, Alec and Wu, Jeffrey and Child, Rewon and Luan, David and Amodei, Dario and Sutskever, Ilya}},
  institution = {{OpenAI}},
  year = {{2019}}
}}
```
"""


def _validation_scores(recipe: Recipe, facts: RunFacts, provenance: Provenance) -> list[Score]:
    if facts.val_loss is None:
        return []
    of = provenance.dataset or provenance.corpus
    windows = f"non-overlapping windows of {recipe.seq_len:,} tokens"
    measured = [("loss", "Loss", "loss in nats per token", facts.val_loss, _published_losses(recipe, provenance))]
    if facts.bits_per_byte is not None:
        measured.append(("bits_per_byte", "Bits per byte", "bits per byte of UTF-8", facts.bits_per_byte, ()))
    return [
        Score(
            short_name,
            EvalResult(
                task_type="text-generation",
                dataset_type=provenance.dataset or "text",
                dataset_name=f"held-out text of {of}" if of else "held-out text",
                metric_type=metric,
                metric_name=f"{name}, {windows}",
                metric_value=round(value, 4),
            ),
            references,
        )
        for metric, short_name, name, value, references in measured
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
        limit = results.limit if results is not None else None
        items = f", first {task_result.items:,} items" if limit else ""
        for name, metric in task_result.metrics.items():
            if not math.isfinite(metric.value):
                continue
            result = EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_config=config,
                dataset_name=dataset_name,
                metric_type=metric.module,
                metric_name=f"{name}, protocol {protocol}{items}",
                metric_value=round(metric.value, 4),
            )
            # Published results are of all items.
            references = () if limit else tuple(one_per_size(published(task_result.task, name)).values())
            scores.append(Score(f"{short_name} {name}", result, references))
    return scores


def _summary(recipe: Recipe, facts: RunFacts, config: PreTrainedConfig, provenance: Provenance) -> str:
    base, dataset = provenance.base_model, provenance.dataset
    start = (
        f"[{base}](https://huggingface.co/{base})" if base else "an earlier model" if recipe.init_from else "scratch"
    )
    corpus = provenance.corpus or "token shards of unknown origin"
    if dataset is not None:
        corpus = f"[{dataset}](https://huggingface.co/datasets/{dataset})"
        corpus += f" ({recipe.corpus_config})" if recipe.corpus_config else ""
    size = f"{facts.parameters / 1e6:.1f}M" if facts.parameters >= 1_000_000 else f"{facts.parameters:,}"
    hardware = f", on {', then '.join(facts.hardware)}" if facts.hardware else ""
    return f"""A GPT-2 with {size} parameters ({_count(config.n_layer, "layer")}, {_count(config.n_head, "head")},
width {config.n_embd}, {config.n_positions:,} positions), trained from {start} on {corpus}:
{_count(facts.steps, "step")} of {recipe.tokens_per_step:,} tokens, {facts.tokens:,} tokens in total{hardware},
with {_kit()}."""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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


def _use(config: PreTrainedConfig) -> str:
    new_tokens = min(40, config.n_positions // 2)
    return f"""```python
from transformers import pipeline

generate = pipeline("text-generation", {_FOLDER}, trust_remote_code=True)
print(generate("The", max_new_tokens={new_tokens})[0]["generated_text"])
```

Or step by step:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({_FOLDER}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({_FOLDER}, trust_remote_code=True)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={new_tokens})[0]))
```

{_PACKAGE}"""


def _results(facts: RunFacts, scores: list[Score], curves: bool) -> str:
    picture = "\n![Loss against tokens](curves.png)" if curves else ""
    if not scores:
        return f"The model has not been evaluated yet.\n{picture}"
    references = [reference for score in scores for reference in score.references]
    rows = [["Model", *map(_column, scores)], ["---", *("---:" for _ in scores)]]
    rows.append(["**This model**", *(f"**{score.result.metric_value:.4f}**" for score in scores)])
    for size in (size for size in SIZES if any(reference.size == size for reference in references)):
        openai = [{one.size: f"{one.value:.4f}" for one in score.references}.get(size, "") for score in scores]
        rows.append([f"OpenAI GPT-2 {size}", *openai])
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n"
    text += "".join(
        f"- {score.short_name}: {score.result.dataset_name}, {score.result.metric_name}\n" for score in scores
    )
    steps = [f"The validation loss is of step {facts.val_step:,}."] if facts.val_step is not None else []
    if facts.task_results is not None:
        steps.append(f"The tasks were evaluated after step {facts.task_results.step:,}.")
    text += f"\n{' '.join(steps)}\n" if steps else ""
    if references:
        sources = "; ".join(sorted({reference.source for reference in references}))
        text += f"\nOpenAI's results are for the same text and protocol; sources: {sources}.\n"
    if facts.gzip_bits_per_byte is not None:
        text += f"\n`gzip -9` needs {facts.gzip_bits_per_byte:.4f} bits per byte for the held-out text.\n"
    return text + picture


def _column(score: Score) -> str:
    """Return the heading of a metric's column; the arrow points to better values."""
    return f"{score.short_name} {'↓' if score.result.metric_type in _LOWER_IS_BETTER else '↑'}"


def _samples(facts: RunFacts) -> str:
    if not facts.samples:
        return "There are no samples yet."
    samples = (f"```text\n{sample.strip().replace('```', '` ` `')}\n```" for sample in facts.samples)
    how = f"Each sample starts with its prompt (temperature {TEMPERATURE}, top-k {TOP_K})."
    return "\n\n".join([how, *samples])


def _training(recipe: Recipe, facts: RunFacts, config: PreTrainedConfig) -> str:
    tokenizer = f"a byte-level BPE, {config.vocab_size:,} tokens"
    if recipe.tokenizer == "gpt2":
        tokenizer = "GPT-2's byte-level BPE"
    elif recipe.tokenizer.startswith("train:"):
        tokenizer = f"a byte-level BPE trained on this corpus, {config.vocab_size:,} tokens"
    lines = [f"- Hardware: {', then '.join(facts.hardware)}"] if facts.hardware else []
    lines += [f"- Tokens: {facts.tokens:,} in {_count(facts.steps, 'step')}", f"- Tokenizer: {tokenizer}"]
    if facts.software:
        lines.append(f"- Software: gpt2-scratch with {facts.software}")
    if facts.seconds is not None:
        rate = f"{facts.tokens / facts.seconds:,.0f} tokens/s"
        lines.append(
            f"- Time: {format_duration(facts.seconds)} of training steps ({rate}), without evaluation and checkpoints"
        )
    rows = [
        f"| `{key}` | {value} |" for key, value in recipe.values_with(on_card=True).items() if value not in (None, [])
    ]
    table = ["| Recipe key | Value |", "| --- | --- |", *rows]
    return "\n".join([*lines, "", "<details><summary>Recipe</summary>", "", *table, "", "</details>"])


def _limits(recipe: Recipe, provenance: Provenance) -> str:
    text = _LIMITS.get(provenance.corpus or "", _OTHER_LIMITS)
    if recipe.init_from is not None:
        text += "\nIt also inherits what its base model learned."
    return f"""This is a base model: it continues a text with what is likely, not with what is true. It was not
trained to be safe, polite or helpful. Do not use it unsupervised in public, or to make decisions about people.

{text}"""
