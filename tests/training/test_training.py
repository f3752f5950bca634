"""Complete runs of a tiny model: the files they write, and how they start and end."""

import dataclasses
import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from support.command_lines import refused
from support.launching import run_python
from support.trained import assert_same, losses, weights

from common.cli_errors import InputError
from training.checkpoints.checkpoint_folder import TrainerState, checkpoints
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe
from training.setup.accelerator import resolve_mixed_precision
from training.step.hooks import Hook, Run

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_a_run_writes_the_files_that_the_design_lists(tiny_recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(save_total_limit=2)
    train(recipe)
    run = Path(recipe.output_dir)
    assert {path.name for path in run.iterdir()} == {
        *("recipe.yaml", "metrics.jsonl", "log.txt", "train.log", "samples.txt", "curves.png", "checkpoints", "model"),
        ".starts.jsonl",
    }
    assert [path.name for path in checkpoints(run)] == ["step-000008", "step-000012"]
    assert {path.name for path in (run / "model").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("README.md", "curves.png", "modeling_gpt2_scratch.py", "configuration_gpt2_scratch.py"),
        *("heads_gpt2_scratch.py", "linear_cross_entropy.py", "pretrained_gpt2_scratch.py"),
    }
    assert Recipe(**yaml.safe_load((run / "recipe.yaml").read_text())) == recipe
    metrics = read_metrics(run)
    trained = [line for line in metrics if "train_loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert [line["tokens"] for line in trained] == [256 * step for step in range(1, 13)]
    assert set(trained[0]) == {
        *("step", "tokens", "train_loss", "smoothed_loss", "learning_rate", "grad_norm"),
        *("tokens_per_second", "mfu", "memory_gib"),
    }
    assert all(line["mfu"] is None and line["memory_gib"] > 0 for line in trained)  # MFU is of known GPUs only
    samples = (run / "samples.txt").read_text()
    assert samples.startswith("step 6\n\n  | The model")
    assert samples.count("\nstep 12\n\n  | The model") == 1
    assert trained[-1]["train_loss"] < trained[0]["train_loss"] - 0.5
    assert [line["step"] for line in metrics if "val_loss" in line] == [6, 12]
    state = TrainerState.read(checkpoints(run)[-1])
    assert (state.step, state.tokens, state.num_processes) == (12, 12 * 256, 1)
    printed = capsys.readouterr().out
    assert printed in (run / "train.log").read_text() + "\n"
    for part in ("nats per token", "bits per byte", "by gzip -9", "To try next", str(run / "model")):
        assert part in printed


def test_a_warm_up_longer_than_the_run_is_logged(tiny_recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_recipe(max_steps=2, warmup_steps=2, seq_len_warmup_steps=3, eval_steps=0))
    printed = capsys.readouterr().out
    assert "the learning rate never reaches its peak: 2 warmup_steps of 2 steps" in printed
    assert "no step trains on whole windows: 3 seq_len_warmup_steps of 2 steps" in printed


def test_the_model_folder_loads_through_the_auto_classes(tiny_recipe: Make) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    recipe = tiny_recipe(max_steps=2)
    train(recipe)
    folder = str(Path(recipe.output_dir) / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "GPT2ScratchForCausalLM"
    assert tokenizer.model_max_length == model.config.n_positions == 32
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.config.vocab_size - 1
    # The pipeline's default of 256 new tokens would not fit into 32 positions.
    text = pipeline("text-generation", model=folder)("The model")[0]["generated_text"]
    assert text.startswith("The model")
    assert len(tokenizer.encode(text)) <= 32


def test_checkpoints_load_as_model_folders(tiny_recipe: Make) -> None:
    from transformers import AutoModelForCausalLM

    recipe = tiny_recipe(max_steps=4)
    train(recipe)
    run = Path(recipe.output_dir)
    model = AutoModelForCausalLM.from_pretrained(checkpoints(run)[-1])
    # The head is tied, so it is not stored.
    stored = weights(run / "model")
    assert "lm_head.weight" not in stored
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())


def test_a_second_start_reports_that_the_run_is_complete(tiny_recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(max_steps=2)
    train(recipe)
    model = Path(recipe.output_dir) / "model" / "model.safetensors"
    before = (model.stat().st_mtime_ns, read_metrics(Path(recipe.output_dir)))
    capsys.readouterr()
    train(recipe)
    printed = capsys.readouterr().out
    assert "is complete: 2 of 2 steps" in printed
    assert "--max_steps 4" in printed
    assert (model.stat().st_mtime_ns, read_metrics(Path(recipe.output_dir))) == before


def test_a_complete_run_resumes_to_a_later_end(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=2)
    train(recipe)
    train(dataclasses.replace(recipe, max_steps=5))
    assert [line["step"] for line in read_metrics(Path(recipe.output_dir)) if "train_loss" in line] == [1, 2, 3, 4, 5]


def test_a_run_killed_before_it_wrote_its_model_folder_only_writes_that(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=4)
    train(recipe)
    run = Path(recipe.output_dir)
    before = weights(run / "model")
    (run / "model").rename(run.parent / "taken")
    metrics = read_metrics(run)
    train(recipe)
    assert_same(weights(run / "model"), before)
    assert read_metrics(run) == metrics


def test_training_starts_from_the_weights_of_init_from(tiny_recipe: Make, tmp_path: Path) -> None:
    first = tiny_recipe(output_dir=str(tmp_path / "first"), max_steps=8)
    train(first)
    second = tiny_recipe(
        output_dir=str(tmp_path / "second"),
        init_from=str(tmp_path / "first" / "model"),
        max_steps=1,
        learning_rate=1e-9,
    )
    train(second)
    before, after = losses(first)[8, "val_loss"], losses(second)[1, "val_loss"]
    assert after == pytest.approx(before, abs=1e-4)


@pytest.mark.slow
def test_run_with_more_positions_than_init_from_trains_and_resumes(
    tiny_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_recipe(output_dir=str(tmp_path / "first"), max_steps=1))
    longer = tiny_recipe(seq_len=64, init_from=str(tmp_path / "first" / "model"), max_steps=4, save_steps=2)
    train(longer)
    assert "init_from has 32, the recipe 64" in capsys.readouterr().out
    run = Path(longer.output_dir)
    uninterrupted = weights(run / "model")
    assert uninterrupted["transformer.wpe.weight"].shape[0] == 64
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    train(longer)
    assert_same(weights(run / "model"), uninterrupted)
    assert "init_from has" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_a_step_that_does_not_fit_into_memory_is_one_line(tiny_recipe: Make, error: Exception) -> None:
    class Fails(Hook):
        def before_step(self, run: Run, step: int) -> None:
            if step == 2:
                raise error

    with pytest.raises(InputError, match=r"step 2 does not fit into the memory of cpu .* lower per_device_train_ba"):
        train(tiny_recipe(), hooks=[Fails()])


def test_metrics_reach_tensorboard(tiny_recipe: Make) -> None:
    pytest.importorskip("tensorboard")
    recipe = tiny_recipe(max_steps=2, report_to=["tensorboard"])
    train(recipe)
    events = list((Path(recipe.output_dir) / "gpt2-scratch").rglob("events.out.*"))
    assert any(b"train_loss" in path.read_bytes() for path in events)


def test_a_truncated_shard_gives_an_error_of_one_line(
    tiny_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    recipe = tiny_recipe()
    data = tmp_path / "data"
    shutil.copytree(recipe.data_dir, data)
    shard = sorted(data.glob("*_train_*.npy"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    error = refused(lambda _: train(dataclasses.replace(recipe, data_dir=str(data))), capsys)
    assert error.startswith("error: ")
    assert shard.name in error
    assert not Path(recipe.output_dir).exists()


def test_ready_shards_without_a_manifest_are_trained_on(tiny_recipe: Make, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, size in (("x_val_000000", 500), ("x_train_000001", 3000)):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 300, size).astype("<u2"))
    source = tiny_recipe().data_dir
    train(tiny_recipe(data_dir=str(tmp_path), tokenizer=source, max_steps=2))
    run = Path(tiny_recipe().output_dir)
    assert TrainerState.read(checkpoints(run)[-1]).shards == ["500 tokens", "3000 tokens"]


def test_training_on_ready_shards_imports_neither_datasets_nor_evaluate(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=1)
    recipe.save(tmp_path / "r.yaml")
    code = f"""
import sys
assert not sys.modules.keys() & {{"datasets", "evaluate"}}
sys.modules["datasets"] = sys.modules["evaluate"] = None
from pathlib import Path
from training.loop import train
from training.recipe import load_recipe
train(load_recipe(Path({str(tmp_path / "r.yaml")!r})))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "no"), ({}, "no")],
)
def test_cpus_use_bf16_only_with_hardware_support(
    capabilities: dict[str, bool], expected: str, tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_mixed_precision(tiny_recipe(mixed_precision="auto")) == expected
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve_mixed_precision(tiny_recipe(mixed_precision="auto")) == "bf16"
    assert resolve_mixed_precision(tiny_recipe(mixed_precision="no")) == "no"


def test_the_card_contains_no_local_path(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=1)
    train(recipe)
    card = (Path(recipe.output_dir) / "model" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    for secret in (str(tmp_path), str(Path(recipe.data_dir).parent), str(Path(recipe.corpus).parent)):
        assert secret not in card
    assert json.dumps(str(tmp_path)) not in (Path(recipe.output_dir) / "model" / "config.json").read_text()


def test_a_failed_step_releases_model_and_optimizer_before_the_process_group(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise gloo can hang when they are released together, after the error was printed."""
    kept: list[weakref.ref[object]] = []

    class Watch(Hook):
        def before_training(self, run: Run) -> None:
            kept.append(weakref.ref(run.optimizer))

    def lose_connection(*_: object) -> None:
        raise RuntimeError("[/x/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1")

    def shut_down(accelerator: Accelerator) -> None:
        accelerator.free_memory()
        gc.collect()
        assert kept[0]() is None
        kept.clear()

    monkeypatch.setattr("training.step.train_step.skip_update_if", lose_connection)
    monkeypatch.setattr("training.loop.shut_down", shut_down)
    with pytest.raises(InputError, match="the connection to another process was lost"):
        train(tiny_recipe(max_steps=2, eval_steps=0), hooks=[Watch()])
    assert not kept
