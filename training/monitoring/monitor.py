"""The monitor records a run: throughput and metrics, on the terminal, in files, in trackers and as curves."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from common.cli_errors import InputError, one_line, subprocess_environment
from training.checkpoints.signals import StopTraining
from training.checkpoints.state_snapshot import bare_model
from training.monitoring.plots import Curves, plot_curves
from training.monitoring.run_history import Start
from training.monitoring.run_log import RunLog
from training.monitoring.throughput import Throughput, device_name, flops_per_token, memory_bytes, peak_flops
from training.monitoring.trackers import start_trackers
from training.optim.schedule import sequence_length_at
from training.step.hooks import Hook, Run
from training.step.precision import precision_name
from training.step.train_step import StepResult

CURVES = "curves.png"


class CurvePlotter:
    """Plots a run's curves in a background process, one plot at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, output_dir: Path) -> None:
        """Start a plot, unless an earlier one is still in progress."""
        if self._process is not None and self._process.poll() is None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "training.plots", output_dir.resolve()],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=subprocess_environment(),
            start_new_session=True,  # Ctrl-C on the terminal is for training
        )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)  # lowest

    def stop(self) -> None:
        """Stop the plot in progress, if any; the previous picture stays."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None


class Monitor(Hook):
    """Logs the steps of a run; evaluations log their results through it.

    Losses are means over all ranks, so all ranks call it. Only rank 0 writes.
    """

    def __init__(self, run: Run) -> None:
        accelerator = run.accelerator
        self._accelerator = accelerator
        self.log = RunLog(
            run.output_dir,
            enabled=accelerator.is_main_process,
            first_step=run.first_step,
            total_steps=run.total_steps,
        )
        if accelerator.is_main_process:
            software = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
            start = Start(run.first_step, device_name(accelerator.device), accelerator.num_processes, software)
            self.log.history.add_start(run.output_dir, start)
        run.report, run.pause = self.log.print, self.pause
        self._throughput = Throughput()
        self._plotter = CurvePlotter()
        self._peak = peak_flops(device_name(accelerator.device), accelerator.mixed_precision)
        start_trackers(accelerator, run.recipe, run.first_step)

    def before_training(self, run: Run) -> None:
        """Log what is trained, on what, and from where."""
        config, device = run.config, self._accelerator.device
        run.report(
            f"{run.parameters / 1e6:.1f}M parameters, {config.n_layer} layers, width {config.n_embd}, vocabulary "
            f"{run.tokenizer.vocab_size:,}, on {device_name(device)} in "
            f"{precision_name(self._accelerator)}"
        )
        if self._peak is not None:
            run.report(f"MFU is relative to the vendor's {self._peak / 1e12:,.3g} TFLOP/s per GPU")
        start = f"resumed from {run.resume_from}" if run.resume_from else "from scratch"
        run.report(f"{run.batch.arithmetic}; {run.total_steps:,} steps, {start}")
        if run.recipe.warmup_steps >= run.total_steps:
            run.report(
                f"the learning rate never reaches its peak: {run.recipe.warmup_steps:,} warmup_steps of "
                f"{run.total_steps:,} steps; lower warmup_steps"
            )
        if run.recipe.seq_len_warmup_steps >= run.total_steps:
            run.report(
                f"no step trains on whole windows: {run.recipe.seq_len_warmup_steps:,} seq_len_warmup_steps of "
                f"{run.total_steps:,} steps; lower seq_len_warmup_steps"
            )

    def before_step(self, run: Run, step: int) -> None:
        """Measure throughput from the first step on."""
        if step == run.first_step + 1:
            self._throughput.take()

    def after_step(self, run: Run, result: StepResult) -> None:
        """Count the step, and log it if it is due."""
        self._throughput.add(run.batch.tokens_per_step)
        self.log.advance()
        if run.is_due(run.recipe.logging_steps):
            self._log_step(run, result)

    def before_save(self, run: Run) -> None:
        """Force the log to disk: a checkpoint must not appear without its lines."""
        self.log.flush_to_disk()

    def _log_step(self, run: Run, result: StepResult) -> None:
        grad_norm = result.grad_norm.item()  # waits for the device, which only logged steps do
        tokens_per_second = self._throughput.take()
        flops = tokens_per_second * _flops_per_token(run) / self._accelerator.num_processes
        values = {
            "step": run.step,
            "tokens": run.tokens,
            "train_loss": result.loss.item(),
            "learning_rate": result.learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": None if self._peak is None else round(flops / self._peak, 4),
            "memory_gib": round(memory_bytes(self._accelerator.device) / 2**30, 3),
        }
        seconds_left = self._throughput.seconds_left((run.total_steps - run.step) * run.batch.tokens_per_step)
        self.track(run.step, self.log.training(values, seconds_left))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time inside from the throughput, but not from the estimate of the time left."""
        if self._accelerator.device.type != "cpu":
            torch.accelerator.synchronize()  # steps still running on the device belong to training
        with self._throughput.pause():
            yield

    def track(self, step: int, values: Mapping[str, Any]) -> None:
        """Send values to the trackers."""
        known = {key: value for key, value in values.items() if key != "step" and value is not None}
        if known:
            self._accelerator.log(known, step=step)

    def record(self, run: Run, values: Mapping[str, Any], text: str) -> None:
        """Record an evaluation of the current step, print `text`, and plot the curves unless the run ends."""
        self.log.record({"step": run.step, "tokens": run.tokens, **values}, text)
        self.track(run.step, values)
        if self._accelerator.is_main_process and run.step < run.total_steps:
            self._plotter.start(run.output_dir)

    def plot_final(self, output_dir: Path, folder: Path) -> None:
        """Plot `curves.png` of the finished run, and copy it to `folder`."""
        self._plotter.stop()
        picture = output_dir / CURVES
        try:
            plot_curves(picture, [Curves.of(output_dir)])
        except OSError:  # such as a full disk
            raise
        except Exception as error:  # the model must not be lost for a picture
            self.log.print(f"cannot plot {picture} ({type(error).__name__}: {one_line(error)})")
        else:
            shutil.copyfile(picture, folder / CURVES)

    def close(self) -> None:
        """Stop the plot in progress and close the files."""
        self._plotter.stop()
        self.log.close()


class PeriodicEvaluation(Hook):
    """An evaluation that is due `every` so many steps and at the end, and records `columns` of metrics.jsonl.

    If a signal stops the run during the evaluation, the next start runs it.
    """

    def __init__(self, monitor: Monitor, every: int, columns: set[str]) -> None:
        self._monitor, self._every, self._columns = monitor, every, columns

    def is_due(self, run: Run) -> bool:
        """Whether the evaluation is due after the current step."""
        return run.is_due(self._every)

    def is_recorded(self, run: Run) -> bool:
        """Whether rank 0 has recorded the evaluation of the current step; False on other ranks."""
        lines = self._monitor.log.history.metrics
        return any(line["step"] == run.step and self._columns <= line.keys() for line in lines)

    def evaluate(self, run: Run) -> None:
        """Evaluate the model and record the result; called by all ranks together."""
        raise NotImplementedError

    def before_training(self, run: Run) -> None:
        """Evaluate the checkpoint if an earlier start was stopped before it could."""
        if run.step and self.is_due(run) and not run.on_any_rank(self.is_recorded(run)):
            with self.failures_reported(run):
                self.evaluate(run)

    def after_step(self, run: Run, result: StepResult) -> None:
        """Evaluate if it is due."""
        if self.is_due(run):
            with self.failures_reported(run):
                self.evaluate(run)

    @contextmanager
    def failures_reported(self, run: Run) -> Iterator[None]:
        """Report errors inside, which must not keep a checkpoint from being written.

        With several processes, those errors end the run that one process may meet alone: the others would wait for it.
        """
        try:
            yield
        except StopTraining:
            raise
        except Exception as error:
            if run.accelerator.num_processes > 1 and not self.fails_alike(run, error):
                raise
            reason = one_line(error) if isinstance(error, InputError) else f"{type(error).__name__}: {one_line(error)}"
            run.report(f"step {run.step}  {type(self).__name__} failed ({reason}); training continues")

    def fails_alike(self, run: Run, error: Exception) -> bool:
        """Whether all processes meet the error, or no process waits for another."""
        return False


def _flops_per_token(run: Run) -> float:
    """FLOPs of a token at the sequence length of the last step."""
    recipe, config = run.recipe, run.config
    seq_len = sequence_length_at(run.step - 1, seq_len=recipe.seq_len, warmup_steps=recipe.seq_len_warmup_steps)
    return flops_per_token(parameters=run.parameters, n_layer=config.n_layer, n_embd=config.n_embd, seq_len=seq_len)


@contextmanager
def evaluation_mode(accelerator: Accelerator, model: nn.Module) -> Iterator[PreTrainedModel]:
    """The bare model, without dropout, gradients and compiling, in the precision of the run.

    The random state of training is left alone.
    """
    bare, was_training = bare_model(accelerator, model), model.training
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    # Compiled blocks would be recompiled for every length.
    eager = torch.compiler.set_stance("force_eager")
    model.eval()
    try:
        with torch.no_grad(), eager, torch.random.fork_rng(devices=devices), accelerator.autocast():
            yield bare
    finally:
        model.train(was_training)
