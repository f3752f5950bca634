"""Complete runs of a tiny model: the files they write, and how they resume."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.paths import ROOT

from training.checkpoints.checkpoint_folder import TrainerState, checkpoints
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe
from training.setup.accelerator import resolve_mixed_precision
from training.step.hooks import Hook, Run
from training.step.train_step import StepResult

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def launched(recipe: Recipe, path: Path, *, processes: int = 1) -> "subprocess.CompletedProcess[str]":
    """Train under `accelerate launch`."""
    recipe.save(path)
    config = "cpu.yaml" if processes == 1 else "cpu_2_processes.yaml"
    command = [Path(sys.executable).parent / "accelerate", "launch", "--quiet"]
    command += ["--config_file", ROOT / "accelerate_configs" / config, "--main_process_port", "0"]
    command += [ROOT / "training" / "train.py", "--config", path]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def optimizer_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "training_state" / "optimizer.safetensors")


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def losses(recipe: Recipe) -> dict[tuple[int, str], float]:
    return {
        (line["step"], name): line[name]
        for line in read_metrics(Path(recipe.output_dir))
        for name in ("train_loss", "val_loss")
        if name in line
    }


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
        *("linear_cross_entropy.py", "pretrained_gpt2_scratch.py"),
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
    train(tiny_recipe(max_steps=2, warmup_steps=2, eval_steps=0))
    assert "the learning rate never reaches its peak: 2 warmup_steps of 2 steps" in capsys.readouterr().out


def test_a_hook_of_the_user_sees_every_step(tiny_recipe: Make) -> None:
    class Record(Hook):
        def __init__(self) -> None:
            self.calls: list[str] = []
            self.losses: list[float] = []

        def before_training(self, run: Run) -> None:
            self.calls.append(f"before training from step {run.step}")

        def after_step(self, run: Run, result: StepResult) -> None:
            self.losses.append(result.loss.item())
            if run.step == 3:
                run.report("a line of my own")

        def after_save(self, run: Run, checkpoint: Path, step: int) -> None:
            self.calls.append(checkpoint.name)

        def after_training(self, run: Run) -> None:
            self.calls.append(f"after training at step {run.step}")

        def close(self) -> None:
            self.calls.append("close")

    first, second = Record(), Record()
    recipe = tiny_recipe(max_steps=4)
    train(recipe, hooks=[first])
    train(dataclasses.replace(recipe, max_steps=6), hooks=[second])
    assert first.calls == ["before training from step 0", "step-000004", "after training at step 4", "close"]
    assert second.calls == ["before training from step 4", "step-000006", "after training at step 6", "close"]
    run = Path(recipe.output_dir)
    assert first.losses + second.losses == [line["train_loss"] for line in read_metrics(run) if "train_loss" in line]
    assert "a line of my own\n" in (run / "train.log").read_text()


def test_a_hook_sees_the_last_step_before_a_stop(tiny_recipe: Make) -> None:
    steps: list[int] = []

    class StopAfterFive(Hook):
        def after_step(self, run: Run, result: StepResult) -> None:
            steps.append(run.step)
            if run.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    recipe = tiny_recipe()
    with pytest.raises(SystemExit):
        train(recipe, hooks=[StopAfterFive()])
    assert steps == [1, 2, 3, 4, 5]
    assert checkpoints(Path(recipe.output_dir))[-1].name == "step-000005"


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


@pytest.mark.parametrize("stop", [4, 8])
def test_an_interrupted_run_ends_bit_identical_to_a_complete_one(stop: int, tiny_recipe: Make, tmp_path: Path) -> None:
    complete = tiny_recipe(output_dir=str(tmp_path / "complete"), dropout=0.1, save_total_limit=None)
    train(complete)
    interrupted = dataclasses.replace(complete, output_dir=str(tmp_path / "interrupted"))
    # A run that was killed after a checkpoint: its log already has later lines.
    run = Path(interrupted.output_dir)
    (run / "checkpoints").mkdir(parents=True)
    Path(tmp_path / "complete" / "checkpoints" / f"step-{stop:06d}").rename(run / "checkpoints" / f"step-{stop:06d}")
    for name in ("metrics.jsonl", "log.txt", "recipe.yaml"):
        (run / name).write_bytes((tmp_path / "complete" / name).read_bytes())
    train(interrupted)
    assert_same(weights(run / "model"), weights(tmp_path / "complete" / "model"))
    assert_same(optimizer_state(checkpoints(run)[-1]), optimizer_state(checkpoints(tmp_path / "complete")[-1]))
    assert losses(interrupted) == losses(complete)
    steps = [line["step"] for line in read_metrics(run) if "train_loss" in line]
    assert steps == list(range(1, 13))


def test_accumulation_gives_the_same_weights_as_one_large_batch(tiny_recipe: Make, tmp_path: Path) -> None:
    large = tiny_recipe(output_dir=str(tmp_path / "large"), per_device_train_batch_size=8, max_steps=4)
    small = tiny_recipe(output_dir=str(tmp_path / "small"), per_device_train_batch_size=1, max_steps=4)
    train(large)
    train(small)
    # Sums in a different order: fp32 rounding, amplified by AdamW where a gradient is almost 0.
    for key, loss in losses(large).items():
        assert losses(small)[key] == pytest.approx(loss, abs=1e-5), key


def test_two_processes_equal_one(tiny_recipe: Make, tmp_path: Path) -> None:
    one = tiny_recipe(output_dir=str(tmp_path / "one"), max_steps=6)
    two = dataclasses.replace(one, output_dir=str(tmp_path / "two"))
    train(one)
    done = launched(two, tmp_path / "two.yaml", processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes × 1 accumulated" in done.stdout
    for key, loss in losses(one).items():
        # The mean of two halves instead of one sum: fp32 rounding.
        assert losses(two)[key] == pytest.approx(loss, abs=1e-5), key
    assert {path.name for path in (checkpoints(Path(two.output_dir))[-1] / "training_state").iterdir()} == {
        *("SHA256SUMS", "trainer_state.json", "optimizer.safetensors", "loop_state.safetensors"),
        *("rng_state_0.safetensors", "rng_state_1.safetensors"),
    }


def test_a_run_of_two_processes_resumes_on_one_over_the_same_samples(tiny_recipe: Make, tmp_path: Path) -> None:
    complete = tiny_recipe(output_dir=str(tmp_path / "complete"))
    train(complete)
    resumed = dataclasses.replace(complete, output_dir=str(tmp_path / "resumed"))
    # The same schedule, killed after step 8: its later checkpoint is moved away.
    assert launched(resumed, tmp_path / "resumed.yaml", processes=2).returncode == 0
    run = Path(resumed.output_dir)
    newest = checkpoints(run)[-1]
    newest.rename(tmp_path / "moved")
    train(resumed)
    for key, loss in losses(complete).items():
        assert losses(resumed)[key] == pytest.approx(loss, abs=1e-5), key


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


def test_metrics_reach_tensorboard(tiny_recipe: Make) -> None:
    pytest.importorskip("tensorboard")
    recipe = tiny_recipe(max_steps=2, report_to=["tensorboard"])
    train(recipe)
    events = list((Path(recipe.output_dir) / "gpt2-scratch").rglob("events.out.*"))
    assert any(b"train_loss" in path.read_bytes() for path in events)


def test_a_truncated_shard_gives_an_error_of_one_line(tiny_recipe: Make, tmp_path: Path) -> None:
    import shutil

    recipe = tiny_recipe()
    data = tmp_path / "data"
    shutil.copytree(recipe.data_dir, data)
    shard = sorted(data.glob("*_train_*.npy"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    done = launched(dataclasses.replace(recipe, data_dir=str(data)), tmp_path / "r.yaml")
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert shard.name in done.stderr
    assert len(done.stderr.splitlines()) == 1
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
sys.modules["datasets"] = sys.modules["evaluate"] = None
from pathlib import Path
from training.loop import train
from training.recipe import load_recipe
train(load_recipe(Path({str(tmp_path / "r.yaml")!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
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


def test_bf16_trains_to_nearly_the_same_loss(tiny_recipe: Make, tmp_path: Path) -> None:
    full = tiny_recipe(output_dir=str(tmp_path / "full"))
    half = tiny_recipe(output_dir=str(tmp_path / "half"), mixed_precision="bf16")
    train(full)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # the precision is part of it
    train(half)
    # bf16 keeps 8 bits of mantissa: a relative error near 0.4 % in each product, far less in the mean.
    assert losses(half)[12, "val_loss"] == pytest.approx(losses(full)[12, "val_loss"], rel=0.01)
    assert weights(Path(half.output_dir) / "model")["transformer.wte.weight"].dtype == torch.float32


@pytest.mark.parametrize("knob", ["activation_checkpointing", "compile"])
def test_settings_for_speed_and_memory_do_not_change_the_losses(knob: str, tiny_recipe: Make, tmp_path: Path) -> None:
    plain = tiny_recipe(output_dir=str(tmp_path / "plain"), max_steps=4, eval_steps=2, sample_steps=2)
    train(plain)
    changed = dataclasses.replace(plain, output_dir=str(tmp_path / "changed"), **{knob: True})
    train(changed)
    for key, loss in losses(plain).items():
        # The compiler fuses operations, which changes rounding.
        assert losses(changed)[key] == pytest.approx(loss, abs=1e-5), key
    saved = weights(Path(changed.output_dir) / "model")
    assert saved.keys() == weights(Path(plain.output_dir) / "model").keys()  # no `_orig_mod.`


def test_the_card_contains_no_local_path(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=1)
    train(recipe)
    card = (Path(recipe.output_dir) / "model" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    for secret in (str(tmp_path), str(Path(recipe.data_dir).parent), str(Path(recipe.corpus).parent)):
        assert secret not in card
    assert json.dumps(str(tmp_path)) not in (Path(recipe.output_dir) / "model" / "config.json").read_text()
