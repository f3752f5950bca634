"""The command line: results, table and chart, and one-line errors."""

import contextlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.evaluated import TASKS, data, evaluate, flat, model  # noqa: F401 - fixtures
from support.launching import launched
from support.paths import ROOT
from support.small_tasks import save_model, write_tasks
from support.tiny_models import one_thread, tiny  # noqa: F401 - one_thread is a fixture

from common.cli_errors import InputError
from common.ranks import _Failure
from evaluation.results.task_runner import on_every_process
from evaluation.run import main, parse


def test_results_have_metrics_protocols_and_published_results(model, data, tmp_path, capsys):
    output, chart = tmp_path / "new" / "results.json", tmp_path / "chart.png"
    evaluate(model, data, "--output", output, "--save_items", "--plot", chart)
    results = json.loads(output.read_text())
    assert results["model"] == str(model)
    assert (results["dtype"], results["limit"], results["processes"]) == ("float32", None, 1)
    assert results["versions"]["torch"] == metadata.version(
        "torch"
    )  # without the build that torch.__version__ includes
    assert list(results["tasks"]) == [
        "hellaswag:completion",
        "lambada:harness",
        "lambada:word",
        "cbt_cn:paper",
        "wikitext2:paper",
    ]
    hellaswag = results["tasks"]["hellaswag:completion"]
    assert (hellaswag["protocol"], hellaswag["items"], len(hellaswag["records"])) == ("completion", 8, 8)
    acc_norm = hellaswag["figures"]["acc_norm"]
    right = sum(record["prediction"] == record["gold"] for record in hellaswag["records"])
    assert acc_norm["value"] == right / 8
    assert [each["value"] for each in acc_norm["published"]][:2] == [0.2955, 0.2945]
    assert chart.read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    markdown = output.with_suffix(".md").read_text()
    for text in (printed, markdown):
        assert f"{acc_norm['value']:.4f}" in text
        assert "0.2955" in text
    assert "| hellaswag | completion | acc_norm |" in markdown
    assert "tokenized separately" in markdown


def test_compare_prints_paired_tests(model, data, tmp_path, tokenizer_folder, capsys):
    other = save_model(tmp_path / "other", tokenizer_folder, seed=1)
    for name, folder in (("a", model), ("b", other)):
        evaluate(folder, data, "--output", tmp_path / f"{name}.json", "--save_items", tasks=("hellaswag", "lambada"))
    capsys.readouterr()
    main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    table = capsys.readouterr().out
    assert "McNemar, exact" in table
    assert "paired t (8 items)" in table


def test_table_does_not_overwrite_another_file(model, data, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("my own notes")
    with pytest.raises(InputError, match=r"would overwrite .*notes\.md"):
        evaluate("no/model", data, "--output", tmp_path / "notes.json")
    assert notes.read_text() == "my own notes"
    evaluate(model, data, "--output", tmp_path / "notes.json", "--markdown", notes, tasks=("lambada",))
    evaluate(model, data, "--output", tmp_path / "notes.json", tasks=("lambada",))  # now the file is a table


def test_unwritable_output_is_refused_before_the_model_is_loaded(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output: cannot create the folder"):
        evaluate("no/model", data, "--output", tmp_path / "file" / "results.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="is a folder; pass a file in it"):
        evaluate("no/model", data, "--output", tmp_path / "folder.json")


def test_error_names_the_line_of_a_truncated_file(model, tmp_path):
    folder = write_tasks(tmp_path)
    path = folder / "hellaswag_val.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"hellaswag_val\.jsonl, line 8: not JSON"):
        evaluate(model, folder, tasks=("hellaswag",))


def test_missing_tokenizer_and_tokenizer_larger_than_the_model_are_refused(model, data, tmp_path, tokenizer_folder):
    small = save_model(tmp_path / "small", tokenizer_folder, vocab_size=280, bos_token_id=0, eos_token_id=0)
    with pytest.raises(InputError, match="vocabulary size is 280"):
        evaluate(small, data)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).unlink()
    with pytest.raises(InputError, match="cannot load a tokenizer from"):
        evaluate(small, data)


def test_tokenizer_much_smaller_than_the_vocabulary_is_refused(data, tmp_path, tokenizer_folder):
    padded = save_model(tmp_path / "padded", tokenizer_folder, vocab_size=384)
    evaluate(padded, data, tasks=("lambada",))
    large = save_model(tmp_path / "large", tokenizer_folder, vocab_size=500)
    with pytest.raises(InputError, match="300 tokens, but the model's vocabulary size is 500; use the tokenizer"):
        evaluate(large, data, tasks=("lambada",))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_an_input_error(model, data, tmp_path):
    (tmp_path / "results.items.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        InputError, match="No space left on device; free some space and run the same command again to resume"
    ):
        evaluate(model, data, "--output", tmp_path / "results.json", tasks=("lambada",))


def test_model_that_returns_nan_is_an_input_error(data, tmp_path, tokenizer_folder):
    folder = save_model(tmp_path / "model", tokenizer_folder)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="NaN at item"):
        evaluate(folder, data)


@pytest.mark.parametrize(
    ("task", "n_positions"), [("hellaswag", 8), ("lambada:word", 8), ("cbt_cn:full_sequence", 2), ("wikitext2", 1)]
)
def test_items_longer_than_the_model_are_refused(task, n_positions, data, tmp_path, tokenizer_folder):
    folder = save_model(tmp_path / "model", tokenizer_folder, n_positions=n_positions)
    with pytest.raises(InputError, match="use a model with more positions"):
        evaluate(folder, data, tasks=(task,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "no tasks given; choose --tasks from hellaswag, lambada, cbt_cn"),
        (["--model", "m", "--tasks", "hellaswg"], "did you mean hellaswag"),
        (["--model", "m", "--tasks", "lambada:paper"], "choose from lambada:harness, lambada:last_token"),
        (["--tasks", "lambada"], "no model given; pass --model"),
        (["--model", "m", "--tasks", "lambada", "--limit", "0"], "--limit must be at least 1"),
        (["--model", "m", "--tasks", "lambada", "--plot", "x.gif"], "must end in .png, .svg, .pdf"),
        (["--model", "m", "--tasks", "lambada", "--output", "x.txt"], "must end in .json"),
        (["--model", "m", "--tasks", "lambada", "--save_items"], "--save_items needs --output"),
        (["--models", "m"], "--help lists the flags"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(arguments)


def test_duplicate_tasks_are_evaluated_once():
    found = parse(["--model", "m", "--tasks", "lambada", "lambada:harness", "lambada:word"]).tasks
    assert [task.full_name for task in found] == ["lambada:harness", "lambada:word"]


def test_list_does_not_import_torch():
    program = "import sys; from evaluation.run import main; main(['--list']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert "hellaswag:harness" in done.stdout


@pytest.mark.parametrize("here", [True, False])
def test_error_on_one_process_is_raised_on_every_process(here, monkeypatch):
    gathered = []
    processes = SimpleNamespace(num_processes=2, local_main_process_first=contextlib.nullcontext)

    def gather_object(objects):
        gathered.extend(objects)
        return [*objects, _Failure("no data")]

    monkeypatch.setattr("evaluation.results.task_runner.gather_object", gather_object)

    def compute():
        if here:
            raise InputError("no model")
        return 1

    with pytest.raises(InputError, match="no model" if here else "rank 1 failed: no data"):
        on_every_process(processes, compute)
    assert gathered == [_Failure("no model") if here else None]


def test_two_processes_give_the_results_of_one(model, data, tmp_path):
    evaluate(model, data, "--output", tmp_path / "one.json", "--save_items")
    flags = ["--model", str(model), "--data_dir", str(data), "--tasks", *TASKS, "--save_items"]
    output = ["--output", str(tmp_path / "two.json")]
    done = launched("cpu_2_processes", str(ROOT / "evaluation" / "run.py"), *flags, *output)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, task in one["tasks"].items():
        for a, b in zip(task["records"], two["tasks"][name]["records"], strict=True):
            assert a["index"] == b["index"]
            assert flat(a) == pytest.approx(flat(b), abs=1e-4)
