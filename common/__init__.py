"""What every package needs: command-line errors, atomic files, Hub retries, logs. Cheap to import."""
