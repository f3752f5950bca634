"""Evaluation of causal language models on the tasks of the GPT-2 paper."""
