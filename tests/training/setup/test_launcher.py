"""What `accelerate launch` asks for is obeyed, or refused with the recipe's key; the settings come from accelerate."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from support.paths import ROOT

from common.cli_errors import InputError
from training.loop import train
from training.recipe import Recipe
from training.setup import launcher
from training.setup.accelerator import check_launch, resolve_mixed_precision
from training.setup.launcher import check_launcher
from training.setup.model import compiles
from training.setup.preflight import preflight

Make = Callable[..., Recipe]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the environment that `accelerate launch` gives to the processes it starts."""

    def launch(*flags: str) -> None:
        monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
        given = ["--num_machines", "1"] if "--config_file" not in flags else []
        arguments = _validate_launch_command(launch_command_parser().parse_args([*given, *flags, "train.py"]))[0]
        several = arguments.multi_gpu or arguments.use_fsdp
        environment = prepare_multi_gpu_env(arguments) if several else prepare_simple_launcher_cmd_env(arguments)[1]
        for name, value in environment.items():
            if name.startswith(("ACCELERATE_", "FSDP_")):
                monkeypatch.setenv(name, value)
        words = ["python", "/bin/accelerate", "launch", *flags, "train.py", "--gradient_clipping", "9"]
        monkeypatch.setattr(launcher.psutil.Process, "cmdline", lambda process: words)

    return launch


@pytest.mark.parametrize("config", [None, *CONFIGS], ids=str)
def test_included_configs_and_the_flags_of_make_train_are_accepted(
    config: Path | None, launched: Callable[..., None], tiny_recipe: Make
) -> None:
    make_train = ["--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launched(*(["--config_file", str(config)] if config else make_train))
    check_launcher(tiny_recipe(mixed_precision="auto"))


@pytest.mark.parametrize(
    ("flags", "recipe", "message"),
    [
        ("--mixed_precision fp16", {"mixed_precision": "bf16"}, "mixed_precision fp16, but .* mixed_precision: bf16"),
        ("--mixed_precision bf16", {"mixed_precision": "no"}, "mixed_precision bf16, but .* mixed_precision: no;"),
        ("--gradient_clipping 0.5", {}, r"gradient_clipping 0.5, but the recipe has max_grad_norm: 1.0; change one"),
        ("--gradient-clipping=0.5", {}, r"gradient_clipping 0.5, but the recipe has max_grad_norm: 1.0; change one"),
        ("--gradient_accumulation_steps 4", {}, "from the recipe keys tokens_per_step and per_device_train_batch_s"),
        ("--dynamo_backend inductor", {"compile": False}, "dynamo_backend inductor, but the recipe has compile: false"),
        ("--dynamo_backend eager", {}, "dynamo_backend EAGER, which .*; set the recipe key compile: true"),
        ("--dynamo_backend inductor --dynamo_mode max-autotune", {}, "dynamo_mode max-autotune, which"),
        ("--dynamo_backend inductor --dynamo_use_fullgraph", {}, "for dynamo_use_fullgraph, which"),
        ("--use_fsdp", {}, "fsdp_version 1, which .*; use accelerate_configs/fsdp2_8xa100.yaml"),
        ("--use_fsdp --fsdp_version 2 --fsdp_offload_params true", {}, "fsdp_offload_params, .* activation_checkp"),
        ("--use_fsdp --fsdp_version 2 --fsdp_activation_checkpointing true", {}, "key activation_checkpointing: true"),
        ("--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy SIZE_BASED_WRAP", {}, "policy SIZE_BASED_WRAP, which"),
        ("--use_fsdp --fsdp_version 2 --fsdp_state_dict_type SHARDED_STATE_DICT", {}, "dict_type SHARDED_STATE_DICT"),
    ],
)
def test_settings_that_would_be_ignored_or_contradict_the_recipe_are_refused(
    flags: str, recipe: dict[str, object], message: str, launched: Callable[..., None], tiny_recipe: Make
) -> None:
    launched("--num_processes", "2", *flags.split())
    with pytest.raises(InputError, match=message) as caught:
        check_launcher(tiny_recipe(**{"mixed_precision": "auto", **recipe}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"]
)
def test_other_ways_to_shard_are_refused_before_anything_starts(
    variable: str, tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")  # whose launchers need their packages
    for start in (train, preflight):
        with pytest.raises(InputError, match="does not support; to shard a model, use accelerate_configs/fsdp2"):
            start(tiny_recipe(data_dir=str(tmp_path / "absent")))
    assert list(tmp_path.iterdir()) == []


def test_fp8_is_refused(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match=r"mixed_precision fp8, which .* recipe key mixed_precision to bf16, fp16 or"):
        check_launcher(tiny_recipe(mixed_precision="auto"))


def test_settings_that_agree_with_the_recipe_are_obeyed(launched: Callable[..., None], tiny_recipe: Make) -> None:
    launched("--num_processes", "1", "--mixed_precision", "fp16", "--gradient_clipping", "0.5")
    for precision in ("auto", "fp16"):
        recipe = tiny_recipe(mixed_precision=precision, max_grad_norm=0.5)
        check_launch(recipe)
        assert resolve_mixed_precision(recipe) == "fp16"
    launched("--num_processes", "1", "--dynamo_backend", "inductor")
    check_launcher(tiny_recipe(compile="auto"))
    assert compiles(tiny_recipe(compile="auto"), "cpu")


def test_flags_that_the_launcher_drops_are_read_from_its_command_line() -> None:
    code = "import json; from training.setup.launcher import _dropped_flags; print(json.dumps(_dropped_flags()))"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    for program, expected in (("accelerate", {"gradient_clipping": "0.5"}), ("torchrun", {})):
        command = [sys.executable, "-c", start, program, "launch", "--gradient_clipping", "0.5", "train.py"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
        assert json.loads(done.stdout) == expected


@pytest.mark.parametrize(
    ("bf16", "capability", "expected"),
    [(True, (8, 0), "bf16"), (False, (7, 5), "fp16"), (False, (7, 0), "fp16"), (False, (6, 1), "no")],
)
def test_auto_is_the_half_precision_that_the_gpu_has(
    bf16: bool, capability: tuple[int, int], expected: str, tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert resolve_mixed_precision(tiny_recipe(mixed_precision="auto")) == expected
    if not bf16:
        with pytest.raises(InputError, match="Tesla T4 has no bf16; set the recipe key mixed_precision: fp16, or"):
            resolve_mixed_precision(tiny_recipe(mixed_precision="bf16"))
