"""Kills runs at random moments, starts them again, and compares what they end with to a run that nobody killed."""

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
    """Runs of one recipe, each killed at random moments until it is through.

    Args:
        recipe: its output_dir is where the runs go, side by side.
        number: of processes.
        seed: of the moments and of who is killed.
    """

    recipe: Recipe
    number: int
    seed: int
    kills: int = 0
    runs: int = 0
    moments: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._place = Path(self.recipe.output_dir)
        self._place.mkdir(parents=True)
        self._whole = self._recipe("whole")
        start = time.monotonic()
        codes = self._start(self._whole).wait()
        assert codes == [0] * self.number, (codes, self._printed(self._whole).read_text())
        self._seconds = time.monotonic() - start

    def run(self, kills: int, say: Callable[[str], None] = lambda line: None) -> None:
        """Kill so many times in all, and check every run that came to its end, the last one without kills."""
        while self.kills < kills:
            self.runs += 1
            broken = self._recipe(f"broken-{self.runs}")
            while self.kills < kills and not self._is_over(broken):
                self._kill_once(broken)
            if not self._is_over(broken):
                codes = self._start(broken).wait()
                assert codes == [0] * self.number, (codes, self._printed(broken).read_text())
            self._compare(broken)
            say(f"run {self.runs}: ended alike; {self.kills} kills so far")

    def _recipe(self, name: str) -> Recipe:
        recipe = replace(self.recipe, output_dir=str(self._place / name))
        recipe.save(self._place / f"{name}.yaml")
        return recipe

    @staticmethod
    def _printed(recipe: Recipe) -> Path:
        return Path(recipe.output_dir).with_suffix(".printed")

    def _start(self, recipe: Recipe) -> ProcessesOfARun:
        path = Path(recipe.output_dir).with_suffix(".yaml")
        return ProcessesOfARun(path, self.number, self._printed(recipe))

    @staticmethod
    def _is_over(recipe: Recipe) -> bool:
        return (Path(recipe.output_dir) / "model").exists()

    def _kill_once(self, recipe: Recipe) -> None:
        """Start the run, and kill one of its processes or all of them at a random moment of its life."""
        folder = Path(recipe.output_dir)
        before = _of_saves(folder)  # as the kill before left it, where the run is not to come to cleaning up
        run = self._start(recipe)
        # A second is the start's, and a kill is to cost a twentieth of a run on the mean.
        time.sleep(self._random.uniform(0.0, 1.0 + self._seconds / 10))
        if self._random.random() < 0.5:
            # A save is where a kill could do harm, and takes a small part of the time.
            patience = time.monotonic() + 5
            while run.alive and not _of_saves(folder) - before and time.monotonic() < patience:
                time.sleep(0.001)
            time.sleep(self._random.uniform(0.0, 0.02))
        victim = self._random.choice(["all", *range(self.number)]) if self.number > 1 else 0
        saving = bool(_of_saves(folder) - before)
        was_alive = run.alive
        run.send(signal.SIGKILL, *([] if victim == "all" else [int(victim)]))
        if victim != "all":
            time.sleep(self._random.uniform(0.0, 0.2))  # as long as a launcher takes to notice
        run.kill()
        if was_alive:
            self.kills += 1
            saving = saving or bool(_of_saves(folder) - before)
            found = checkpoints(folder)
            self.moments["during a save" if saving else "between saves" if found else "before the first"] += 1

    def _compare(self, broken: Recipe) -> None:
        ours = Path(broken.output_dir)
        assert_end_alike(ours, Path(self._whole.output_dir))
        assert not list((ours / "checkpoints").glob(".*"))


def _of_saves(folder: Path) -> set[tuple[str, int]]:
    """The folders that saves have under other names than their own at this moment, each with its inode."""
    found = set()
    for path in (folder / "checkpoints").glob(".*-step-*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def assert_end_alike(ours: Path, theirs: Path) -> None:
    """Assert that two runs ended with the same bytes in weights, optimizer and generators, and told the same."""
    newest = checkpoints(theirs)[-1]
    assert checkpoints(ours)[-1].name == newest.name
    names = ["model.safetensors", *(f"training_state/{path.name}" for path in _tensors(newest / "training_state"))]
    for name in names:
        assert (checkpoints(ours)[-1] / name).read_bytes() == (newest / name).read_bytes(), name
    assert (ours / "model" / "model.safetensors").read_bytes() == (newest / "model.safetensors").read_bytes()
    assert _told(ours) == _told(theirs)
    assert (ours / "log.txt").read_text() == (theirs / "log.txt").read_text()


def _tensors(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _told(folder: Path) -> list[str]:
    """What metrics.jsonl says of each step, without what depends on the machine's mood."""
    lines = read_metrics(folder)
    return [json.dumps([line["step"], *(line.get(key) for key in _COMPARED)]) for line in lines]
