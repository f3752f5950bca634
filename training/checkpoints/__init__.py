"""Checkpoint folders: format, writer, resume, checksums, signals."""
