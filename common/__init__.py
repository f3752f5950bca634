"""Code without GPT-2 in it: command-line errors, atomic files, Hub retries, logs. Imports only the standard library."""
