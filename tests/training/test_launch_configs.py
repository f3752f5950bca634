"""How `accelerate launch --config_file` reads the files in accelerate_configs/."""

import argparse
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from support.paths import ROOT

from gpt2_scratch.modeling_gpt2_scratch import GPT2ScratchBlock

CONFIGS = ROOT / "accelerate_configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def _free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may use accelerate's default port while the tests run."""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)


def merged(config: Path) -> argparse.Namespace:
    """The launcher's arguments merged with the config file by `accelerate launch` itself."""
    return _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(config), "train.py"]))[0]


def check_keys(config: Path) -> None:
    loaded = load_config_from_file(str(config))  # raises for unknown keys outside fsdp_config
    options = vars(launch_command_parser().parse_args(["train.py"]))
    unknown = [key for key in loaded.fsdp_config if key not in options]
    assert not unknown, unknown


def test_included_configs() -> None:
    assert sorted(["cpu", "cpu_2_processes", "single_gpu", "ddp_8xa100", "fsdp2_8xa100", "multi_node_ddp"]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_key(name: str) -> None:
    check_keys(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("change", [{"num_gpus": 8}, {"fsdp_config": {"fsdp_versoin": 2}}])
def test_unknown_key_is_found(change: dict[str, object], tmp_path: Path) -> None:
    keys = yaml.safe_load((CONFIGS / "fsdp2_8xa100.yaml").read_text())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**keys, **change}))
    with pytest.raises((ValueError, AssertionError), match=r"num_gpus|fsdp_versoin"):
        check_keys(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("name", "processes", "machines", "precision", "launcher"),
    [
        ("cpu", 1, 1, "no", None),
        ("cpu_2_processes", 2, 1, "no", "multi_gpu"),
        ("single_gpu", 1, 1, "bf16", None),
        ("ddp_8xa100", 8, 1, "bf16", "multi_gpu"),
        ("fsdp2_8xa100", 8, 1, "bf16", "use_fsdp"),
        ("multi_node_ddp", 16, 2, "bf16", "multi_gpu"),
    ],
)
def test_launcher_starts_what_the_file_name_states(
    name: str, processes: int, machines: int, precision: str, launcher: str | None
) -> None:
    arguments = merged(CONFIGS / f"{name}.yaml")
    assert (arguments.num_processes, arguments.num_machines) == (processes, machines)
    assert arguments.mixed_precision == precision
    assert [kind for kind in ("multi_gpu", "use_fsdp", "tpu", "use_deepspeed") if getattr(arguments, kind)] == (
        [launcher] if launcher else []
    )
    assert arguments.use_cpu == name.startswith("cpu")


def test_two_cpu_processes_see_no_gpu() -> None:
    # accelerate passes use_cpu only to a process that it starts alone.
    assert prepare_multi_gpu_env(merged(CONFIGS / "cpu_2_processes.yaml"))["CUDA_VISIBLE_DEVICES"] == "-1,-1"


def test_fsdp2_settings_reach_the_processes() -> None:
    environment = prepare_multi_gpu_env(merged(CONFIGS / "fsdp2_8xa100.yaml"))
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] == GPT2ScratchBlock.__name__
    # Otherwise transformers loads the weights on rank 0 only.
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_both_nodes_connect_to_the_address_in_the_file() -> None:
    arguments = merged(CONFIGS / "multi_node_ddp.yaml")
    prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 0)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")
