"""The item cache: interrupted evaluations resume, and nothing stale or damaged is used."""

import contextlib
import itertools
import json
import shutil

import pytest
import torch
from support.evaluated import TASKS, data, evaluate, flat, model  # noqa: F401 - fixtures
from support.small_tasks import save_model
from support.tiny_models import one_thread, tiny  # noqa: F401 - one_thread is a fixture

from common.cli_errors import InputError
from evaluation.results.item_cache import ItemCache, code_fingerprint, item_key, model_fingerprint
from evaluation.tasks.registry import task_named
from evaluation.tasks.task_types import Item, Request


def test_killed_evaluation_resumes_without_scoring_again(model, data, tmp_path, monkeypatch):
    output = tmp_path / "results.json"
    evaluate(model, data, "--output", output, "--save_items")
    uninterrupted = json.loads(output.read_text())
    cache = tmp_path / "results.items.jsonl"
    lines = cache.read_bytes().splitlines(keepends=True)
    assert len(lines) > 20
    cache.write_bytes(b"".join(lines[:15]) + lines[15][:20])  # killed inside a line
    output.unlink()

    scored = []
    monkeypatch.setattr("evaluation.results.task_runner.score_batches", counting(scored))
    evaluate(model, data, "--output", output, "--save_items")
    assert len(scored) == len(lines) - 15
    resumed = json.loads(output.read_text())
    for name, task in uninterrupted["tasks"].items():
        for metric, expected in task["figures"].items():
            assert resumed["tasks"][name]["figures"][metric]["value"] == pytest.approx(expected["value"], rel=1e-5)
        for one, other in zip(task["records"], resumed["tasks"][name]["records"], strict=True):
            assert flat(other) == pytest.approx(flat(one), abs=1e-4)  # the batches differ

    scored.clear()
    evaluate(model, data, "--output", output, "--limit", "3")
    assert scored == []  # the limited items are all cached
    assert json.loads(output.read_text())["tasks"]["lambada:harness"]["items"] == 3


def test_flipped_byte_in_the_item_cache_never_changes_a_record(tmp_path):
    path, task = tmp_path / "results.items.jsonl", task_named("lambada")
    items = [Item(index, (Request((1,), (2, 3)),), gold=True) for index in range(3)]
    records = [{"index": index, "log_likelihood": -10.5, "target": "the"} for index in range(3)]

    def opened():
        return contextlib.closing(ItemCache(path, model="m", weights="1", dtype="float32", code="c"))

    with opened() as cache:
        for item, record in zip(items, records, strict=True):
            cache.add(task, item, record)
    intact = path.read_bytes()
    header, line = intact.index(b"\n") + 1, intact.splitlines()[1]
    for offset, bit in itertools.product(range(len(line)), (1, 4, 128)):
        corrupted = bytearray(intact)
        corrupted[header + offset] ^= bit
        path.write_bytes(corrupted)
        with opened() as cache:
            assert [cache.get(task, item) for item in items] == [None, *records[1:]], bytes(corrupted)
            assert cache.corrupted >= 1


def test_changed_data_or_code_and_corrupted_lines_are_scored_again(model, data, tmp_path, monkeypatch, capsys):
    own, output, scored = shutil.copytree(data, tmp_path / "data"), tmp_path / "results.json", []
    monkeypatch.setattr("evaluation.results.task_runner.score_batches", counting(scored))
    evaluate(model, own, "--output", output, tasks=("lambada",))
    items = len(scored)
    path = own / "lambada_test.jsonl"
    path.write_text(path.read_text().replace("a", "e", 1))
    evaluate(model, own, "--output", output, tasks=("lambada",))
    assert len(scored) == items + 1
    monkeypatch.setattr("evaluation.evaluate_model.code_fingerprint", lambda model: "updated")
    evaluate(model, own, "--output", output, tasks=("lambada",))
    assert len(scored) == 2 * items + 1
    cache = tmp_path / "results.items.jsonl"
    cache.write_bytes(cache.read_bytes()[:-40] + b"0" * 39 + b"\n")
    evaluate(model, own, "--output", output, tasks=("lambada",))
    assert len(scored) == 2 * items + 2
    assert "1 lines are corrupted; their items are scored again" in capsys.readouterr().err


def test_code_fingerprint_depends_on_the_class_of_the_model_and_the_libraries(monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    ours, official = tiny(), GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    before = code_fingerprint(ours)
    assert code_fingerprint(ours) == before != code_fingerprint(official)
    monkeypatch.setattr("evaluation.results.item_cache.metadata.version", lambda name: "9.9")
    assert code_fingerprint(ours) != before


def counting(scored):
    from evaluation.scoring.scorer import score_batches

    def counted(model, items, **options):
        scored.extend(items)
        return score_batches(model, items, **options)

    return counted


def test_output_with_results_of_another_model_is_refused(model, data, tmp_path, tokenizer_folder):
    output = tmp_path / "results.json"
    evaluate(model, data, "--output", output, tasks=("lambada",))
    before = output.read_bytes()
    other = save_model(tmp_path / "other", tokenizer_folder, seed=1)
    with pytest.raises(InputError, match="with other weights, config or tokenizer; choose another --output"):
        evaluate(other, data, "--output", output, tasks=("lambada",))
    with pytest.raises(InputError, match="in float32, not bfloat16; choose another --output"):
        evaluate(model, data, "--output", output, "--dtype", "bfloat16", tasks=("lambada",))
    output.unlink()  # the item cache alone is refused too
    with pytest.raises(InputError, match=r"results\.items\.jsonl holds results of"):
        evaluate(other, data, "--output", output, tasks=("lambada",))
    output.write_bytes(before)
    for content in (b"{}", b"[1]", b"rubbish", before.replace(b'"source"', b'"records": [1], "source"', 1)):
        output.write_bytes(content)
        with pytest.raises(InputError, match="was not written by"):
            evaluate(model, data, "--output", output, tasks=("lambada",))


def test_fingerprint_depends_on_every_weight_the_config_and_the_tokenizer(model, tmp_path):
    from gpt2_scratch.generate import load

    loaded, tokenizer = load(str(model), "cpu")
    before = model_fingerprint(loaded, tokenizer)
    moved = shutil.copytree(model, tmp_path / "moved")
    assert model_fingerprint(*load(str(moved), "cpu")) == before
    weight = loaded.transformer.h[1].mlp.c_fc.weight
    for index in ((0, 1), (5, 7), (31, 100)):
        with torch.no_grad():
            kept, weight[index] = weight[index].clone(), 9.0
            assert model_fingerprint(loaded, tokenizer) != before
            weight[index] = kept
    assert model_fingerprint(loaded, tokenizer) == before
    loaded.generation_config.eos_token_id, eos = 3, loaded.generation_config.eos_token_id
    assert model_fingerprint(loaded, tokenizer) != before
    loaded.generation_config.eos_token_id = eos
    loaded.config.layer_norm_epsilon = 1e-3
    assert model_fingerprint(loaded, tokenizer) != before
    path = moved / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))
    assert model_fingerprint(*load(str(moved), "cpu")) != before


def test_item_key_depends_on_the_extra_values():
    task, request = task_named("validation"), Request((1,), (2, 3))
    keys = [item_key(task, Item(0, (request,), extra={"bytes": count})) for count in (4, 5, 5)]
    assert keys[0] != keys[1] == keys[2]


@pytest.mark.parametrize("content", ["my notes", "line one\nline two", '{"model": 1}\nline two'])
def test_another_file_at_the_path_of_the_item_cache_is_refused_and_kept(content, model, data, tmp_path):
    path = tmp_path / "results.items.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="is not an item cache; choose another --output"):
        evaluate(model, data, "--output", tmp_path / "results.json", tasks=("lambada",))
    assert path.read_text() == content


def test_item_cache_killed_inside_its_first_line_starts_over(tmp_path):
    path = tmp_path / "results.items.jsonl"
    path.write_text('{"model": "m", "wei')
    ItemCache(path, model="m", weights="1", dtype="float32").close()
    assert [json.loads(line)["weights"] for line in path.read_text().splitlines()] == ["1"]
