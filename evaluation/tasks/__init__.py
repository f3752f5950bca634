"""The tasks: HellaSwag, LAMBADA, CBT, WikiText-2 and validation shards, and their registry."""
