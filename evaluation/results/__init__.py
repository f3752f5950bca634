"""Metrics, standard errors, cached items, reports, comparisons and published references."""
