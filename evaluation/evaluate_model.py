"""The work of `python -m evaluation.run --model … --tasks …`: load, evaluate, print and write."""

import argparse
import contextlib
import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from common.atomic_files import write_atomically
from common.cli_errors import InputError
from common.cpus import use_all_cores
from evaluation.results.item_cache import ItemCache, code_fingerprint, model_fingerprint, refuse_another_model
from evaluation.results.metric_values import load_metrics
from evaluation.results.report import is_table, markdown_table, terminal_table
from evaluation.results.results_file import Results, read_results
from evaluation.results.task_runner import from_main_process, on_every_process, read_items, run_task
from evaluation.scoring.scorer import n_positions_of
from evaluation.scoring.tokenizer_adapter import TokenizerAdapter
from gpt2_scratch.generate import load

_MIN_SHARE_OF_VOCABULARY = 0.75
_PROCESS_TIMEOUT = datetime.timedelta(hours=6)  # one process downloads while the others wait


def evaluate_model(options: argparse.Namespace) -> None:
    """Evaluate the model, print the table, and write the output files; `options` come from `evaluation.run.parse`.

    Raises:
        InputError: the model, the data or an output path cannot be used.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # explicit, or several CPU processes would not form a group
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PROCESS_TIMEOUT)],
    )
    if accelerator.device.type == "cpu" and "OMP_NUM_THREADS" in os.environ:  # otherwise torch's own default
        use_all_cores()
    try:
        from_main_process(accelerator, lambda: _check_outputs(options))
        from_main_process(accelerator, lambda: load_metrics(options.tasks))
        model, tokenizer = on_every_process(accelerator, lambda: _load(options, accelerator.device))
        results = _evaluate(options, accelerator, model, tokenizer)
        if accelerator.is_main_process:
            print(terminal_table(results))
            _write(results, options)
    finally:
        accelerator.end_training()


def _evaluate(options: argparse.Namespace, accelerator: Accelerator, model: Any, tokenizer: Any) -> Results:
    started, begin = datetime.datetime.now(datetime.UTC).astimezone(), time.perf_counter()
    weights, dtype = model_fingerprint(model, tokenizer), str(model.dtype).removeprefix("torch.")
    n_positions = n_positions_of(model)
    encoder = TokenizerAdapter(tokenizer)
    items = on_every_process(
        accelerator, lambda: read_items(options.tasks, options.data_dir, encoder, n_positions, options.limit)
    )
    cache: ItemCache | None = None  # on the main process, with --output

    def open_cache() -> None:
        nonlocal cache
        if options.output.exists():
            refuse_another_model(options.output, vars(read_results(options.output)), weights, dtype)
        path, code = options.output.with_suffix(".items.jsonl"), code_fingerprint(model)
        cache = ItemCache(path, model=options.model, weights=weights, dtype=dtype, code=code)
        if cache.corrupted:
            print(f"{path}: {cache.corrupted:,} lines are corrupted; their items are scored again", file=sys.stderr)

    if options.output is not None:
        from_main_process(accelerator, open_cache)
    with contextlib.closing(cache) if cache else contextlib.nullcontext():
        tasks = [
            run_task(
                model,
                task,
                items[task.full_name],
                accelerator=accelerator,
                tokens_per_batch=options.tokens_per_batch,
                cache=cache,
                show_progress=True,
            )
            for task in options.tasks
        ]
    device = accelerator.device
    return Results(
        model=options.model,
        revision=options.revision,
        commit=getattr(model.config, "_commit_hash", None),
        weights=weights,
        parameters=model.num_parameters(),
        n_positions=n_positions,
        dtype=dtype,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        processes=accelerator.num_processes,
        data_dir=None if options.data_dir is None else str(options.data_dir),
        limit=options.limit,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - begin, 3),
        tasks=tasks,
    )


def _load(options: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """Return the model, on the device, and its tokenizer."""
    model, tokenizer = load(
        options.model,
        str(device),
        revision=options.revision,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        trust_remote_code=options.trust_remote_code,
    )
    # Vocabularies are padded by some hundred rows at most. A tokenizer with too many tokens shows by its ids.
    vocab_size, tokens = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if tokens < _MIN_SHARE_OF_VOCABULARY * vocab_size:
        raise InputError(
            f"the tokenizer has {tokens:,} tokens, but the model's vocabulary size is {vocab_size:,}; use the "
            "tokenizer that the model was trained with"
        )
    return model, tokenizer


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse paths that cannot be written, before the long computation."""
    for flag in ("output", "markdown", "plot"):
        path: Path | None = getattr(options, flag)
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--{flag}: cannot create the folder: {error}; choose another path") from None
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"--{flag}: the folder {path.parent} is not writable; choose another path")
        if path.is_dir():
            raise InputError(f"--{flag}: {path} is a folder; pass a file in it")
    table = _table_path(options)
    if options.markdown is None and table is not None and table.exists() and not is_table(table):
        raise InputError(
            f"the table would overwrite {table}, which is another file; choose another --output, or pass --markdown"
        )


def _table_path(options: argparse.Namespace) -> Path | None:
    """Return the path of the Markdown table: --markdown, or next to --output."""
    if options.markdown is not None or options.output is None:
        return options.markdown
    return options.output.with_suffix(".md")


def _write(results: Results, options: argparse.Namespace) -> None:
    """Write results.json, the table and the chart, and print their paths."""
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
        raise InputError(f"cannot write the results: {error}; free some space, or choose another path") from None
    written = [str(path) for path in (options.output, markdown, options.plot) if path is not None]
    if written:
        print(f"\nwrote {', '.join(written)}")
