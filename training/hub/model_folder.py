"""The model folder at the end of a run."""

import json
import shutil
from pathlib import Path
from shlex import quote

from common.cli_errors import InputError
from training.checkpoints.checkpoint_folder import publish
from training.checkpoints.checkpoint_writer import Checkpoints
from training.checkpoints.resume_command import extend_command, program
from training.hub.card import write_model_card
from training.monitoring.monitor import Monitor
from training.monitoring.run_history import RunFacts
from training.monitoring.samples import Samples
from training.monitoring.validation import Validation
from training.step.hooks import Hook, Run


class ModelFolder(Hook):
    """Writes `model/` and `curves.png` at the end of a run, and prints a summary."""

    def __init__(self, checkpoints: Checkpoints, validation: Validation, samples: Samples, monitor: Monitor) -> None:
        self._checkpoints, self._validation, self._samples, self._monitor = checkpoints, validation, samples, monitor

    def after_training(self, run: Run) -> None:
        """Sample, write the model folder, and print the summary.

        Raises:
            InputError: the last checkpoint or the model folder could not be written; older checkpoints stay.
        """
        if run.accelerator.is_main_process:
            self._checkpoints.check_last(run)
        with self._samples.failures_reported(run):
            self._samples.evaluate(run)
        if not run.accelerator.is_main_process:
            return
        history = self._monitor.log.history
        history.gzip_bits_per_byte = self._validation.text.gzip_bits_per_byte(run.tokenizer)
        facts = history.facts(run.recipe, steps=run.step, parameters=run.parameters)
        try:
            self._write_model(run, facts)
        except OSError as error:
            raise InputError(
                f"{run.output_dir / 'model'} could not be written ({error.strerror}); free some space and start the "
                "run again: all steps are saved, and only this is missing"
            ) from None
        prompts = run.recipe.sample_prompts
        run.report(_summary(run.output_dir, facts, prompts[0] if prompts else ""))

    def _write_model(self, run: Run, facts: RunFacts) -> None:
        model, partial = run.output_dir / "model", run.output_dir / ".unfinished-model"
        assert self._checkpoints.newest is not None  # of the last step
        shutil.copytree(self._checkpoints.newest, partial, ignore=shutil.ignore_patterns("training_state"))
        self._monitor.plot_final(run.output_dir, partial)
        write_model_card(partial, run.recipe, facts, run.config, earlier=model)
        publish(partial, model)


def _summary(output_dir: Path, facts: RunFacts, prompt: str) -> str:
    """Where the files are, the validation loss, a sample, and three commands that work as printed."""
    model, python = output_dir / "model", program("python")
    sample = "\n".join("  | " + line for line in "\n".join(facts.samples[:1]).strip().splitlines())
    validation = "failed: see the log above"
    if facts.val_loss is not None:
        validation = (
            f"{facts.val_loss:.4f} nats per token\n               {facts.bits_per_byte:.4f} bits per byte "
            f"({facts.gzip_bits_per_byte:.4f} by gzip -9 on the same text)"
        )
    # JSON strings are valid Python, and their double quotes fit into the shell's single quotes.
    code = (
        "import gpt2_scratch; from transformers import pipeline; "
        f'print(pipeline("text-generation", {json.dumps(str(model))})({json.dumps(prompt)})[0]["generated_text"])'
    )
    return f"""
The run is complete: {facts.steps:,} steps, {facts.tokens:,} tokens.

  model        {model}
  curves       {output_dir / "curves.png"}
  metrics      {output_dir / "metrics.jsonl"}
  samples      {output_dir / "samples.txt"}
  checkpoints  {output_dir / "checkpoints"}

  validation   {validation}

{sample}

To try next:
  {python} -m gpt2_scratch.generate --model {quote(str(model))} --prompt {quote(prompt)}
  {python} -c {quote(code)}
  {extend_command(output_dir, facts.steps)}
"""
