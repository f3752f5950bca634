"""The run: everything is checked, then steps are taken, watched and saved, and a model folder is left."""

import contextlib
import functools
import gc
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.cli_errors import InputError
from common.folder_lock import locked
from common.rate_limited_log import RateLimitedLog
from training.checkpoints.checkpoint_folder import copy_model, load_checkpoint, publish, remove_leftovers, skeleton_of
from training.checkpoints.checkpoint_writer import Saving
from training.checkpoints.resume import good_checkpoint, set_aside_later_checkpoints
from training.checkpoints.resume_command import extend_command, resume_command
from training.checkpoints.signals import Agreement, LeaveAsked, SignalWatch
from training.data.loading.loader import TrainingWindows, training_batches
from training.data.producing.background_producer import SECONDS_BETWEEN_LINES, BackgroundProducer
from training.hub.card import write_model_card
from training.hub.publisher import Publisher, pending_push
from training.monitoring.monitor import Watch
from training.monitoring.profiling import NoTrace, StepTrace, TraceOf
from training.monitoring.run_history import RunFacts, Start
from training.monitoring.run_summary import summary_text
from training.monitoring.throughput import device_name
from training.optim.schedule import learning_rate_at
from training.recipe import Recipe, profiled_steps
from training.setup.accelerator import (
    PROCESS_TIMEOUT,
    all_reduce_min,
    build_accelerator,
    check_process_count,
    shut_down,
)
from training.setup.batch_size_finder import find_batch_size
from training.setup.model import build_model, prepare_for_training
from training.setup.plan import Plan, plan_run
from training.step.document_mask import attention_for
from training.step.guard import Guard, Verdict
from training.step.train_step import train_step


def train(recipe: Recipe) -> None:
    """Run the recipe to its end, from its beginning or from where an earlier start stopped.

    Raises:
        InputError: from `plan_run`, before any work starts.
    """
    check_process_count()
    # Nothing touches a GPU before the plan is checked, unless nodes have to wait for each other.
    accelerator = functools.cache(lambda: build_accelerator(recipe))

    def gather(values: list[Any]) -> list[Any]:
        accelerator()
        return gather_object(values)

    with BackgroundProducer() as producer:
        plan = plan_run(recipe, producer, gather_object=gather)
        _train(plan, accelerator, producer)


def _train(plan: Plan, make_accelerator: Callable[[], Accelerator], producer: BackgroundProducer) -> None:
    recipe = plan.recipe
    if plan.is_complete:
        if os.environ.get("RANK", "0") == "0":
            print(f"The run in {recipe.output_dir} is complete: {plan.first_step:,} of {plan.total_steps:,} steps.")
            longer = extend_command(plan.output_dir, plan.total_steps)
            print(f"To go on, give it a new end:\n  {longer}")
            if left := pending_push(recipe, plan.first_step):
                print(left)
        return
    accelerator = make_accelerator()
    # Its bars for each model that is saved, and its reports before an error that we put into one line.
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    attention = attention_for(recipe, accelerator.device.type)
    model = build_model(replace(recipe, attn_implementation=attention), plan.tokenizer, plan.resume_from)
    if recipe.per_device_train_batch_size == "auto":
        plan = replace(plan, batch=find_batch_size(plan.batch, accelerator, model, recipe, plan.document_mark))
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(locked(plan.output_dir))
        run = Run(plan, accelerator, model, producer)
        stack.callback(run.close)
        if accelerator.is_main_process:
            producer.report = run.log.say
            stack.callback(producer.stop)  # before its log is closed
        run.take_steps()
        run.finish()


@contextlib.contextmanager
def spared_by_the_collector() -> Iterator[None]:
    """Keep Python's garbage collector from going through what is there already, again and again.

    That is hundreds of thousands of objects of the libraries: 0.2 s each time, a step or more on a GPU.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Run:
    """A run in progress: the prepared model and optimizer, and what watches them."""

    def __init__(
        self, plan: Plan, accelerator: Accelerator, model: PreTrainedModel, producer: BackgroundProducer
    ) -> None:
        self.plan = plan
        self.producer = producer
        self.accelerator = accelerator
        recipe = plan.recipe
        self.config = model.config
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        skeleton = skeleton_of(model)
        self.model, self.optimizer = prepare_for_training(accelerator, model, recipe)
        self.guard = Guard(
            accelerator.device,
            threshold=recipe.spike_threshold,
            window=recipe.spike_window,
            skip_spikes=recipe.skip_spikes,
            on_verdict=self._stands_out,
        )
        # Each process draws its own dropout.
        torch.manual_seed(recipe.seed + accelerator.process_index)
        # What the loop remembers from step to step, updated in place: saved, and filled again on resuming.
        self.loop_state: dict[str, Tensor] = {**self.guard.state}
        if plan.resume_from is not None:
            load_checkpoint(
                plan.resume_from,
                accelerator=accelerator,
                model=self.model,
                optimizer=self.optimizer,
                loop_state=self.loop_state,
            )
        # Nothing is written before everything could be built.
        set_aside: list[Path] = []
        if accelerator.is_main_process:
            recipe.save(plan.output_dir / "recipe.yaml")
            set_aside = set_aside_later_checkpoints(plan.output_dir, plan.first_step)
            # Not only at the next save: a run that was killed in its last one has none before it.
            remove_leftovers(plan.output_dir)
        self.watch = Watch(
            plan, accelerator, self.model, parameters=self.parameters, between_batches=self._between_batches
        )
        self.log = self.watch.log
        if accelerator.is_main_process:
            start = Start(plan.first_step, device_name(accelerator.device), accelerator.num_processes)
            self.log.history.add_start(plan.output_dir, start)
        if set_aside:
            self.log.say(f"later checkpoints are kept as {', '.join(map(str, set_aside))}; remove them when you like")
        self.saving = Saving(
            plan,
            accelerator,
            self.model,
            self.optimizer,
            skeleton=skeleton,
            loop_state=self.loop_state,
            before_it_counts=self.log.flush_to_disk,
            say=self.log.say,
        )
        self.agreement = Agreement(accelerator.num_processes, PROCESS_TIMEOUT)
        self.signals = SignalWatch()
        self._save_is_due = False
        self.publishing: Publisher | None = None
        if plan.repo_id is not None:
            self.publishing = Publisher(recipe, plan.repo_id, self.log, self.config, self.parameters)
            self.saving.on_saved.append(self._push)

    def take_steps(self) -> None:
        """Train from the first step that is missing to the last.

        Raises:
            SystemExit: a signal asked for it; the run is saved, and goes on from there at the next start.
        """
        with self.signals, spared_by_the_collector():
            self._take_steps()
            self.saving.wait()
            self.agreement.settled()
        if self.accelerator.is_main_process:
            self.saving.refuse_unsaved_end()

    def _take_steps(self) -> None:
        self.watch.introduce()
        recipe, plan = self.plan.recipe, self.plan
        # A run that was asked to leave, or only its model folder is missing, or it goes to a new output_dir.
        leave = self._unless_asked_to_leave(self.watch.make_up, plan.first_step) if plan.first_step else 0
        if leave:
            self._leave(plan.first_step, leave)
        batches = self._training_batches()
        self.model.train()
        trace = self._trace()
        self.watch.begin()
        for step in range(plan.first_step, plan.total_steps):
            done = step + 1
            learning_rate = learning_rate_at(
                step,
                peak=recipe.learning_rate,
                warmup_steps=recipe.warmup_steps,
                total_steps=plan.total_steps,
                min_ratio=recipe.min_learning_rate_ratio,
                schedule=recipe.lr_scheduler_type,
                decay_steps=recipe.decay_steps,
            )
            trace.before(done)
            loss, grad_norm = train_step(
                self.accelerator,
                self.model,
                self.optimizer,
                batches,
                accumulation_steps=plan.batch.accumulation_steps,
                learning_rate=learning_rate,
                max_grad_norm=recipe.max_grad_norm,
                end_of_text_id=plan.document_mark,
                judge=functools.partial(self.guard.judge, done),
            )
            trace.after(done)
            self.watch.step_taken()
            self.saving.step_taken()
            self.guard.look_back()
            leave, by_clock = self.agreement.exchange(self.signals.received, self.saving.due_by_clock())
            if plan.is_due(done, recipe.logging_steps):
                self.watch.record(done, loss, grad_norm, learning_rate)
            if not leave:  # the next start makes up for what is left out
                leave = self._unless_asked_to_leave(self.watch.look, done)
            if (leave or by_clock or self._save_is_due or self.saving.due(done)) and self._weights_are_good(done):
                with self.watch.pause():
                    self.saving.save(done)
            self._save_is_due = False
            if leave:
                self._leave(done, leave)

    def _leave(self, done: int, number: int) -> NoReturn:
        self.saving.wait()
        name, total = signal.Signals(number).name, self.plan.total_steps
        self.log.say(
            f"{name}: stopped after step {done:,} of {total:,}; the run goes on from "
            f"{self.saving.newest or 'its beginning'} with\n  "
            + resume_command(self.plan.output_dir, self.saving.newest)
        )
        raise SystemExit(128 + number)

    def _stands_out(self, verdict: Verdict) -> None:
        """Tell of a spike or of an update that was left out, and stop where too many of them were."""
        plan = self.plan
        self.watch.stands_out(verdict)
        if verdict.in_a_row >= plan.recipe.max_skipped_steps:
            self.saving.wait()
            raise InputError(
                f"{verdict.in_a_row:,} updates in a row were skipped up to step {verdict.step:,}, where the loss is "
                f"{verdict.loss:.4g} and the gradient's norm {verdict.grad_norm:.4g}; lower learning_rate or raise "
                "warmup_steps: " + good_checkpoint(plan.output_dir, before=verdict.step - verdict.in_a_row + 1)
            )

    def _weights_are_good(self, done: int) -> bool:
        """Whether a checkpoint may be saved.

        Where updates are being skipped, the one that was made last may be what broke the weights, unless a validation
        of this step vouches for them.
        """
        self.guard.look_at_all()
        step, loss = self.watch.last_validation
        if not self.guard.skipped_in_a_row or (step == done and math.isfinite(loss)):
            return True
        if step == done == self.plan.total_steps:
            self.saving.wait()
            raise InputError(
                "the run's last updates were skipped, and its validation loss is no finite number; lower "
                "learning_rate or raise warmup_steps: "
                + good_checkpoint(self.plan.output_dir, before=done - self.guard.skipped_in_a_row + 1)
            )
        self.log.say(f"step {done}  no checkpoint while updates are skipped")
        return False

    def _unless_asked_to_leave(self, evaluate: Callable[[int], None], done: int) -> int:
        """Evaluate after step `done`; return the signal that broke it off, or 0."""
        try:
            evaluate(done)
        except LeaveAsked as asked:
            return asked.number
        return 0

    def _between_batches(self) -> None:
        leave, by_clock = self.agreement.exchange(self.signals.received, self.saving.due_by_clock())
        self._save_is_due |= bool(by_clock)  # behind the validation
        if leave:
            raise LeaveAsked(leave)

    def _trace(self) -> StepTrace:
        wish = self.plan.recipe.profile_steps
        if wish is None or not self.accelerator.is_main_process:
            return NoTrace()
        steps = [step for step in profiled_steps(wish) if self.plan.first_step < step <= self.plan.total_steps]
        if not steps:
            self.log.say(f"no trace: this start takes none of the steps {wish}")
            return NoTrace()
        return TraceOf(range(steps[0], steps[-1] + 1), self.plan.output_dir, self.log.say)

    def _training_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        plan, recipe = self.plan, self.plan.recipe
        say = RateLimitedLog(SECONDS_BETWEEN_LINES, self.log.say)

        def waiting(step: int) -> None:
            # Processes that read ahead may wait in the middle of a step.
            between_steps = not recipe.dataloader_num_workers
            save_is_due = between_steps and self.saving.due_by_clock()
            leave, by_clock = self.agreement.exchange(self.signals.received, save_is_due)
            asked = between_steps and (leave or by_clock)
            if asked and step > self.saving.saved_step and self._weights_are_good(step):
                self.saving.save(step)
            if leave:
                self._leave(step, leave)
            say(self._waiting_line(step))

        return training_batches(
            TrainingWindows(plan.shards, plan.tokenizer.vocab_size),
            plan.batch,
            rank=self.accelerator.process_index,
            first_step=plan.first_step,
            end_step=plan.total_steps,
            num_workers=recipe.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            on_wait=waiting,
            least=self._least,
        )

    def _waiting_line(self, step: int) -> str:
        shards, error = self.plan.shards, self.producer.last_error
        here = shards.ready() >= (step + 1) * self.plan.batch.sequences_per_step
        return (
            f"step {step + 1} waits for the corpus: {len(shards.shards)} training shards are here, "
            + ("and another machine waits for its own" if here else "and the next is not ready yet")
            + (f"; their producer died: {error}" if error else "")
        )

    def _least(self, number: int) -> int:
        return all_reduce_min(self.accelerator, number)

    def finish(self) -> None:
        """Leave `model/` and `curves.png`, and tell what came out and what to try next.

        Raises:
            InputError: the disk does not take them; the checkpoints stay.
        """
        plan, prompts = self.plan, self.plan.recipe.sample_prompts
        self.watch.sample(plan.total_steps, show=False)
        if not self.accelerator.is_main_process:
            return
        self.log.history.gzip_bits_per_byte = self.watch.text.gzip_bits_per_byte(plan.tokenizer)
        facts = self._facts(plan.total_steps)
        model = plan.output_dir / "model"
        try:
            self._write_model(model, facts)
        except OSError as error:
            raise InputError(
                f"{model} could not be written ({error.strerror}); make room for it and start again: every step is "
                "saved, and only this is left to do"
            ) from None
        prompt = prompts[0] if prompts else ""
        self.log.say(summary_text(plan.output_dir, facts, prompt=prompt))
        if self.publishing is not None:
            self.publishing.finish(model, plan.total_steps, self.saving.newest)

    def _write_model(self, model: Path, facts: RunFacts) -> None:
        unfinished = self.plan.output_dir / ".unfinished-model"
        assert self.saving.newest is not None  # the last step's
        copy_model(self.saving.newest, unfinished)
        self.watch.draw_curves(unfinished)
        write_model_card(unfinished, self.plan.recipe, facts, self.config, earlier=model)
        publish(unfinished, model)

    def _push(self, checkpoint: Path, step: int) -> None:
        # The last one is pushed as the model folder.
        if self.publishing is not None and step < self.plan.total_steps:
            self.publishing.on_saved(checkpoint, step)

    def _facts(self, step: int) -> RunFacts:
        return self.log.history.facts(self.plan.recipe, steps=step, parameters=self.parameters)

    def close(self) -> None:
        """End the trackers and close the files, and leave the group of processes."""
        self.saving.close()
        if self.publishing is not None:
            self.publishing.close()
        del self.model, self.optimizer, self.saving, self.watch.model
        self.watch.close()
        shut_down(self.accelerator)
