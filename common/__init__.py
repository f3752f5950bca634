"""Command-line errors, atomic files, Hub retries, progress: code without GPT-2 in it, and cheap to import."""
