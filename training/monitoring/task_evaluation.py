"""Evaluation tasks while training: their data is read and checked before training starts.

Results go to metrics.jsonl, onto the curves, and into eval_results.json in the format of
`python -m evaluation.run --output`: with protocol, standard errors and GPT-2's published values.
"""

import datetime
import hashlib
from pathlib import Path

from transformers import PreTrainedConfig

from common.cli_errors import InputError
from evaluation.results.metric_values import load_metrics
from evaluation.results.results_file import Results, TaskResult
from evaluation.results.task_runner import read_items, run_task
from evaluation.scoring.scorer import check_items
from evaluation.tasks.registry import default_protocols, task_named
from evaluation.tasks.task_types import Encoder
from training.checkpoints.signals import Coordinator
from training.monitoring.monitor import Monitor, PeriodicEvaluation, evaluation_mode
from training.monitoring.run_history import TASK_RESULTS
from training.monitoring.throughput import device_name
from training.recipe import Recipe
from training.step.hooks import Run
from training.step.precision import autocast_dtype


class TaskSet:
    """A recipe's tasks with their items; missing or invalid data of a task is an `InputError`."""

    def __init__(self, recipe: Recipe, tokenizer: Encoder) -> None:
        self.tasks = list({task.full_name: task for task in map(task_named, recipe.eval_tasks)}.values())
        data_dir = Path(recipe.eval_data_dir) if recipe.eval_data_dir else None
        try:
            self.items = read_items(self.tasks, data_dir, tokenizer, recipe.positions, recipe.eval_task_limit)
        except InputError as error:
            raise InputError(f"recipe key eval_tasks: {str(error).replace('--data_dir', 'eval_data_dir')}") from None
        load_metrics(self.tasks)

    def check_fit(self, config: PreTrainedConfig) -> None:
        """Raise an `InputError` if an item does not fit the model: the first evaluation would end the run."""
        for name, items in self.items.items():
            try:
                check_items(items, n_positions=config.n_positions, vocab_size=config.vocab_size)
            except InputError as error:
                raise InputError(f"recipe key eval_tasks: {name}: {error}") from None

    @property
    def fingerprint(self) -> str:
        """A hash of the data of all items."""
        data = [(name, [item.data for item in items]) for name, items in sorted(self.items.items())]
        return hashlib.sha256(repr(data).encode()).hexdigest()


class TaskEvaluation(PeriodicEvaluation):
    """Evaluates the model on the recipe's tasks every `eval_task_steps`."""

    def __init__(self, run: Run, tasks: TaskSet, monitor: Monitor, coordinator: Coordinator) -> None:
        columns = {column_name(task.full_name, metric.name) for task in tasks.tasks for metric in task.metrics}
        super().__init__(monitor, run.recipe.eval_task_steps, columns)
        self._tasks, self._coordinator = tasks, coordinator

    def fails_alike(self, run: Run, error: Exception) -> bool:
        """Whether it is an error of scores, which `run_task` raises on all ranks."""
        return isinstance(error, InputError)

    def evaluate(self, run: Run) -> None:
        """Evaluate on all ranks, and write metrics.jsonl and eval_results.json; NaN is an `InputError`."""
        accelerator = run.accelerator
        with run.pause(), evaluation_mode(accelerator, run.model) as model:
            results = [
                run_task(
                    model,
                    task,
                    self._tasks.items[task.full_name],
                    accelerator=accelerator,
                    sharded_model=bool(accelerator.is_fsdp2),
                    between_batches=self._coordinator.check_stop,
                )
                for task in self._tasks.tasks
            ]
        if accelerator.is_main_process:
            path = run.output_dir / TASK_RESULTS
            file = self._monitor.log.history.task_results = _results_file(run, results)
            try:
                file.write(path, with_items=False)
            except OSError as error:
                run.report(
                    f"cannot write {path} ({error.strerror}): free some space; training continues, the results are in "
                    "metrics.jsonl, and the next evaluation writes the file"
                )
        metrics = [(result.task, name, metric) for result in results for name, metric in result.metrics.items()]
        values = {column_name(task, name): metric.value for task, name, metric in metrics}
        self._monitor.record(run, values, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))


def _results_file(run: Run, results: list[TaskResult]) -> Results:
    return Results(
        model=run.output_dir.resolve().name,
        revision=None,
        commit=None,
        weights="",
        parameters=run.parameters,
        n_positions=run.recipe.positions,
        dtype=str(autocast_dtype(run.accelerator)).removeprefix("torch."),
        device=device_name(run.accelerator.device),
        processes=run.accelerator.num_processes,
        data_dir=None,
        limit=run.recipe.eval_task_limit,
        started=datetime.datetime.now(datetime.UTC).astimezone().isoformat(timespec="seconds"),
        seconds=round(sum(result.seconds for result in results), 3),
        tasks=results,
        step=run.step,
    )


def column_name(task: str, metric: str) -> str:
    """The key of a metric in metrics.jsonl: `hellaswag_acc_norm`, or `hellaswag_harness_acc_norm` for a protocol that
    is not the task's default.
    """
    name, _, protocol = task.partition(":")
    return f"{name}_{metric}" if default_protocols()[name].protocol == protocol else f"{name}_{protocol}_{metric}"
