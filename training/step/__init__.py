"""One optimizer step: batch arithmetic, forward and backward, document mask, guard, hooks."""
