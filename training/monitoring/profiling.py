"""Profiling: a trace of some steps by torch's profiler."""

import torch
from torch.profiler import profile

from training.recipe import profiled_steps
from training.step.hooks import Hook, Run
from training.step.train_step import StepResult


class Profiling(Hook):
    """Traces the steps of `profile_steps` on rank 0, as a compressed Chrome trace in the run folder."""

    def __init__(self) -> None:
        self._steps = range(0)
        self._profiler: profile | None = None

    def before_training(self, run: Run) -> None:
        """Find out which of the steps this start takes."""
        wanted = run.recipe.profile_steps
        if wanted is None or not run.accelerator.is_main_process:
            return
        steps = profiled_steps(wanted)
        self._steps = range(max(steps.start, run.first_step + 1), min(steps.stop, run.total_steps + 1))
        if not self._steps:
            run.report(f"no trace: this start takes none of the steps {wanted}")

    def before_step(self, run: Run, step: int) -> None:
        """Start the profiler before the first step to trace."""
        if self._steps and step == self._steps[0]:
            self._profiler = profile(acc_events=True)
            self._profiler.start()

    def after_step(self, run: Run, result: StepResult) -> None:
        """Write the trace after the last step to trace."""
        if self._profiler is not None and run.step == self._steps[-1]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._profiler.stop()
            path = run.output_dir / f"trace-steps-{self._steps[0]}-{self._steps[-1]}.json.gz"
            self._profiler.export_chrome_trace(str(path))
            self._profiler = None
            run.report(f"trace of steps {self._steps[0]} to {run.step} in {path}; open it at https://ui.perfetto.dev")
