"""Rules that hold for the whole project."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

SOURCES = sorted(
    path for name in ("common", "gpt2_scratch", "evaluation", "training") for path in (ROOT / name).rglob("*.py")
)


def imports(path: Path) -> set[str]:
    """Absolute modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


# Lowest first. A module may import those on earlier lines; `a, b` on one line do not import each other.
LAYERS = """
common
gpt2_scratch
evaluation.tasks
evaluation.scoring
evaluation.results
evaluation.metrics
evaluation.evaluate_model
evaluation.run
training.data.sources
training.data.tokenization
training.data.shards
training.data.producing
training.data.loading
training.settings, training.strict_yaml
training.recipe
training.optim, training.step
training.checkpoints
training.monitoring
training.hub
training.setup
training.loop
training.train, training.prepare, training.plots
"""
LAYER_OF = {name: number for number, line in enumerate(LAYERS.split("\n")) for name in line.split(", ") if name}


def layered_package(module: str) -> str | None:
    """The name in LAYERS that a module belongs to."""
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in LAYER_OF), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way_between_packages(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module in {"evaluation", "training", "training.data"}:
        assert not imports(path)
        return
    own = layered_package(module)
    assert own is not None, f"{module} is missing in LAYERS"
    for name in imports(path):
        if name.split(".")[0] in {"common", "gpt2_scratch", "evaluation", "training"}:
            used = layered_package(name)
            assert used is not None, f"{module} imports {name}: import the module itself"
            assert used == own or LAYER_OF[used] < LAYER_OF[own], f"{module} imports {name}"


def test_no_script_folder_shadows_a_module() -> None:
    installed = {"datasets", "evaluate", "tokenizers", "transformers", "accelerate", "tiktoken", "torch", "wandb"}
    for folder in ("training", "evaluation"):
        names = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
        assert not names & (installed | set(sys.stdlib_module_names)), folder


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_grows_past_350_lines(path: Path) -> None:
    limit = 380 if path.name == "modeling_gpt2_scratch.py" else 350  # the model is one file
    assert len(path.read_text().splitlines()) <= limit
    assert path.stem != "utils"


def test_every_requirement_is_pinned() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"] + "".join(setup["options.extras_require"].values())
    names = {re.split(r"[<>=\[]", line)[0].lower() for line in wanted.split() if not line.startswith("%")}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert names <= {pin.split("==")[0].lower() for pin in pins}
    assert "torch==2.13.0" in pins


def test_the_readme_names_only_files_that_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        for name in re.findall(
            r"(?:training|accelerate_configs|gpt2_scratch|evaluation|tests|benchmarks)/[\w./-]+\.\w+", text
        ):
            assert (ROOT / name).exists() or "NAME" in name, f"{document}: {name}"
