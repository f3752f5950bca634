"""What stops a producer: user errors, a full disk, another producer. No partial file stays."""

import errno
import json
import os
import re
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.small_corpora import folder_bytes, make_shards

from common.atomic_files import PARTIAL_SUFFIX
from common.cli_errors import InputError, TemporaryError
from common.folder_lock import LOCK_NAME, locked
from training.data.producing import batches, progress
from training.data.shards.manifest import Manifest, ResumePoint
from training.data.shards.shard_reader import ShardFolder
from training.data.tokenization.tokenizer import train_bpe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_tokens": 10_000_000}, "training need at least 10,000,002"),
        ({"tokenizer": "train:30000"}, "is too small for a vocabulary of 30,000 tokens"),
        ({"text_field": "body"}, "no field 'body' in"),
        ({"tokenizer": "nowhere"}, "cannot read nowhere/tokenizer.json"),
        ({"corpus": "nowhere"}, "unknown corpus 'nowhere'"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 2, found 0"),
        ({"val_tokens": 0}, "val_tokens must be at least 1, found 0"),
        ({"shard_tokens": 10**15}, "shard_tokens must be at most 4,294,967,296, found 1,000,000,000,000,000"),
        ({"val_tokens": 10**15}, "val_tokens must be at most 4,294,967,296"),
        ({"max_tokens": -1}, "max_tokens must be at least 2, found -1"),
        ({"num_workers": -1}, "num_workers must be at least 0, found -1"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_user_error_leaves_the_output_unchanged(tmp_path, settings, change, message, exists):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with pytest.raises(InputError, match=message):
        make_shards(out, **{**settings, **change})
    assert out.exists() == exists
    assert not exists or not list(out.iterdir())


def test_full_disk_is_a_clear_error_and_the_producer_can_resume(tmp_path, settings, monkeypatch):
    make_shards(tmp_path / "complete", **settings)
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(InputError, match=r"No space left on device; free some space.*complete shards are kept"):
            make_shards(tmp_path / "out", **settings)
    assert not list((tmp_path / "out").glob(f"*{PARTIAL_SUFFIX}"))
    assert ShardFolder.open(tmp_path / "out").shards
    make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "complete")


def test_folder_that_may_not_be_written_is_an_error_that_a_restart_cannot_resolve(tmp_path, settings, monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="Permission denied; change its permissions, or choose another path") as error:
        make_shards(tmp_path / "out", **settings)
    assert not isinstance(error.value, TemporaryError)


def test_disk_without_space_for_the_tokenizer_is_a_clear_error(tmp_path, settings):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write to .*: File too large; free some space"):
            make_shards(tmp_path / "out", **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()


def test_too_little_disk_space_is_an_error_before_anything_is_written(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1_040_000))
    expected = r"1.0 MB of disk space left, 1.2 MB needed; free some space, and run the command again"
    with pytest.raises(InputError, match=expected):
        make_shards(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_disk_space_is_checked_before_each_shard(tmp_path, settings, monkeypatch):
    free = iter([10**9, 10**9, 10**9])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, next(free, 10**5)))
    with pytest.raises(InputError, match=r"MB of disk space left.*complete shards are kept"):
        make_shards(tmp_path / "out", **settings)
    assert len(ShardFolder.open(tmp_path / "out").shards) == 2


def test_time_left_is_reported_if_the_end_is_known(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_REPORTS", 0.0)
    monkeypatch.setattr(batches, "CHARACTERS_PER_BATCH", 10_000)
    for number, limit in enumerate((None, 20_000)):
        lines: list[str] = []
        make_shards(tmp_path / str(number), **{**settings, "report": lines.append}, max_tokens=limit)
        shares = [int(match[1]) for line in lines if (match := re.search(r" (\d+)%, \d+ s left", line))]
        assert len(shares) > 3
        assert shares == sorted(shares)


def test_shard_larger_than_memory_is_a_clear_error(tmp_path, settings, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr("training.data.shards.shard_writer.np.empty", full)
    with pytest.raises(InputError, match="not enough memory for a shard of 1,500 tokens"):
        make_shards(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("position", [7, "there", [0, 1], [9, 0, 0], [0, -1, 0], {"row": 1}, None])
def test_invalid_position_in_the_manifest_is_an_error(tmp_path, settings, position):
    make_shards(tmp_path, **settings)
    manifest = Manifest.read(tmp_path)
    resume = ResumePoint(0, "the position", 0)
    replace(manifest, shards=manifest.shards[:1], complete=False, resume=resume).write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"the position"', json.dumps(position)))
    with pytest.raises(InputError, match="resume has another sha256; delete the folder and prepare it again"):
        make_shards(tmp_path, **settings)


def test_two_producers_cannot_fill_one_folder(tmp_path, settings):
    with locked(tmp_path), pytest.raises(InputError, match="is already writing to"):
        make_shards(tmp_path, **settings)
    assert make_shards(tmp_path, **settings).complete  # the lock has been released
    assert not (tmp_path / LOCK_NAME).exists()


def test_folder_with_other_files_is_an_error(tmp_path, settings):
    (tmp_path / "thesis.md").write_text("mine")
    with pytest.raises(InputError, match="holds other files than shards"):
        make_shards(tmp_path, **settings)
    with pytest.raises(InputError, match=r"thesis\.md is a file, not a folder"):
        make_shards(tmp_path / "thesis.md", **settings)
    with pytest.raises(InputError, match="Not a directory"):
        make_shards(tmp_path / "thesis.md" / "out", **settings)
    assert folder_bytes(tmp_path) == {"thesis.md": b"mine"}


def test_folder_with_shards_of_another_program_is_an_error(tmp_path, settings):
    np.save(tmp_path / "edufineweb_val_000000", np.arange(9, dtype=np.uint16))
    with pytest.raises(InputError, match="holds shards without a manifest"):
        make_shards(tmp_path, **settings)


def test_progress_is_reported_line_by_line_without_a_terminal(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_REPORTS", 0.0)
    lines: list[str] = []
    make_shards(tmp_path / "out", **{**settings, "report": lines.append})
    assert "tokens at" in lines[-2]
    assert "documents" in lines[-2]


def test_rate_on_a_terminal_is_the_average_of_the_run(shard_folder, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    manifest = Manifest.read(shard_folder)
    with progress.ProducerProgress(1000, lambda line: None) as shown:
        for second in range(1, 11):  # ten tokens per second, and a thousand more in the last one
            seconds[0] += 1
            shown.show(manifest, 1000 + 10 * second + (1000 if second == 10 else 0), None)
        assert "110 tokens/s" in str(shown._bar)


def test_complete_folder_with_another_tokenizer_is_refused(tmp_path, settings):
    make_shards(tmp_path / "out", **settings)
    train_bpe(["another text, another tokenizer"] * 9, 270).save(tmp_path / "out")
    with pytest.raises(InputError, match=r"were made with the tokenizer bpe-300, not with bpe-270; restore its"):
        make_shards(tmp_path / "out", **settings)


def test_output_inside_its_corpus_is_refused(tmp_path, settings):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text " * 2000)
    (tmp_path / "link").symlink_to(tmp_path / "texts")
    for output in (tmp_path / "texts", tmp_path / "texts" / "new" / "shards", tmp_path / "link" / "shards"):
        with pytest.raises(InputError, match=r"is inside corpus .*texts, which would change while it is read"):
            make_shards(output, **{**settings, "corpus": str(tmp_path / "texts")})
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["a.txt"]
