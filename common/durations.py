"""Durations for people to read."""

import math


def format_duration(seconds: float) -> str:
    """Return a duration in two units at most: `50 s`, `4.2 min`, `1 h 07 min`, `2 d 03 h`."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds / 60:.1f} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24:02d} h"
