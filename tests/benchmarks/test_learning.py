"""The comparison of recipes: its arithmetic by hand, and tiny runs that are not repeated."""

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.foreign_models import BLOCK_SIZE, N_EMBD, N_HEAD, N_LAYER, logits, state_dict
from support.paths import ROOT

from common.cli_errors import InputError
from training.data.shards.shard_reader import ShardFolder
from training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def learning() -> Iterator[ModuleType]:
    path = sys.path.copy()
    sys.path.append(str(ROOT / "benchmarks"))  # at the end: its evaluation.py must not shadow the package
    spec = importlib.util.spec_from_file_location("learning", ROOT / "benchmarks" / "learning.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["learning"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["learning"]


@pytest.fixture(scope="module")
def learning_report(learning: ModuleType) -> ModuleType:
    return sys.modules["learning_report"]


def test_steps_are_interpolated_in_their_logarithm(learning_report: ModuleType) -> None:
    curve = {100: 5.0, 400: 4.0, 1600: 3.5}
    assert learning_report.steps_to_reach(4.5, curve) == pytest.approx(200)  # halfway from log 100 to log 400
    assert learning_report.steps_to_reach(4.0, curve) == pytest.approx(400)
    assert learning_report.steps_to_reach(3.75, curve) == pytest.approx(800)
    assert learning_report.steps_to_reach(5.5, curve) == 100
    assert learning_report.steps_to_reach(3.4, curve) is None


def test_the_interval_of_paired_differences_is_students(learning_report: ModuleType) -> None:
    mean, half = learning_report.interval([-0.4, -0.5, -0.6])
    assert mean == pytest.approx(-0.5)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)  # two degrees of freedom
    assert learning_report.interval([-0.5]) == (-0.5, math.inf)


def test_a_shorter_run_has_shorter_warmup_and_decay(learning: ModuleType, tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(max_steps=600, warmup_steps=60, lr_scheduler_type="warmup_stable_decay", decay_steps=420)
    short = learning.shortened(recipe, 240)
    assert (short.max_steps, short.warmup_steps, short.decay_steps) == (240, 24, 168)
    muon = learning.shortened(tiny_recipe(max_steps=600, optimizer="muon", warmup_steps=0), 240)
    assert (muon.warmup_steps, muon.decay_steps, muon.muon_momentum_warmup_steps) == (0, None, 120)


def test_recipes_are_compared_and_finished_runs_are_not_repeated(
    learning: ModuleType,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tiny_recipe(max_steps=8, eval_steps=0, sample_steps=0, save_steps=0)
    recipe.save(tmp_path / "slow.yaml")
    dataclasses.replace(recipe, learning_rate=0.02, mixed_precision="bf16").save(tmp_path / "fast.yaml")
    names = [str(tmp_path / name) for name in ("slow.yaml", "fast.yaml")]
    command = ["learning.py", *names, "--output", str(tmp_path / "out")]
    command += ["--baseline_steps", "8", "--steps", "4", "8", "--seeds", "1", "2"]
    monkeypatch.setattr(sys, "argv", command)
    learning.main()
    printed = capsys.readouterr().out
    runs = sorted(path.parent.relative_to(tmp_path / "out") for path in tmp_path.rglob("metrics.jsonl"))
    assert [str(run) for run in runs] == [
        *("fast/4-steps/seed-1", "fast/4-steps/seed-2", "fast/8-steps/seed-1", "fast/8-steps/seed-2"),
        *("slow/8-steps/seed-1", "slow/8-steps/seed-2"),
    ]
    assert "fast in 8 steps − slow in 8: -" in printed
    assert "fast reaches the final loss of slow in" in printed
    assert (tmp_path / "out" / "learning.png").stat().st_size > 10_000

    def fail(recipe: Recipe) -> None:
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr("training.loop.train", fail)
    learning.main()
    assert capsys.readouterr().out == printed

    dataclasses.replace(recipe, learning_rate=0.03, mixed_precision="bf16").save(tmp_path / "fast.yaml")
    with pytest.raises(InputError, match=r"4-steps/seed-1 holds a run of another recipe \(learning_rate: 0.02 → 0.03"):
        learning.main()


def test_built_in_recipes_train_on_any_shard_folder(
    learning: ModuleType,
    shard_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = tmp_path / "bare"  # as another program's: shards without a manifest
    bare.mkdir()
    for shard in ShardFolder.open(shard_folder).shards:
        (bare / shard.path.name).write_bytes(shard.path.read_bytes())
    assert learning.shard_settings(str(bare)) == {"data_dir": str(bare), "tokenizer": "gpt2"}
    assert learning.shard_settings(str(tmp_path / "none")) == {"data_dir": str(tmp_path / "none")}

    command = ["learning.py", "classic", "muon", "--baseline_steps", "2", "--steps", "1", "--seeds", "1"]
    command += ["--data_dir", str(shard_folder), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    learning.main()  # the quickstart's corpus and tokenizer would be refused
    assert "muon in 1 steps − classic in 2: " in capsys.readouterr().out
    assert (tmp_path / "out/muon/1-steps/seed-1/model/tokenizer.json").is_file()


STAND_IN = """
import sys
import numpy as np, torch
torch.manual_seed(1337)
flags = dict(flag.removeprefix("--").split("=") for flag in sys.argv[1:])
assert flags["dtype"] == "float32"
assert np.fromfile(flags["dataset"] + "/train.bin", dtype=np.uint16).max() < 300
state = torch.load("state.pt")
if flags["learning_rate"] == "0.5":
    raise ValueError("too high")
args = {"n_head": int(flags["n_head"]), "vocab_size": 300}
torch.save({"model": state, "model_args": args, "config": flags}, flags["out_dir"] + "/ckpt.pt")
for iteration in range(int(flags["max_iters"]) + 1):
    print(f"iter {iteration}: loss {5 - iteration:.4f}, time {torch.initial_seed():.2f}ms, mfu -100.00%")
"""


def test_nanogpts_loop_is_a_side(
    learning: ModuleType, tiny_recipe: Callable[..., Recipe], shard_folder: Path, tmp_path: Path
) -> None:
    from nanogpt_loop import train_with_nanogpt  # from the folder that `learning` added to the path

    checkout = tmp_path / "nanoGPT"
    checkout.mkdir()
    sizes = {"seq_len": BLOCK_SIZE, "n_embd": N_EMBD, "n_head": N_HEAD, "n_layer": N_LAYER}
    recipe = tiny_recipe(max_steps=3, tokens_per_step=4 * BLOCK_SIZE, seed=50, **sizes)
    with pytest.raises(InputError, match=f"no train.py in {checkout}; pass a checkout of nanoGPT"):
        train_with_nanogpt(recipe, checkout)
    (checkout / "train.py").write_text(STAND_IN)
    state = state_dict(300)
    torch.save(state, checkout / "state.pt")
    train_with_nanogpt(recipe, checkout)

    folder = Path(recipe.output_dir)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "recipe.yaml"]
    result = learning.result_of(folder, 3)
    assert (result.tokens, result.losses) == ([96, 192, 288], [5, 4, 3])  # the fourth follows the checkpoint
    assert result.seconds_per_step == pytest.approx(0.05)  # the stand-in prints its seed as milliseconds
    tokens = torch.from_numpy(ShardFolder.open(shard_folder).val_shard.read().astype("int64"))
    starts = range(0, recipe.eval_tokens - BLOCK_SIZE, BLOCK_SIZE)
    windows = [tokens[first : first + BLOCK_SIZE + 1] for first in starts]
    losses = [torch.nn.functional.cross_entropy(logits(state, ids[:-1], "none"), ids[1:]) for ids in windows]
    assert result.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)

    with pytest.raises(InputError, match=f"nanoGPT in {checkout} failed: ValueError: too high"):
        train_with_nanogpt(dataclasses.replace(recipe, learning_rate=0.5), checkout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["muno", "adamw"], "muno is neither a YAML file nor one of classic, adamw, muon"),
        (["muon", "muon"], "two recipes have the same name"),
        (["adamw", "--steps", "0"], "--steps: expected at least 1, found 0"),
        (["adamw", "muon", "--size", "124m", "--data_dir", "none"], "--size 124m needs --data_dir: shards"),
        (["adamw", "nanogpt"], "the recipe nanogpt and --nanogpt CHECKOUT need each other"),
        (["adamw", "muon", "--nanogpt", "nanoGPT"], "the recipe nanogpt and --nanogpt CHECKOUT need each other"),
    ],
)
def test_bad_input_is_a_one_line_error(
    learning: ModuleType, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["learning.py", *arguments])
    with pytest.raises(InputError, match=message):
        learning.main()


def test_the_classic_recipe_has_nothing_newer(learning: ModuleType) -> None:
    classic = learning.named_recipe("classic", {})
    assert (classic.optimizer, classic.seq_len_warmup_steps, classic.document_mask) == ("adamw", 0, False)


def test_rates_that_depend_on_the_width_follow_it(learning: ModuleType) -> None:
    sizes = ("proxy", "quickstart", "124m")
    muon, adamw = ([learning.named_recipe(name, {}, size) for size in sizes] for name in ("muon", "adamw"))
    assert [recipe.embedding_learning_rate for recipe in muon] == pytest.approx([0.04, 0.02, 0.04 / 6])
    assert [recipe.learning_rate for recipe in adamw] == pytest.approx([6e-3, 3e-3, 1e-3])
    assert [recipe.learning_rate for recipe in muon] == [0.02] * 3
    assert [recipe.n_embd for recipe in muon] == [128, 256, 768]


def test_a_single_seed_has_no_interval(learning_report: ModuleType) -> None:
    result = {loss: {1: learning_report.Result(loss, 1.0, 10, [10], [loss])} for loss in (4.0, 3.5)}
    lines = learning_report.report({"slow": {8: result[4.0]}, "fast": {4: result[3.5]}})
    assert "fast in 4 steps − slow in 8: -0.5000 (one seed)" in lines
