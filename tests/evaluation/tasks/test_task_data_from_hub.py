"""Task data from the Hub's parquet conversions: the same items as from the official raw files."""

import json
import os
import subprocess
import sys
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.loopback_hub import LoopbackHub, serving
from support.loopback_repository import Repository
from support.task_rows import CBT_OPTIONS, LAMBADA, cbt_folder, cbt_text, hellaswag_row, write_rows
from support.toy_model import Characters

from evaluation.tasks.registry import task_named

CBT_ROW = {
    "sentences": [f"s{place} ." for place in range(1, 21)],
    "question": "a XXXXX c .",
    "answer": "b",
    "options": CBT_OPTIONS,
}
WIKITEXT = [" = Title = \n", "", " some words . \n", ""]

PROGRAM = """
import json, sys
sys.path.insert(0, "tests")
from support.toy_model import Characters
from evaluation.tasks.registry import task_named
from common.cli_errors import run_command

def main():
    for name in sys.argv[1:]:
        items = task_named(name).items(None, Characters(), 1024, limit=3)
        print(json.dumps([[[list(r.context), list(r.continuation)] for r in item.requests] for item in items]))

run_command(main)
"""


def parquet(rows):
    stream = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def converted(files):
    """A data set of a loading script, which `datasets` does not run, and the Hub's conversion on a branch beside it."""
    repository = Repository({"dataset.py": b"raise SystemExit('a loading script was run')"})
    repository.commit("refs/convert/parquet", files, "convert")
    return repository


def program(hub, cache, *names):
    environment = {**os.environ, **hub, "HF_HOME": str(cache)}
    return subprocess.run([sys.executable, "-c", PROGRAM, *names], env=environment, capture_output=True, text=True)


def test_the_hub_gives_the_items_that_the_official_files_give(tmp_path):
    files = {
        "Rowan/hellaswag": {
            "default/validation/0000.parquet": parquet([hellaswag_row(label="1")] * 2),
            "default/train/0000.parquet": parquet([hellaswag_row(label="2", ctx="other")]),
        },
        "EleutherAI/lambada_openai": {
            "default/test/0000.parquet": parquet([LAMBADA]),
            "de/test/0000.parquet": parquet([{"text": "ein anderes Wort"}]),
        },
        "cam-cst/cbt": {
            "CN/test/0000.parquet": parquet([CBT_ROW]),
            "CN/train/0000.parquet": parquet([{**CBT_ROW, "question": "x XXXXX"}]),
            "NE/test/0000.parquet": parquet([CBT_ROW]),
        },
        "Salesforce/wikitext": {"wikitext-2-raw-v1/test/0000.parquet": parquet([{"text": t} for t in WIKITEXT])},
    }
    hub = LoopbackHub()
    hub.repositories = {("dataset", name): converted(content) for name, content in files.items()}
    names = ["hellaswag", "lambada", "cbt_cn", "cbt_ne", "wikitext2:raw"]
    with serving(hub):
        found = program(hub.environment, tmp_path / "cache", *names)
    assert found.returncode == 0, found.stderr

    write_rows(tmp_path / "hellaswag_val.jsonl", hellaswag_row(), hellaswag_row())
    write_rows(tmp_path / "lambada_test.jsonl", LAMBADA)
    cbt_folder(tmp_path, cbt_text())
    (tmp_path / "wiki.test.raw").write_text("".join(line or " \n" for line in WIKITEXT))
    for name, line in zip(names, found.stdout.splitlines(), strict=True):
        expected = [
            [[list(r.context), list(r.continuation)] for r in item.requests]
            for item in task_named(name).items(tmp_path, Characters(), 1024)
        ]
        assert json.loads(line) == expected, name


@pytest.mark.parametrize("trouble", ["absent", "offline"])
def test_a_hub_without_the_data_is_told_in_one_line(trouble, tmp_path):
    if trouble == "offline":
        found = program({"HF_HUB_OFFLINE": "1"}, tmp_path, "lambada")
    else:
        with serving(LoopbackHub({})) as hub:
            found = program(hub.environment, tmp_path, "lambada")
    assert found.returncode == 2
    assert found.stderr.startswith("error: expected the data set EleutherAI/lambada_openai on the Hub")
    assert "--data_dir" in found.stderr
    assert found.stderr.count("\n") == 1
