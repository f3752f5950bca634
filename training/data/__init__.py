"""From documents to batches: corpus, tokenizer, shards, producer, order, loader."""
