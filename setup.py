"""Builds the wheel of `gpt2_scratch`. Everything declarative is in setup.cfg.

The wheel installs one top-level name. A top-level `common` could shadow a module of the user's, so the wheel carries
it as `gpt2_scratch._common`. Editable installs put the whole checkout on the path.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPackage(build_py):
    """Adds `common`, which `gpt2_scratch` imports."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib, "gpt2_scratch")
        shutil.copytree("common", package / "_common", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        for path in package.rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            path.write_text(source.replace("from common.", "from gpt2_scratch._common."), encoding="utf-8")


setup(cmdclass={"build_py": BuildPackage})
