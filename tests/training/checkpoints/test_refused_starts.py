"""Starts that are refused, and leave the run folder as it was."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.trained import everything_in, run_of

from common.cli_errors import InputError
from common.folder_lock import LOCK_NAME, locked
from training.checkpoints.checkpoint_folder import checkpoints
from training.data.shards.shard_reader import ShardFolder
from training.loop import train
from training.recipe import Recipe

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_an_end_before_the_checkpoint_is_refused(tiny_recipe: Make) -> None:
    train(tiny_recipe(max_steps=4))
    with pytest.raises(InputError, match="step-000004 is at step 4, after the end of the run at step 2"):
        train(tiny_recipe(max_steps=2))


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_another_run_is_refused_with_or_without_checkpoints(has_checkpoint: bool, tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=4)
    train(recipe)
    if not has_checkpoint:
        shutil.rmtree(run_of(recipe) / "checkpoints")
        shutil.rmtree(run_of(recipe) / "model")
    before = everything_in(run_of(recipe))
    with pytest.raises(InputError, match="n_layer: 2 → 1"):
        train(dataclasses.replace(recipe, n_layer=1))
    with pytest.raises(InputError, match="resume_from_checkpoint is none"):
        train(dataclasses.replace(recipe, resume_from_checkpoint="none"))
    assert everything_in(run_of(recipe)) == before


def test_a_refused_start_writes_nothing(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=4)
    train(recipe)
    before = everything_in(run_of(recipe))
    with pytest.raises(InputError, match="cannot build the model"):
        train(dataclasses.replace(recipe, max_steps=8, attn_implementation="flash_attention_2"))
    assert everything_in(run_of(recipe)) == before


def test_two_runs_do_not_write_one_folder(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=4)
    run_of(recipe).mkdir()
    (run_of(recipe) / LOCK_NAME).write_text("pid 1 on another-node")  # left by a start that was killed
    train(recipe)
    with (
        locked(run_of(recipe)),
        pytest.raises(InputError, match=rf"another process \(pid {os.getpid()} on .* is already writing to"),
    ):
        train(dataclasses.replace(recipe, max_steps=8))
    train(dataclasses.replace(recipe, max_steps=8))
    assert not (run_of(recipe) / LOCK_NAME).exists()


def test_a_second_start_reads_no_checkpoint_that_the_first_may_still_replace(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=4)
    train(recipe)
    state = run_of(recipe) / "checkpoints" / "step-000004" / "training_state" / "trainer_state.json"
    state.write_text("torn")
    with locked(run_of(recipe)), pytest.raises(InputError, match="is already writing to"):
        train(recipe)
    with pytest.raises(InputError, match="is corrupted"):
        train(recipe)


def test_an_error_leaves_no_new_folder(tiny_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown corpus"):
        train(tiny_recipe(output_dir=str(tmp_path / "a" / "b"), data_dir=str(tmp_path / "data"), corpus="nowhere"))
    assert not (tmp_path / "a").exists()


def test_data_inside_the_output_folder_is_refused(tiny_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose separate folders"):
        train(tiny_recipe(data_dir=str(tmp_path / "run" / "data")))


@pytest.mark.parametrize("key", ["output_dir", "data_dir"])
def test_a_folder_inside_the_corpus_is_refused(key: str, tiny_recipe: Make, text_file: Path) -> None:
    inside = text_file.parent / "inside"
    with pytest.raises(InputError, match=f"{key} {inside} is inside corpus .*; choose separate folders"):
        train(tiny_recipe(corpus=str(text_file.parent), **{key: str(inside)}))
    assert not inside.exists()


@pytest.mark.parametrize("path", ["/proc/x", "file/below"])
def test_an_output_folder_that_cannot_be_written_is_refused(path: str, tiny_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not writable"):
        train(tiny_recipe(output_dir=str(tmp_path / path)))


def test_weights_that_are_nan_are_no_start(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe(max_steps=1, save_steps=0)
    train(recipe)
    weights = load_file(run_of(recipe) / "model" / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = float("nan")
    save_file(weights, run_of(recipe) / "model" / "model.safetensors", metadata={"format": "pt"})
    start = str(run_of(recipe) / "model")
    with pytest.raises(InputError, match=r"init_from .* hold NaN or infinity; start from other weights"):
        train(dataclasses.replace(recipe, output_dir=str(tmp_path / "next"), init_from=start))


def test_tokenizer_that_differs_from_the_shards_is_refused(
    tiny_recipe: Make, shard_folder: Path, tmp_path: Path
) -> None:
    from training.data.tokenization.tokenizer import train_bpe

    shutil.copytree(shard_folder, tmp_path / "data")
    train_bpe(["another text, " * 9 + "with other merges " * 9] * 4, 260).save(tmp_path / "data")
    with pytest.raises(InputError, match=r"were made with the tokenizer .*; restore its tokenizer.json"):
        train(tiny_recipe(data_dir=str(tmp_path / "data")))


@pytest.mark.parametrize("number", [0, 1])
def test_swapped_shards_and_flipped_ids_that_stay_valid_are_refused(
    number: int, tiny_recipe: Make, shard_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(shard_folder, tmp_path / "data")
    path = ShardFolder.open(tmp_path / "data").shards[number].path
    ids = np.load(path)
    np.save(path, np.roll(ids, 1))
    with pytest.raises(InputError, match=rf"{path.name} is corrupted: its sha256 is not the manifest's; delete"):
        train(tiny_recipe(data_dir=str(tmp_path / "data")))
    assert not run_of(tiny_recipe()).exists()


def test_run_is_saved_before_a_corrupted_shard_and_resumes_once_it_is_restored(
    tiny_recipe: Make, shard_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(shard_folder, tmp_path / "data")
    path = ShardFolder.open(tmp_path / "data").train_shards[1].path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    recipe = tiny_recipe(
        data_dir=str(tmp_path / "data"), tokens_per_step=4096, max_steps=4, save_steps=0, eval_steps=0, sample_steps=0
    )
    for _ in range(2):  # the second start takes no step
        with pytest.raises(InputError, match=rf"the shards end before step 3, and the run is saved: .*{path.name} is"):
            train(recipe)
        assert [checkpoint.name for checkpoint in checkpoints(run_of(recipe))] == ["step-000002"]
    path.write_bytes(content)
    train(recipe)
    assert checkpoints(run_of(recipe))[-1].name == "step-000004"


def test_ids_outside_the_vocabulary_in_validation_are_refused(
    tiny_recipe: Make, shard_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(shard_folder, tmp_path / "data")
    shard = next((tmp_path / "data").glob("*_val_*.npy"))
    ids = np.load(shard)
    ids[100] = 60_000
    np.save(shard, ids)
    (tmp_path / "data" / "manifest.json").unlink()  # otherwise its hash is found to be wrong
    with pytest.raises(InputError, match=r"_val_.* holds token id 60,000, but the vocabulary has 300 ids"):
        train(tiny_recipe(data_dir=str(tmp_path / "data"), tokenizer=str(tmp_path / "data")))
    assert not run_of(tiny_recipe()).exists()


def test_an_output_folder_with_other_files_is_refused(tiny_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear reader")
    with pytest.raises(InputError, match="contains files but no run"):
        train(tiny_recipe(output_dir=str(tmp_path / "mine")))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file; choose another output_dir"):
        train(tiny_recipe(output_dir=str(tmp_path / "file")))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
