"""Scores of requests: log-likelihoods and greedy continuations of any causal language model."""
