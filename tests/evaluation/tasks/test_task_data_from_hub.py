"""Task data from the Hub's parquet conversions: the same items as from the official raw files."""

import json
import os
import subprocess
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.loopback_hub import LoopbackHub, serving
from support.loopback_repository import Repository
from support.task_rows import CBT_OPTIONS, LAMBADA, cbt_folder, cbt_text, hellaswag_row, write_rows
from support.toy_model import Characters

from common.cli_errors import InputError
from evaluation.tasks.data_sources import hub_rows
from evaluation.tasks.registry import task_named

CBT_ROW = {
    "sentences": [f"s{number} ." for number in range(1, 21)],
    "question": "a XXXXX c .",
    "answer": "b",
    "options": CBT_OPTIONS,
}
WIKITEXT = [" = Title = \n", "", " some words . \n", ""]

PROGRAM = """
import json, sys
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
    """A data set with a loading script, which `datasets` does not run, and the Hub's conversion on another branch."""
    repository = Repository({"dataset.py": b"raise SystemExit('the loading script ran')"})
    repository.commit("refs/convert/parquet", files, "convert")
    return repository


def program(programs, hub, cache, *names):
    environment = {**os.environ, **hub, "HF_HOME": str(cache)}
    return subprocess.run([programs / "python", "-c", PROGRAM, *names], env=environment, capture_output=True, text=True)


def test_hub_gives_the_same_items_as_the_official_files(programs, tmp_path):
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
        done = program(programs, hub.environment, tmp_path / "cache", *names)
    assert done.returncode == 0, done.stderr

    write_rows(tmp_path / "hellaswag_val.jsonl", hellaswag_row(), hellaswag_row())
    write_rows(tmp_path / "lambada_test.jsonl", LAMBADA)
    cbt_folder(tmp_path, cbt_text())
    (tmp_path / "wiki.test.raw").write_text("".join(line or " \n" for line in WIKITEXT))
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        expected = [
            [[list(r.context), list(r.continuation)] for r in item.requests]
            for item in task_named(name).items(tmp_path, Characters(), 1024)
        ]
        assert json.loads(line) == expected, name


@pytest.mark.parametrize("problem", ["missing", "offline"])
def test_data_that_the_hub_does_not_give_is_a_one_line_error(problem, programs, tmp_path):
    if problem == "offline":
        done = program(programs, {"HF_HUB_OFFLINE": "1"}, tmp_path, "lambada")
    else:
        with serving(LoopbackHub({})) as hub:
            done = program(programs, hub.environment, tmp_path, "lambada")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read the data set EleutherAI/lambada_openai from the Hub")
    assert "--data_dir" in done.stderr
    assert done.stderr.count("\n") == 1


def test_setting_that_the_hubs_client_cannot_use_is_one_line(monkeypatch):
    def load(*arguments, **settings):
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(InputError, match=r"cannot read the data set a/b from the Hub \(ImportError: Using SOCKS proxy"):
        hub_rows("a/b", "config", "test")
