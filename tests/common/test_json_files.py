"""JSON from disk: whatever the bytes are, an object or a `ValueError` of one line."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from common.json_files import instance_of, read_json_object


@dataclass
class Point:
    x: int
    names: list[str]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"\0" * 50, "Expecting value"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"x":' * 100_000, "nested too deeply"),
        (b'{"x": ' + b"9" * 5000 + b"}", "limit .4300 digits."),
        (b"\xff\xfe{}", "utf-8"),
        (b"[1]", "holds no object but list"),
        (b'"x"', "holds no object but str"),
    ],
)
def test_content_that_is_no_object_is_a_value_error(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_json_object(tmp_path / "file.json")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1], "not an object"),
        ({"x": 1}, "missing 1 required"),
        ({"x": 1, "names": [], "y": 1}, "unexpected keyword"),
        ({"x": "1", "names": []}, "expected int"),
        ({"x": 1, "names": [None]}, "names"),
    ],
)
def test_objects_with_other_keys_or_types_are_a_value_error(values: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        instance_of(Point, values)


def test_an_object_becomes_a_dataclass() -> None:
    assert instance_of(Point, {"x": 1, "names": ["a"]}) == Point(1, ["a"])
