"""A small model and small tasks, and the command line that evaluates the one on the other."""

import pytest

from evaluation.run import main
from support.small_tasks import save_model, write_tasks

TASKS = ("hellaswag", "lambada", "lambada:word", "cbt_cn", "wikitext2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_folder):
    return save_model(tmp_path_factory.mktemp("evaluated") / "model", tokenizer_folder)


def evaluate(model, data, *arguments, tasks=TASKS):
    main([str(a) for a in ("--model", model, "--data_dir", data, "--tasks", *tasks, *arguments)])


def flat(record):
    """Return the values of a record that may differ by rounding."""
    values = record.get("log_likelihoods", [record.get("log_likelihood", 0.0)])
    return [*values, float(record["prediction"] == record.get("gold")) if "prediction" in record else 0.0]
