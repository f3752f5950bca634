"""Samples: text that the model generates from the recipe's prompts while it trains."""

import torch

from training.monitoring.monitor import Monitor, PeriodicEvaluation, evaluation_mode
from training.step.hooks import Run

TEMPERATURE, TOP_K = 0.8, 50


class Samples(PeriodicEvaluation):
    """Samples from the model every `sample_steps`; those of the last step come with the summary."""

    def __init__(self, run: Run, monitor: Monitor) -> None:
        super().__init__(monitor, run.recipe.sample_steps, set())

    def is_due(self, run: Run) -> bool:
        """Every `sample_steps`, but not at the end."""
        return super().is_due(run) and run.step < run.total_steps

    def is_recorded(self, run: Run) -> bool:
        """Whether samples.txt has samples of the current step."""
        return run.step in self._monitor.log.history.samples

    def fails_alike(self, run: Run, error: Exception) -> bool:
        """Whether rank 0 generates without the other ranks."""
        return not run.accelerator.is_fsdp2

    def evaluate(self, run: Run) -> None:
        """Generate samples and record them; print them, but for those of the last step.

        Only rank 0 generates, unless the weights are sharded: then all ranks take part.
        """
        if not (run.accelerator.is_main_process or run.accelerator.is_fsdp2):
            return
        with run.pause():
            texts = _generate(run)
        self._monitor.log.samples(run.step, texts, show=run.step < run.total_steps)
        self._monitor.track(run.step, {"samples": "\n\n".join(texts)})


def _generate(run: Run) -> list[str]:
    """Each prompt with its continuation."""
    end_of_text, device = run.tokenizer.end_of_text_id, run.accelerator.device
    longest = min(run.recipe.sample_tokens, run.config.n_positions // 2)
    texts = []
    with evaluation_mode(run.accelerator, run.model) as model:
        torch.manual_seed(run.recipe.seed + run.step)
        for prompt in run.recipe.sample_prompts:
            # A prompt that is too long is truncated from the left.
            ids = [*run.tokenizer.document_start, *run.tokenizer.encode(prompt)][longest - run.config.n_positions :]
            output = model.generate(
                torch.tensor([ids], device=device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
                max_new_tokens=min(run.recipe.sample_tokens, run.config.n_positions - len(ids)),
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=TOP_K,
                pad_token_id=end_of_text,
                remove_invalid_values=True,  # the loss shows that a run diverges; samples must not raise
            )
            texts.append(run.tokenizer.decode([token for token in output[0].tolist() if token != end_of_text]))
    return texts
