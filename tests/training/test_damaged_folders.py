"""Run folders and shard folders with damaged files are refused in one line, or used with the right result.

No traceback, no wrong resume, nothing lost. In CI a few cases run; thousands take minutes:

    python -m pytest tests/training/test_damaged_folders.py --fuzz-cases 2000 --fuzz-seed 1
"""

import dataclasses
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.damage import copy_folder, damage
from support.small_corpora import make_shards

from common.atomic_files import file_sha256
from common.cli_errors import InputError, os_error_message
from training.checkpoints.checkpoint_folder import checkpoints
from training.checkpoints.checksums import update_checksums
from training.checkpoints.resume import prepare_run_folder
from training.checkpoints.state_snapshot import rng_state
from training.data.loading.loader import TrainingWindows, training_batches, validation_batches
from training.data.producing.background_producer import BackgroundProducer
from training.data.shards.inspection import inspect
from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import Shard, ShardFolder
from training.data.shards.shard_writer import ShardWriter
from training.hub.publisher import last_push
from training.loop import _prepare, train
from training.monitoring.run_history import RunHistory, set_aside_unreadable_metrics
from training.recipe import Recipe
from training.setup.accelerator import build_accelerator
from training.setup.model import build_model
from training.setup.plan import plan_run

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore"),  # of libraries, about rubbish
]


class NoProducer(BackgroundProducer):
    """A producer that never starts."""

    def start(self, command: list[str]) -> None:
        raise InputError("the folder is not complete")


class Cases:
    """Damaged copies of a folder; collects what went wrong, and fails at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.count, self.seed = config.getoption("--fuzz-cases"), config.getoption("--fuzz-seed")
        self.failures: list[str] = []
        self.refused = 0

    def run(self, case: int, what: str, start: Callable[[], Any], is_right: Callable[[Any], bool]) -> None:
        """Call `start`: an error must be one line, a result must be right."""
        name = f"case {case} of seed {self.seed}, {what}"
        try:
            result = start()
        except (InputError, OSError) as error:
            message = os_error_message(error) if isinstance(error, OSError) else str(error)
            self.refused += 1
            if not message or "\n" in message or len(message) > 1000:
                self.failures.append(f"{name}: not one line: {error!r}")
        except Exception:
            self.failures.append(f"{name}: {traceback.format_exc()}")
        else:
            if not is_right(result):
                self.failures.append(f"{name}: a wrong result")

    def check(self) -> None:
        assert not self.failures, f"{len(self.failures)} failures:\n\n" + "\n".join(self.failures[:20])
        assert self.refused > self.count / 4


def hashes_below(folder: Path) -> dict[Path, str]:
    return {path.relative_to(folder): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def resumed(recipe: Recipe) -> tuple[int, list[bytes]]:
    """Do what a start does before its first step; return the step, and all tensors that decide what follows."""
    plan = plan_run(recipe, NoProducer())
    run = plan.run
    accelerator = build_accelerator(recipe)
    model = build_model(recipe, run.tokenizer, device_type="cpu", weights=run.resume_from)
    _prepare(run, accelerator, model)
    prepare_run_folder(recipe, run.first_step)
    history = RunHistory.load(run.output_dir, run.first_step)
    set_aside_unreadable_metrics(run.output_dir, history.unreadable)
    last_push(run.output_dir)
    state = [value for values in run.optimizer.state.values() for value in values.values()]
    found = [*model.state_dict().values(), *state, *run.guard.state.values(), *rng_state(accelerator.device).values()]
    accelerator.free_memory()
    return run.first_step, [torch.as_tensor(tensor).detach().numpy().tobytes() for tensor in found]  # NaN equals NaN


def test_damaged_run_folders_are_refused_or_resume_the_same_run(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    cases = Cases(pytestconfig)
    recipe = tiny_recipe(max_steps=8, n_layer=1, eval_steps=0, sample_steps=0, dropout=0.1)
    train(recipe)
    shutil.rmtree(tmp_path / "run" / "model")
    good = (tmp_path / "run").rename(tmp_path / "good")
    recipe = dataclasses.replace(recipe, max_steps=12)
    step, expected = resumed(dataclasses.replace(recipe, output_dir=str(copy_folder(good, tmp_path / "run"))))
    assert step == 8
    before = hashes_below(good)
    for case in range(cases.count):
        rng = random.Random(f"{cases.seed} {case}")
        copy_folder(good, tmp_path / "run")
        what, changed = damage(tmp_path / "run", rng)
        # As if it had been damaged before its hash was taken: any result is right, if there is one.
        rehashed = rng.random() < 0.3 and _update_checksums(tmp_path / "run", changed)

        def is_right(result: tuple[int, list[bytes]], anything: bool = rehashed) -> bool:
            return anything or result == (8, expected)

        cases.run(case, what + rehashed * ", with its hash", lambda: resumed(recipe), is_right)
        kept = set(hashes_below(tmp_path / "run").values())
        names = {path.relative_to(tmp_path / "run") for path in changed} | {Path("recipe.yaml")}
        lost = [path for path, sha256 in before.items() if sha256 not in kept and path not in names]
        if lost and not rehashed:
            cases.failures.append(f"case {case}, {what}: lost {lost}")
    cases.check()


def _update_checksums(run: Path, changed: list[Path]) -> bool:
    """Update the checksums of damaged files; return whether that is possible."""
    done = False
    for checkpoint in checkpoints(run):
        files = [path for path in changed if path.is_relative_to(checkpoint) and path.is_file()]
        if files and not any(path.name == "SHA256SUMS" for path in changed):
            update_checksums(checkpoint, files)
            done = True
    return done


def read_all(recipe: Recipe) -> list[torch.Tensor]:
    """Start a new run, and read all of its training and validation batches."""
    run = plan_run(recipe, NoProducer()).run

    def may_read(shards: list[Shard]) -> bool:
        for shard in shards:
            shard.check_hash()
        return True

    windows = TrainingWindows(run.shards, run.tokenizer.vocab_size)
    training = training_batches(windows, run.batch, rank=0, first_step=0, end_step=run.total_steps, may_read=may_read)
    validation = validation_batches(
        run.shards.folder.val_shard,
        seq_len=recipe.seq_len,
        eval_tokens=recipe.eval_tokens,
        batch_size=8,
        vocab_size=run.tokenizer.vocab_size,
        rank=0,
        num_processes=1,
    )
    return [tensor for batches in (training, validation) for batch in batches for tensor in batch]


def test_damaged_shard_folders_are_refused_or_read_as_before(
    tiny_recipe: Callable[..., Recipe], shard_folder: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    cases = Cases(pytestconfig)
    recipe = tiny_recipe(
        data_dir=str(tmp_path / "data"), tokens_per_step=8192, per_device_train_batch_size=256, max_steps=12
    )
    copy_folder(shard_folder, tmp_path / "data")
    expected = read_all(recipe)
    for case in range(cases.count):
        copy_folder(shard_folder, tmp_path / "data")
        what, _ = damage(tmp_path / "data", random.Random(f"{cases.seed} {case}"))

        def is_right(result: list[torch.Tensor]) -> bool:
            return len(result) == len(expected) and all(map(torch.equal, result, expected))

        cases.run(case, what, lambda: read_all(recipe), is_right)
        cases.run(case, what, lambda: list(inspect(tmp_path / "data", verify=True)), bool)
    cases.check()


def test_damaged_partial_shard_folders_are_refused_or_completed_as_before(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, settings = Cases(pytestconfig), {"corpus": str(corpus), "tokenizer": str(tokenizer_folder)}
    settings |= {"shard_tokens": 30_000, "val_tokens": 1_500}
    manifests: list[Manifest] = []
    with monkeypatch.context() as patch:
        update = ShardWriter._update
        patch.setattr(
            ShardWriter, "_update", lambda self, **changes: (update(self, **changes), manifests.append(self.manifest))
        )
        complete = make_shards(tmp_path / "complete", **settings)
    partial = copy_folder(complete.path, tmp_path / "partial")
    assert manifests[1].resume is not None
    for shard in complete.shards[2:]:
        (partial / shard.path.name).unlink()
    (partial / "manifest.json").unlink()
    manifests[1].write(partial)
    expected = {shard.path.name: shard.path.read_bytes() for shard in complete.shards}
    assert len(expected) > 3

    def is_right(folder: ShardFolder) -> bool:
        for shard in folder.shards:
            try:
                shard.check_hash()
            except InputError:  # training refuses it
                continue
            if shard.path.read_bytes() != expected.get(shard.path.name):
                return False
        return len(folder.shards) == len(expected)

    for case in range(cases.count):
        copy_folder(partial, tmp_path / "data")
        what, _ = damage(tmp_path / "data", random.Random(f"{cases.seed} {case}"))
        cases.run(case, what, lambda: make_shards(tmp_path / "data", **settings), is_right)
    cases.check()
