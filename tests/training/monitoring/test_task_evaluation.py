"""Evaluation tasks while training: what is recorded, that nothing else changes, and errors before the first step."""

import dataclasses
import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.launching import train_in_two
from support.small_tasks import write_tasks

from common.cli_errors import InputError
from evaluation.run import main
from evaluation.scoring.forward_passes import ForwardPasses
from training.checkpoints.checkpoint_folder import checkpoints
from training.hub.card import task_scores
from training.loop import train
from training.monitoring.run_history import RunHistory, read_metrics
from training.recipe import Recipe

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), count=6)


def with_tasks(recipe: Recipe, data: Path, **changes: object) -> Recipe:
    values = {
        "eval_tasks": ["hellaswag", "hellaswag:harness", "lambada:word"],
        "eval_task_steps": 4,
        "eval_task_limit": 5,
        "eval_data_dir": str(data),
        "n_positions": 96,
    }
    return dataclasses.replace(recipe, **{**values, **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_tasks_are_recorded_and_change_nothing_else(tiny_recipe: Make, data: Path, tmp_path: Path) -> None:
    plain = tiny_recipe(output_dir=str(tmp_path / "plain"), max_steps=6, dropout=0.1, n_positions=96)
    evaluated = with_tasks(plain, data, output_dir=str(tmp_path / "evaluated"))
    train(plain)
    train(evaluated)
    run = Path(evaluated.output_dir)
    assert files(run) == files(Path(plain.output_dir))  # weights, optimizer and random numbers of every checkpoint

    lines = [line for line in read_metrics(run) if "hellaswag_acc_norm" in line]
    assert [(line["step"], line["tokens"]) for line in lines] == [(4, 1024), (6, 1536)]
    names = ("hellaswag_acc_norm", "hellaswag_acc", "hellaswag_harness_acc_norm", "hellaswag_harness_acc")
    assert set(lines[0]) == {"step", "tokens", *names, "lambada_word_acc"}
    assert f"4 hella {lines[0]['hellaswag_acc_norm']:.4f}\n" in (run / "log.txt").read_text()
    assert f"step 4  hellaswag_acc_norm {lines[0]['hellaswag_acc_norm']:.4f}  " in (run / "train.log").read_text()

    results = json.loads((run / "eval_results.json").read_text())
    assert (results["step"], results["limit"], results["data_dir"]) == (6, 5, None)
    harness = results["tasks"]["hellaswag:harness"]
    assert (harness["protocol"], harness["items"]) == ("harness", 5)
    assert harness["figures"]["acc_norm"]["value"] == lines[1]["hellaswag_harness_acc_norm"]
    card = (run / "model" / "README.md").read_text()
    assert "HellaSwag acc_norm: HellaSwag, acc_norm, protocol harness, first 5 items" in card
    assert "The tasks were evaluated after step 6." in card
    assert not any(
        score.references for score in task_scores(RunHistory.load(run).task_results)
    )  # published values are of all items
    (run / "eval_results.json").write_text(json.dumps({**results, "limit": None}))
    assert "0.3114" in str(task_scores(RunHistory.load(run).task_results))

    # The command gives the same results for the final model.
    paths = ["--model", str(run / "model"), "--data_dir", str(data), "--output", str(tmp_path / "r.json")]
    main([*paths, "--limit", "5", "--tasks", *evaluated.eval_tasks])
    by_command = json.loads((tmp_path / "r.json").read_text())["tasks"]
    assert {name: task["figures"] for name, task in by_command.items()} == {
        name: task["figures"] for name, task in results["tasks"].items()
    }


def test_a_full_disk_does_not_end_training(
    tiny_recipe: Make, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, write: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("evaluation.results.results_file.write_atomically", full)
    recipe = with_tasks(tiny_recipe(max_steps=2), data, eval_tasks=["lambada"], eval_task_steps=2)
    train(recipe)
    run = Path(recipe.output_dir)
    assert "eval_results.json (No space left on device): free some space; training continues" in capsys.readouterr().out
    assert not (run / "eval_results.json").exists()
    assert [line["step"] for line in read_metrics(run) if "lambada_acc" in line] == [2]
    assert (run / "model" / "model.safetensors").is_file()


def test_a_signal_stops_the_tasks_and_the_next_start_makes_up_for_them(
    tiny_recipe: Make, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_tasks(tiny_recipe(max_steps=6, eval_steps=0), data, eval_tasks=["hellaswag"])
    run, forward, passes = Path(recipe.output_dir), ForwardPasses.shared, []

    def with_signal(self: ForwardPasses, *args: object) -> object:
        passes.append(len(checkpoints(run)))
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr("evaluation.scoring.scorer._TOKENS_PER_BATCH", 1)  # an item at a time
        patch.setattr(ForwardPasses, "shared", with_signal)
        with pytest.raises(SystemExit):
            train(recipe)
    assert len(passes) == 1
    assert [path.name for path in checkpoints(run)] == ["step-000004"]
    assert not [line for line in read_metrics(run) if "hellaswag_acc" in line]
    train(recipe)
    assert [line["step"] for line in read_metrics(run) if "hellaswag_acc" in line] == [4, 6]


def test_ranks_with_sharded_weights_evaluate_together(tiny_recipe: Make, data: Path, tmp_path: Path) -> None:
    one = with_tasks(tiny_recipe(output_dir=str(tmp_path / "one"), max_steps=4, per_device_train_batch_size=2), data)
    two = dataclasses.replace(one, output_dir=str(tmp_path / "two"), eval_task_steps=2)
    train(one)
    train_in_two(two, "fsdp2_8xa100")
    expected, found = (RunHistory.load(Path(recipe.output_dir)).task_results for recipe in (one, two))
    assert expected is not None
    assert found is not None
    assert found.processes == 2
    # Weights differ by rounding, which changes no argmax of so few items.
    assert [task.metrics for task in found.tasks] == [task.metrics for task in expected.tasks]


def test_errors_come_before_anything_is_written(tiny_recipe: Make, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe key eval_tasks: unknown task 'hellaswg'; .* did you mean"):
        tiny_recipe(eval_tasks=["hellaswg"])
    recipe = with_tasks(tiny_recipe(), data, eval_data_dir=str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"eval_tasks: no file hellaswag_val\.jsonl .* omit eval_data_dir"):
        train(recipe)
    cut = write_tasks(tmp_path / "cut")
    (cut / "lambada_test.jsonl").write_text('{"text": "a b"}\n{"te')
    with pytest.raises(InputError, match=r"lambada_test\.jsonl, line 2: not JSON"):
        train(with_tasks(tiny_recipe(), data, eval_tasks=["lambada"], eval_data_dir=str(cut)))
    with pytest.raises(InputError, match="recipe key eval_task_limit"):
        tiny_recipe(eval_task_limit=0)
    assert not Path(recipe.output_dir).exists()


def test_facts_have_no_task_results_of_a_later_step(tiny_recipe: Make, data: Path) -> None:
    recipe = with_tasks(tiny_recipe(max_steps=2), data, eval_tasks=["lambada"], eval_task_steps=2)
    assert RunHistory.load(Path(recipe.output_dir)).task_results is None
    train(recipe)
    history = RunHistory.load(Path(recipe.output_dir))
    assert history.facts(recipe, steps=1, parameters=1).task_results is None
    assert history.facts(recipe, steps=2, parameters=1).task_results is not None


def test_items_that_do_not_fit_the_model_are_refused_before_the_first_step(tiny_recipe: Make, data: Path) -> None:
    recipe = with_tasks(tiny_recipe(seq_len=8, tokens_per_step=64), data, eval_tasks=["hellaswag"], n_positions=None)
    with pytest.raises(InputError, match=r"eval_tasks: hellaswag:completion: item \d+ needs \d+ tokens, but the model"):
        train(recipe)
    assert not Path(recipe.output_dir).exists()


@pytest.mark.parametrize("name", ["TaskEvaluation", "Samples", "Validation"])
def test_an_evaluation_that_fails_keeps_no_checkpoint_from_being_written(
    name: str, tiny_recipe: Make, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("no\nway")

    function = {"TaskEvaluation": "task_evaluation.run_task", "Samples": "samples._generate"}
    monkeypatch.setattr(f"training.monitoring.{function.get(name, 'validation.validation_loss')}", fails)
    recipe = with_tasks(tiny_recipe(max_steps=6, sample_steps=4), data, eval_tasks=["lambada"])
    train(recipe)
    assert f"step 4  {name} failed (ValueError: no way); training continues" in capsys.readouterr().out.replace(
        "step 6  Validation", "step 4  Validation"
    )
    assert [path.name for path in checkpoints(Path(recipe.output_dir))] == ["step-000004", "step-000006"]
    assert (Path(recipe.output_dir) / "model" / "model.safetensors").is_file()


def test_a_plot_that_fails_does_not_cost_the_model(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("a font")

    monkeypatch.setattr("training.monitoring.monitor.plot_curves", fails)
    recipe = tiny_recipe(max_steps=2)
    train(recipe)
    assert "curves.png (ValueError: a font)" in capsys.readouterr().out
    assert "curves.png" not in (Path(recipe.output_dir) / "model" / "README.md").read_text()
