"""The summary of a finished run: results, files, and commands to try next."""

import json
from pathlib import Path
from shlex import quote

from training.checkpoints.resume_command import extend_command, program
from training.monitoring.run_history import RunFacts


def summary_text(output_dir: Path, facts: RunFacts, *, prompt: str) -> str:
    """Where the files are, the validation loss, a sample, and three commands that work as printed.

    Args:
        output_dir: the run folder.
        facts: of the finished run.
        prompt: of the first sample.
    """
    model, python = output_dir / "model", program("python")
    sample = "\n".join("  | " + line for line in "\n".join(facts.samples[:1]).strip().splitlines())
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

  validation   {facts.val_loss:.4f} nats per token
               {facts.bits_per_byte:.4f} bits per byte ({facts.gzip_bits_per_byte:.4f} by gzip -9 on the same text)

{sample}

To try next:
  {python} -m gpt2_scratch.generate --model {quote(str(model))} --prompt {quote(prompt)}
  {python} -c {quote(code)}
  {extend_command(output_dir, facts.steps)}
"""
