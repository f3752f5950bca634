"""The evaluation tasks of a recipe: read and checked before training starts, judged while it goes on.

What it measures is in metrics.jsonl and on the curves by step, and the newest in the run's eval_results.json, in the
form of `python -m evaluation.run --output`: with the protocol, standard errors and GPT-2's published figures.
"""

import datetime
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from common.cli_errors import InputError
from evaluation.results.metric_values import load_metrics
from evaluation.results.results_file import Results
from evaluation.results.task_runner import TaskResult, judge, read_items
from evaluation.tasks.registry import default_protocols, task_named
from evaluation.tasks.task_types import Encoder
from training.checkpoints.state_snapshot import bare_model
from training.monitoring.throughput import device_name
from training.recipe import Recipe


class TaskEvaluation:
    """A recipe's tasks with their items.

    Arguments:
        recipe: its eval_tasks is not empty.
        tokenizer: of the run.

    Raises:
        InputError: a task's data is not there or cannot be used, or the metric modules cannot be loaded.
    """

    def __init__(self, recipe: Recipe, tokenizer: Encoder) -> None:
        self.tasks = list({task.full_name: task for task in map(task_named, recipe.eval_tasks)}.values())
        data_dir = Path(recipe.eval_data_dir) if recipe.eval_data_dir else None
        try:
            self._items = read_items(self.tasks, data_dir, tokenizer, recipe.positions, recipe.eval_task_limit)
        except InputError as error:
            raise InputError(f"recipe key eval_tasks: {str(error).replace('--data_dir', 'eval_data_dir')}") from None
        self._recipe = recipe
        load_metrics(self.tasks)

    @property
    def fingerprint(self) -> str:
        """A hash of what the items were made from."""
        data = [(name, [item.data for item in items]) for name, items in sorted(self._items.items())]
        return hashlib.sha256(repr(data).encode()).hexdigest()

    @property
    def column_names(self) -> set[str]:
        """The keys of the tasks' figures in metrics.jsonl."""
        return {column_name(task.full_name, figure.name) for task in self.tasks for figure in task.figures}

    def judge(
        self, accelerator: Accelerator, model: nn.Module, between_batches: Callable[[], None] = lambda: None
    ) -> list[TaskResult]:
        """Judge the model as it is, with all processes; neither it nor the random numbers of training change.

        Arguments:
            accelerator: what the processes share.
            model: as it was prepared.
            between_batches: is called by all processes equally often; what it raises ends the evaluation.

        Raises:
            InputError: the model gives NaN.
        """
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        bare = bare_model(accelerator, model)
        # Compiled blocks would be compiled again for every length.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.random.fork_rng(devices=devices), accelerator.autocast():
            return [
                judge(
                    bare,
                    task,
                    self._items[task.full_name],
                    accelerator=accelerator,
                    every_process_scores_all=bool(accelerator.is_fsdp2),
                    between_batches=between_batches,
                )
                for task in self.tasks
            ]

    def results(self, step: int, judged: Sequence[TaskResult], accelerator: Accelerator, parameters: int) -> Results:
        """Return what eval_results.json holds for the model after `step`."""
        recipe = self._recipe
        return Results(
            model=Path(recipe.output_dir).resolve().name,
            revision=None,
            commit=None,
            weights="",
            parameters=parameters,
            n_positions=recipe.positions,
            dtype="bfloat16" if accelerator.mixed_precision == "bf16" else "float32",
            device=device_name(accelerator.device),
            processes=accelerator.num_processes,
            data_dir=None,
            limit=recipe.eval_task_limit,
            started=datetime.datetime.now(datetime.UTC).astimezone().isoformat(timespec="seconds"),
            seconds=round(sum(result.seconds for result in judged), 3),
            tasks=list(judged),
            step=step,
        )


def columns(judged: Iterable[TaskResult]) -> dict[str, float]:
    """Results as metrics.jsonl has them, by `column_name`."""
    return {
        column_name(result.task, figure): measured.value
        for result in judged
        for figure, measured in result.figures.items()
    }


def column_name(task: str, figure: str) -> str:
    """The key of a task's figure: `hellaswag_acc_norm`, or with a protocol that is not the task's default
    `hellaswag_harness_acc_norm`.
    """
    name, _, protocol = task.partition(":")
    return f"{name}_{figure}" if default_protocols()[name].protocol == protocol else f"{name}_{protocol}_{figure}"
