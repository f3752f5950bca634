"""Settings of `accelerate launch`, from flags or its config file: they are used, or refused with the recipe's key.

accelerate passes its settings on in the environment. Without DeepSpeed it drops two flags, `--gradient_clipping` and
`--gradient_accumulation_steps`. These are read from its command line, so that they are not ignored silently.
"""

import os
from pathlib import Path

import psutil

from common.cli_errors import InputError
from training.recipe import Recipe

_DROPPED_FLAGS = ("gradient_accumulation_steps", "gradient_clipping")

# Environment variable -> accepted values and, if there are others, what to do.
_ACCEPTED = {
    "ACCELERATE_USE_DEEPSPEED": ("false", "to shard a model, use accelerate_configs/fsdp2_8xa100.yaml"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "to shard a model, use accelerate_configs/fsdp2_8xa100.yaml"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "to shard a model, use accelerate_configs/fsdp2_8xa100.yaml"),
    "ACCELERATE_MIXED_PRECISION": ("no bf16 fp16", "set the recipe key mixed_precision to bf16, fp16 or no"),
    "ACCELERATE_DYNAMO_BACKEND": ("no inductor", "set the recipe key compile: true"),
    "ACCELERATE_DYNAMO_MODE": ("default", "set only the recipe key compile: true"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ("false", "set only the recipe key compile: true"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ("false", "set only the recipe key compile: true"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": ("false", "set only the recipe key compile: true"),
}
_AS_IN_OURS = "use accelerate_configs/fsdp2_8xa100.yaml"
_ACCEPTED_WITH_FSDP = {
    "FSDP_VERSION": ("2", _AS_IN_OURS),
    "FSDP_AUTO_WRAP_POLICY": ("transformer_based_wrap", _AS_IN_OURS),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("gpt2scratchblock", _AS_IN_OURS),
    "FSDP_STATE_DICT_TYPE": ("full_state_dict", _AS_IN_OURS),
    "FSDP_IGNORED_MODULES": ("none", _AS_IN_OURS),
    "FSDP_OFFLOAD_PARAMS": ("false", "to save memory, set the recipe key activation_checkpointing: true"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "set the recipe key activation_checkpointing: true"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false", "set only the recipe key activation_checkpointing: true"),
}


def check_launcher(recipe: Recipe) -> None:
    """Raise an `InputError` for a setting of `accelerate launch` that would be ignored, or contradicts the recipe."""
    accepted = _ACCEPTED | (_ACCEPTED_WITH_FSDP if uses_fsdp() else {})
    for variable, (values, way_out) in accepted.items():
        default = "1" if variable == "FSDP_VERSION" else values.split()[0]
        value = os.environ.get(variable, default)
        if value.lower() not in values.split():
            name = variable.removeprefix("ACCELERATE_").removeprefix("USE_").lower()
            found = name if value.lower() == "true" else f"{name} {value}"
            raise InputError(f"accelerate launch asks for {found}, which this kit does not support; {way_out}")
    asked_precision = requested_precision()
    if asked_precision and recipe.mixed_precision not in ("auto", asked_precision):
        raise _conflict(f"mixed_precision {asked_precision}", f"mixed_precision: {recipe.mixed_precision}")
    if requests_compile() and recipe.compile is False:
        raise _conflict("dynamo_backend inductor", "compile: false")
    flags = _dropped_flags()
    clipping = flags.get("gradient_clipping")
    if clipping not in (None, str(recipe.max_grad_norm), f"{recipe.max_grad_norm:g}"):
        raise _conflict(f"gradient_clipping {clipping}", f"max_grad_norm: {recipe.max_grad_norm}")
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", flags.get("gradient_accumulation_steps"))
    if accumulation is not None:
        raise InputError(
            f"accelerate launch asks for gradient_accumulation_steps {accumulation}, but this follows from the recipe "
            "keys tokens_per_step and per_device_train_batch_size; set these instead"
        )


def uses_fsdp() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def requested_precision() -> str | None:
    """The launcher's mixed precision, or None: "no" is also what it passes on if nobody asked for one."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if precision == "no" else precision


def requests_compile() -> bool:
    """Whether the launcher asks for `torch.compile`."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() == "inductor"


def _conflict(asked: str, recipe: str) -> InputError:
    return InputError(f"accelerate launch asks for {asked}, but the recipe has {recipe}; change one of them")


def _dropped_flags() -> dict[str, str]:
    """The flags of `accelerate launch` that it does not pass on, from the command line of the process above."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return {}
    if not any(Path(word).name.startswith("accelerate") for word in words[:4]):
        return {}
    found = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.endswith(".py"):  # what follows are flags of the script
            break
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and (name := name.replace("-", "_")) in _DROPPED_FLAGS:
            found[name] = value if equals else following
    return found
