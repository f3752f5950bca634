"""A few lines of text from the model as it learns."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from training.data.tokenization.tokenizer import Tokenizer

TEMPERATURE, TOP_K = 0.8, 50


@torch.no_grad()
def sample_texts(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
) -> list[str]:
    """Each prompt with its continuation, drawn from a generator that training does not share.

    A model that is sharded must be given by all processes alike.
    """
    was_training = model.training
    model.eval()
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    texts = []
    # Compiled blocks would be compiled again for every length.
    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.random.fork_rng(devices=devices), accelerator.autocast():
        torch.manual_seed(seed)
        for prompt in prompts:
            # A prompt that leaves no room is cut from the left.
            room = model.config.n_positions - min(max_new_tokens, model.config.n_positions // 2)
            ids = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)][-room:]
            output = model.generate(
                torch.tensor([ids], device=accelerator.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=accelerator.device),
                max_new_tokens=min(max_new_tokens, model.config.n_positions - len(ids)),
                do_sample=True,
                temperature=temperature,
                top_k=top_k,
                pad_token_id=tokenizer.end_of_text_id,
                remove_invalid_values=True,  # a run that diverges is told by its loss, not by its samples
            )
            written = output[0].tolist()
            texts.append(tokenizer.decode([token for token in written if token != tokenizer.end_of_text_id]))
    model.train(was_training)
    return texts
