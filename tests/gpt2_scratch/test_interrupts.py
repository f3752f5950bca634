"""Ctrl-C while a command imports torch, which takes seconds."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import ROOT


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the list of mapped files of Linux")
@pytest.mark.parametrize("command", ["generate", "export"])
def test_ctrl_c_during_the_import_is_no_traceback(command: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", f"gpt2_scratch.{command}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # Programs started in the background ignore Ctrl-C by default.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode in (130, -signal.SIGINT)  # a shell shows 130 for both
    assert len(printed.splitlines()) <= 1
    assert "Traceback" not in printed
