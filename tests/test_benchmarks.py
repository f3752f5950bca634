"""The benchmarks run: what they print is checked by reading it, and is in docs/benchmarks.md."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from support.launching import run_python
from support.paths import ROOT

COMMANDS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_benchmark_starts_as_documented(path: Path) -> None:
    done = run_python(str(path), "--help")
    assert done.returncode == 0, done.stderr
    # Python puts benchmarks/ first, where evaluation.py hides the package.
    first = re.search(r"^from evaluation\b", path.read_text(), re.MULTILINE)
    assert first is None or "sys.path" in path.read_text()[: first.start()]


# A machine with a GPU may have neither datasets nor evaluate. Processes that compile would get more streams than three.
GPU_BENCHMARK = f"""
import runpy, sys
from torch._inductor import config
assert not sys.modules.keys() & {{"datasets", "evaluate"}}
sys.modules["datasets"] = sys.modules["evaluate"] = None
config.compile_threads = 1
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
runpy.run_path({str(ROOT / "benchmarks" / "gpu.py")!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_gpu_benchmark_measures_everything_without_datasets_and_evaluate(programs: Path, tmp_path: Path) -> None:
    command = [programs / "python", "-c", GPU_BENCHMARK, "--toy", "--minutes", "20", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["state"] for row in rows} == {"measured"}
    names = [row["name"] for row in rows]
    assert names == sorted(set(names), key=names.index)
    assert {"parity with GPT2LMHeadModel", "resume", "generation"} <= set(names)
    table = (tmp_path / "results.md").read_text()
    assert all(f"| {name} |" in table for name in names)


def test_gpu_benchmark_skips_what_does_not_fit_into_the_minutes(tmp_path: Path) -> None:
    done = run_python(str(ROOT / "benchmarks" / "gpu.py"), "--toy", "--minutes", "0", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows
    assert {row["state"] for row in rows} == {"skipped"}
