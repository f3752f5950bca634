"""Evaluation of causal language models on the tasks that the GPT-2 paper reports."""
