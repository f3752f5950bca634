"""Writes the checkpoints of a run.

All ranks collect the state together, which training waits for. Rank 0 then writes it, in the background if the recipe
sets `async_save`. If a checkpoint cannot be written, training continues and older checkpoints stay.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor

from safetensors import SafetensorError
from transformers import PreTrainedModel

from common.cli_errors import InputError
from training.checkpoints.checkpoint_folder import (
    TrainerState,
    checkpoint_folder,
    publish,
    remove_leftovers,
    remove_old_checkpoints,
    write_checkpoint,
)
from training.checkpoints.resume import shard_identities
from training.checkpoints.signals import Coordinator
from training.checkpoints.state_snapshot import HostMemory, Snapshot, collect_snapshot
from training.step.hooks import Hook, Run
from training.step.train_step import StepResult


class Checkpoints(Hook):
    """Saves a checkpoint every `save_steps`, every `save_minutes`, and after the last step."""

    def __init__(self, run: Run, skeleton: PreTrainedModel, coordinator: Coordinator) -> None:
        self._skeleton, self._coordinator = skeleton, coordinator
        self.newest = run.resume_from  # the checkpoint that the run would resume from; only rank 0 knows it
        self.saved_step = run.first_step  # of the last checkpoint, which may still be being written
        self._memory = HostMemory() if run.recipe.async_save and run.accelerator.is_main_process else None
        # One thread writes one checkpoint after the other; the interpreter waits for it before it exits.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str] | None = None

    def after_step(self, run: Run, result: StepResult) -> None:
        """Save if it is due; report a checkpoint that has been written, and allocate memory after the first step."""
        if self._memory is not None and run.step == run.first_step + 1:
            self._memory.allocate_for(run.model, run.optimizer, run.accelerator.device)
        if self._writing is not None and self._writing.done():
            self._finish(run)
        if self._coordinator.save_is_due or run.is_due(run.recipe.save_steps):
            self.save(run)

    def save(self, run: Run) -> None:
        """Save the current step, unless it is saved or a hook objects; all ranks must call this together."""
        self._coordinator.restart_clock()
        if run.step > self.saved_step and all(hook.allows_save(run) for hook in run.hooks):
            with run.pause():
                self._save(run)

    def _save(self, run: Run) -> None:
        start = time.monotonic()
        self.saved_step = run.step
        self._finish(run)
        snapshot = collect_snapshot(run.accelerator, run.model, run.optimizer, run.guard.state, self._memory)
        if snapshot is not None:
            state = TrainerState(
                step=run.step,
                tokens=run.tokens,
                tokenizer_fingerprint=run.tokenizer.fingerprint,
                shards=shard_identities(run.shards.folder),
                recipe=run.recipe.to_dict(),
                num_processes=run.accelerator.num_processes,
            )
            stall = time.monotonic() - start
            self._writing = self._thread.submit(self._write, run, state, snapshot, stall)
            if not run.recipe.async_save:
                self._finish(run)

    def wait(self, run: Run) -> None:
        """Wait until the last checkpoint is written; all ranks must call this together."""
        self._finish(run)
        run.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Wait until the last checkpoint is written, on this rank alone."""
        self._thread.shutdown()

    def check_last(self, run: Run) -> None:
        """On rank 0, raise an `InputError` if the checkpoint of the last step could not be written."""
        if run.first_step < run.total_steps and self.newest != checkpoint_folder(run.output_dir, run.total_steps):
            start = f"resumes from {self.newest}" if self.newest else "starts from scratch"
            raise InputError(
                f"the last checkpoint of {run.output_dir} could not be written; free some space and start the run "
                f"again: it {start}"
            )

    def _finish(self, run: Run) -> None:
        """Wait for the checkpoint being written, and report it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            run.report(writing.result())

    def _write(self, run: Run, state: TrainerState, snapshot: Snapshot, stall: float) -> str:
        """Write a checkpoint, and return the line that reports it."""
        recipe, start = run.recipe, time.monotonic()
        try:
            remove_leftovers(run.output_dir)
            partial = write_checkpoint(
                run.output_dir, state, snapshot, skeleton=self._skeleton, tokenizer=run.tokenizer
            )
            for hook in run.hooks:
                hook.before_save(run)
            folder = checkpoint_folder(run.output_dir, state.step)
            publish(partial, folder)
        except (OSError, SafetensorError) as error:
            remove_leftovers(run.output_dir)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            newest = f"the newest checkpoint is {self.newest}" if self.newest else "there is no checkpoint yet"
            return f"step {state.step}  checkpoint could not be written ({reason}); training continues, {newest}"
        self.newest = folder
        remove_old_checkpoints(run.output_dir, keep=recipe.save_total_limit, keep_every=recipe.save_keep_every)
        for hook in run.hooks:
            hook.after_save(run, folder, state.step)
        seconds = time.monotonic() - start
        if not recipe.async_save:
            return f"step {state.step}  checkpoint saved; training paused for {stall + seconds:.2f} s"
        return (
            f"step {state.step}  checkpoint saved; training paused for {stall:.2f} s, "
            f"written in the background in {seconds:.1f} s"
        )
