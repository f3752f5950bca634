"""When a run saves, and what happens then: the state is collected from all processes, written, and old ones removed."""

from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from training.checkpoint import TrainerState, remove_old_checkpoints, write_checkpoint
from training.plan import Plan, shard_identities
from training.snapshot import collect_snapshot


class Saving:
    """The checkpoints of a run in progress.

    Args:
        plan: the run.
        accelerator, model, optimizer: as prepared for training.
        skeleton: the model's class and configuration (`checkpoint.skeleton_of`), to write model folders with.
        loop_state: small tensors that the loop updates in place and that go into every checkpoint; `load_checkpoint`
            fills them again. The same on all processes.
        before_it_counts: called before a checkpoint gets its name, such as to force logs to disk.

    Attributes:
        on_saved: called with the checkpoint's folder and step on the main process, once it is whole on disk.
        newest: the checkpoint that the run would go on from.
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
    ) -> None:
        self._plan = plan
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer
        self._skeleton = skeleton
        self._loop_state = loop_state
        self._before_it_counts = before_it_counts
        self.on_saved: list[Callable[[Path, int], None]] = []
        self.newest = plan.resume_from

    def due(self, done: int) -> bool:
        """Whether a checkpoint is to be saved after `done` steps."""
        every = self._plan.recipe.save_steps
        return done == self._plan.total_steps or (every > 0 and done % every == 0)

    def save(self, done: int) -> None:
        """Save the checkpoint of `done` steps; called by all processes together."""
        snapshot = collect_snapshot(self._accelerator, self._model, self._optimizer, self._loop_state)
        if snapshot is not None:
            self._before_it_counts()
            folder = write_checkpoint(
                self._plan.output_dir,
                self._state(done),
                snapshot,
                skeleton=self._skeleton,
                tokenizer=self._plan.tokenizer,
            )
            self.newest = folder
            remove_old_checkpoints(self._plan.output_dir, keep=self._plan.recipe.save_total_limit)
            for call in self.on_saved:
                call(folder, done)
        self._accelerator.wait_for_everyone()

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
