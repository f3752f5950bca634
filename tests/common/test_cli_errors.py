"""Errors of commands, and what they print where printing fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from common.cli_errors import InputError, did_you_mean, os_error_message, run_command

HAS_DEV_FULL = Path("/dev/full").exists()

PRINTING = """
import sys, time
from common.cli_errors import run_command
def main():
    for number in range(3):
        print("8 × 512 tokens", "x" * 100_000, flush=True)
        print("a bar", file=sys.stderr)
    open(sys.argv[1], "w").write("saved")
run_command(main)
"""


def printing(saved: Path, redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that prints and then writes a file, with redirected streams."""
    command = f'"{sys.executable}" -c \'{PRINTING.replace(chr(39), chr(34))}\' "{saved}" {redirection}'
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=variables)


@pytest.mark.parametrize(
    ("redirection", "reported"),
    [
        pytest.param(
            "> /dev/full",
            "cannot write to standard output (No space left on device)",
            marks=pytest.mark.skipif(not HAS_DEV_FULL, reason="/dev/full exists on Linux only"),
        ),
        ("> >(exec head -c 1 > /dev/null)", "cannot write to standard output (Broken pipe)"),
        (">&-", ""),
        (">&- 2>&-", ""),
        ("2>&- | true", ""),
    ],
)
def test_output_that_cannot_be_written_does_not_end_a_command(tmp_path: Path, redirection: str, reported: str) -> None:
    done = printing(tmp_path / "saved", redirection)
    assert (tmp_path / "saved").read_text() == "saved"
    assert done.returncode == 0
    assert done.stderr.count("cannot write") == bool(reported)
    assert reported in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not HAS_DEV_FULL, reason="/dev/full exists on Linux only")
def test_standard_error_that_cannot_be_written_is_reported_on_standard_output(tmp_path: Path) -> None:
    done = printing(tmp_path / "saved", "2> /dev/full")
    assert (done.returncode, done.stdout.count("8 ×")) == (0, 3)
    assert "cannot write to standard error (No space left on device)" in done.stdout
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second is Python's in the C locale
def test_a_character_that_the_terminal_lacks_is_escaped(tmp_path: Path, errors: str) -> None:
    done = printing(tmp_path / "saved", "", PYTHONIOENCODING=f"ascii:{errors}")
    assert (done.returncode, done.stdout[:18]) == (0, r"8 \xd7 512 tokens "[:18])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file/below", r"file/below cannot be used: Not a directory; check the path"),
        ("x" * 300, r"xxx cannot be used: File name too long; choose a shorter path"),
        ("absent", r"absent cannot be used: No such file or directory; check the path"),
    ],
)
def test_an_error_of_the_operating_system_is_one_line_with_the_path_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, message: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: print((tmp_path / path).stat()))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path}")
    assert printed.endswith(f"{message}\n")


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB"), MemoryError()])
def test_a_lack_of_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: (_ for _ in ()).throw(error))  # type: ignore[arg-type]
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: there is not enough memory")
    assert printed.endswith("use a smaller model or batch, or raise the limit (ulimit -v)\n")


def test_a_permission_error_advises_to_change_the_permissions() -> None:
    message = os_error_message(PermissionError(13, "Permission denied", "/data"))
    assert message == "/data cannot be used: Permission denied; change its permissions, or choose another path"


def test_other_errors_keep_their_traceback() -> None:
    for error in (
        ValueError("bug"),
        RuntimeError("bug"),
        OSError("no number"),
        TimeoutError(110, "Connection timed out"),
    ):
        with pytest.raises(type(error)):
            run_command(lambda error=error: (_ for _ in ()).throw(error))  # type: ignore[misc]


def test_a_token_that_is_not_ascii_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ü")
    run_command(lambda: print(os.environ.get("HF_TOKEN")))
    printed = capsys.readouterr()
    assert printed.out == "None\n"
    assert printed.err.startswith("HF_TOKEN holds characters that no token has, and is not used; copy it again")


def test_an_input_error_exits_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise InputError("no")

    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    assert capsys.readouterr().err == "error: no\n"


def test_a_lost_connection_ends_a_process_whose_objects_cannot_be_destroyed() -> None:
    program = """
import threading
from common.cli_errors import *
def main():
    threading.Thread(target=threading.Event().wait).start()
    print("a log line")
    raise LostConnectionError("no")
run_command(main)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (2, "a log line\n", "error: no\n")


def test_closest_known_name_is_suggested() -> None:
    assert did_you_mean("learning_rat", ["seed", "learning_rate"]) == "; did you mean learning_rate?"


def test_nothing_is_suggested_for_a_name_unlike_all_others() -> None:
    assert did_you_mean("banana", ["seed", "learning_rate"]) == ""


def test_a_deleted_current_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit):
        run_command(lambda: print("never"))
    assert capsys.readouterr().err.startswith("error: the current folder was deleted; change to another one")
