"""Samples: text that the model generates from the recipe's prompts while it trains."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from training.checkpoints.state_snapshot import bare_model
from training.data.tokenization.tokenizer import Tokenizer
from training.monitoring.monitor import Monitor
from training.step.hooks import PeriodicEvaluation, Run

TEMPERATURE, TOP_K = 0.8, 50


class Samples(PeriodicEvaluation):
    """Samples from the model every `sample_steps`."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def is_due(self, run: Run) -> bool:
        """Every `sample_steps`; the samples of the last step come with the summary."""
        every = run.recipe.sample_steps
        return every > 0 and run.step % every == 0 and run.step < run.total_steps

    def is_recorded(self, run: Run) -> bool:
        """Whether samples.txt has samples of the current step."""
        return self._monitor.log.has_samples(run.step)

    def evaluate(self, run: Run) -> None:
        """Generate samples, record and print them."""
        self.sample(run, show=True)

    def sample(self, run: Run, *, show: bool) -> None:
        """Generate and record samples of the current model; with `show`, print them too.

        Only rank 0 generates, unless the weights are sharded: then all ranks take part.
        """
        recipe, accelerator = run.recipe, run.accelerator
        if not (accelerator.is_main_process or accelerator.is_fsdp2):
            return
        with self._monitor.pause():
            texts = sample_texts(
                accelerator,
                bare_model(accelerator, run.model),
                run.tokenizer,
                recipe.sample_prompts,
                max_new_tokens=recipe.sample_tokens,
                seed=recipe.seed + run.step,
            )
        self._monitor.log.samples(run.step, texts, show=show)
        self._monitor.track(run.step, {"samples": "\n\n".join(texts)})


@torch.no_grad()
def sample_texts(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
) -> list[str]:
    """Each prompt with its continuation; the random state of training is left alone.

    If the model is sharded, all ranks must call this with the same arguments.
    """
    was_training = model.training
    model.eval()
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    texts = []
    # Compiled blocks would be recompiled for every length.
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.random.fork_rng(devices=devices), accelerator.autocast():
        torch.manual_seed(seed)
        for prompt in prompts:
            # A prompt that is too long is truncated from the left.
            room = model.config.n_positions - min(max_new_tokens, model.config.n_positions // 2)
            ids = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)][-room:]
            output = model.generate(
                torch.tensor([ids], device=accelerator.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=accelerator.device),
                max_new_tokens=min(max_new_tokens, model.config.n_positions - len(ids)),
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=TOP_K,
                pad_token_id=tokenizer.end_of_text_id,
                remove_invalid_values=True,  # the loss shows that a run diverges; samples must not raise
            )
            generated = output[0].tolist()
            texts.append(tokenizer.decode([token for token in generated if token != tokenizer.end_of_text_id]))
    model.train(was_training)
    return texts
