"""The page of a model folder: README.md, the card that the Hub shows."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from training.recipe import Recipe

_HUB_DATASETS = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}


@dataclass(frozen=True)
class RunFacts:
    """What a finished run knows about itself."""

    name: str
    parameters: int
    steps: int
    tokens: int
    device: str
    val_loss: float
    bits_per_byte: float
    gzip_bits_per_byte: float
    samples: list[str]


def write_model_card(folder: Path, recipe: Recipe, facts: RunFacts, config: PreTrainedConfig) -> None:
    """Write `folder/README.md`: metadata for the Hub, how to load the model, its results, recipe and samples."""
    dataset = _HUB_DATASETS.get(recipe.corpus)
    data = ModelCardData(
        language="en",
        license="mit",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "gpt2_scratch"],
        datasets=[dataset] if dataset else None,
        # A folder is no name that the Hub could link.
        base_model=recipe.init_from if recipe.init_from and not Path(recipe.init_from).exists() else None,
    )
    samples = "\n\n".join(f"```text\n{sample.strip()}\n```" for sample in facts.samples)
    corpus = recipe.corpus if not Path(recipe.corpus).exists() else f"local files ({Path(recipe.corpus).name})"
    corpus += f" ({recipe.corpus_config})" if recipe.corpus_config else ""
    # Paths of the machine are nobody's business.
    local = {"output_dir", "data_dir", "corpus", "tokenizer", "init_from", "resume_from_checkpoint", "sample_prompts"}
    shown = {key: value for key, value in recipe.to_dict().items() if key not in local and value is not None}
    knobs = "\n".join(f"| `{key}` | {value} |" for key, value in shown.items())
    content = f"""---
{data.to_yaml()}
---

# {facts.name}

A GPT-2 with {facts.parameters / 1e6:.1f}M parameters ({config.n_layer} layers, {config.n_head} heads, width
{config.n_embd}), trained from {"scratch" if recipe.init_from is None else "an earlier model"} on {corpus}:
{facts.steps:,} steps of {recipe.tokens_per_step:,} tokens, {facts.tokens:,} tokens in all, on {facts.device}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

With the `gpt2-scratch` package installed, `import gpt2_scratch` takes the place of `trust_remote_code=True`.

## Results

| On held-out text of the same corpus | |
| --- | --- |
| loss, nats per token | {facts.val_loss:.4f} |
| bits per byte | {facts.bits_per_byte:.4f} |
| `gzip -9` on the same text, bits per byte | {facts.gzip_bits_per_byte:.4f} |

![Loss against tokens](curves.png)

## Samples

{samples}

## Recipe

| key | value |
| --- | --- |
{knobs}

## Limits

A base model: it continues text, with the facts, gaps and biases of its corpus, and nothing was done to make it safe or
truthful.
"""
    ModelCard(content).save(folder / "README.md")
