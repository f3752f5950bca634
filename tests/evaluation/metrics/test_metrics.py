"""The metric modules, loaded by path, and the statistics they use."""

import math
import os
import random
import subprocess
import sys

import pytest

from common.cli_errors import InputError
from evaluation.results.metric_values import METRICS, _load, compute_metrics
from evaluation.results.standard_errors import ratio_of_sums, wilson_interval
from evaluation.tasks.registry import task_named, tasks


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """`evaluate` copies a module into its cache before importing it."""
    from evaluate import config

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(config, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr(config, "HF_METRICS_CACHE", folder / "metrics")
        for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
            patch.delitem(sys.modules, name)  # imported from another cache
        yield


def compute(metric, predictions, references):
    return _load(metric).compute(predictions=predictions, references=references)


def test_accuracy_has_standard_error_and_interval():
    found = compute("accuracy", [0, 1, 2, 3, 0, 0, 0, 0, 0, 0], [0, 1, 2, 0, 1, 1, 1, 1, 1, 1])
    assert found["accuracy"] == 0.3
    assert found["stderr"] == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    # Wilson's interval for 3 of 10, from tables.
    assert found["interval"] == pytest.approx([0.10779, 0.60322], abs=1e-5)


def test_accuracy_accepts_strings_and_booleans():
    assert compute("accuracy", ["shard", "Shard"], ["shard", "shard"])["accuracy"] == 0.5
    assert compute("accuracy", [True, False], [True, True])["accuracy"] == 0.5


def test_accuracy_of_a_single_item_has_an_interval_but_no_standard_error():
    found = compute("accuracy", [1], [1])
    assert found["stderr"] is None
    assert found["interval"] == pytest.approx([0.20655, 1.0], abs=1e-5)


def test_losses_weigh_items_by_their_counts():
    # Two items: 2 nats on one token, 1 nat on three; 3 nats on 4 tokens.
    assert compute("loss", [-2.0, -1.0], [1, 3])["loss"] == pytest.approx(0.75)
    assert compute("perplexity", [-2.0, -1.0], [1, 3])["perplexity"] == pytest.approx(math.exp(0.75))
    assert compute("bits_per_byte", [-2.0, -1.0], [1, 3])["bits_per_byte"] == pytest.approx(0.75 / math.log(2))


def test_standard_errors_of_losses_agree_with_a_bootstrap():
    rng = random.Random(0)
    counts = [rng.randint(5, 50) for _ in range(400)]
    nats = [-count * rng.gauss(3.0, 0.5) for count in counts]
    drawn = []
    for _ in range(1_000):
        sample = rng.choices(range(400), k=400)
        drawn.append(math.exp(-sum(nats[i] for i in sample) / sum(counts[i] for i in sample)))
    mean = sum(drawn) / len(drawn)
    bootstrap = math.sqrt(sum((value - mean) ** 2 for value in drawn) / (len(drawn) - 1))
    # A standard deviation of 1,000 draws has an error of about 2 %.
    assert compute("perplexity", nats, counts)["stderr"] == pytest.approx(bootstrap, rel=0.08)


def test_perplexity_that_overflows_a_float_is_infinite():
    assert compute("perplexity", [-1e6, -1e6], [1, 1])["perplexity"] == math.inf


def test_intervals_of_shares_stay_between_0_and_1():
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0
    assert ratio_of_sums([1.0], [2]) == (0.5, None)
    with pytest.raises(ValueError, match="counts above 0"):
        ratio_of_sums([1.0], [0])


def test_every_metric_of_every_task_has_its_module():
    for task in tasks().values():
        for metric in task.metrics:
            assert (METRICS / metric.module / f"{metric.module}.py").is_file(), metric


def test_metrics_are_computed_from_the_records():
    records = [
        {"gold": True, "prediction": True, "log_likelihood": -1.0, "words": 1},
        {"gold": True, "prediction": False, "log_likelihood": -3.0, "words": 1},
    ]
    found = compute_metrics(task_named("lambada"), records)
    assert list(found) == ["acc", "ppl"]
    assert (found["acc"].value, found["ppl"].value) == (0.5, pytest.approx(math.exp(2.0)))
    with pytest.raises(
        InputError, match="the 1 items of wikitext2:paper hold no words, so there is no word_ppl; raise the limit"
    ):
        compute_metrics(task_named("wikitext2"), [{"log_likelihood": -1.0, "words": 0, "tokens": 4}])


def test_unwritable_cache_of_metric_modules_is_an_input_error(tmp_path, monkeypatch):
    from evaluate import config

    (tmp_path / "a-file").write_text("")
    monkeypatch.setattr(config, "HF_MODULES_CACHE", str(tmp_path / "a-file" / "modules"))
    _load.cache_clear()
    with pytest.raises(InputError, match="environment variable HF_HOME"):
        _load("accuracy")


def test_modules_load_from_any_folder_and_write_to_the_cache_only(tmp_path):
    program = (
        "import evaluate\n"
        f"module = evaluate.load({str(METRICS / 'accuracy')!r}, keep_in_memory=True)\n"
        "print(module.compute(predictions=[1, 0], references=[1, 1])['accuracy'])\n"
    )
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(METRICS.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=work, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0.5\n"
    assert not list(work.iterdir())
