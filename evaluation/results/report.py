"""Results as a table, for the terminal and in Markdown, with GPT-2's published results of the same protocol."""

import math
from collections.abc import Sequence
from pathlib import Path

from evaluation.results.references import SIZES, one_per_size, published
from evaluation.results.results_file import Results
from evaluation.tasks.registry import default_protocols, tasks

_HEADINGS = ("task", "protocol", "metric", "value", "± stderr", "95 %", "items")


def terminal_table(results: Results) -> str:
    """Return a line about the model, and the table in columns."""
    rows, sources = _table(results)
    lines = [heading(results), "", *aligned(rows)]
    if sources:
        lines += ["", "OpenAI's GPT-2 under the same protocols: " + "; ".join(sources)]
    return "\n".join(lines)


def markdown_table(results: Results) -> str:
    """Return the table in Markdown, followed by a description of each protocol."""
    rows, sources = _table(results)
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    lines = [f"# {results.model}", "", heading(results), "", head, "|" + " --- |" * len(rows[0]), *body, ""]
    if sources:
        lines += [f"OpenAI's GPT-2 under the same protocols, from {'; '.join(sources)}.", ""]
    described = [tasks()[result.task] for result in results.tasks if result.task in tasks()]
    lines += [f"- `{task.full_name}`: {task.description} ({task.source})" for task in described]
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return "\n".join([*lines, "", f"{versions}; {results.started}", ""])


def is_table(path: Path) -> bool:
    """Return whether a file was written by `markdown_table`; False if it cannot be read."""
    try:
        return f"\n| {' | '.join(_HEADINGS[:2])} |".encode() in path.read_bytes()
    except OSError:
        return False


def heading(results: Results) -> str:
    """Return one line about the model and its evaluation."""
    at = f" at {results.revision or results.commit}" if results.revision or results.commit else ""
    processes = f" × {results.processes}" if results.processes > 1 else ""
    limited = f", the first {results.limit:,} items of each task" if results.limit else ""
    return (
        f"{results.model}{at}: {results.parameters / 1e6:.1f}M parameters, {results.dtype}, "
        f"{results.device}{processes}, {results.seconds:.1f} s{limited}"
    )


def protocol_list() -> str:
    """Return the text of --list: every task with its protocols."""
    defaults = default_protocols()
    lines = []
    for name, task in tasks().items():
        mark = f"  (default of {task.name})" if defaults[task.name] is task else ""
        metrics = ", ".join(metric.name for metric in task.metrics)
        lines += [f"{name}{mark}", f"    {task.description}", f"    metrics: {metrics}; source: {task.source}"]
    return "\n".join(lines)


def number(value: float) -> str:
    """Return a value with four decimals, or two or none for large ones."""
    if math.isinf(value):
        return "∞"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.2f}" if abs(value) < 1e6 else f"{value:.3e}"


def _table(results: Results) -> tuple[list[list[str]], list[str]]:
    """Return heading and rows, and the sources of the published results in them."""
    metrics = [(result, name) for result in results.tasks for name in result.metrics]
    found = {(result.task, name): one_per_size(published(result.task, name)) for result, name in metrics}
    sizes = [size for size in SIZES if any(size in references for references in found.values())]
    rows = [[*_HEADINGS, *(f"GPT-2 {size}" for size in sizes)]]
    for result, name in metrics:
        metric, references = result.metrics[name], found[result.task, name]
        shown = [number(references[size].value) if size in references else "" for size in sizes]
        error = "" if metric.stderr is None else number(metric.stderr)
        interval = " – ".join(map(number, metric.interval or ()))
        values = [number(metric.value), error, interval, f"{result.items:,}", *shown]
        rows.append([*result.task.split(":"), name, *values])
    sources = {each.source: None for references in found.values() for each in references.values()}
    return rows, list(sources)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows in aligned columns: the first three to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
