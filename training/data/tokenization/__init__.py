"""Tokenizers: loading, training, and encoding documents."""
