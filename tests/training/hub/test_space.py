"""The demo page as a Space: the Hub's real client against a server on this machine."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.hub_client import TOKEN
from support.loopback_hub import LoopbackHub
from support.loopback_repository import Repository
from support.model_folders import scratch  # noqa: F401 - a fixture
from support.paths import ROOT

from common.cli_errors import InputError
from training.hub import __main__ as command
from training.hub.space import GRADIO_VERSION, space_files, space_id

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("impatient"),
]


@pytest.fixture
def model(scratch: Path, tmp_path: Path) -> Path:
    """A model folder, which is not a checkpoint."""
    shutil.copytree(scratch, tmp_path / "model", ignore=shutil.ignore_patterns("training_state"))
    return tmp_path / "model"


def push(folder: Path, *flags: str) -> None:
    command.main(["push", str(folder), "--repo_id", "me/my-gpt2", *flags])


def space(hub: LoopbackHub, name: str = "me/demo") -> dict[str, str]:
    files = hub.repositories["space", name].files()
    return {path: content.decode() for path, content in files.items() if path != ".gitattributes"}


def metadata(readme: str) -> dict[str, object]:
    return dict(yaml.safe_load(readme.split("---")[1]))


def test_push_publishes_the_demo_with_the_model(
    hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(model, "--space", "demo")
    assert "the demo page is on the Hub: spaces/me/demo" in capsys.readouterr().out
    assert "model.safetensors" in hub.model("me/my-gpt2").files()
    files = space(hub)
    assert files == space_files("me/my-gpt2")
    about = metadata(files["README.md"])
    assert about["sdk"] == "gradio"
    assert about["app_file"] == "app.py"
    assert about["models"] == ["me/my-gpt2"]
    assert len(str(about["short_description"])) <= 60  # the Hub's limit
    assert 'MODEL = "me/my-gpt2"' in files["app.py"]
    assert f"transformers=={importlib.metadata.version('transformers')}\n" in files["requirements.txt"]


def test_no_file_holds_the_token_or_a_path_of_this_machine(hub: LoopbackHub, model: Path) -> None:
    push(model, "--space", "demo")
    for content in space(hub).values():
        assert TOKEN not in content
        assert str(ROOT) not in content
        assert str(model) not in content


def test_files_of_a_space_import_only_each_other_and_what_is_installed_there() -> None:
    files = space_files("me/my-gpt2")
    for path, content in files.items():
        if not path.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(content)):
            names = []
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for name in [node.module] if node.module else [alias.name for alias in node.names]:
                    assert f"gpt2_demo/{name}.py" in files, (path, name)
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                known = {"gradio", "torch", "transformers", "PIL", "gpt2_demo", *sys.stdlib_module_names}
                assert name.split(".")[0] in known, (path, name)


def test_versions_are_those_that_are_tested() -> None:
    assert f"gradio=={GRADIO_VERSION}\n" in (ROOT / "constraints.txt").read_text()


def test_name_of_a_space_is_under_the_owner_of_the_model() -> None:
    assert space_id("demo", "our-lab/my-gpt2") == "our-lab/demo"
    assert space_id("me/demo", "our-lab/my-gpt2") == "me/demo"


def test_second_push_keeps_an_edited_readme_and_updates_the_code(hub: LoopbackHub, model: Path) -> None:
    push(model, "--space", "demo")
    repository = hub.repositories["space", "me/demo"]
    edited = space(hub)["README.md"].replace("🔎", "🚀").replace(GRADIO_VERSION, "6.0.0") + "\nMy own words.\n"
    changed = {"README.md": edited.encode(), "app.py": b"old", "mine.py": b"mine"}
    repository.commit("main", repository.files() | changed, "by hand")
    push(model, "--space", "demo")
    files = space(hub)
    assert "My own words." in files["README.md"]
    assert metadata(files["README.md"])["emoji"] == "🚀"
    assert metadata(files["README.md"])["sdk_version"] == GRADIO_VERSION
    assert files["app.py"] == space_files("me/my-gpt2")["app.py"]
    assert files["mine.py"] == "mine"


def test_private_model_gets_a_private_space_and_the_need_of_a_secret_is_printed(
    hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(model, "--space", "demo", "--private")
    assert hub.repositories["space", "me/demo"].private
    assert "add a secret HF_TOKEN, with read access, in the settings of the Space" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"), [("them/demo", r"you cannot write to them/demo \(403\)"), ("a b", "invalid repository id")]
)
def test_space_that_cannot_be_written_is_refused_before_the_model_is_pushed(
    hub: LoopbackHub, model: Path, name: str, message: str
) -> None:
    hub.repositories["space", "them/demo"] = Repository({"README.md": b"theirs"})
    with pytest.raises(InputError, match=message):
        push(model, "--space", name)
    assert list(hub.model("me/my-gpt2").files()) == [".gitattributes"]


def test_failed_push_of_the_space_names_it(hub: LoopbackHub, model: Path) -> None:
    hub.trouble = lambda method, path, number: 403 if "/spaces/me/demo/commit" in path else None
    with pytest.raises(InputError, match=r"you cannot write to me/demo \(403\); .*run the same command again"):
        push(model, "--space", "demo")


@pytest.mark.slow
def test_space_starts_from_its_own_files_and_the_models_repository(
    hub: LoopbackHub, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gradio", reason="needs gradio: pip install -c constraints.txt -e '.[demo]'")
    push(model, "--space", "demo")
    for path, content in space(hub).items():
        (tmp_path / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / path).write_text(content)
    environment = (
        os.environ | hub.environment | {"HF_HOME": str(tmp_path / "home"), "GRADIO_ANALYTICS_ENABLED": "False"}
    )
    # The checkout is not importable there.
    hide = (
        "import sys; sys.modules['gpt2_scratch'] = sys.modules['common'] = None; import runpy; runpy.run_path('app.py')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {hide}"],
        cwd=tmp_path / "space",
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if "http://127.0.0.1" in line:
                break
        process.terminate()
    assert re.search(r"Running on local URL: +http://127.0.0.1:\d+", output), output
