"""The closing words of a run: what came out, where it is, and what to try next."""

import json
from pathlib import Path
from shlex import quote

from training.checkpoints.resume_command import extend_command, program
from training.monitoring.run_history import RunFacts


def summary_text(output_dir: Path, facts: RunFacts, *, prompt: str) -> str:
    """Where everything is, how good it is, a sample, and three commands that work as printed.

    Arguments:
        output_dir: the run's folder.
        facts: what came out.
        prompt: of the first sample.
    """
    model = output_dir / "model"
    sample = "\n".join("  | " + line for line in "\n".join(facts.samples[:1]).strip().splitlines())
    # JSON's strings are Python's too, and their double quotes stand well in a shell's single ones.
    in_python = (
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
  {program("python")} -m gpt2_scratch.generate --model {quote(str(model))} --prompt {quote(prompt)}
  {program("python")} -c {quote(in_python)}
  {extend_command(output_dir, facts.steps)}
"""
