"""A run's recipe: one frozen dataclass with every setting, read from YAML and from flags.

Each field is a key of `training/recipes/*.yaml` and a flag of `training/train.py`, and declares everything about
itself: type, default, help, bounds, group, and whether the card shows it and nodes may differ. Names are those of
`transformers.TrainingArguments` and `GPT2Config` where these have the same setting.

Validation is our own because no library makes this file shorter: pydantic and jsonargparse reject `1e6` for an
integer, report an error over several lines, suggest no name and take 0.15 to 0.25 s to import; huggingface_hub's
`@strict` converts nothing and does not check frozen dataclasses.
"""

import dataclasses
import re
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from common.atomic_files import write_atomically
from common.cli_errors import InputError, did_you_mean
from common.typed_values import convert
from evaluation.tasks.registry import task_named
from training.settings import BOUNDS, local, off_card, setting
from training.strict_yaml import read_yaml

RECIPES = Path(__file__).parent / "recipes"
QUICKSTART = RECIPES / "quickstart.yaml"
LENGTHS = ("max_steps", "num_train_epochs", "max_tokens")
SIZES = {"n_layer": 12, "n_head": 12, "n_embd": 768}  # of a model without init_from, by default
Schedule = Literal["cosine", "linear", "constant", "warmup_stable_decay"]
OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a run; an `InputError` names the key, the invalid value and what is valid."""

    output_dir: str = local("run folder: checkpoints, logs, curves, final model")

    # data
    data_dir: str = local("shard folder; filled from the corpus if incomplete")
    corpus: str = local(
        "installed-docs, fineweb, fineweb-edu, a file or folder (text, jsonl, parquet), or a Hub dataset as owner/name",
        group="data",
    )
    corpus_config: str | None = off_card("config of a Hub corpus, e.g. sample-10BT", None, group="data")
    text_field: str = off_card("text column of jsonl, parquet and Hub corpora", "text", group="data")
    document_separator: str | None = off_card(
        r"what separates documents in text files: a line, a text with line breaks such as '\n\n', or none",
        "<|endoftext|>",
        group="data",
    )
    encoding: str | None = off_card("encoding of text without a byte-order mark (default: UTF-8)", None, group="data")
    tokenizer: str = local("gpt2, train:VOCAB_SIZE, a folder with a tokenizer, or a Hub id", "gpt2", group="data")
    split_special_tokens: bool = off_card(
        "encode special tokens that the corpus spells, such as <|endoftext|>, as plain text", True, group="data"
    )
    # Shards are held in memory, hence the limit.
    shard_tokens: int = off_card("tokens per training shard", 100_000_000, group="data", at_least=1, at_most=10**9)
    val_tokens: int | None = off_card(
        "tokens in the validation shard (default: shard_tokens)", None, group="data", more_than=0, at_most=10**9
    )
    # A window of one token has no context, and a model of one position cannot continue a text.
    seq_len: int = setting("tokens per training window", 1024, group="data", at_least=2)
    seq_len_warmup_steps: int = setting(
        "steps with shorter sequences: windows are cut into quarters, and after half of them into halves",
        0,
        at_least=0,
    )
    tokens_per_step: int = setting("tokens per optimizer step, over all processes", 524_288, group="data", at_least=1)
    seed: int = setting(
        "seed of weight initialization, dropout and data order", 1337, group="data", at_least=0, less_than=2**32
    )

    # model
    n_layer: int | None = setting(
        "number of transformer blocks (default: 12, or init_from's)", None, group="model", at_least=1, at_most=10_000
    )
    n_head: int | None = setting("attention heads (default: 12, or init_from's)", None, group="model", at_least=1)
    n_embd: int | None = setting("hidden size (default: 768, or init_from's)", None, group="model", at_least=1)
    n_positions: int | None = setting("maximum sequence length (default: seq_len)", None, group="model", more_than=0)
    init_from: str | None = local("model folder or Hub id to start from instead of random weights", None, group="model")
    dropout: float = setting("dropout of embeddings, attention and residuals", 0.0, at_least=0, less_than=1)
    document_mask: bool = setting("no attention across documents; positions restart at each", False, group="model")
    attn_implementation: str = setting(
        "sdpa, eager, flex_attention, flash_attention_2 or _3, or a kernel of the Hub by its name", "sdpa"
    )

    # optimization
    optimizer: OptimizerName = setting(
        "adamw, or muon for the blocks' matrices and adamw for the rest", "adamw", group="model"
    )
    per_device_train_batch_size: int | Literal["auto"] = setting(
        "sequences per forward pass on one device; auto for the most that fit into memory", 8, at_least=1
    )
    max_steps: int | None = setting("run length in optimizer steps", None, more_than=0)
    num_train_epochs: float | None = setting(
        "run length in passes over the training shards", None, more_than=0, at_most=10**5
    )
    max_tokens: int | None = setting("run length in tokens", None, more_than=0)
    learning_rate: float = setting(
        "peak learning rate; with muon, of block matrices", by_optimizer={"adamw": 6e-4, "muon": 0.02}, more_than=0
    )
    embedding_learning_rate: float | None = setting(
        "peak learning rate of embeddings; try 0.02 * 256 / n_embd", by_optimizer={"muon": 6.7e-3}, more_than=0
    )
    norm_learning_rate: float | None = setting(
        "peak learning rate of biases and layer norms", by_optimizer={"muon": 4e-3}, more_than=0
    )
    min_learning_rate_ratio: float = setting(
        "final learning rate as a fraction of the peak", 0.1, at_least=0, at_most=1
    )
    warmup_steps: int = setting("steps of linear warmup", 715, at_least=0)
    lr_scheduler_type: Schedule = setting("schedule after the warmup", "cosine")
    decay_steps: int | None = setting(
        "final steps in which warmup_stable_decay decays (default: a fifth of the run)", None, more_than=0
    )
    weight_decay: float = setting(
        "decoupled weight decay of matrices, and with adamw of embeddings",
        by_optimizer={"adamw": 0.1, "muon": 0.01},
        at_least=0,
    )
    muon_momentum: float | None = setting("momentum of muon", by_optimizer={"muon": 0.95}, at_least=0, less_than=1)
    muon_momentum_warmup_steps: int | None = setting(
        "steps in which the momentum of muon rises from 0.85", by_optimizer={"muon": 300}, at_least=0
    )
    adam_beta1: float = setting("beta1 of AdamW", by_optimizer={"adamw": 0.9, "muon": 0.8}, at_least=0, less_than=1)
    adam_beta2: float = setting("beta2 of AdamW", by_optimizer={"adamw": 0.95, "muon": 0.99}, at_least=0, less_than=1)
    adam_epsilon: float = setting("epsilon of AdamW", 1e-8, more_than=0)
    max_grad_norm: float = setting("maximum gradient norm, for clipping; 0 disables it", 1.0, at_least=0)
    max_skipped_steps: int = off_card("consecutive skipped updates after which the run aborts", 10, at_least=1)
    spike_threshold: float = setting(
        "a loss is a spike this many standard deviations above the mean of the last spike_window losses; 0 disables it",
        6.0,
        at_least=0,
    )
    spike_window: int = setting("number of losses that a spike is measured against", 128, at_least=2, at_most=10**6)
    skip_spikes: bool = setting("skip the update of a spike instead of only logging it", False)

    # monitoring
    logging_steps: int = off_card("steps between lines of metrics.jsonl", 10, at_least=1)
    eval_steps: int = off_card("steps between validations; 0: only at the end", 250, at_least=0)
    eval_tokens: int = setting("tokens of the validation shard scored per validation", 10_485_760, at_least=1)
    eval_tasks: list[str] = off_card("tasks, e.g. hellaswag or lambada:word; see python -m evaluation.run --list", [])
    eval_task_steps: int = off_card("steps between evaluations on eval_tasks; 0: only at the end", 1000, at_least=0)
    eval_task_limit: int | None = off_card("evaluate only this many items per task", None, more_than=0)
    eval_data_dir: str | None = local("folder with the tasks' raw files (default: downloaded from the Hub)", None)
    sample_steps: int = off_card("steps between samples; 0: only at the end", 250, at_least=0)
    sample_prompts: list[str] = off_card("prompts to continue; an empty one starts a document", ["", "The"])
    sample_tokens: int = off_card("tokens per sample", 48, at_least=1)
    profile_steps: str | None = local("steps to trace with torch.profiler, e.g. 10-12", None)
    report_to: list[Literal["none", "all", "tensorboard", "wandb", "trackio"]] = local(
        "trackers: tensorboard, wandb, trackio, all (those installed) or none", ["none"]
    )

    # checkpoints
    save_steps: int = off_card("steps between checkpoints; 0: only at the end", 1000, at_least=0)
    save_minutes: float | None = off_card("minutes between checkpoints, in addition to save_steps", None, more_than=0)
    save_total_limit: int | None = off_card("number of checkpoints to keep; null keeps all", 2, more_than=0)
    save_keep_every: int | None = off_card(
        "also keep checkpoints at multiples of this step, in addition to save_total_limit", None, more_than=0
    )
    async_save: bool = off_card("write checkpoints in the background, from a copy in host memory", True)
    resume_from_checkpoint: str = local("auto (newest of output_dir), none, or a checkpoint folder", "auto")

    # publishing
    push_to_hub: bool = local("push to the Hub while training, with HF_TOKEN or the stored login", False)
    hub_model_id: str | None = local("repository as owner/name (default: the name of output_dir)", None)
    hub_private_repo: bool = local("create the repository as private", False)
    hub_strategy: Literal["end", "every_save", "checkpoint"] = local(
        "push at the end, every checkpoint, or every checkpoint with its training state as last-checkpoint/",
        "every_save",
    )

    # hardware
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = setting(
        "auto uses bf16 if the hardware supports it, or else fp16 on a GPU", "auto"
    )
    compile: bool | Literal["auto"] = setting(
        "use torch.compile; auto compiles on a GPU if the run has 1,000 steps or more", "auto"
    )
    activation_checkpointing: bool = setting("recompute activations in the backward pass to save memory", False)
    dataloader_num_workers: int = off_card(
        "processes that read batches ahead; 0 reads in the training process",
        0,
        per_node=True,
        at_least=0,
        at_most=1024,
    )
    preprocessing_num_workers: int | None = off_card(
        "processes that tokenize in the background (default: the cores that training leaves free)",
        None,
        per_node=True,
        at_least=0,
        at_most=1024,
    )

    def __post_init__(self) -> None:
        for name, size in SIZES.items():
            if getattr(self, name) is None and self.init_from is None:
                object.__setattr__(self, name, size)
        for name, defaults in _by_optimizer().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults.get(self.optimizer))
            elif self.optimizer not in defaults:
                raise InputError(
                    f"recipe key {name} is for optimizer {' or '.join(defaults)}, not {self.optimizer}; "
                    "remove it, or change optimizer"
                )
        for key in dataclasses.fields(self):
            value, bounds = getattr(self, key.name), key.metadata["bounds"]
            if isinstance(value, int | float) and not all(BOUNDS[b][0](value, limit) for b, limit in bounds.items()):
                valid = " and ".join(BOUNDS[bound][1].format(limit) for bound, limit in bounds.items())
                raise InputError(f"recipe key {key.name}: expected {valid}, found {value:,}")
        if self.output_dir.startswith("-"):
            raise InputError(
                f"recipe key output_dir: {self.output_dir} begins with a dash, which commands read as a flag; "
                "give its full path, or choose another name"
            )
        if self.profile_steps is not None and not profiled_steps(self.profile_steps):
            raise InputError(
                f"recipe key profile_steps: expected FIRST-LAST, such as 10-12, found {self.profile_steps}"
            )
        for name in self.eval_tasks:
            try:
                task_named(name)
            except InputError as error:
                raise InputError(f"recipe key eval_tasks: {error}") from None
        if self.decay_steps is not None and self.lr_scheduler_type != "warmup_stable_decay":
            raise InputError(
                f"recipe key decay_steps has no effect with lr_scheduler_type {self.lr_scheduler_type}; "
                "remove it, or set lr_scheduler_type to warmup_stable_decay"
            )
        lengths = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(lengths) != 1:
            found = " and ".join(lengths) or "none of them"
            raise InputError(f"the recipe needs exactly one of {', '.join(LENGTHS)}; found {found}")
        if self.n_embd is not None and self.n_head is not None and self.n_embd % self.n_head:
            raise InputError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; change one of them")
        if self.seq_len_warmup_steps and self.seq_len % 4:
            raise InputError(
                f"seq_len_warmup_steps cuts windows into quarters, but seq_len={self.seq_len:,} is not divisible by 4; "
                "change seq_len, or remove seq_len_warmup_steps"
            )
        if self.seq_len > self.positions:
            raise InputError(
                f"seq_len={self.seq_len:,} exceeds n_positions={self.positions:,}; "
                "shorten seq_len, or train with more positions"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the model that the recipe names; with `init_from`, it may leave them to that model."""
        return {name: size for name in SIZES if (size := getattr(self, name)) is not None}

    @property
    def positions(self) -> int:
        """Positions of the model."""
        return self.seq_len if self.n_positions is None else self.n_positions

    @property
    def validation_shard_tokens(self) -> int:
        """Tokens in the validation shard."""
        return self.shard_tokens if self.val_tokens is None else self.val_tokens

    def to_dict(self) -> dict[str, Any]:
        """Keys and values, in the order of the fields."""
        return dataclasses.asdict(self)

    def values_with(self, **metadata: bool | None) -> dict[str, Any]:
        """The values of settings with this `on_card`, `per_node` or `group`."""
        fields = [key for key in dataclasses.fields(self) if metadata.items() <= key.metadata.items()]
        return {key.name: getattr(self, key.name) for key in fields}

    def save(self, path: Path) -> None:
        """Write the recipe as YAML, which `load_recipe` reads back to an equal one."""
        write_atomically(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    def differences_from(self, earlier: Mapping[str, Any]) -> list[str]:
        """`key: then → now` for each difference from the keys of an earlier run that makes this another run."""
        left_to_model = SIZES.keys() - self.sizes.keys()  # earlier versions wrote sizes that had no effect
        if earlier:  # earlier versions had only AdamW, and no key for it
            earlier = {"optimizer": "adamw", **earlier}
        identity = {key.name for key in dataclasses.fields(self) if key.metadata["group"]}
        return self.changes_from(earlier, identity - left_to_model)

    def changes_from(self, earlier: Mapping[str, Any], names: Collection[str]) -> list[str]:
        """`key: then → now` for each of these keys that an earlier recipe has with another value."""
        return [
            f"{name}: {earlier[name]} → {now}"
            for name, now in self.to_dict().items()
            if name in names and name in earlier and earlier[name] != now
        ]


def _by_optimizer() -> dict[str, Mapping[str, Any]]:
    """Keys whose default depends on the optimizer, and the defaults of the optimizers that have them."""
    keys = dataclasses.fields(Recipe)
    return {key.name: key.metadata["by_optimizer"] for key in keys if "by_optimizer" in key.metadata}


def profiled_steps(text: str) -> range:
    """The steps in "10-12" or "10", counted from 1 as in the logs; empty if the text is invalid."""
    found = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    return range(first, last + 1) if first else range(0)


def field_types() -> dict[str, Any]:
    """The recipe's keys and their types."""
    return typing.get_type_hints(Recipe)


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, with `overrides` from flags.

    Raises:
        InputError: the file is missing or not YAML, a key is unknown, or a value is invalid.
    """
    try:
        loaded = read_yaml(path, "recipe")
    except FileNotFoundError:
        known = ", ".join(sorted(str(recipe.relative_to(RECIPES.parent.parent)) for recipe in RECIPES.glob("*.yaml")))
        raise InputError(f"no recipe at {path}; the included ones are {known}") from None
    overrides = overrides or {}
    if any(name in overrides for name in LENGTHS):  # a length from a flag replaces that of the file
        loaded = {key: value for key, value in loaded.items() if key not in LENGTHS}
    if overrides.get("optimizer", loaded.get("optimizer", "adamw")) != loaded.get("optimizer", "adamw"):
        # An optimizer from a flag brings its own defaults: the file's values are for the other one.
        loaded = {key: value for key, value in loaded.items() if key not in _by_optimizer()}
    kinds = field_types()
    if convert("recipe key init_from", kinds["init_from"], overrides.get("init_from")) is not None:
        # A model from a flag brings its own sizes: the file's are for another one.
        loaded = {key: value for key, value in loaded.items() if key not in SIZES}
    values = {**loaded, **overrides}
    for key in values:
        if key not in kinds:
            raise InputError(f"unknown recipe key {key!r} in {path}{did_you_mean(str(key), kinds)}")
    missing = [
        key.name
        for key in dataclasses.fields(Recipe)
        if key.default is key.default_factory is dataclasses.MISSING and key.name not in values
    ]
    if missing:
        raise InputError(f"recipe {path} lacks {', '.join(missing)}; add the key, or give it as a flag")
    return Recipe(**{key: convert(f"recipe key {key}", kinds[key], value) for key, value in values.items()})
