"""The producer: turns a corpus into a shard folder, in the foreground or in the background of a run."""
