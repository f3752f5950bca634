"""Shard folders: format, manifest, reader, writer, inspection."""
