"""The card in a repository: edits on the Hub are kept."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.loopback_hub import LoopbackHub
from support.loopback_writing import metadata_errors
from support.repositories import CARD, ensured, model_folder  # noqa: F401 - a fixture

from training.hub import __main__ as command
from training.hub.repository import push_folder
from training.hub.staging import stage
from training.recipe import Recipe

# The client itself uploads large files this way without Xet.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("impatient"),
]

Make = Callable[..., Recipe]


def test_a_card_edited_on_the_hub_keeps_its_text_and_gets_new_results(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path
) -> None:
    ensured()
    folder = stage(tmp_path / "staged", model_folder)
    assert not push_folder(folder, "me/my-gpt2", message="First").card_kept
    there = hub.model("me/my-gpt2")
    edited = there.files()["README.md"].decode().replace("# A model", "# A model\n\nWrite to me before you use it.")
    edited = edited.replace("license: mit", "license: apache-2.0")
    there.commit("main", {**there.files(), "README.md": edited.encode()}, "by hand")
    (folder / "README.md").unlink()
    (folder / "README.md").write_text(CARD.replace("old", "new"))
    assert push_folder(folder, "me/my-gpt2", message="Second").card_kept
    card = there.files()["README.md"].decode()
    assert "Write to me" in card
    assert "license: apache-2.0" in card
    assert "\nnew\n" in card
    assert "\nold\n" not in card


def test_a_card_edited_locally_replaces_an_unedited_one_on_the_hub(
    hub: LoopbackHub,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    ensured()
    folder = stage(tmp_path / "staged", model_folder)
    push_folder(folder, "me/my-gpt2", message="First")
    (folder / "README.md").unlink()
    (folder / "README.md").write_text(CARD.replace("# A model", "# My model"))
    assert not push_folder(folder, "me/my-gpt2", message="Second").card_kept
    assert b"# My model" in hub.model("me/my-gpt2").files()["README.md"]


def test_a_card_edited_during_a_push_is_kept(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    ensured()
    folder = stage(tmp_path / "staged", model_folder)
    push_folder(folder, "me/my-gpt2", message="First")
    there = hub.model("me/my-gpt2")
    edited: list[bytes] = []

    def edit(method: str, path: str, number: int) -> None:
        if "/commit/" in path and not edited:
            edited.append(there.files()["README.md"].replace(b"# A model", b"# A model by somebody quick"))
            there.commit("main", {**there.files(), "README.md": edited[0]}, "by hand")

    hub.trouble = edit
    (folder / "config.json").unlink()
    (folder / "config.json").write_text("{}")
    assert push_folder(folder, "me/my-gpt2", message="Second").card_kept
    assert there.messages == ["First", "by hand", "Second"]
    assert b"by somebody quick" in there.files()["README.md"]
    assert there.files()["config.json"] == b"{}"


def test_a_push_asks_for_a_license_until_the_card_on_the_hub_states_one(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "x")
    (tmp_path / "x" / "README.md").write_text(CARD.replace("license: mit", "library_name: transformers"))
    push = ["push", str(tmp_path / "x"), "--repo_id", "me/x"]
    command.main(push)
    question = "the card states no license: add one to its metadata on the Hub; later pushes keep it\n"
    assert question in capsys.readouterr().out
    there = hub.model("me/x")
    card = there.files()["README.md"].decode().replace("---\n", "---\nlicense: odc-by\n", 1)
    there.commit("main", {**there.files(), "README.md": card.encode()}, "by hand")
    command.main(push)
    assert question not in capsys.readouterr().out
    assert "license: odc-by" in there.files()["README.md"].decode()


def test_the_loopback_hub_rejects_invalid_metadata() -> None:
    assert len(metadata_errors({"content": "---\nlicense: nonsense\ndatasets: [a b]\n---\n"})) == 2
    wrong = [{"name": "x", "results": [{"task": {}, "dataset": {"type": "a b", "name": "c"}, "metrics": [{}]}]}]
    assert len(metadata_errors({"content": f"---\n{yaml.safe_dump({'model-index': wrong})}---\n"})) == 3
