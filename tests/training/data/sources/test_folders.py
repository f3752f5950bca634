"""Files below a folder: links are followed once, and what cannot be read is an error."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.small_corpora import documents_of

from common.cli_errors import InputError
from training.data.sources.files import FileCorpus, files_below


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (
        "corpus/a/1.txt",
        "corpus/b.txt",
        "corpus/.hidden/no.txt",
        "corpus/lost+found/no.txt",
        "other/c/2.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path / "corpus"


def names(root: Path) -> list[str]:
    return [str(file.relative_to(root)) for file in files_below(root)]


def test_files_are_sorted_by_relative_path_without_hidden_ones(root: Path) -> None:
    assert names(root) == ["a/1.txt", "b.txt"]


def test_links_to_folders_and_files_are_followed(root: Path) -> None:
    (root / "z").symlink_to(root.parent / "other")
    (root / "y.txt").symlink_to(root.parent / "other" / "c" / "2.txt")
    assert names(root) == ["a/1.txt", "b.txt", "y.txt", "z/c/2.txt"]
    assert "other/c/2.txt" in set(documents_of(FileCorpus(root)))


def test_folders_that_are_read_already_are_not_read_through_a_link(root: Path) -> None:
    (root / "z").symlink_to(root.parent / "other")
    for link, target in (("again", root / "a"), ("a/up", root), ("zz", root.parent / "other" / "c")):
        (root / link).symlink_to(target)
    (root.parent / "other" / "c" / "loop").symlink_to(root.parent / "other")
    assert names(root) == ["a/1.txt", "b.txt", "z/c/2.txt"]
    (root / "from-hidden").symlink_to(root / ".hidden")  # the only way to read it
    (root.parent / "other" / ".hidden").mkdir()
    (root.parent / "other" / ".hidden" / "3.txt").write_text("text")
    (root / "z-hidden").symlink_to(root.parent / "other" / ".hidden")
    assert names(root) == ["a/1.txt", "b.txt", "from-hidden/no.txt", "z/c/2.txt", "z-hidden/3.txt"]


def test_a_link_to_a_folder_that_contains_the_corpus_is_refused(root: Path) -> None:
    (root / "a" / "everything").symlink_to(root.parent)
    with pytest.raises(InputError, match=r"a/everything is a link to a folder that contains .*corpus; remove it"):
        files_below(root)


def test_a_name_that_is_not_utf8_is_read(root: Path) -> None:
    (root / os.fsdecode(b"\xff.txt")).write_text("text")
    corpus = FileCorpus(root)
    assert len(corpus.revision) == 64
    assert "text" in set(documents_of(corpus))


@pytest.mark.parametrize("target", ["nowhere", "2.txt"])
def test_a_link_that_leads_nowhere_is_refused(root: Path, target: str) -> None:
    (root / "2.txt").symlink_to(target)
    with pytest.raises(InputError, match=r"2.txt is a link that leads nowhere \(.*\); repair or remove it"):
        files_below(root)


def test_a_folder_that_may_not_be_entered_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterdir = Path.iterdir

    def refusing(folder: Path) -> Iterator[Path]:  # the tests may run as root, who may enter every folder
        if folder.name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refusing)
    with pytest.raises(InputError, match=r"cannot read the folder .*/a: Permission denied; change its permissions"):
        FileCorpus(root)


def test_a_pipe_is_refused_instead_of_waiting_for_its_writer(root: Path) -> None:
    os.mkfifo(root / "pipe.txt")
    for corpus in (root, root / "pipe.txt"):
        with pytest.raises(InputError, match=r"pipe.txt is a pipe, a socket or a device, not a file; save its content"):
            FileCorpus(corpus)
