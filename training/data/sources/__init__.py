"""Corpora: documents in a fixed order, from files, the Hub or installed packages."""
