"""One writer per folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import ROOT

from common.cli_errors import InputError
from common.folder_lock import LOCK_NAME, locked


def test_lock_file_and_empty_folder_are_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "new"):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [LOCK_NAME]
    assert not (tmp_path / "new").exists()
    with locked(tmp_path):
        (tmp_path / "shard").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]


def test_second_writer_is_refused_with_the_process_that_holds_the_lock(tmp_path: Path) -> None:
    expected = rf"another process \(pid {os.getpid()} on .+\) is already writing to .*; wait for it or stop it"
    with locked(tmp_path), pytest.raises(InputError, match=expected), locked(tmp_path):
        raise AssertionError("two writers in one folder")
    with locked(tmp_path):
        pass


def test_waiting_writer_takes_over_when_the_other_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.folder_lock._POLL_SECONDS", 0.05)
    program = f"""
import time
from pathlib import Path
from common.folder_lock import locked
with locked(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        waited: list[float] = []

        def on_wait() -> None:
            waited.append(time.monotonic())
            if len(waited) == 3:
                process.kill()

        with locked(tmp_path, on_wait=on_wait):
            assert f"pid {os.getpid()} " in (tmp_path / LOCK_NAME).read_text()
    assert len(waited) >= 3
    assert not (tmp_path / LOCK_NAME).exists()
