"""Kill a run of several processes at random moments, again and again, and compare its end with an unbroken run's.

    python benchmarks/kill_fuzz.py --kills 200

Each start of the run has one of its processes, or all of them, killed with SIGKILL at a random moment of its life:
while it is built, in a step, while a checkpoint is written. What comes out must have the bytes of a run that nobody
killed, in weights, optimizer state and random-number generators, and metrics.jsonl must tell every step once, alike.
Ends with an error at the first difference.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    """Kill as often as asked, and say what came of it."""
    parser = argparse.ArgumentParser(description="Kill a run at random moments and compare its end.")
    parser.add_argument("--kills", type=int, default=200, help="kills in all")
    parser.add_argument("--processes", type=int, default=2, help="processes of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    arguments = parser.parse_args()

    from killing import KillFuzz
    from small_corpora import make_shards, write_corpus

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
        fuzz.run(arguments.kills, say=lambda line: print(line, flush=True))
        seconds = time.monotonic() - start
        moments = ", ".join(f"{count} {moment}" for moment, count in fuzz.moments.most_common())
        print(
            f"{fuzz.kills} kills ({moments}) of {arguments.processes} processes over {fuzz.runs} runs of "
            f"{recipe.max_steps} steps: every run ended with the bytes of an unbroken one ({seconds:.0f} s)"
        )


if __name__ == "__main__":
    main()
