"""What `python -m evaluation.run --model … --tasks …` does, behind its command line."""

import argparse
import datetime
import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from common.atomic_files import write_atomically
from common.cli_errors import InputError
from evaluation.results.item_cache import FinishedItems, items_path, model_fingerprint, refuse_another_model
from evaluation.results.metric_values import load_metrics
from evaluation.results.report import is_table, markdown_table, terminal_table
from evaluation.results.results_file import Results, read_results
from evaluation.results.task_runner import agreed, judge, on_every_process, read_items
from evaluation.scoring.scorer import n_positions_of
from evaluation.scoring.tokenizer_adapter import HubEncoder
from gpt2_scratch.generate import load

_LEAST_SHARE_OF_ROWS = 0.75
_PROCESS_TIMEOUT = datetime.timedelta(hours=6)  # one process downloads while the others wait


def evaluate_model(options: argparse.Namespace) -> None:
    """Judge the model, print the table, and write what was asked for.

    Args:
        options: as `evaluation.run.parse` gives them.

    Raises:
        InputError: the model, the data or a place for results cannot be used.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerator = Accelerator(
        # Told so outright: several CPU processes would otherwise not find each other.
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PROCESS_TIMEOUT)],
    )
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":  # launchers say so
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    try:
        _evaluate(options, accelerator)
    finally:
        accelerator.end_training()


def _evaluate(options: argparse.Namespace, accelerator: Accelerator) -> None:
    agreed(accelerator, lambda: _check_places(options))
    agreed(accelerator, lambda: load_metrics(options.tasks))
    model, tokenizer = on_every_process(accelerator, lambda: _load(options, accelerator.device))
    started, begin = datetime.datetime.now(datetime.UTC).astimezone(), time.perf_counter()
    weights, dtype = model_fingerprint(model, tokenizer), str(model.dtype).removeprefix("torch.")
    if options.output is not None:
        agreed(accelerator, lambda: _refuse_other_results(options.output, weights, dtype))
    n_positions = n_positions_of(model)
    items = on_every_process(
        accelerator,
        lambda: read_items(options.tasks, options.data_dir, HubEncoder(tokenizer), n_positions, options.limit),
    )
    finished = _finished(options, accelerator, weights, dtype)
    try:
        judged = [
            judge(
                model,
                task,
                items[task.full_name],
                accelerator=accelerator,
                tokens_per_batch=options.tokens_per_batch,
                finished=finished,
                show=True,
            )
            for task in options.tasks
        ]
    finally:
        if finished is not None:
            finished.close()
    if not accelerator.is_main_process:
        return
    results = Results(
        model=options.model,
        revision=options.revision,
        commit=getattr(model.config, "_commit_hash", None),
        weights=weights,
        parameters=model.num_parameters(),
        n_positions=n_positions,
        dtype=dtype,
        device=_device_name(accelerator.device),
        processes=accelerator.num_processes,
        data_dir=None if options.data_dir is None else str(options.data_dir),
        limit=options.limit,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - begin, 3),
        tasks=judged,
    )
    print(terminal_table(results))
    _write(results, options)


def _load(options: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """Return the model on the device, and its tokenizer."""
    model, tokenizer = load(
        options.model,
        str(device),
        revision=options.revision,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        trust_remote_code=options.trust_remote_code,
    )
    _refuse_another_tokenizer(model, tokenizer)
    return model, tokenizer


def _refuse_another_tokenizer(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer of far fewer tokens than the model has: a vocabulary is padded by some hundred rows at most.

    One with more tokens is found by the ids that it gives.
    """
    rows, tokens = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if tokens < _LEAST_SHARE_OF_ROWS * rows:
        raise InputError(
            f"expected a tokenizer of about as many tokens as the model's vocabulary ({rows:,}), found {tokens:,}; "
            "give the tokenizer that the model was trained with"
        )


def _finished(options: argparse.Namespace, accelerator: Accelerator, weights: str, dtype: str) -> FinishedItems | None:
    """Return the finished items on the main process, None on others and without --output."""
    opened: list[FinishedItems] = []

    def open_on_the_main_process() -> None:
        opened.append(FinishedItems(items_path(options.output), model=options.model, weights=weights, dtype=dtype))

    if options.output is not None:
        agreed(accelerator, open_on_the_main_process)
    return opened[0] if opened else None


def _check_places(options: argparse.Namespace) -> None:
    """Refuse places that nothing can be written to, before the hours that come first."""
    for flag in ("output", "markdown", "plot"):
        path: Path | None = getattr(options, flag)
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"expected --{flag} in a folder, found {error}; choose another place") from None
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"expected --{flag} where files can be written, found {path.parent}; choose another place")
        if path.is_dir():
            raise InputError(f"expected --{flag} to be a file, found the folder {path}; name a file in it")
    table = _table_path(options)
    if options.markdown is None and table is not None and table.exists() and not is_table(table):
        raise InputError(
            f"expected no file of yours at {table}, where the table goes, found one; choose another --output, or name "
            "the table's place by --markdown"
        )


def _table_path(options: argparse.Namespace) -> Path | None:
    """Return where the table in Markdown goes: beside the results unless it is named."""
    if options.markdown is not None or options.output is None:
        return options.markdown
    return options.output.with_suffix(".md")


def _refuse_other_results(output: Path, weights: str, dtype: str) -> None:
    """Refuse to write over results of another model, or over another file."""
    if output.exists():
        found = read_results(output)
        refuse_another_model(output, vars(found), weights, dtype)


def _write(results: Results, options: argparse.Namespace) -> None:
    """Write results.json, the table and the chart, and say where they are."""
    markdown = _table_path(options)
    try:
        if options.output is not None:
            results.write(options.output, with_items=options.save_items)
        if markdown is not None:
            write_atomically(markdown, markdown_table(results))
        if options.plot is not None:
            from evaluation.results.chart import plot_results

            plot_results(options.plot, results)
    except OSError as error:
        raise InputError(f"expected to write the results, found {error}; free the place, or choose another") from None
    written = [str(path) for path in (options.output, markdown, options.plot) if path is not None]
    if written:
        print(f"\nwrote {', '.join(written)}")


def _device_name(device: Any) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
