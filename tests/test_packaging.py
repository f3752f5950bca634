"""The wheel holds the model library under one name; an editable install makes the complete checkout importable."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

SOURCES = ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def build(hook: str, sources: Path, target: Path) -> Path:
    """Build a wheel offline with a hook of setuptools, and return its path."""
    program = f"from setuptools import build_meta; print(build_meta.{hook}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=sources, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that a build reads, because a build writes next to them."""
    path = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copy(ROOT / name, path / name)
    for name in ("common", "gpt2_scratch", "evaluation", "training"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return path


@pytest.fixture(scope="module")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(build("build_wheel", checkout, tmp_path_factory.mktemp("wheel"))) as wheel:
        wheel.extractall(folder)
    return folder


def run_with(path: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with `path` first on its path, and without the checkout that the tests run in."""
    # Our own environment has an editable install: its entry is removed before the program starts.
    hide = (
        "import importlib.util, runpy, sys; from pathlib import Path\n"
        f"sys.path = [p for p in sys.path if p and Path(p).resolve() != Path({str(ROOT)!r})]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "assert importlib.util.find_spec('common') is None\n"
        "module, sys.argv = sys.argv[1], sys.argv[1:]\n"
        "runpy.run_module(module, run_name='__main__', alter_sys=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", hide, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_wheel_installs_one_top_level_package(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"gpt2_scratch"}
    assert (installed / "gpt2_scratch" / "_common" / "cli_errors.py").is_file()
    assert not [path for path in installed.rglob("*.py") if "from common" in path.read_text()]
    assert (installed / "gpt2_scratch" / "demo.css").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "export", "demo"])
def test_commands_run_from_an_installed_wheel(installed: Path, tmp_path: Path, command: str) -> None:
    done = run_with(installed, f"gpt2_scratch.{command}", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"python -m gpt2_scratch.{command}" in done.stdout
    done = run_with(installed, f"gpt2_scratch.{command}", "--no_such_flag", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: "), done.stderr


def test_editable_install_puts_the_checkout_on_the_path(checkout: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build("build_editable", checkout, tmp_path)) as wheel:
        paths = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".pth")]
    assert [Path(path.strip()).resolve() for path in paths] == [checkout.resolve()]
