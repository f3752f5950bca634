"""What is told about a task's data that is wrong, cut or absent."""

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
    ("name", "file", "text", "complaint"),
    [
        ("hellaswag", "hellaswag_val.jsonl", json.dumps(hellaswag_row()) + '\n{"ctx": "cut', "JSON object in line 2"),
        ("hellaswag", "hellaswag_val.jsonl", '{"ctx": "no more"}\n', "the field activity_label in line 1"),
        ("hellaswag", "hellaswag_val.jsonl", json.dumps(hellaswag_row(label=7)), "a label from 0 to 3 in line 1"),
        ("hellaswag", "hellaswag_val.jsonl", json.dumps(hellaswag_row(endings=["a"])), "four endings in line 1"),
        ("hellaswag", "hellaswag_val.jsonl", "[1, 2]\n", "a JSON object with .* in line 1"),
        ("hellaswag", "hellaswag_val.jsonl", "", "data in line 1 .* an empty file"),
        ("lambada", "lambada_test.jsonl", '{"text": "a b"}\n{"text": 3}\n', "text of type str in line 2"),
        ("lambada", "lambada_test.jsonl", '\n{"text": "word"}\n', "a passage and its last word in line 2"),
        ("lambada", "lambada_test.jsonl", '{"text": "a b"}\n{"text": "a \\ud800"}\n', "a JSON object in line 2"),
        ("lambada", "lambada_test.jsonl", "[" * 100_000, "a JSON object in line 1"),
        (
            "cbt_cn",
            "cbtest_CN_test_2500ex.txt",
            cbt_text()[:60],
            "sentence 10 of a question in line 10 .*, found the end of the file",
        ),
        ("cbt_cn", "cbtest_CN_test_2500ex.txt", cbt_text(sentences=19), "a line that begins with 20 in line 20"),
        ("cbt_cn", "cbtest_CN_test_2500ex.txt", cbt_text(answer="nobody"), "the answer among them in line 21"),
        ("cbt_cn", "cbtest_CN_test_2500ex.txt", cbt_text(question="no blank"), "a question with XXXXX in line 21"),
        ("cbt_cn", "cbtest_CN_test_2500ex.txt", cbt_text().replace("\t", " "), "between tabs in line 21"),
        ("wikitext2", "wiki.test.raw", " = Title = \n a cut li", "the end of a line in line 2"),
        ("wikitext2", "wiki.test.raw", "other text\n", "an article's heading"),
    ],
)
def test_a_wrong_or_cut_file_is_told_with_its_line(name, file, text, complaint, tmp_path):
    with pytest.raises(InputError, match=complaint) as caught:
        task_named(name).items(bad_line(tmp_path / file, text), Characters(), 1024)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_other_bytes_than_text_are_told(tmp_path):
    (tmp_path / "lambada_test.jsonl").write_bytes(b'{"text": "a b"}\n\xff\xfe\n')
    with pytest.raises(InputError, match="UTF-8 text in line 2"):
        task_named("lambada").items(tmp_path, Characters(), 1024)


@pytest.mark.parametrize("name", ["hellaswag", "lambada", "cbt_ne", "wikitext2", "validation"])
def test_an_absent_file_is_told_by_its_name(name, tmp_path):
    with pytest.raises(InputError, match=r"expected .* in .*, found none"):
        task_named(name).items(tmp_path, Characters(), 1024)


def test_a_shard_that_is_cut_is_told(tmp_path):
    np.save(tmp_path / "c_val_000000.npy", np.arange(1000, dtype=np.uint16))
    path = tmp_path / "c_val_000000.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="found a file that is cut"):
        task_named("validation").items(tmp_path, Characters(), 1024)
    with pytest.raises(InputError, match="name it by --data_dir"):
        task_named("validation").items(None, Characters(), 1024)
