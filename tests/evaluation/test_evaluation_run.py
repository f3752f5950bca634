"""The command: results, table and chart, going on after a kill, and every mistake told in one line."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.paths import ROOT
from support.small_tasks import save_model, write_tasks
from support.tiny_models import one_thread  # noqa: F401 - a fixture

from common.cli_errors import InputError
from evaluation.results.item_cache import FinishedItems, item_key, model_fingerprint
from evaluation.results.task_runner import on_every_process
from evaluation.run import main, parse
from evaluation.tasks.registry import task_named
from evaluation.tasks.task_types import Item, Request

TASKS = ("hellaswag", "lambada", "lambada:word", "cbt_cn", "wikitext2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_folder):
    return save_model(tmp_path_factory.mktemp("judged") / "model", tokenizer_folder)


def evaluate(model, data, *arguments, tasks=TASKS):
    main([str(a) for a in ("--model", model, "--data_dir", data, "--tasks", *tasks, *arguments)])


def test_results_hold_figures_protocols_and_published_ones(model, data, tmp_path, capsys):
    output, chart = tmp_path / "new" / "results.json", tmp_path / "chart.png"
    evaluate(model, data, "--output", output, "--save_items", "--plot", chart)
    results = json.loads(output.read_text())
    assert results["model"] == str(model)
    assert (results["dtype"], results["limit"], results["processes"]) == ("float32", None, 1)
    assert results["versions"]["torch"] == metadata.version("torch")  # without the build that torch itself names
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
    assert "tokenised apart" in markdown


def test_a_killed_run_goes_on_without_scoring_again(model, data, tmp_path, monkeypatch):
    output = tmp_path / "results.json"
    evaluate(model, data, "--output", output, "--save_items")
    whole = json.loads(output.read_text())
    kept = tmp_path / "results.items.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) > 20
    kept.write_bytes(b"".join(lines[:15]) + lines[15][:20])  # killed inside a line
    output.unlink()

    scored = []
    monkeypatch.setattr("evaluation.scoring.scorer.score", counting(scored))
    evaluate(model, data, "--output", output, "--save_items")
    assert len(scored) == len(lines) - 15
    again = json.loads(output.read_text())
    for name, task in whole["tasks"].items():
        for figure, measured in task["figures"].items():
            assert again["tasks"][name]["figures"][figure]["value"] == pytest.approx(measured["value"], rel=1e-5)
        for one, other in zip(task["records"], again["tasks"][name]["records"], strict=True):
            assert flat(other) == pytest.approx(flat(one), abs=1e-4)  # batches are other ones

    scored.clear()
    evaluate(model, data, "--output", output, "--limit", "3")
    assert scored == []  # a limit takes items that are finished
    assert json.loads(output.read_text())["tasks"]["lambada:harness"]["items"] == 3


def counting(scored):
    from evaluation.scoring.scorer import score

    def counted(model, items, **options):
        scored.extend(items)
        return score(model, items, **options)

    return counted


def flat(record):
    values = record.get("log_likelihoods", [record.get("log_likelihood", 0.0)])
    return [*values, float(record["prediction"] == record.get("gold")) if "prediction" in record else 0.0]


def test_two_results_are_compared(model, data, tmp_path, tokenizer_folder, capsys):
    other = save_model(tmp_path / "other", tokenizer_folder, seed=1)
    for name, folder in (("a", model), ("b", other)):
        evaluate(folder, data, "--output", tmp_path / f"{name}.json", "--save_items", tasks=("hellaswag", "lambada"))
    capsys.readouterr()
    main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    table = capsys.readouterr().out
    assert "McNemar, exact" in table
    assert "paired t (8 items)" in table


def test_an_output_of_another_model_is_refused(model, data, tmp_path, tokenizer_folder):
    output = tmp_path / "results.json"
    evaluate(model, data, "--output", output, tasks=("lambada",))
    before = output.read_bytes()
    other = save_model(tmp_path / "other", tokenizer_folder, seed=1)
    with pytest.raises(InputError, match="with other weights, config or tokenizer; choose another --output"):
        evaluate(other, data, "--output", output, tasks=("lambada",))
    with pytest.raises(InputError, match=r"in bfloat16 in .* in float32; choose another --output"):
        evaluate(model, data, "--output", output, "--dtype", "bfloat16", tasks=("lambada",))
    output.unlink()  # the finished items alone are refused too
    with pytest.raises(InputError, match=r"results\.items\.jsonl, found those of"):
        evaluate(other, data, "--output", output, tasks=("lambada",))
    output.write_bytes(before)
    for content in (b"{}", b"[1]", b"rubbish", before.replace(b'"source"', b'"records": [1], "source"', 1)):
        output.write_bytes(content)
        with pytest.raises(InputError, match="found another file"):
            evaluate(model, data, "--output", output, tasks=("lambada",))


def test_a_model_is_known_by_every_value_its_config_and_its_tokenizer(model, tmp_path):
    from gpt2_scratch.generate import load

    loaded, tokenizer = load(str(model), "cpu")
    before = model_fingerprint(loaded, tokenizer)
    moved = shutil.copytree(model, tmp_path / "moved")
    assert model_fingerprint(*load(str(moved), "cpu")) == before
    weight = loaded.transformer.h[1].mlp.c_fc.weight
    for place in ((0, 1), (5, 7), (31, 100)):
        with torch.no_grad():
            kept, weight[place] = weight[place].clone(), 9.0
            assert model_fingerprint(loaded, tokenizer) != before
            weight[place] = kept
    assert model_fingerprint(loaded, tokenizer) == before
    loaded.generation_config.eos_token_id, ends = 3, loaded.generation_config.eos_token_id
    assert model_fingerprint(loaded, tokenizer) != before
    loaded.generation_config.eos_token_id = ends
    loaded.config.layer_norm_epsilon = 1e-3
    assert model_fingerprint(loaded, tokenizer) != before
    path = moved / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))
    assert model_fingerprint(*load(str(moved), "cpu")) != before


def test_an_item_is_known_by_its_facts_too():
    task, request = task_named("validation"), Request((1,), (2, 3))
    keys = [item_key(task, Item(0, (request,), facts={"bytes": count})) for count in (4, 5, 5)]
    assert keys[0] != keys[1] == keys[2]


@pytest.mark.parametrize("content", ["my notes", "line one\nline two", '{"model": 1}\nline two'])
def test_a_file_of_somebody_else_is_refused_and_left_as_it_is(content, model, data, tmp_path):
    kept = tmp_path / "results.items.jsonl"
    kept.write_text(content)
    with pytest.raises(InputError, match="found another file; choose another --output"):
        evaluate(model, data, "--output", tmp_path / "results.json", tasks=("lambada",))
    assert kept.read_text() == content


def test_a_run_that_was_killed_inside_its_first_line_begins_anew(tmp_path):
    path = tmp_path / "results.items.jsonl"
    path.write_text('{"model": "m", "wei')
    FinishedItems(path, model="m", weights="1", dtype="float32").close()
    assert [json.loads(line)["weights"] for line in path.read_text().splitlines()] == ["1"]


def test_notes_that_lie_where_the_table_would_go_are_not_written_over(model, data, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("my own notes")
    with pytest.raises(InputError, match=r"notes\.md, where the table goes, found one"):
        evaluate("no/model", data, "--output", tmp_path / "notes.json")
    assert notes.read_text() == "my own notes"
    evaluate(model, data, "--output", tmp_path / "notes.json", "--markdown", notes, tasks=("lambada",))
    evaluate(model, data, "--output", tmp_path / "notes.json", tasks=("lambada",))  # now the table is ours


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected --output in a folder"):
        evaluate("no/model", data, "--output", tmp_path / "file" / "results.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="found the folder"):
        evaluate("no/model", data, "--output", tmp_path / "folder.json")


def test_a_cut_file_is_told_by_its_line(model, tmp_path):
    folder = write_tasks(tmp_path)
    path = folder / "hellaswag_val.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"in line 8 of .*hellaswag_val\.jsonl"):
        evaluate(model, folder, tasks=("hellaswag",))


def test_a_tokenizer_that_is_missing_or_larger_than_the_model_is_refused(model, data, tmp_path, tokenizer_folder):
    small = save_model(tmp_path / "small", tokenizer_folder, vocab_size=280, bos_token_id=0, eos_token_id=0)
    with pytest.raises(InputError, match="vocabulary size 280"):
        evaluate(small, data)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).unlink()
    with pytest.raises(InputError, match="cannot load a tokenizer from"):
        evaluate(small, data)


def test_a_tokenizer_of_another_vocabulary_is_refused_where_all_its_ids_fit_too(data, tmp_path, tokenizer_folder):
    padded = save_model(tmp_path / "padded", tokenizer_folder, vocab_size=384)
    evaluate(padded, data, tasks=("lambada",))
    large = save_model(tmp_path / "large", tokenizer_folder, vocab_size=500)
    with pytest.raises(InputError, match=r"the model's vocabulary \(500\), found 300; give the tokenizer"):
        evaluate(large, data, tasks=("lambada",))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(model, data, tmp_path):
    (tmp_path / "results.items.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match="No space left on device; make room, and the same command goes on"):
        evaluate(model, data, "--output", tmp_path / "results.json", tasks=("lambada",))


def test_a_model_that_gives_nan_is_refused(data, tmp_path, tokenizer_folder):
    folder = save_model(tmp_path / "model", tokenizer_folder)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="found NaN at item"):
        evaluate(folder, data)


@pytest.mark.parametrize(
    ("task", "n_positions"), [("hellaswag", 8), ("lambada:word", 8), ("cbt_cn:full_sequence", 2), ("wikitext2", 1)]
)
def test_items_longer_than_the_model_are_refused(task, n_positions, data, tmp_path, tokenizer_folder):
    folder = save_model(tmp_path / "model", tokenizer_folder, n_positions=n_positions)
    with pytest.raises(InputError, match="take a model with more positions"):
        evaluate(folder, data, tasks=(task,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "expected tasks, found none; --tasks takes hellaswag, lambada, cbt_cn"),
        (["--model", "m", "--tasks", "hellaswg"], "did you mean hellaswag"),
        (["--model", "m", "--tasks", "lambada:paper"], "there are lambada:harness, lambada:last_token"),
        (["--tasks", "lambada"], "name a folder or a Hub id by --model"),
        (["--model", "m", "--tasks", "lambada", "--limit", "0"], "expected --limit to be at least 1"),
        (["--model", "m", "--tasks", "lambada", "--plot", "x.gif"], "to end in .png, .svg, .pdf"),
        (["--model", "m", "--tasks", "lambada", "--output", "x.txt"], "to end in .json"),
        (["--model", "m", "--tasks", "lambada", "--save_items"], "expected --output for --save_items"),
        (["--models", "m"], "--help lists the flags"),
    ],
)
def test_a_mistyped_command_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(arguments)


def test_a_task_is_judged_once():
    asked = parse(["--model", "m", "--tasks", "lambada", "lambada:harness", "lambada:word"]).tasks
    assert [task.full_name for task in asked] == ["lambada:harness", "lambada:word"]


def test_help_and_mistakes_are_told_without_importing_torch():
    program = "import sys; from evaluation.run import main; main(['--list']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert "hellaswag:harness" in done.stdout


@pytest.mark.parametrize("here", [True, False])
def test_a_mistake_that_one_process_meets_is_raised_on_every_one(here, monkeypatch):
    told = []
    processes = SimpleNamespace(num_processes=2, local_main_process_first=nullcontext)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [None, *(told.append(mine) or mine), "no data"])

    def compute():
        if here:
            raise InputError("no model")
        return 1

    with pytest.raises(InputError, match="no model" if here else "no data"):
        on_every_process(processes, compute)
    assert told == [["no model" if here else None]]


def test_two_processes_reach_what_one_does(model, data, tmp_path):
    evaluate(model, data, "--output", tmp_path / "one.json", "--save_items")
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    config = ["--config_file", str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml")]
    flags = ["--model", str(model), "--data_dir", str(data), "--tasks", *TASKS, "--save_items"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    subprocess.run(
        [*launch, *config, "-m", "evaluation.run", *flags, "--output", str(tmp_path / "two.json")],
        check=True,
        capture_output=True,
        env=environment,
        cwd=tmp_path,
    )
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, task in one["tasks"].items():
        for a, b in zip(task["records"], two["tasks"][name]["records"], strict=True):
            assert a["index"] == b["index"]
            assert flat(a) == pytest.approx(flat(b), abs=1e-4)
