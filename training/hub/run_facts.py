"""What a run's files tell of it: the last figures, the hours, the tokens."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from safetensors import safe_open

from common.atomic_files import write_atomically
from evaluation.results.references import one_per_size, published
from training.data.shards.manifest import Manifest
from training.data.sources.base import HUB_CORPORA, INSTALLED_DOCS, corpus_name
from training.data.sources.open_corpus import is_repository_id
from training.hub.card import LOCAL_FILES, RunFacts, Score, hardware_words
from training.monitoring.run_log import read_metrics, read_samples
from training.monitoring.task_evaluation import latest_results
from training.recipe import Recipe

_DIGITS_OF_A_COMMIT = 40
_STARTS = ".starts.jsonl"  # what each start of a run took its steps on

# What a task's items are called on the Hub, and in words.
_DATASETS = {
    "hellaswag": ("Rowan/hellaswag", "HellaSwag"),
    "lambada": ("EleutherAI/lambada_openai", "LAMBADA"),
    "cbt_cn": ("cam-cst/cbt", "Children's Book Test, common nouns"),
    "cbt_ne": ("cam-cst/cbt", "Children's Book Test, named entities"),
    "wikitext2": ("Salesforce/wikitext", "WikiText-2"),
}


def run_facts(
    recipe: Recipe,
    output_dir: Path,
    *,
    steps: int,
    parameters: int,
    device: str | None = None,
    devices: int = 1,
    gzip_bits_per_byte: float | None = None,
    samples: list[str] | None = None,
) -> RunFacts:
    """What is known of a run after so many steps.

    Args:
        recipe: of the run.
        output_dir: its folder, with metrics.jsonl.
        steps: taken.
        parameters: of the model.
        device, devices: what it runs on; as its last start noted it when None.
        gzip_bits_per_byte: of the validation text, where that was measured.
        samples: drawn last; those of samples.txt when none are given.
    """
    lines = [line for line in read_metrics(output_dir) if line["step"] <= steps]
    starts = _starts(output_dir, before=steps)
    if device is None and starts:
        device, devices = starts[-1]["device"], starts[-1]["devices"]
    validation: dict[str, Any] = next((line for line in reversed(lines) if "val_loss" in line), {})
    return RunFacts(
        name=(recipe.hub_model_id or output_dir.resolve().name).split("/")[-1],
        parameters=parameters,
        steps=steps,
        tokens=steps * recipe.tokens_per_step,
        device=device,
        devices=devices,
        seconds=training_seconds([line for line in lines if "train_loss" in line]),
        val_loss=validation.get("val_loss"),
        bits_per_byte=validation.get("bits_per_byte"),
        val_step=validation.get("step"),
        earlier_hardware=_earlier_hardware(starts, device, devices),
        gzip_bits_per_byte=gzip_bits_per_byte,
        samples=samples or read_samples(output_dir, up_to=steps),
        gpt2_tokens=recipe.tokenizer == "gpt2",
        scores=task_scores(output_dir, steps),
        corpus=known_corpus(recipe),
        base_model=known_base(recipe.init_from),
    )


def note_start(output_dir: Path, step: int, device: str, devices: int) -> None:
    """Note what a run takes its steps on from `step` on; starts whose steps are taken anew are forgotten."""
    lines = [*_starts(output_dir, before=step), {"step": step, "device": device, "devices": devices}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(output_dir / _STARTS, text)


def _starts(output_dir: Path, *, before: int) -> list[dict[str, Any]]:
    path = output_dir / _STARTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [start for start in map(json.loads, lines) if start["step"] < before]


def _earlier_hardware(starts: list[dict[str, Any]], device: str | None, devices: int) -> tuple[str, ...]:
    """What starts ran on before the last, in words, as far as it differs from `devices` of `device`."""
    words = [hardware_words(start["device"], start["devices"]) for start in starts]
    if starts and starts[0]["step"]:  # in another folder, or before it was noted
        words.insert(0, "hardware that nobody noted")
    if device is None or set(words) <= {hardware_words(device, devices)}:
        return ()
    words.append(hardware_words(device, devices))
    return tuple(one for one, after in itertools.pairwise(words) if one != after)


def known_corpus(recipe: Recipe) -> str | None:
    """What the recipe's shards are of, by their manifest; see `RunFacts.corpus`.

    The recipe alone does not tell: `data/texts` may be a dataset or a folder, the folder may be gone, and shards of
    another program are of whatever they are of. The revision does: a commit of the Hub has 40 digits, and a hash of
    files has 64.
    """
    manifest = Manifest.read(Path(recipe.data_dir))
    if manifest is None or manifest.corpus != corpus_name(recipe.corpus):
        return None
    if recipe.corpus == INSTALLED_DOCS:
        return INSTALLED_DOCS
    is_of_the_hub = len(manifest.corpus_revision) == _DIGITS_OF_A_COMMIT
    has_an_id = recipe.corpus in HUB_CORPORA or is_repository_id(recipe.corpus)
    return recipe.corpus if is_of_the_hub and has_an_id else LOCAL_FILES


def known_base(init_from: str | None) -> str | None:
    """The Hub's id of a model to start from, where it surely is one: OpenAI's, or one that was downloaded here."""
    if init_from is None or not is_repository_id(init_from) or Path(init_from).exists():
        return None
    cached = Path(constants.HF_HUB_CACHE) / f"models--{init_from.replace('/', '--')}"
    return init_from if init_from.startswith("openai-community/") or cached.is_dir() else None


def task_scores(output_dir: Path, steps: int) -> list[Score]:
    """The newest figures of the run's evaluation tasks, each with its protocol."""
    results = latest_results(output_dir, up_to=steps)
    if results is None:
        return []
    scores = []
    for result in results.tasks:
        task, _, protocol = result.task.partition(":")
        kind, dataset = _DATASETS.get(task, ("text", task))
        items = f", first {result.items:,} items" if results.limit else ""
        for name, measured in result.figures.items():
            if math.isfinite(measured.value):
                # Published figures are of all items.
                references = () if results.limit else tuple(one_per_size(published(result.task, name)).values())
                what = f"{name}, protocol `{protocol}`{items}, after step {results.step:,}"
                scores.append(Score(measured.metric, what, measured.value, kind, dataset, references))
    return scores


def training_seconds(lines: list[dict[str, float]]) -> float | None:
    """Seconds of training steps by logged lines of a run's metrics, each with its tokens so far and its rate.

    A run that went on elsewhere, or that was stopped in between, counts the seconds that it worked.
    """
    seconds, tokens = 0.0, 0.0
    for line in lines:
        if line.get("tokens_per_second"):
            seconds += (line["tokens"] - tokens) / line["tokens_per_second"]
        tokens = line["tokens"]
    return seconds or None


def count_parameters(model: Path) -> int:
    """Parameters in a model folder, by the headers of its weights; tied ones stand there once."""
    count = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            count += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return count
