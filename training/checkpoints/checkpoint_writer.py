"""When a run saves, and what happens then.

All processes collect the state together, which training has to wait for; the main process writes it, beside training
where the recipe says `async_save`. A checkpoint that the disk does not take is told and costs nothing else: training
goes on, and what was saved before stays.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from common.cli_errors import InputError
from training.checkpoints.checkpoint_folder import (
    TrainerState,
    checkpoint_folder,
    remove_old_checkpoints,
    write_checkpoint,
)
from training.checkpoints.data_identity import shard_identities
from training.checkpoints.state_snapshot import HostMemory, Snapshot, collect_snapshot
from training.setup.plan import Plan


class Saving:
    """The checkpoints of a run in progress.

    Args:
        plan: the run.
        accelerator, model, optimizer: as prepared for training.
        skeleton: the model's class and configuration (`checkpoint.skeleton_of`), to write model folders with.
        loop_state: small tensors that the loop updates in place and that go into every checkpoint; `load_checkpoint`
            fills them again. The same on all processes.
        before_it_counts: called before a checkpoint gets its name, such as to force logs to disk.
        say: is given a line for each checkpoint, on the training thread.

    Attributes:
        on_saved: called with the checkpoint's folder and step on the main process once it is whole on disk, on the
            thread that writes: the next checkpoint waits for it, training does not.
        newest: the checkpoint that the run would go on from; only the main process knows it.
        saved_step: steps that the last checkpoint has behind it, whether the disk has taken it yet or not.
    """

    def __init__(
        self,
        plan: Plan,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        skeleton: PreTrainedModel,
        loop_state: Mapping[str, Tensor],
        before_it_counts: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer
        self._skeleton = skeleton
        self._loop_state = loop_state
        self._before_it_counts = before_it_counts
        self._say = say
        self.on_saved: list[Callable[[Path, int], None]] = []
        self.newest = plan.resume_from
        self.saved_step = plan.first_step
        self._last_start = time.monotonic()
        self._memory = HostMemory() if plan.recipe.async_save and accelerator.is_main_process else None
        self._memory_is_made = False
        # One thread writes one checkpoint after the other; the interpreter waits for it at its end.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str] | None = None

    def due(self, done: int) -> bool:
        """Whether the recipe's steps ask for a checkpoint after `done` of them."""
        every = self._plan.recipe.save_steps
        return done == self._plan.total_steps or (every > 0 and done % every == 0)

    def due_by_clock(self) -> bool:
        """Whether `save_minutes` have passed on the main process, which then counts from anew."""
        minutes = self._plan.recipe.save_minutes
        if minutes is None or not self._accelerator.is_main_process:
            return False
        passed = time.monotonic() - self._last_start >= 60 * minutes
        if passed:
            self._last_start = time.monotonic()
        return passed

    def step_taken(self) -> None:
        """Tell what became of a checkpoint that was being written, and after the first step make room for the next."""
        if self._memory is not None and not self._memory_is_made:
            self._memory.make_for(self._model, self._optimizer, self._accelerator.device)
            self._memory_is_made = True
        if self._writing is not None and self._writing.done():
            self._tell()

    def save(self, done: int) -> None:
        """Save the checkpoint of `done` steps; called by all processes together."""
        start = self._last_start = time.monotonic()
        self.saved_step = done
        self._tell()  # never two at once
        snapshot = collect_snapshot(self._accelerator, self._model, self._optimizer, self._loop_state, self._memory)
        if snapshot is not None:
            stall = time.monotonic() - start
            self._writing = self._writer.submit(self._write, self._state(done), snapshot, stall)
            if not self._plan.recipe.async_save:
                self._tell()

    def wait(self) -> None:
        """Return when the last checkpoint is written; called by all processes together."""
        self._tell()
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Let what is being written come to its end, whatever became of training."""
        self._writer.shutdown()

    def refuse_unsaved_end(self) -> None:
        """Raise what keeps the main process from making the model folder of the last checkpoint.

        Raises:
            InputError: the last step's checkpoint could not be written.
        """
        steps = self._plan.total_steps
        if self._plan.first_step < steps and self.newest != checkpoint_folder(self._plan.output_dir, steps):
            raise InputError(
                f"the last checkpoint of {self._plan.output_dir} could not be written; make room for it and start "
                f"again: the run goes on from {self.newest or 'its beginning'}"
            )

    def _tell(self) -> None:
        """Wait for what is being written, and say what became of it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._say(writing.result())

    def _write(self, state: TrainerState, snapshot: Snapshot, stall: float) -> str:
        """Write a checkpoint, and return the line that tells of it."""
        plan, start = self._plan, time.monotonic()
        try:
            folder = write_checkpoint(
                plan.output_dir,
                state,
                snapshot,
                skeleton=self._skeleton,
                tokenizer=plan.tokenizer,
                before_it_counts=self._before_it_counts,
            )
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            left = f"the newest is {self.newest}" if self.newest else "there is none yet"
            return f"step {state.step}  checkpoint could not be written ({reason}); training goes on, {left}"
        self.newest = folder
        remove_old_checkpoints(
            plan.output_dir, keep=plan.recipe.save_total_limit, keep_every=plan.recipe.save_keep_every
        )
        for call in self.on_saved:
            call(folder, state.step)
        seconds = time.monotonic() - start
        if not plan.recipe.async_save:
            return f"step {state.step}  checkpoint saved; training stood still for {stall + seconds:.2f} s"
        return (
            f"step {state.step}  checkpoint saved; training stood still for {stall:.2f} s, "
            f"written beside it in {seconds:.1f} s"
        )

    def _state(self, done: int) -> TrainerState:
        plan = self._plan
        return TrainerState(
            step=done,
            tokens=done * plan.batch.tokens_per_step,
            tokenizer_fingerprint=plan.tokenizer.fingerprint,
            shards=shard_identities(plan.folder),
            recipe=plan.recipe.to_dict(),
            num_processes=self._accelerator.num_processes,
        )
