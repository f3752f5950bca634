"""Published results: each under its own protocol."""

import pytest

from evaluation.results.references import PUBLISHED, SIZES, VALIDATION_LOSS, one_per_size, published
from evaluation.tasks.registry import tasks

NOT_OUR_TASKS = {"wikitext103:paper", "openwebtext:training"}


@pytest.mark.parametrize(
    ("task", "metric", "values"),
    [
        ("hellaswag:harness", "acc", {"124M": 0.2892, "1.5B": 0.4004}),
        ("hellaswag:harness", "acc_norm", {"124M": 0.3114, "1.5B": 0.5089}),
        ("hellaswag:completion", "acc_norm", {"124M": 0.2955, "355M": 0.3752, "774M": 0.4320, "1.5B": 0.4893}),
        ("lambada:harness", "ppl", {"124M": 40.06, "1.5B": 10.63}),
        ("lambada:last_token", "acc", {"124M": 0.4689}),
        ("lambada:stop_word_filter", "acc", {"124M": 0.4599, "355M": 0.5548, "774M": 0.6012, "1.5B": 0.6324}),
        ("lambada:word", "acc", {"124M": 0.2606, "355M": 0.3776, "774M": 0.4058, "1.5B": 0.4469}),
        ("cbt_cn:paper", "acc", {"124M": 0.8765, "355M": 0.9235, "774M": 0.9345, "1.5B": 0.9330}),
        ("cbt_ne:paper", "acc", {"124M": 0.834, "355M": 0.871, "774M": 0.880, "1.5B": 0.8905}),
        ("cbt_ne:full_sequence_raw", "acc", {"124M": 0.5933, "355M": 0.6711, "774M": 0.6895, "1.5B": 0.7232}),
        ("cbt_ne:full_sentence_raw", "acc", {"124M": 0.5933, "355M": 0.6711, "774M": 0.6895, "1.5B": 0.7232}),
        ("wikitext2:paper", "word_ppl", {"124M": 29.41, "355M": 22.76, "774M": 19.93, "1.5B": 18.34}),
    ],
)
def test_published_results(task, metric, values):
    assert {size: each.value for size, each in one_per_size(published(task, metric)).items()} == values


def test_result_belongs_to_one_protocol_only():
    assert published("lambada:word", "ppl") == []
    assert published("cbt_cn:sentence", "acc") == []
    assert published("cbt_ne:full_sequence", "acc") == []
    assert published("hellaswag", "acc_norm") == []
    assert published("lambada:stop_word_filter", "ppl") == []  # equal to that of harness, not the paper's


def test_source_states_that_cbt_results_are_of_other_questions():
    sources = {each.source for kind in ("cn", "ne") for each in published(f"cbt_{kind}:paper", "acc")}
    assert all("validation questions" in source for source in sources)


@pytest.mark.parametrize("task", ["cbt_ne:full_sequence_raw", "cbt_ne:full_sentence_raw"])
def test_source_states_that_a_protocol_is_not_known_in_full(task):
    assert all("protocol not stated in full" in reference.source for reference in published(task, "acc"))


def test_every_reference_names_an_existing_task_and_metric():
    known = tasks()
    for reference in PUBLISHED:
        assert reference.source
        assert reference.size in SIZES
        if reference.task not in NOT_OUR_TASKS:
            assert reference.metric in {metric.name for metric in known[reference.task].metrics}, reference


def test_accuracies_are_fractions_and_larger_models_are_better():
    for task in {reference.task for reference in PUBLISHED}:
        for metric in ("acc", "acc_norm"):
            assert all(0 < reference.value < 1 for reference in published(task, metric))
        for metric in ("ppl", "word_ppl", "loss"):
            values = [reference.value for reference in published(task, metric)]
            assert values == sorted(values, reverse=True)


def test_validation_losses_are_published_by_corpus():
    assert VALIDATION_LOSS["fineweb-edu"][0].value == 3.2924
    assert [each.value for each in VALIDATION_LOSS["Skylion007/openwebtext"]] == [3.12, 2.84, 2.67, 2.54]
