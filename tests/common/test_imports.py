"""Importing `common` is cheap: commands do it before they parse their flags."""

import subprocess
import sys

from support.paths import ROOT

MODULES = sorted(f"common.{path.stem}" for path in (ROOT / "common").glob("*.py") if path.stem != "__init__")


def test_common_imports_nothing_but_the_standard_library_and_tqdm() -> None:
    program = f"import sys; before = set(sys.modules); import {', '.join(MODULES)}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    imported = {name.split(".")[0] for name in done.stdout.split()}
    assert imported - sys.stdlib_module_names <= {"common", "tqdm", "__mp_main__"}  # multiprocessing's name of __main__
