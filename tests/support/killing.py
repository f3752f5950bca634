"""Kills runs at random moments, resumes them, and compares their end with that of an uninterrupted run."""

import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from support.processes import ProcessesOfARun
from training.checkpoints.checkpoint_folder import checkpoints
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe

_COMPARED = ("train_loss", "val_loss", "learning_rate", "grad_norm", "tokens")


@dataclass
class KillFuzz:
    """Runs of one recipe, each killed at random moments until it is complete.

    Args:
        recipe: its output_dir gets the folders of all runs.
        number: of processes.
        seed: of the moments and of the processes killed.
    """

    recipe: Recipe
    number: int
    seed: int
    kills: int = 0
    runs: int = 0
    moments: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._folder = Path(self.recipe.output_dir)
        self._folder.mkdir(parents=True)
        self._uninterrupted = self._recipe("uninterrupted")
        start = time.monotonic()
        codes = self._start(self._uninterrupted).wait()
        assert codes == [0] * self.number, (codes, self._printed(self._uninterrupted).read_text())
        self._seconds = time.monotonic() - start

    def run(self, kills: int, report: Callable[[str], None] = lambda line: None) -> None:
        """Kill `kills` times in all, and check every run at its end."""
        while self.kills < kills:
            self.runs += 1
            killed = self._recipe(f"killed-{self.runs}")
            while self.kills < kills and not self._is_complete(killed):
                self._kill_once(killed)
            if not self._is_complete(killed):
                codes = self._start(killed).wait()
                assert codes == [0] * self.number, (codes, self._printed(killed).read_text())
            self._check(killed)
            report(f"run {self.runs}: equal at its end; {self.kills} kills so far")

    def _recipe(self, name: str) -> Recipe:
        recipe = replace(self.recipe, output_dir=str(self._folder / name))
        recipe.save(self._folder / f"{name}.yaml")
        return recipe

    @staticmethod
    def _printed(recipe: Recipe) -> Path:
        return Path(recipe.output_dir).with_suffix(".printed")

    def _start(self, recipe: Recipe) -> ProcessesOfARun:
        path = Path(recipe.output_dir).with_suffix(".yaml")
        return ProcessesOfARun(path, self.number, self._printed(recipe))

    @staticmethod
    def _is_complete(recipe: Recipe) -> bool:
        return (Path(recipe.output_dir) / "model").exists()

    def _kill_once(self, recipe: Recipe) -> None:
        """Start the run, and kill one or all of its processes at a random moment."""
        folder = Path(recipe.output_dir)
        before = _partial_saves(folder)  # left by the previous kill, if this start is killed before it cleans up
        run = self._start(recipe)
        # A start takes a second; a kill should cost a twentieth of a run on average.
        time.sleep(self._random.uniform(0.0, 1.0 + self._seconds / 10))
        if self._random.random() < 0.5:
            # A kill during a save could do harm, and saves are short: wait for one.
            deadline = time.monotonic() + 5
            while run.alive and not _partial_saves(folder) - before and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(self._random.uniform(0.0, 0.02))
        victim = self._random.choice(["all", *range(self.number)]) if self.number > 1 else 0
        saving = bool(_partial_saves(folder) - before)
        was_alive = run.alive
        run.send(signal.SIGKILL, *([] if victim == "all" else [int(victim)]))
        if victim != "all":
            time.sleep(self._random.uniform(0.0, 0.2))  # until a launcher would notice
        run.kill()
        if was_alive:
            self.kills += 1
            saving = saving or bool(_partial_saves(folder) - before)
            found = checkpoints(folder)
            self.moments["during a save" if saving else "between saves" if found else "before the first"] += 1

    def _check(self, killed: Recipe) -> None:
        ours = Path(killed.output_dir)
        assert_runs_are_equal(ours, Path(self._uninterrupted.output_dir))
        assert not list((ours / "checkpoints").glob(".*"))


def _partial_saves(folder: Path) -> set[tuple[str, int]]:
    """The temporary folders of saves in progress, each with its inode."""
    found = set()
    for path in (folder / "checkpoints").glob(".*-step-*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def assert_runs_are_equal(ours: Path, theirs: Path) -> None:
    """Assert that weights, optimizer state, random-number generators and logged values are bit-identical."""
    newest = checkpoints(theirs)[-1]
    assert checkpoints(ours)[-1].name == newest.name
    names = ["model.safetensors", *(f"training_state/{path.name}" for path in _tensors(newest / "training_state"))]
    for name in names:
        assert (checkpoints(ours)[-1] / name).read_bytes() == (newest / name).read_bytes(), name
    assert (ours / "model" / "model.safetensors").read_bytes() == (newest / "model.safetensors").read_bytes()
    assert _logged(ours) == _logged(theirs)
    assert (ours / "log.txt").read_text() == (theirs / "log.txt").read_text()


def _tensors(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _logged(folder: Path) -> list[str]:
    """The values in metrics.jsonl that do not depend on time."""
    lines = read_metrics(folder)
    return [json.dumps([line["step"], *(line.get(key) for key in _COMPARED)]) for line in lines]
