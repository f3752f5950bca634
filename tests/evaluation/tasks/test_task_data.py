"""Errors about task data that is malformed, truncated or missing."""

import json

import numpy as np
import pytest
from support.task_rows import cbt_text, hellaswag_row
from support.toy_model import Characters

from common.cli_errors import InputError
from evaluation.tasks.registry import task_named


def bad_line(path, text):
    path.write_text(text)
    return path.parent


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("hellaswag", "hellaswag_val.jsonl", json.dumps(hellaswag_row()) + '\n{"ctx": "cut', "line 2: not JSON"),
        ("hellaswag", "hellaswag_val.jsonl", '{"ctx": "no more"}\n', "line 1: no field 'activity_label'"),
        (
            "hellaswag",
            "hellaswag_val.jsonl",
            json.dumps(hellaswag_row(label=7)),
            "line 1: the label is not 0, 1, 2 or 3",
        ),
        ("hellaswag", "hellaswag_val.jsonl", json.dumps(hellaswag_row(endings=["a"])), "line 1: not four endings"),
        ("hellaswag", "hellaswag_val.jsonl", "[1, 2]\n", "line 1: not a JSON object"),
        ("hellaswag", "hellaswag_val.jsonl", "", "line 1: the file is empty"),
        (
            "lambada",
            "lambada_test.jsonl",
            '{"text": "a b"}\n{"text": 3}\n',
            "line 2: field 'text' has the wrong type: 3",
        ),
        ("lambada", "lambada_test.jsonl", '\n{"text": "word"}\n', "line 2: not a passage and a last word"),
        ("lambada", "lambada_test.jsonl", '{"text": "a b"}\n{"text": "a \\ud800"}\n', "line 2: not JSON"),
        ("lambada", "lambada_test.jsonl", "[" * 100_000, "line 1: not JSON"),
        (
            "cbt_cn",
            "cbtest_CN_test_2500ex.txt",
            cbt_text()[:60],
            "line 10: the file ends before sentence 10 of a question",
        ),
        (
            "cbt_cn",
            "cbtest_CN_test_2500ex.txt",
            cbt_text(sentences=19),
            "line 20: sentence 20 of a question is missing",
        ),
        (
            "cbt_cn",
            "cbtest_CN_test_2500ex.txt",
            cbt_text(answer="nobody"),
            "line 21: the answer 'nobody' is not among 10 candidates",
        ),
        ("cbt_cn", "cbtest_CN_test_2500ex.txt", cbt_text(question="no blank"), "line 21: no XXXXX in the question"),
        (
            "cbt_cn",
            "cbtest_CN_test_2500ex.txt",
            cbt_text().replace("\t", " "),
            "line 21: not question, answer and candidates between tabs",
        ),
        ("wikitext2", "wiki.test.raw", " = Title = \n a truncated li", "line 2: the last line is incomplete"),
        ("wikitext2", "wiki.test.raw", "other text\n", "line 1: the text has no article heading"),
    ],
)
def test_error_names_the_line_of_a_malformed_or_truncated_file(name, file, text, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        task_named(name).items(bad_line(tmp_path / file, text), Characters(), 1024)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_error_names_the_line_that_is_not_utf8(tmp_path):
    (tmp_path / "lambada_test.jsonl").write_bytes(b'{"text": "a b"}\n\xff\xfe\n')
    with pytest.raises(InputError, match="line 2: not UTF-8"):
        task_named("lambada").items(tmp_path, Characters(), 1024)


@pytest.mark.parametrize("name", ["hellaswag", "lambada", "cbt_ne", "wikitext2", "validation"])
def test_error_names_a_missing_file(name, tmp_path):
    with pytest.raises(InputError, match=r"^no (file|validation shard) .* in "):
        task_named(name).items(tmp_path, Characters(), 1024)


def test_truncated_shard_is_refused(tmp_path):
    np.save(tmp_path / "c_val_000000.npy", np.arange(1000, dtype=np.uint16))
    path = tmp_path / "c_val_000000.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="is not a valid shard"):
        task_named("validation").items(tmp_path, Characters(), 1024)


def test_validation_without_a_folder_is_refused():
    with pytest.raises(InputError, match="pass --data_dir"):
        task_named("validation").items(None, Characters(), 1024)
