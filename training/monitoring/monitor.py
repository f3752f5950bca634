"""What one sees of a run: logged steps, validations, samples and curves, on the terminal, in files and in trackers.

The loop calls it on every process, because losses are means over all of them; only the main process writes.
"""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.cli_errors import subprocess_environment
from training.checkpoints.state_snapshot import bare_model
from training.data.loading.loader import validation_batches, validation_windows
from training.monitoring.bits_per_byte import ScoredText
from training.monitoring.plots import Curves, plot_curves
from training.monitoring.run_history import TASK_RESULTS
from training.monitoring.run_log import RunLog
from training.monitoring.samples import sample_texts
from training.monitoring.task_evaluation import columns
from training.monitoring.throughput import (
    Throughput,
    device_name,
    flops_per_token,
    measured_peak_flops,
    memory_bytes,
    peak_flops,
)
from training.monitoring.trackers import start_trackers
from training.setup.plan import Plan
from training.step.guard import Verdict
from training.step.train_step import validation_loss

CURVES = "curves.png"


class _DrawingBeside:
    """Draws a run's curves in a process beside it, one at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, output_dir: Path) -> None:
        """Begin to draw, unless an earlier picture is still being drawn: the next one will show it all."""
        if self._process is not None and self._process.poll() is None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "training.monitoring.plots", output_dir.resolve()],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=subprocess_environment(),
            start_new_session=True,  # Ctrl-C on the terminal is training's to answer
        )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)  # it gives way to training

    def stop(self) -> None:
        """End the drawing that is under way, if any; the picture of before stays."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None


class Watch:
    """Watches a run that is in progress.

    Arguments:
        plan: the run.
        accelerator: what the run's processes share.
        model: the prepared model, which validations and samples put into evaluation mode and back.
        parameters: of the whole model.
        between_batches: is called between two batches of a validation or of tasks, by all processes equally often; what
            it raises ends them without a result.

    Attributes:
        last_validation: its step and loss.
    """

    def __init__(
        self,
        plan: Plan,
        accelerator: Accelerator,
        model: nn.Module,
        *,
        parameters: int,
        between_batches: Callable[[], None],
    ) -> None:
        self.plan, self.accelerator, self.model = plan, accelerator, model
        self._between_batches = between_batches
        recipe, shard = plan.recipe, plan.folder.val_shard
        self.log = RunLog(
            plan.output_dir,
            enabled=accelerator.is_main_process,
            first_step=plan.first_step,
            total_steps=plan.total_steps,
        )
        self.throughput = Throughput()
        self.last_validation = (-1, math.nan)
        self._drawing = _DrawingBeside()
        windows = validation_windows(shard, seq_len=recipe.seq_len, eval_tokens=recipe.eval_tokens)
        self.text = ScoredText.of_windows(shard, plan.tokenizer, windows=windows, seq_len=recipe.seq_len)
        self._peak = _peak_flops(accelerator)
        self._parameters, self._config = parameters, bare_model(accelerator, model).config
        self._flops_per_token = flops_per_token(
            parameters=parameters,
            n_layer=self._config.n_layer,
            n_embd=self._config.n_embd,
            seq_len=recipe.seq_len,
        )
        start_trackers(accelerator, plan)

    def introduce(self) -> None:
        """Say what is trained, on what, and from where."""
        plan = self.plan
        start = f"going on from {plan.resume_from}" if plan.resume_from else "from the beginning"
        self.log.say(
            f"{self._parameters / 1e6:.1f}M parameters, {self._config.n_layer} layers, width {self._config.n_embd}, "
            f"vocabulary {plan.tokenizer.vocab_size:,}, on {device_name(self.accelerator.device)}"
            f" in {'bf16' if self.accelerator.mixed_precision == 'bf16' else 'fp32'}"
        )
        if self._peak is not None:
            how = "measured just now" if self.accelerator.device.type == "cpu" else "as its maker says"
            self._tell_peak(self._peak, how)
        self.log.say(f"{plan.batch.arithmetic}; {plan.total_steps:,} steps, {start}")
        if plan.recipe.warmup_steps >= plan.total_steps:
            self.log.say(
                f"the learning rate still rises at the end: {plan.recipe.warmup_steps:,} warmup_steps of "
                f"{plan.total_steps:,} steps; give fewer of them"
            )

    def _tell_peak(self, peak: float, how: str) -> None:
        figure = f"{peak / 1e12:,.0f}" if peak >= 1e14 else f"{peak / 1e12:.3g}"
        self.log.say(f"MFU is the share of {figure} TFLOP/s per process, {how}")

    def begin(self) -> None:
        """Count time from now on."""
        self.throughput.take()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what is done inside out of the speed of training, though not out of the time left."""
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()  # steps that are still on their way belong to training
        with self.throughput.pause():
            yield

    def step_taken(self) -> None:
        """Count a step and move the bar."""
        self.throughput.add(self.plan.batch.tokens_per_step)
        self.log.advance()

    def record(self, done: int, loss: Tensor, grad_norm: Tensor, learning_rate: float) -> None:
        """Record step `done`; waits for the device, which steps that are not logged never do."""
        norm = grad_norm.item()
        rate = self.throughput.take()
        tokens_per_step = self.plan.batch.tokens_per_step
        values = {
            "step": done,
            "tokens": done * tokens_per_step,
            "train_loss": loss.item(),
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "tokens_per_second": round(rate, 1),
            "mfu": self._mfu(rate),
            "memory_gib": round(memory_bytes(self.accelerator.device) / 2**30, 3),
        }
        seconds_left = self.throughput.seconds_left((self.plan.total_steps - done) * tokens_per_step)
        self._track(done, self.log.training(values, seconds_left))

    def stands_out(self, verdict: Verdict) -> None:
        """Record a spike, or an update that was left out, with the samples of its step."""
        samples = self.plan.batch.sequences_per_step
        first = (verdict.step - 1) * samples
        values = {
            "step": verdict.step,
            "tokens": verdict.step * self.plan.batch.tokens_per_step,
            "guard": "skipped" if verdict.skipped else "spike",
            "loss": verdict.loss,
            "grad_norm": verdict.grad_norm,
            "samples": [first, first + samples - 1],
        }
        self.log.guarded(values)

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation: the share of the devices' peak that goes into the model's own operations."""
        if self._peak is None:
            return None
        flops = tokens_per_second * self._flops_per_token / self.accelerator.num_processes
        if flops > self._peak and self.accelerator.device.type == "cpu":
            # Other work had the cores when they were asked, such as the producer of shards.
            with self.pause():
                peak = measured_peak_flops(self.accelerator.mixed_precision, again=True)
            if peak > self._peak:
                self._peak = peak
                self._tell_peak(peak, "measured again")
        return round(flops / self._peak, 4)

    def _track(self, done: int, values: Mapping[str, Any]) -> None:
        """Send what is known to the trackers."""
        known = {key: value for key, value in values.items() if key != "step" and value is not None}
        if known:
            self.accelerator.log(known, step=done)

    def look(self, done: int) -> None:
        """Validate, judge and draw samples after step `done`, as far as they are due."""
        plan, recipe = self.plan, self.plan.recipe
        if plan.is_due(done, recipe.eval_steps):
            self.validate(done)
        if plan.tasks is not None and plan.is_due(done, recipe.eval_task_steps):
            self.judge(done)
        if self._samples_are_due(done):
            self.sample(done)

    def make_up(self, done: int) -> None:
        """Do after step `done`, the last one of an earlier start, what that was asked to leave before."""
        plan, recipe = self.plan, self.plan.recipe
        if plan.is_due(done, recipe.eval_steps):
            self.validate_once(done)
        if plan.tasks is not None and plan.is_due(done, recipe.eval_task_steps):
            self.judge_once(done)
        if self._samples_are_due(done) and not self._any(self.log.has_samples(done)):
            self.sample(done)

    def _samples_are_due(self, done: int) -> bool:
        every = self.plan.recipe.sample_steps
        return every > 0 and done % every == 0 and done < self.plan.total_steps  # those of the end are the summary's

    def validate(self, done: int) -> None:
        """Score the validation text after step `done`, with all processes."""
        recipe, accelerator = self.plan.recipe, self.accelerator
        batches = validation_batches(
            self.plan.folder.val_shard,
            seq_len=recipe.seq_len,
            eval_tokens=recipe.eval_tokens,
            batch_size=self.plan.batch.per_device,
            vocab_size=self.plan.tokenizer.vocab_size,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        with self.pause():
            loss, tokens = validation_loss(
                accelerator,
                self.model,
                batches,
                end_of_text_id=self.plan.document_mark,
                between_batches=self._between_batches,
            )
        self.last_validation = (done, loss)
        values = {
            "step": done,
            "tokens": done * self.plan.batch.tokens_per_step,
            "val_loss": loss,
            "val_tokens": tokens,
            "bits_per_byte": self.text.bits_per_byte(loss),
        }
        self.log.validation(values)
        self.redraw(done)
        self._track(done, {"val_loss": loss, "bits_per_byte": values["bits_per_byte"]})

    def validate_once(self, done: int) -> None:
        """Validate after step `done` unless the main process finds that recorded already."""
        known = any("val_loss" in line and line["step"] == done for line in self.log.history.metrics)
        if not self._any(known):
            self.validate(done)

    def judge(self, done: int) -> None:
        """Judge the model on the recipe's tasks after step `done`, with all processes."""
        tasks, accelerator = self.plan.tasks, self.accelerator
        assert tasks is not None
        with self.pause():
            judged = tasks.judge(accelerator, self.model, self._between_batches)
        if accelerator.is_main_process:
            path = self.plan.output_dir / TASK_RESULTS
            results = tasks.results(done, judged, accelerator, self._parameters)
            self.log.history.task_results = results
            try:
                results.write(path, with_items=False)
            except OSError as error:
                self.log.say(
                    f"cannot write {path} ({error.strerror}): free some space; training goes on, the figures are in "
                    "metrics.jsonl, and the next evaluation writes the file"
                )
        self.record_tasks(done, columns(judged))

    def record_tasks(self, done: int, results: Mapping[str, float]) -> None:
        """Record results of evaluation tasks after step `done`, under the keys that `RunLog.tasks` explains."""
        values = {"step": done, "tokens": done * self.plan.batch.tokens_per_step, **results}
        self.log.tasks(values)
        self.redraw(done)
        self._track(done, values)

    def judge_once(self, done: int) -> None:
        """Judge the model after step `done` unless the main process finds that recorded already."""
        assert self.plan.tasks is not None
        names = self.plan.tasks.column_names
        if not self._any(any(names <= set(line) and line["step"] == done for line in self.log.history.metrics)):
            self.judge(done)

    def _any(self, holds: bool) -> bool:
        """Whether something holds on any process."""
        return bool(int(self.accelerator.reduce(torch.tensor(int(holds), device=self.accelerator.device))))

    def sample(self, done: int, *, show: bool = True) -> list[str]:
        """Draw samples after step `done`, keep and show them, and return them; none on other processes.

        These take part all the same where each holds a share of the weights.
        """
        recipe = self.plan.recipe
        if not (self.accelerator.is_main_process or self.accelerator.is_fsdp2):
            return []
        with self.pause():
            texts = sample_texts(
                self.accelerator,
                bare_model(self.accelerator, self.model),
                self.plan.tokenizer,
                recipe.sample_prompts,
                max_new_tokens=recipe.sample_tokens,
                seed=recipe.seed + done,
            )
        self.log.samples(done, texts, show=show)
        self._track(done, {"samples": "\n\n".join(texts)})
        return texts

    def redraw(self, done: int) -> None:
        """Begin to draw the curves anew; nobody waits for it."""
        if self.accelerator.is_main_process and done < self.plan.total_steps:  # at the end, draw_curves does
            self._drawing.start(self.plan.output_dir)

    def draw_curves(self, folder: Path) -> None:
        """Draw the finished run's `curves.png`, and copy it to a folder."""
        if self.accelerator.is_main_process:
            self._drawing.stop()
            picture = self.plan.output_dir / CURVES
            plot_curves(picture, [Curves.of(self.plan.output_dir)])
            shutil.copyfile(picture, folder / CURVES)

    def close(self) -> None:
        """Close the files."""
        self._drawing.stop()
        self.log.close()


def _peak_flops(accelerator: Accelerator) -> float | None:
    """What this process's device multiplies at best in the run's precision: known of GPUs, measured on CPUs."""
    device = accelerator.device
    if device.type == "cuda":
        return peak_flops(torch.cuda.get_device_name(device), accelerator.mixed_precision)
    return measured_peak_flops(accelerator.mixed_precision) if device.type == "cpu" else None
