"""Rows and small files of the tasks in their official raw formats."""

import json

LAMBADA = {"text": "x ` abc"}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


def hellaswag_row(**changes):
    row = {
        "activity_label": "Abc",
        "ctx_a": "[step] x",
        "ctx_b": "yz",
        "ctx": "x yz",
        "endings": ["zz", '!"#$', "[tag] abcdefgh", "q"],
        "label": 1,
    }
    return {**row, **changes}


CBT_OPTIONS = ["b", "q", "abcdefgh", "z", "1", "2", "3", "4", "5", "6"]


def cbt_text(question="a XXXXX c .", sentences=20, answer="b", options=None):
    lines = [f"{number} s{number} ." for number in range(1, sentences + 1)]
    return "\n".join([*lines, f"21 {question}\t{answer}\t\t{'|'.join(options or CBT_OPTIONS)}", "", ""])


def cbt_folder(path, text):
    path.mkdir(exist_ok=True)
    for kind in ("CN", "NE"):
        (path / f"cbtest_{kind}_test_2500ex.txt").write_text(text)
    return path
