"""A run's recipe: one frozen dataclass that holds every knob, read from YAML and from flags.

Every field is a key of `training/recipes/*.yaml` and a flag of `training/train.py`. Names are those of
`transformers.TrainingArguments` and `GPT2Config` where these have the same thing.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from common.atomic_files import write_atomically
from common.cli_errors import InputError
from common.suggestions import did_you_mean
from evaluation.tasks.registry import task_named

RECIPES = Path(__file__).parent / "recipes"
QUICKSTART = RECIPES / "quickstart.yaml"
LENGTHS = ("max_steps", "num_train_epochs", "max_tokens")


def knob(help_text: str, default: Any = dataclasses.MISSING, *, group: str | None = None) -> Any:
    """A field with its line of documentation, which is also the flag's help.

    Fields of the groups "data" and "model" are the run's identity: a resumed run may not change them.
    """
    metadata = {"help": help_text, "group": group}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every knob of a run, checked on construction.

    Raises:
        InputError: a value that cannot be; the message names the key, what was found and what would do.
    """

    output_dir: str = knob("folder of the run: checkpoints, logs, curves and the final model")

    # data
    data_dir: str = knob("shard folder; filled from the corpus when it is not complete")
    corpus: str = knob(
        "installed-docs, fineweb, fineweb-edu, a file or folder (text, jsonl, parquet), or a Hub dataset as owner/name",
        group="data",
    )
    corpus_config: str | None = knob("configuration of a Hub corpus, such as sample-10BT", None, group="data")
    text_field: str = knob("column that holds the text in jsonl, parquet and Hub corpora", "text", group="data")
    tokenizer: str = knob("gpt2, train:VOCAB_SIZE, or a folder with tokenizer.json", "gpt2", group="data")
    shard_tokens: int = knob("tokens in a training shard", 100_000_000, group="data")
    val_tokens: int | None = knob("tokens in the validation shard; shard_tokens when not given", None, group="data")
    seq_len: int = knob("tokens in a training window", 1024, group="data")
    tokens_per_step: int = knob("tokens of an optimizer step over all processes", 524_288, group="data")
    seed: int = knob("seed of the initial weights, of dropout and of the data order", 1337, group="data")

    # model
    n_layer: int = knob("transformer blocks", 12, group="model")
    n_head: int = knob("attention heads", 12, group="model")
    n_embd: int = knob("width of the residual stream", 768, group="model")
    n_positions: int | None = knob("longest sequence the model can take; seq_len when not given", None, group="model")
    init_from: str | None = knob("model folder or Hub id to start from instead of random weights", None, group="model")
    dropout: float = knob("dropout of embeddings, attention and residual branches", 0.0)
    document_mask: bool = knob("no attention across documents, positions restart at each one", False, group="model")
    attn_implementation: str = knob("attention: eager, sdpa, flash_attention_2 or flex_attention", "sdpa")

    # optimization
    optimizer: Literal["adamw"] = knob("optimizer", "adamw", group="model")
    per_device_train_batch_size: int | Literal["auto"] = knob(
        "sequences in one forward pass on one device, or auto for the most that fit", 8
    )
    max_steps: int | None = knob("length of the run in optimizer steps", None)
    num_train_epochs: float | None = knob("length of the run in passes over the training shards", None)
    max_tokens: int | None = knob("length of the run in tokens", None)
    learning_rate: float = knob("peak learning rate", 6e-4)
    min_learning_rate_ratio: float = knob("last learning rate as a fraction of the peak", 0.1)
    warmup_steps: int = knob("steps of linear warm-up", 715)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = knob(
        "schedule after the warm-up", "cosine"
    )
    decay_steps: int | None = knob(
        "last steps of warmup_stable_decay, in which the rate falls; a fifth of the run when not given", None
    )
    weight_decay: float = knob("decoupled weight decay of matrices and embeddings", 0.1)
    adam_beta1: float = knob("AdamW's first beta", 0.9)
    adam_beta2: float = knob("AdamW's second beta", 0.95)
    adam_epsilon: float = knob("AdamW's epsilon", 1e-8)
    max_grad_norm: float = knob("gradients are clipped to this norm; 0 for no clipping", 1.0)
    max_skipped_steps: int = knob("updates in a row that may be skipped before the run stops", 10)
    spike_threshold: float = knob(
        "standard deviations above the mean of spike_window losses that make a loss a spike; 0 for none", 6.0
    )
    spike_window: int = knob("losses that a spike is measured against", 128)
    skip_spikes: bool = knob("skip the update of a spike, which is only logged otherwise", False)

    # watching it learn
    logging_steps: int = knob("steps between lines of metrics.jsonl", 10)
    eval_steps: int = knob("steps between validations; 0 for only one at the end", 250)
    eval_tokens: int = knob("tokens of the validation shard that are scored each time", 10_485_760)
    eval_tasks: list[str] = knob("tasks such as hellaswag or lambada:word; python -m evaluation.run --list", [])
    eval_task_steps: int = knob("steps between evaluations on eval_tasks; 0 for only one at the end", 1000)
    eval_task_limit: int | None = knob("only the first so many items of each task; all when not given", None)
    eval_data_dir: str | None = knob("folder with the tasks' raw files; from the Hub when not given", None)
    sample_steps: int = knob("steps between samples; 0 for only one at the end", 250)
    sample_prompts: list[str] = knob("prompts that are continued; an empty one starts a document", ["", "The"])
    sample_tokens: int = knob("tokens in a sample", 48)
    profile_steps: str | None = knob("steps that torch's profiler traces, such as 10-12", None)
    report_to: list[Literal["none", "all", "tensorboard", "wandb", "trackio"]] = knob(
        "trackers that also get the metrics: tensorboard, wandb, trackio, all that are installed, or none", ["none"]
    )

    # going on
    save_steps: int = knob("steps between checkpoints; 0 for only one at the end", 1000)
    save_minutes: float | None = knob("minutes between checkpoints, besides those of save_steps", None)
    save_total_limit: int | None = knob("checkpoints that are kept; all when not given", 2)
    save_keep_every: int | None = knob("checkpoints at multiples of this step are kept besides those", None)
    async_save: bool = knob("write checkpoints beside training, from a copy in host memory", True)
    resume_from_checkpoint: str = knob("auto (the newest of output_dir), none, or a checkpoint folder", "auto")

    # publishing
    push_to_hub: bool = knob("put the weights on the Hub while training; the token is HF_TOKEN's or the login's", False)
    hub_model_id: str | None = knob("repository as owner/name; the name of output_dir when not given", None)
    hub_private_repo: bool = knob("make the repository private, if it does not exist yet", False)
    hub_strategy: Literal["end", "every_save", "checkpoint"] = knob(
        "push at the end, every checkpoint, or every checkpoint with the state to go on from as last-checkpoint/",
        "every_save",
    )

    # the machine
    mixed_precision: Literal["auto", "no", "bf16"] = knob("auto takes bf16 where the hardware has it", "auto")
    compile: bool = knob("torch.compile the model", False)
    activation_checkpointing: bool = knob("recompute activations in the backward pass to save memory", False)
    dataloader_num_workers: int = knob("processes that read batches ahead; 0 reads in the training process", 0)
    preprocessing_num_workers: int | None = knob(
        "processes that tokenise the corpus beside training; the cores that training leaves free when not given", None
    )

    def __post_init__(self) -> None:
        for name in (
            "n_layer",
            "n_head",
            "n_embd",
            "seq_len",
            "tokens_per_step",
            "shard_tokens",
            "logging_steps",
            "eval_tokens",
            "sample_tokens",
            "max_skipped_steps",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "warmup_steps",
            "eval_steps",
            "eval_task_steps",
            "sample_steps",
            "save_steps",
            "dataloader_num_workers",
            "seed",
            "weight_decay",
            "max_grad_norm",
            "spike_threshold",
        ):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        per_device = self.per_device_train_batch_size
        self._require("per_device_train_batch_size", per_device == "auto" or per_device >= 1, "at least 1, or auto")
        for name in (
            *(*LENGTHS, "decay_steps", "val_tokens", "n_positions", "eval_task_limit"),
            *("save_minutes", "save_total_limit", "save_keep_every"),
        ):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "more than 0, or left out")
        for name in self.eval_tasks:
            try:
                task_named(name)
            except InputError as error:
                raise InputError(f"recipe key eval_tasks: {error}") from None
        if self.decay_steps is not None and self.lr_scheduler_type != "warmup_stable_decay":
            raise InputError(
                f"recipe key decay_steps is {self.decay_steps}, but lr_scheduler_type {self.lr_scheduler_type} decays "
                "all the way; leave it out, or take lr_scheduler_type warmup_stable_decay"
            )
        self._require("spike_window", self.spike_window >= 2, "at least 2, or spike_threshold 0 for no watch over it")
        steps = self.profile_steps
        self._require("profile_steps", steps is None or bool(profiled_steps(steps)), "FIRST-LAST, such as 10-12")
        workers = self.preprocessing_num_workers
        self._require("preprocessing_num_workers", workers is None or workers >= 0, "at least 0, or left out")
        for name in ("shard_tokens", "val_tokens"):
            value = getattr(self, name)
            self._require(name, value is None or value <= 10**9, "at most 1,000,000,000; shards are held in memory")
        self._require("seed", self.seed < 2**32, "less than 2**32")
        for name in ("adam_beta1", "adam_beta2", "dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and less than 1")
        self._require("min_learning_rate_ratio", 0 <= self.min_learning_rate_ratio <= 1, "between 0 and 1")
        for name in ("learning_rate", "adam_epsilon"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        lengths = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(lengths) != 1:
            found = " and ".join(lengths) or "none of them"
            raise InputError(f"a run's length is one of {', '.join(LENGTHS)}; found {found}; give one")
        if self.n_embd % self.n_head:
            raise InputError(
                f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads; change one of them"
            )
        if self.seq_len > self.positions:
            raise InputError(
                f"seq_len={self.seq_len:,} exceeds n_positions={self.positions:,}; "
                "shorten the windows, or train with more positions"
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"recipe key {name}: expected {expected}, found {getattr(self, name)}")

    @property
    def positions(self) -> int:
        """Positions of the model: n_positions, or seq_len when that was not given."""
        return self.seq_len if self.n_positions is None else self.n_positions

    @property
    def validation_shard_tokens(self) -> int:
        """Tokens in the validation shard: val_tokens, or shard_tokens when that was not given."""
        return self.shard_tokens if self.val_tokens is None else self.val_tokens

    def to_dict(self) -> dict[str, Any]:
        """Keys and values, in the order of the fields."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write the recipe as YAML, which `load_recipe` reads back to an equal one."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomically(path, text)

    def differences_from(self, earlier: Mapping[str, Any]) -> list[str]:
        """What keeps this recipe from going on where a run with the keys `earlier` stopped: `key: then → now`."""
        return [
            f"{key.name}: {earlier[key.name]} → {getattr(self, key.name)}"
            for key in dataclasses.fields(Recipe)
            if key.metadata["group"] and key.name in earlier and earlier[key.name] != getattr(self, key.name)
        ]


def profiled_steps(text: str) -> range:
    """The steps that "10-12" or "10" names, counted from 1 as everywhere in the logs; empty when it names none."""
    found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    return range(first, last + 1) if first else range(0)


def field_types() -> dict[str, Any]:
    """The recipe's keys and their types."""
    return typing.get_type_hints(Recipe)


def load_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, with `overrides` (flags) on top.

    Raises:
        InputError: no such file, not YAML, an unknown key (the nearest known one is named), a value of the wrong type,
            or values that do not fit together.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(str(recipe.relative_to(RECIPES.parent.parent)) for recipe in RECIPES.glob("*.yaml")))
        raise InputError(f"no recipe at {path}; the project's own are {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise InputError(f"recipe {path} is not YAML{line}; expected lines of `key: value`") from None
    if not isinstance(loaded, dict):
        raise InputError(f"recipe {path} holds no keys; expected lines of `key: value`")
    overrides = overrides or {}
    if any(name in overrides for name in LENGTHS):  # a length that is given as a flag takes the place of the file's
        loaded = {key: value for key, value in loaded.items() if key not in LENGTHS}
    values = {**loaded, **overrides}
    kinds = field_types()
    for key in values:
        if key not in kinds:
            raise InputError(f"unknown recipe key {key!r} in {path}{did_you_mean(str(key), kinds)}")
    missing = [f.name for f in dataclasses.fields(Recipe) if _is_required(f) and f.name not in values]
    if missing:
        raise InputError(f"recipe {path} lacks {', '.join(missing)}; add the key, or give it as a flag")
    return Recipe(**{key: coerce(key, kinds[key], value) for key, value in values.items()})


def _is_required(key: "dataclasses.Field[Any]") -> bool:
    return key.default is dataclasses.MISSING and key.default_factory is dataclasses.MISSING


def coerce(key: str, kind: Any, value: Any) -> Any:
    """`value`, as YAML or a flag gave it, in the type `kind` of a recipe key.

    YAML reads `6e-4` as a string and `no` as False; both mean here what they look like.

    Raises:
        InputError: the value cannot be of that type.
    """
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):  # every union here is `X | None` or `X | Literal[word]`
        first, other = typing.get_args(kind)
        if other is not types.NoneType:
            return value if value in typing.get_args(other) else coerce(key, first, value)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return coerce(key, first, value)
    if origin is Literal:
        value = {False: "no", True: "yes"}.get(value, value) if isinstance(value, bool) else value
        choices = typing.get_args(kind)
        if value not in choices:
            raise InputError(f"recipe key {key}: expected one of {', '.join(choices)}, found {value!r}")
        return value
    if origin is list and typing.get_origin(typing.get_args(kind)[0]) is Literal:
        named = value if isinstance(value, list) else [value]  # one may stand without brackets
        return [coerce(key, typing.get_args(kind)[0], item) for item in named]
    if origin is list:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(f"recipe key {key}: expected a list of strings, found {value!r}")
        return value
    converted = _CONVERTERS[kind](value)
    if converted is None:
        raise InputError(f"recipe key {key}: expected {_SPELLED[kind]}, found {value!r}")
    return converted


def _to_int(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value.replace("_", "") if isinstance(value, str) else value
    if isinstance(text, str) and text.removeprefix("-").isdecimal():
        return int(text)
    number = _to_float(text)  # 1e9 is a whole number too
    return int(number) if number is not None and number == int(number) else None


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(str(value).lower())


def _to_str(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


_CONVERTERS = {int: _to_int, float: _to_float, bool: _to_bool, str: _to_str}
_SPELLED = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
