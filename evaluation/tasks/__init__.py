"""Benchmarks: HellaSwag, LAMBADA, CBT, WikiText and validation shards, and their registry."""
