"""Importing `common` costs next to nothing: commands do it before they parse their flags."""

import subprocess
import sys

from support.paths import ROOT

MODULES = sorted(f"common.{path.stem}" for path in (ROOT / "common").glob("*.py") if path.stem != "__init__")


def test_common_imports_nothing_outside_the_standard_library() -> None:
    program = f"import sys, {', '.join(MODULES)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert set(done.stdout.split()) - sys.stdlib_module_names <= {"common", "__main__"}
