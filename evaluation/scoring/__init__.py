"""Log-likelihoods of continuations under any causal language model."""
