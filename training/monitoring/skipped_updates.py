"""Reports what the guard found, and stops a run that skips too many updates."""

import math
from pathlib import Path
from typing import NoReturn

from common.cli_errors import InputError
from training.checkpoints.checkpoint_folder import checkpoints, step_of
from training.checkpoints.checkpoint_writer import Checkpoints
from training.monitoring.monitor import Monitor
from training.monitoring.run_history import read_metrics
from training.step.guard import Verdict
from training.step.hooks import Hook, Run
from training.step.train_step import StepResult


class SkippedUpdates(Hook):
    """Logs spikes and skipped updates.

    All ranks read the same verdicts after the same steps, so all stop together.
    """

    def __init__(self, monitor: Monitor, checkpoints: Checkpoints) -> None:
        self._monitor, self._checkpoints = monitor, checkpoints

    def after_step(self, run: Run, result: StepResult) -> None:
        """Log the verdicts that have arrived; `max_skipped_steps` skipped updates in a row are an `InputError`."""
        for verdict in run.guard.read():
            self._report(run, verdict)

    def allows_save(self, run: Run) -> bool:
        """Whether the weights are good; waits for the device.

        If the last updates were skipped, the update before them may have corrupted the weights, unless a validation of
        the current step gave a finite loss.

        Raises:
            InputError: too many updates were skipped, or the weights are not good after the last step.
        """
        for verdict in run.guard.read(wait=True):
            self._report(run, verdict)
        lines = self._monitor.log.history.metrics
        losses = [line["val_loss"] for line in lines if line["step"] == run.step and "val_loss" in line]
        if not run.guard.skipped_in_a_row or (losses and math.isfinite(losses[-1])):
            return True
        if losses and run.step == run.total_steps:
            reason = "the last updates were skipped, and the validation loss is not finite"
            self._stop(run, reason, run.step - run.guard.skipped_in_a_row)
        run.report(f"step {run.step}  no checkpoint while updates are skipped")
        return False

    def _report(self, run: Run, verdict: Verdict) -> None:
        samples = run.batch.sequences_per_step
        first = (verdict.step - 1) * samples
        kind, text = ("skipped", "update skipped") if verdict.skipped else ("spike", "spike")
        if (scale := verdict.overflowed_scale) is not None:
            kind, text = "overflow", f"update skipped, gradients overflow with loss scale {scale:g}, now {scale / 2:g}"
        self._monitor.log.record(
            {
                "step": verdict.step,
                "tokens": verdict.step * run.batch.tokens_per_step,
                "guard": kind,
                "loss": verdict.loss,
                "grad_norm": verdict.grad_norm,
                "samples": [first, first + samples - 1],
                **({} if scale is None else {"loss_scale": scale}),
            },
            f"{text}: loss {verdict.loss:.4f}  norm {verdict.grad_norm:.2f}  samples {first} to {first + samples - 1}",
        )
        if verdict.skipped_in_a_row >= run.recipe.max_skipped_steps:
            reason = (
                f"{verdict.skipped_in_a_row:,} updates in a row were skipped up to step {verdict.step:,}, with loss "
                f"{verdict.loss:.4g} and gradient norm {verdict.grad_norm:.4g}"
            )
            self._stop(run, reason, verdict.step - verdict.skipped_in_a_row)

    def _stop(self, run: Run, reason: str, last_step: int) -> NoReturn:
        """Raise an `InputError`; `last_step` is the last one that was not skipped."""
        self._checkpoints.wait(run)
        advice = _good_checkpoint(run.output_dir, last_step)
        raise InputError(f"{reason}; lower learning_rate or raise warmup_steps: {advice}")


def _good_checkpoint(output_dir: Path, last_step: int) -> str:
    """Advice for a stopped run: which checkpoint to resume from.

    The update of `last_step` may have corrupted the weights, unless the validation loss of that step was finite.
    """
    lines, found = read_metrics(output_dir), checkpoints(output_dir)
    validated = {line["step"] for line in lines if math.isfinite(line.get("val_loss", math.nan))}
    if not found:
        return "there is no checkpoint yet, so the run starts again from step 0"
    good = [path for path in found if (step := step_of(path)) != last_step or step in validated]
    if good and good[-1] == found[-1]:
        return f"the newest good checkpoint is {good[-1]}, and the run resumes from it"
    if good:
        return f"the newest good checkpoint is {good[-1]}; resume from it with --resume_from_checkpoint {good[-1]}"
    return f"no checkpoint is known to be good ({found[-1]} may have bad weights); choose another output_dir"
