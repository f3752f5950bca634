"""A run in progress, and the hooks that are called around its optimizer steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from training.data.loading.loader import TrainingShards
from training.data.tokenization.tokenizer import Tokenizer
from training.recipe import Recipe
from training.step.batch_plan import BatchPlan
from training.step.guard import Guard
from training.step.train_step import StepResult


@dataclass
class Run:
    """A run as its hooks see it; `accelerator` and what follows it are set once the plan of the run is checked."""

    recipe: Recipe
    shards: TrainingShards  # and the order of their windows; a producer may still be adding shards
    tokenizer: Tokenizer
    batch: BatchPlan  # of one sequence per micro-step until per_device_train_batch_size "auto" is resolved
    first_step: int  # steps taken by earlier starts
    total_steps: int  # where the run ends
    resume_from: Path | None  # the checkpoint of `first_step`; None at the beginning
    accelerator: Accelerator = field(init=False)
    model: nn.Module = field(init=False)  # as prepared by accelerate (and compiled, or sharded)
    optimizer: Optimizer = field(init=False)
    config: PreTrainedConfig = field(init=False)
    parameters: int = field(init=False)  # of the whole model
    guard: Guard = field(init=False)  # decides which updates are skipped
    step: int = field(init=False)  # steps taken so far
    report: Callable[[str], None] = print  # prints a line on rank 0, and keeps it in train.log
    pause: Callable[[], AbstractContextManager[None]] = nullcontext  # excludes the time inside from the throughput
    hooks: list["Hook"] = field(default_factory=list)  # in the order in which they are called

    def __post_init__(self) -> None:
        self.step = self.first_step

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.recipe.output_dir)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.batch.tokens_per_step

    @property
    def document_mark(self) -> int | None:
        """The token id that starts a document, if the recipe masks attention between documents."""
        return self.tokenizer.end_of_text_id if self.recipe.document_mask else None

    def is_due(self, every: int) -> bool:
        """Whether something that happens every `every` steps (0: only at the end) happens after the current step."""
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    def on_any_rank(self, condition: bool) -> bool:
        """Whether the condition holds on at least one rank; all ranks must call this together."""
        flag = torch.tensor(int(condition), device=self.accelerator.device)
        return bool(int(self.accelerator.reduce(flag)))


class Hook:
    """Called around the steps of a run; override what you need.

    All ranks call all hooks in the same order, so a hook may use collective operations. It must then do so on every
    rank. Reading `result.loss` waits for the device.
    """

    def before_training(self, run: Run) -> None:
        """Called once, before the first step of this start."""

    def before_step(self, run: Run, step: int) -> None:
        """Called before each step; `step` counts from 1."""

    def after_step(self, run: Run, result: StepResult) -> None:
        """Called after each step; `run.step` is its number."""

    def allows_save(self, run: Run) -> bool:
        """Whether a checkpoint of the current step may be saved; called when one is due."""
        return True

    def before_save(self, run: Run) -> None:
        """Called before `after_save`, when the checkpoint has no name yet; an OSError keeps it from getting one."""

    def after_save(self, run: Run, checkpoint: Path, step: int) -> None:
        """Called on rank 0 when a checkpoint is complete on disk, on the thread that writes it."""

    def after_training(self, run: Run) -> None:
        """Called once after the last step, when its checkpoint is complete; not if training stopped early."""

    def close(self) -> None:
        """Called once at the end of this start, even after an error; hooks are closed in reverse order."""
