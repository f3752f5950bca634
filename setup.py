"""Builds the wheel of `gpt2_scratch`. Everything declarative is in setup.cfg.

The wheel installs one top-level name. A top-level `common` could shadow a module of the user's, so the wheel carries
what it needs of it as `gpt2_scratch._common`. Editable installs put the whole checkout on the path.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

COMMON = ("__init__.py", "cli_errors.py", "json_files.py", "standard_streams.py", "tokenizer_json.py")


class BuildPackage(build_py):
    """Adds the modules of `common` that `gpt2_scratch` imports."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib, "gpt2_scratch")
        (package / "_common").mkdir(exist_ok=True)
        for name in COMMON:
            shutil.copy(Path("common", name), package / "_common" / name)
        for path in package.rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            path.write_text(source.replace("from common.", "from gpt2_scratch._common."), encoding="utf-8")


setup(cmdclass={"build_py": BuildPackage})
