"""Kill a run of several processes at random moments, and compare its end with that of an uninterrupted run.

    python benchmarks/kill_fuzz.py --kills 200

Each start of the run has one or all of its processes killed with SIGKILL at a random moment: during setup, in a step,
while a checkpoint is written. Weights, optimizer state and random-number generators must end bit-identical to those of
an uninterrupted run, and metrics.jsonl must have every step once, with equal values. The first difference is an error.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    """Kill as often as asked, and print the result."""
    parser = argparse.ArgumentParser(description="Kill a run at random moments and compare its end.")
    parser.add_argument("--kills", type=int, default=200, help="total number of kills")
    parser.add_argument("--processes", type=int, default=2, help="number of processes of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and of the processes killed")
    arguments = parser.parse_args()

    from support.killing import KillFuzz
    from support.small_corpora import make_shards, write_corpus

    from training.recipe import Recipe

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        corpus = write_corpus(work / "corpus.jsonl", 400)
        make_shards(work / "data", corpus=str(corpus), tokenizer="train:300", shard_tokens=9_000, val_tokens=2_000)
        recipe = Recipe(
            output_dir=str(work / "runs"),
            data_dir=str(work / "data"),
            corpus=str(corpus),
            tokenizer="train:300",
            shard_tokens=9_000,
            val_tokens=2_000,
            seq_len=32,
            n_layer=2,
            n_head=2,
            n_embd=32,
            dropout=0.1,
            tokens_per_step=256,
            per_device_train_batch_size=4,
            max_steps=120,
            warmup_steps=2,
            learning_rate=3e-3,
            logging_steps=1,
            eval_steps=60,
            eval_tokens=1_000,
            sample_steps=0,
            save_steps=3,
            mixed_precision="no",
        )
        start = time.monotonic()
        fuzz = KillFuzz(recipe, number=arguments.processes, seed=arguments.seed)
        fuzz.run(arguments.kills, report=lambda line: print(line, flush=True))
        seconds = time.monotonic() - start
        moments = ", ".join(f"{count} {moment}" for moment, count in fuzz.moments.most_common())
        print(
            f"{fuzz.kills} kills ({moments}) of {arguments.processes} processes over {fuzz.runs} runs of "
            f"{recipe.max_steps} steps: every run ended bit-identical to an uninterrupted one ({seconds:.0f} s)"
        )


if __name__ == "__main__":
    main()
