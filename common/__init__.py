"""What every package needs, and nothing of the domain: command-line errors, atomic files, Hub retries, logs. Cheap to import."""
