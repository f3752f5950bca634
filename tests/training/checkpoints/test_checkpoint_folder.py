"""Checkpoints: what is written and when, what a full disk may do, and that corruption is detected and reported."""

import dataclasses
import errno
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.cli_errors import InputError
from training.checkpoints import checkpoint_folder as checkpoint_module
from training.checkpoints import checkpoint_writer as saving_module
from training.checkpoints.checkpoint_folder import checkpoint_folder, checkpoints, remove_old_checkpoints
from training.checkpoints.resume import find_resume_point
from training.checkpoints.state_snapshot import HostMemory
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe
from training.step.guard import Guard
from training.step.hooks import Hook, Run

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def run_of(recipe: Recipe) -> Path:
    return Path(recipe.output_dir)


def names_in(recipe: Recipe) -> set[str]:
    return {path.name for path in (run_of(recipe) / "checkpoints").iterdir()}


def state_of(checkpoint: Path) -> Path:
    return checkpoint / "training_state"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def drop_lines(path: Path, part: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if part not in line))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda c: truncate(c / "model.safetensors"), "is corrupted: model.safetensors has another sha256 than"),
    (lambda c: flip_a_bit(c / "model.safetensors"), "is corrupted: model.safetensors has another sha256 than"),
    (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda c: (c / "config.json").unlink(), "config.json is missing"),
    (lambda c: flip_a_bit(c / "tokenizer.json"), "tokenizer.json has another sha256 than"),
    (lambda c: flip_a_bit(state_of(c) / "optimizer.safetensors"), "state/optimizer.safetensors has another sha256"),
    (lambda c: flip_a_bit(state_of(c) / "rng_state_0.safetensors"), "state/rng_state_0.safetensors has another sha256"),
    (lambda c: (state_of(c) / "rng_state_0.safetensors").unlink(), "state/rng_state_0.safetensors is missing"),
    (lambda c: (state_of(c) / "loop_state.safetensors").unlink(), "state/loop_state.safetensors is missing"),
    (lambda c: (state_of(c) / "SHA256SUMS").unlink(), "state/SHA256SUMS is missing"),
    (lambda c: shutil.rmtree(state_of(c)), "is not a checkpoint: it has no training_state/trainer_state.json"),
    (lambda c: (state_of(c) / "SHA256SUMS").write_text(""), "state/SHA256SUMS has a line that is not a checksum"),
    (lambda c: (state_of(c) / "SHA256SUMS").write_text("x\n"), "state/SHA256SUMS has a line that is not a checksum"),
    (lambda c: truncate(state_of(c) / "SHA256SUMS"), "state/SHA256SUMS has a line that is not a checksum"),
    (lambda c: drop_lines(state_of(c) / "SHA256SUMS", "rng_state"), "SHA256SUMS has no line for training_state/rng_s"),
    (lambda c: drop_lines(state_of(c) / "SHA256SUMS", " config.json"), "SHA256SUMS has no line for config.json"),
    (lambda c: shutil.copy(c / "config.json", c / "x.json"), "SHA256SUMS has no line for x.json"),
    (lambda c: (state_of(c) / "SHA256SUMS").write_bytes(b"\xff"), "state/SHA256SUMS is not UTF-8"),
    (lambda c: replace(state_of(c) / "SHA256SUMS", " config.", " co\0nfig."), "co\0nfig.json is missing"),
    (lambda c: replace(state_of(c) / "SHA256SUMS", " config.", "x" * 300), "has a line that is not a checksum"),
    (lambda c: replace(state_of(c) / "SHA256SUMS", " config.", " " + "x" * 300), "cannot be read (File name too long)"),
    (lambda c: (state_of(c) / "trainer_state.json").write_text("{"), "trainer_state.json cannot be read"),
    (lambda c: (state_of(c) / "trainer_state.json").write_text("[" * 100_000), "cannot be read (it is nested too deep"),
    (lambda c: replace(state_of(c) / "trainer_state.json", '"step": 8', '"step": ' + "8" * 5000), "cannot be read (Ex"),
    (
        lambda c: replace(state_of(c) / "trainer_state.json", '"num_processes": 1', '"num_processes": ""'),
        "cannot be re",
    ),
    (lambda c: (state_of(c) / "trainer_state.json").write_text("[]"), "trainer_state.json cannot be read"),
    (
        lambda c: replace(state_of(c) / "trainer_state.json", '"step": 8', '"step": 9'),
        "trainer_state.json has another sha256",
    ),
    (
        lambda c: replace(state_of(c) / "trainer_state.json", '"step": 8', '"step": ""'),
        "trainer_state.json cannot be read",
    ),
    (
        lambda c: replace(state_of(c) / "trainer_state.json", 'version": 1', 'version": 2'),
        "has format_version 2, but this version of the kit reads 1; resume with the version that wrote it",
    ),
    (
        lambda c: (state_of(c) / "trainer_state.json").write_text("{}"),
        "has format_version None, but this version of the kit reads 1",
    ),
]


def test_corruption_is_reported_with_the_checkpoint_to_resume_from(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=8)
    train(recipe)
    shutil.copytree(run_of(recipe) / "checkpoints", tmp_path / "good")
    for break_it, message in DAMAGE:
        shutil.rmtree(run_of(recipe) / "checkpoints")
        shutil.copytree(tmp_path / "good", run_of(recipe) / "checkpoints")
        break_it(run_of(recipe) / "checkpoints" / "step-000008")
        with pytest.raises(InputError) as caught:
            find_resume_point(recipe)
        message_shown = str(caught.value)
        assert message in message_shown
        assert "\n" not in message_shown
        older = run_of(recipe) / "checkpoints" / "step-000004"
        assert "format" in message_shown or message_shown.endswith(
            f"resume from the newest intact one: --resume_from_checkpoint {older}"
        )
    flip_a_bit(older / "model.safetensors")
    flip_a_bit(run_of(recipe) / "checkpoints" / "step-000008" / "config.json")
    replace(
        state_of(run_of(recipe) / "checkpoints" / "step-000008") / "trainer_state.json", "{}", '{"format_version": 1}'
    )
    with pytest.raises(InputError, match="no older checkpoint is intact: start again in another output_dir"):
        find_resume_point(recipe)
    shutil.rmtree(older.parent)
    shutil.copytree(tmp_path / "good", older.parent)
    older.rename(older.with_name("exchanged"))
    (older.parent / "step-000008").rename(older)
    (older.parent / "exchanged").rename(older.parent / "step-000008")
    with pytest.raises(InputError, match=r"step-000008 holds step 4; rename it to step-000004"):
        find_resume_point(recipe)


def test_run_resumes_from_the_older_checkpoint_that_the_message_names(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=8)
    train(recipe)
    flip_a_bit(run_of(recipe) / "checkpoints" / "step-000008" / "model.safetensors")
    before = read_metrics(run_of(recipe))
    with pytest.raises(InputError) as caught:
        train(recipe)
    train(dataclasses.replace(recipe, resume_from_checkpoint=str(caught.value).split()[-1]))
    assert [line.get("val_loss") for line in read_metrics(run_of(recipe))] == [line.get("val_loss") for line in before]


def test_sha256sum_reads_the_checksums(tiny_recipe: Make) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not installed")
    recipe = tiny_recipe(max_steps=1)
    train(recipe)
    folder = checkpoints(run_of(recipe))[-1]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "training_state/SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    checked = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
    assert checked == files - {"training_state/SHA256SUMS"}


def test_background_and_foreground_saves_write_the_same_checkpoint(
    tiny_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_background = tiny_recipe(
        output_dir=str(tmp_path / "in_background"), dropout=0.1, save_total_limit=None, save_steps=1
    )
    waiting = dataclasses.replace(in_background, output_dir=str(tmp_path / "waiting"), async_save=False)
    train(in_background)
    assert "checkpoint saved; training paused for 0." in capsys.readouterr().out
    train(waiting)
    pairs = list(zip(checkpoints(run_of(in_background)), checkpoints(run_of(waiting)), strict=True))
    assert len(pairs) == 12
    for ours, theirs in pairs:
        for file in (
            "model.safetensors",
            "training_state/optimizer.safetensors",
            "training_state/rng_state_0.safetensors",
        ):
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), (ours.name, file)


def test_full_disk_loses_a_checkpoint_but_not_the_run(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file = checkpoint_module.save_file

    def full_at_step_8(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step-000008" in str(path) and path.name == "rng_state_0.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", full_at_step_8)
    recipe = tiny_recipe(save_total_limit=None)
    train(recipe)
    assert names_in(recipe) == {"step-000004", "step-000012"}
    newest = checkpoint_folder(run_of(recipe), 4)
    line = "step 8  checkpoint could not be written (No space left on device); training continues"
    assert f"{line}, the newest checkpoint is {newest}" in capsys.readouterr().out.splitlines()


def test_disk_that_stays_full_ends_the_run_in_one_line_and_keeps_saved_checkpoints(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = tiny_recipe()
    train(dataclasses.replace(recipe, max_steps=4))
    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(
        InputError, match=r"the last checkpoint of .* could not be written; free some space .*step-000004$"
    ):
        train(recipe)
    assert names_in(recipe) == {"step-000004"}
    monkeypatch.undo()
    train(recipe)
    assert [line["step"] for line in read_metrics(run_of(recipe)) if "train_loss" in line] == list(range(1, 13))


def test_save_killed_halfway_keeps_the_older_checkpoint(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(max_steps=8)
    publish = saving_module.publish

    def die_at_step_8(partial: Path, target: Path) -> None:
        if target.name == "step-000008":
            raise KeyboardInterrupt
        publish(partial, target)

    monkeypatch.setattr(saving_module, "publish", die_at_step_8)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    run = Path(recipe.output_dir)
    assert [path.name for path in checkpoints(run)] == ["step-000004"]
    monkeypatch.undo()
    train(recipe)
    assert [path.name for path in checkpoints(run)] == ["step-000004", "step-000008"]
    assert not list((run / "checkpoints").glob(".*"))


def test_temporary_folders_of_a_killed_save_are_removed(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=8)
    train(recipe)
    run = Path(recipe.output_dir)
    (run / "checkpoints" / "step-000004").rename(run / "checkpoints" / ".removed-step-000004")
    (run / "model").rename(run / ".replaced-model")
    (run / ".unfinished-model").mkdir()
    train(recipe)
    assert (run / "model" / "model.safetensors").is_file()
    left = [*run.glob(".*"), *(run / "checkpoints").glob(".*")]
    assert not [path for path in left if path.is_dir()]


def test_no_space_for_the_model_folder_is_one_line_and_the_next_start_writes_it(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = tiny_recipe(max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr("training.hub.model_folder.shutil.copytree", full)
        with pytest.raises(
            InputError, match=r"model could not be written \(No space left on device\); free some space"
        ) as error:
            train(recipe)
    assert "\n" not in str(error.value)
    train(recipe)
    assert (run_of(recipe) / "model" / "model.safetensors").is_file()


def test_two_checkpoints_are_never_written_at_once(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    write, writers, max_writers = saving_module.write_checkpoint, [0], [0]

    def slow(*args: object, **kwargs: object) -> Path:
        assert threading.current_thread() is not threading.main_thread()
        writers[0] += 1
        max_writers[0] = max(max_writers[0], writers[0])
        time.sleep(0.05)
        try:
            return write(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            writers[0] -= 1

    monkeypatch.setattr(saving_module, "write_checkpoint", slow)
    recipe = tiny_recipe(save_steps=1, save_total_limit=None)
    train(recipe)
    assert max_writers == [1]
    assert len(checkpoints(run_of(recipe))) == 12


def test_save_minutes_saves_checkpoints(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(save_steps=0, save_minutes=1e-9, save_total_limit=None, max_steps=4)
    train(recipe)
    assert names_in(recipe) == {f"step-00000{step}" for step in (1, 2, 3, 4)}


def test_removal_keeps_the_newest_and_those_at_multiples_of_save_keep_every(tmp_path: Path) -> None:
    for step in range(100, 1100, 100):
        (checkpoint_folder(tmp_path, step) / "training_state").mkdir(parents=True)
    remove_old_checkpoints(tmp_path, keep=None, keep_every=400)
    assert len(checkpoints(tmp_path)) == 10
    remove_old_checkpoints(tmp_path, keep=2, keep_every=400)
    assert [path.name[-4:] for path in checkpoints(tmp_path)] == ["0400", "0800", "0900", "1000"]
    remove_old_checkpoints(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-001000"]


def test_hooks_are_called_when_a_checkpoint_is_complete(tiny_recipe: Make) -> None:
    saved = []

    class Saved(Hook):
        def after_save(self, run: Run, checkpoint: Path, step: int) -> None:
            saved.append((step, find_resume_point(run.recipe) == checkpoint))

    train(tiny_recipe(), hooks=[Saved()])
    assert saved == [(4, True), (8, True), (12, True)]


def test_loop_state_is_saved_and_restored(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Count(Hook):
        def before_training(self, run: Run) -> None:
            seen.append({name: tensor.clone() for name, tensor in run.guard.state.items()})
            run.guard.state["starts"] += 1

    def remembering(*args: object, loop_state: dict[str, torch.Tensor], **kwargs: object) -> None:
        loop_state["starts"] = torch.zeros(3)
        load(*args, loop_state=loop_state, **kwargs)  # type: ignore[arg-type]

    recipe = tiny_recipe(max_steps=2)
    train(recipe)
    stored = load_file(state_of(checkpoints(run_of(recipe))[-1]) / "loop_state.safetensors")
    assert isinstance(stored, dict)
    load = checkpoint_module.load_checkpoint
    monkeypatch.setattr("training.loop.load_checkpoint", remembering)
    monkeypatch.setattr(Guard, "check", lambda self, loss, grad_norm: torch.zeros(()))  # it knows its own tensors only
    train(dataclasses.replace(recipe, max_steps=3), hooks=[Count()])
    train(dataclasses.replace(recipe, max_steps=4), hooks=[Count()])
    assert [state["starts"].tolist() for state in seen] == [[0, 0, 0], [1, 1, 1]]


def test_host_memory_holds_copies_and_is_reused() -> None:
    memory, weights = HostMemory(), [torch.arange(3.0), torch.ones(3), torch.ones(2)]
    memory.begin()
    first = [memory.copy(tensor) for tensor in weights]
    assert all(torch.equal(*pair) for pair in zip(first, weights, strict=True))
    weights[0] += 1
    assert first[0].tolist() == [0, 1, 2]
    memory.begin()
    again = [memory.copy(tensor) for tensor in weights]
    assert [tensor.data_ptr() for tensor in again] == [tensor.data_ptr() for tensor in first]
    assert again[0].tolist() == [1, 2, 3]


def test_snapshot_uses_the_memory_allocated_in_the_background() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    memory = HostMemory()
    memory.allocate_for(model, optimizer, torch.device("cpu"))
    memory.begin()
    made = {tensor.data_ptr() for tensors in memory._tensors.values() for tensor in tensors}
    needed = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    assert {memory.copy(tensor.detach()).data_ptr() for tensor in needed} == made
