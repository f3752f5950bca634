import hashlib
from pathlib import Path

import pytest

from common.atomic_files import file_sha256, write_atomically


def test_text_and_streams_are_written_with_their_sha256(tmp_path: Path) -> None:
    for content in ("tëxt", lambda stream: stream.write("tëxt".encode())):
        path = tmp_path / "file"
        digest = write_atomically(path, content)
        assert path.read_text(encoding="utf-8") == "tëxt"
        assert digest == file_sha256(path) == hashlib.sha256("tëxt".encode()).hexdigest()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(stream: object) -> None:
        raise OSError(28, "disk full")

    with pytest.raises(OSError, match="disk full") as caught:
        write_atomically(path, fail)
    assert caught.value.filename == str(path)  # a write does not know its file
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
