"""A task's first metric while its items are being scored."""

import pytest

from evaluation.results.metric_values import RunningMetric
from evaluation.tasks.registry import task_named

RECORDS = [{"gold": 1, "prediction": 1}, {"gold": 2, "prediction": 0}, {"gold": 3, "prediction": 3}]


@pytest.mark.parametrize(
    ("task", "records", "text"),
    [
        ("hellaswag", RECORDS, "acc_norm 0.6667"),
        # exp((2 + 4) / (1 + 2)), and a perplexity that overflows a float.
        ("wikitext2", [{"log_likelihood": -2.0, "words": 1}, {"log_likelihood": -4.0, "words": 2}], "word_ppl 7.3891"),
        ("wikitext2", [{"log_likelihood": -800.0, "words": 1}], "word_ppl inf"),
        ("wikitext2", [{"log_likelihood": -2.0, "words": 0}], ""),  # a window in which no line ends
        ("validation", [{"log_likelihood": -3.0, "tokens": 2}], "loss 1.5000"),
        ("hellaswag", [], ""),
    ],
)
def test_running_metric_is_the_first_metric_over_the_records_so_far(task, records, text):
    running = RunningMetric(task_named(task))
    for record in records:
        running.add(record)
    assert str(running) == text
