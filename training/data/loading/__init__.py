"""From shards to batches: data order, loader, shards that are still being written."""
