"""How far an evaluation is, on a terminal and in a log."""

import io

import pytest

import evaluation.results.progress
from evaluation.results.progress import Progress, Running
from evaluation.tasks.registry import task_named


class Terminal(io.StringIO):
    def isatty(self):
        return True


RECORDS = [{"gold": 1, "prediction": 1}, {"gold": 2, "prediction": 0}, {"gold": 3, "prediction": 3}]


@pytest.mark.parametrize(
    ("task", "records", "shown"),
    [
        ("hellaswag", RECORDS, "acc_norm 0.6667"),
        # exp((2 + 4) / (1 + 2)), and a perplexity beyond a float.
        ("wikitext2", [{"log_likelihood": -2.0, "words": 1}, {"log_likelihood": -4.0, "words": 2}], "word_ppl 7.3891"),
        ("wikitext2", [{"log_likelihood": -800.0, "words": 1}], "word_ppl inf"),
        ("wikitext2", [{"log_likelihood": -2.0, "words": 0}], ""),  # a window in which no line ends
        ("validation", [{"log_likelihood": -3.0, "tokens": 2}], "loss 1.5000"),
        ("hellaswag", [], ""),
    ],
)
def test_the_running_figure_is_the_tasks_first_one_over_what_is_done(task, records, shown):
    running = Running(task_named(task))
    for record in records:
        running.add(record)
    assert str(running) == shown


def test_a_terminal_has_a_bar_with_the_running_figure():
    stream = Terminal()
    progress = Progress(task_named("hellaswag"), 3, stream=stream)
    for record in RECORDS:
        progress.add(record)
    progress.close()
    assert "hellaswag:completion" in stream.getvalue()
    assert "3/3" in stream.getvalue()


def test_a_log_has_a_line_now_and_then_and_one_at_the_end(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(evaluation.results.progress.time, "perf_counter", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(task_named("hellaswag"), 3, stream=stream)
    for record, seconds in zip(RECORDS, (20, 20, 5), strict=True):
        now[0] += seconds
        progress.add(record)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "hellaswag:completion: 2 of 3, acc_norm 0.5000",
        "hellaswag:completion: 3 of 3, acc_norm 0.6667",
    ]


def test_other_processes_show_nothing():
    for stream in (io.StringIO(), Terminal()):
        progress = Progress(task_named("hellaswag"), 3, enabled=False, stream=stream)
        progress.add(RECORDS[0])
        progress.close()
        assert stream.getvalue() == ""
