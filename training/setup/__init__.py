"""From a recipe to a run that can start: checks, model, accelerator, FSDP2, memory and batch size."""
