"""A training run: a loop of optimizer steps, and the hooks that log, evaluate, save and publish around them."""

import contextlib
import functools
import gc
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from common.cli_errors import InputError, is_out_of_memory, one_line
from common.rate_limited_log import RateLimitedLog
from training.checkpoints.checkpoint_folder import load_checkpoint, skeleton_of
from training.checkpoints.checkpoint_writer import Checkpoints
from training.checkpoints.resume import prepare_run_folder
from training.checkpoints.resume_command import extend_command, resume_command
from training.checkpoints.signals import Coordinator, StopTraining
from training.data.loading.loader import TrainingWindows, training_batches
from training.data.producing.background_producer import SECONDS_BETWEEN_LINES, BackgroundProducer
from training.data.shards.shard_reader import Shard
from training.hub.model_folder import ModelFolder
from training.hub.publisher import Publisher, pending_push
from training.monitoring.monitor import Monitor
from training.monitoring.profiling import Profiling
from training.monitoring.samples import Samples
from training.monitoring.skipped_updates import SkippedUpdates
from training.monitoring.task_evaluation import TaskEvaluation
from training.monitoring.validation import Validation
from training.optim.schedule import learning_rate_at, sequence_length_at
from training.recipe import Recipe
from training.setup.accelerator import (
    PROCESS_TIMEOUT,
    all_reduce_min,
    build_accelerator,
    check_launch,
    lost_connections_reported,
    shut_down,
)
from training.setup.memory import find_batch_size
from training.setup.model import build_model, prepare_for_training
from training.setup.plan import Plan, plan_run
from training.step.guard import Guard
from training.step.hooks import Hook, Run
from training.step.precision import loss_scale_state
from training.step.train_step import train_step


def train(recipe: Recipe, hooks: Sequence[Hook] = ()) -> None:
    """Train to the end of the recipe, from scratch or from the newest checkpoint.

    Your own hooks are called in every step, after the step is logged and before evaluations and checkpoints:

        class WarnOnLargeNorm(Hook):
            def after_step(self, run, result):
                if run.is_due(100) and result.grad_norm > 10:
                    run.report(f"step {run.step}: gradient norm {result.grad_norm:.1f}")

        train(load_recipe(Path("recipe.yaml")), hooks=[WarnOnLargeNorm()])

    Raises:
        InputError: from `plan_run`, before any work starts.
        SystemExit: a signal stopped the run; its checkpoint is saved.
    """
    check_launch(recipe)
    # Nothing touches a GPU before the plan is checked, unless nodes have to wait for each other.
    accelerator = functools.cache(lambda: build_accelerator(recipe))

    def gather(values: list[Any]) -> list[Any]:
        accelerator()
        return gather_object(values)

    with lost_connections_reported(), contextlib.ExitStack() as lock, BackgroundProducer() as producer:
        plan = plan_run(recipe, producer, lock=lock, gather_object=gather)
        if plan.is_complete:
            _report_complete(plan.run)
        else:
            _train(plan, accelerator(), producer, hooks)


class NoMoreShardsError(InputError):
    """The next shard is corrupted or will not be produced, and the run has taken all steps before it."""


def take_steps(run: Run, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Take the optimizer steps that are missing, and call the hooks around them; a signal raises `StopTraining`."""
    recipe = run.recipe
    for hook in run.hooks:
        hook.before_training(run)
    run.model.train()
    for step in range(run.first_step + 1, run.total_steps + 1):
        for hook in run.hooks:
            hook.before_step(run, step)
        learning_rate = learning_rate_at(
            step - 1,
            peak=recipe.learning_rate,
            warmup_steps=recipe.warmup_steps,
            total_steps=run.total_steps,
            min_ratio=recipe.min_learning_rate_ratio,
            schedule=recipe.lr_scheduler_type,
            decay_steps=recipe.decay_steps,
        )
        result = train_step(
            run.accelerator,
            run.model,
            run.optimizer,
            batches,
            accumulation_steps=run.batch.accumulation_steps,
            learning_rate=learning_rate,
            max_grad_norm=recipe.max_grad_norm,
            seq_len=sequence_length_at(step - 1, seq_len=recipe.seq_len, warmup_steps=recipe.seq_len_warmup_steps),
            end_of_text_id=run.document_mark,
            guard=run.guard,
        )
        run.step = step
        for hook in run.hooks:
            hook.after_step(run, result)


def _train(plan: Plan, accelerator: Accelerator, producer: BackgroundProducer, user_hooks: Sequence[Hook]) -> None:
    run = plan.run
    model = build_model(
        run.recipe,
        run.tokenizer,
        device_type=accelerator.device.type,
        weights=run.resume_from,
        report=accelerator.print,
    )
    if plan.tasks is not None:
        plan.tasks.check_fit(model.config)
    if run.recipe.per_device_train_batch_size == "auto":
        run.batch = find_batch_size(run.batch, accelerator, model, run.recipe)
    with contextlib.ExitStack() as stack:
        skeleton = skeleton_of(model)
        _prepare(run, accelerator, model)
        # Once everything could be built.
        messages = prepare_run_folder(run.recipe, run.first_step) if accelerator.is_main_process else []
        coordinator = Coordinator(
            save_minutes=run.recipe.save_minutes, num_processes=accelerator.num_processes, timeout=PROCESS_TIMEOUT
        )
        checkpoints = _add_hooks(plan, coordinator, skeleton, user_hooks)
        stack.push(lambda kind, error, _: _close(run, producer, error))
        for message in messages:
            run.report(message)
        if accelerator.is_main_process:
            producer.report = run.report
        # The libraries' hundreds of thousands of objects cost 0.2 s per collection: a step or more on a GPU.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        with coordinator:
            try:
                take_steps(run, _training_batches(run, coordinator, checkpoints, producer))
            except StopTraining as stop:
                if stop.between_steps:
                    checkpoints.save(run)
                checkpoints.wait(run)
                _report_stop(run, stop.number, checkpoints.newest)
                raise SystemExit(128 + stop.number) from None
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise InputError(
                    f"step {run.step + 1:,} does not fit into the memory of {accelerator.device} "
                    f"({one_line(error, 80)}); lower per_device_train_batch_size, or set it to auto"
                ) from None
            except NoMoreShardsError as error:
                checkpoints.save(run)
                checkpoints.wait(run)
                raise InputError(
                    f"the shards end before step {run.step + 1:,}, and the run is saved: {error}"
                ) from None
            checkpoints.wait(run)
            coordinator.wait()
        for hook in run.hooks:
            hook.after_training(run)


def _prepare(run: Run, accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Set the run's model, optimizer and guard, with the state of the checkpoint to resume from."""
    recipe = run.recipe
    run.accelerator, run.config, run.parameters = accelerator, model.config, model.num_parameters()
    run.model, run.optimizer = prepare_for_training(accelerator, model, recipe)
    run.guard = Guard(
        accelerator.device,
        threshold=recipe.spike_threshold,
        window=recipe.spike_window,
        skip_spikes=recipe.skip_spikes,
        step=run.first_step,
        loss_scale=loss_scale_state(accelerator),
    )
    torch.manual_seed(recipe.seed + accelerator.process_index)  # each rank draws its own dropout
    if run.resume_from is not None:
        load_checkpoint(
            run.resume_from,
            accelerator=accelerator,
            model=run.model,
            optimizer=run.optimizer,
            loop_state=run.guard.state,
        )


def _add_hooks(
    plan: Plan, coordinator: Coordinator, skeleton: PreTrainedModel, user_hooks: Sequence[Hook]
) -> Checkpoints:
    """Set the run's hooks, and return the one that saves checkpoints."""
    run = plan.run
    monitor = Monitor(run)
    validation = Validation(run, monitor, coordinator)
    samples = Samples(run, monitor)
    checkpoints = Checkpoints(run, skeleton, coordinator)
    skipped_updates = SkippedUpdates(monitor, checkpoints)
    # These see every step. Profiling comes first, so that the trace ends before other hooks run.
    run.hooks = [Profiling(), monitor, skipped_updates, *user_hooks]
    # A signal stops the run here or in an evaluation; the next start runs missing evaluations.
    run.hooks += [coordinator, validation]
    if plan.tasks is not None:
        run.hooks.append(TaskEvaluation(run, plan.tasks, monitor, coordinator))
    run.hooks += [samples, ModelFolder(checkpoints, validation, samples, monitor)]
    if plan.repo_id is not None:
        run.hooks.append(Publisher(run, plan.repo_id, monitor.log.history))
    # After validation, which shows whether the weights are good. Hooks are closed in reverse order: the last checkpoint
    # is complete before Publisher closes.
    run.hooks.append(checkpoints)
    return checkpoints


def _close(run: Run, producer: BackgroundProducer, error: BaseException | None) -> None:
    if run.accelerator.is_main_process:
        producer.stop()  # before the log that it writes to is closed
    # Release the model before the process group: gloo can hang if DDP and the group are destroyed together.
    del run.model, run.optimizer
    while error is not None:  # the variables of the functions that failed refer to the model too
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    for hook in reversed(run.hooks):
        hook.close()
    shut_down(run.accelerator)


def _training_batches(
    run: Run, coordinator: Coordinator, checkpoints: Checkpoints, producer: BackgroundProducer
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches; while they wait for shards, the run can save and stop.

    Raises:
        NoMoreShardsError: after the last batch that there is, if a shard is corrupted, or the producer of a node failed
            for good.
    """
    # Dataloader workers read ahead, so the wait may begin in the middle of a step.
    between_steps = not run.recipe.dataloader_num_workers
    report = RateLimitedLog(SECONDS_BETWEEN_LINES, run.report)

    failures: list[str] = []

    def on_wait(step: int) -> bool:
        failures.extend(failure for failure in gather_object([producer.failure]) if failure)
        if failures:
            return True
        coordinator.check_stop(between_steps=between_steps)
        if coordinator.save_is_due and between_steps:
            checkpoints.save(run)
        ready_here = run.shards.ready() >= (step + 1) * run.batch.sequences_per_step
        report(
            f"step {step + 1} waits for the corpus: {len(run.shards.shards)} training shards are ready; "
            + ("another node waits for its next shard" if ready_here else "the next is not ready yet")
            + (f"; the producer failed: {producer.last_error}" if producer.last_error else "")
        )
        return False

    def may_read(shards: list[Shard]) -> bool:
        found = []
        try:
            for shard in shards if run.accelerator.is_local_main_process else []:  # one hash per node is enough
                shard.check_hash()
        except InputError as error:
            found.append(str(error))
        failures.extend(gather_object(found))
        return not failures

    yield from training_batches(
        TrainingWindows(run.shards, run.tokenizer.vocab_size),
        run.batch,
        rank=run.accelerator.process_index,
        first_step=run.first_step,
        end_step=run.total_steps,
        num_workers=run.recipe.dataloader_num_workers,
        pin_memory=run.accelerator.device.type == "cuda",
        on_wait=on_wait,
        all_reduce_min=lambda number: all_reduce_min(run.accelerator, number),
        may_read=may_read,
    )
    raise NoMoreShardsError(failures[0])


def _report_complete(run: Run) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"The run in {run.output_dir} is complete: {run.first_step:,} of {run.total_steps:,} steps.")
        print(f"To train longer:\n  {extend_command(run.output_dir, run.total_steps)}")
        if left := pending_push(run.recipe, run.first_step):
            print(left)


def _report_stop(run: Run, number: int, newest: Path | None) -> None:
    start = f"resume from {newest}" if newest else "start from scratch"
    run.report(
        f"{signal.Signals(number).name}: stopped after step {run.step:,} of {run.total_steps:,}; {start} with\n  "
        + resume_command(run.output_dir, newest)
    )
