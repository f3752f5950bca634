"""One optimizer step: forward and backward, batch arithmetic, document mask, guard against bad updates."""
