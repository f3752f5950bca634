"""Pushing a model folder and a run to the Hub: the real client against a server on this machine."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from hub_client import ACCOUNTS, TOKEN, turn_to
from loopback_hub import LoopbackHub, serving
from loopback_repository import Repository
from loopback_writing import metadata_errors
from tiny_models import tiny

from gpt2_scratch_errors import InputError
from training import hub as command
from training import hub_repository, publishing
from training.hub_repository import claim, push_folder, set_tag
from training.loop import train
from training.recipe import Recipe
from training.staging import stage

# How the client itself sends large files where there is no Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Make = Callable[..., Recipe]
CARD = "---\nlicense: mit\n---\n\n# A model\n\n<!-- generated: use -->\nold\n<!-- end of generated: use -->\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "my-gpt2"
    tiny().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(autouse=True)
def patient_for_tests_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pauses that a test can wait for, in our retries and in the client's own."""
    import huggingface_hub.utils._http as client

    monkeypatch.setattr("training.publishing.FIRST_PAUSE_SECONDS", 0.05)
    real = client._http_backoff_base
    monkeypatch.setattr(
        client,
        "_http_backoff_base",
        lambda *args, **kwargs: real(*args, **{**kwargs, "base_wait_time": 0.01, "max_wait_time": 0.02}),
    )
    yield
    huggingface_hub.set_client_factory(client.default_client_factory)


def claimed(repo_id: str | None = "me/my-gpt2", **options: Any) -> str:
    return claim(repo_id, **{"default_name": "run", "private": False, "way_out": "or else", **options})


# The repository


def test_a_repository_is_made_and_named_after_the_folder(hub: LoopbackHub) -> None:
    assert claimed(None, default_name="my run (2)", private=True) == "me/my-run-2"
    assert hub.model("me/my-run-2").private
    assert claimed("our-lab/x") == "our-lab/x"
    assert claimed("our-lab/x") == "our-lab/x"  # it is there already
    assert not hub.model("our-lab/x").private


@pytest.mark.parametrize("repo_id", ["a b", "me/my/gpt2", "me/", "-x", "me/a--b", "me/x.git", "", "C:\\gpt2"])
def test_what_is_no_repository_id_is_refused_before_anything_is_asked(hub: LoopbackHub, repo_id: str) -> None:
    with pytest.raises(InputError, match=r"expected a repository id such as your-name/my-gpt2 .*found"):
        claimed(repo_id)
    assert not hub.requests


@pytest.mark.parametrize("exists", [True, False])
def test_somebody_elses_repository_is_refused(hub: LoopbackHub, exists: bool) -> None:
    if exists:
        hub.repositories["model", "them/gpt2"] = Repository({"x": b"theirs"})
    with pytest.raises(InputError, match=r"may write to, found that the Hub refuses them/gpt2 \(403\).*, or else"):
        claimed("them/gpt2")


def test_no_token_and_a_bad_one_are_told(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_revokedLongAgo")
    with pytest.raises(InputError, match=r"refuses this one \(401\); run `hf auth login`") as refused:
        claimed()
    assert "revoked" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"expected a token of the Hub with the right to write, found none; .*or else"):
        claimed()


@pytest.mark.parametrize("trouble", [429, 500, "down", "hang"])
def test_a_hub_out_of_reach_is_told_within_seconds(
    hub: LoopbackHub,
    trouble: int | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_repository, "_SECONDS_OF_SILENCE_AT_FIRST", 0.3)
    hub.trouble = lambda method, path, number: trouble
    with pytest.raises(InputError, match=r"expected the Hub at http://127.*, found .*; try again, or else"):
        claimed()


def test_a_hub_where_nobody_listens_is_told(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"expected the Hub at http://127.0.0.1:9, found ConnectError"):
        claimed()


# A push


def test_a_push_is_one_commit_with_a_tag_that_moves(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    claimed()
    folder = stage(tmp_path / "staged", model_folder)
    first = push_folder(folder, "me/my-gpt2", message="Step 4", tag="step-000004")
    there = hub.model("me/my-gpt2")
    assert there.messages == ["Step 4"]
    local = {path.name: path.read_bytes() for path in folder.iterdir()}
    pushed = there.files("step-000004")
    assert {name: content for name, content in pushed.items() if name not in (".gitattributes", "README.md")} == {
        name: content for name, content in local.items() if name != "README.md"
    }
    again = push_folder(folder, "me/my-gpt2", message="Step 4 again", tag="step-000004")
    assert (there.messages, again.commit) == (["Step 4"], first.commit)  # nothing new, no commit
    (folder / "config.json").unlink()
    (folder / "config.json").write_text("{}")
    third = push_folder(folder, "me/my-gpt2", message="Another run", tag="step-000004")
    assert third.commit != first.commit
    assert there.tags == {"step-000004": third.commit}


def test_large_files_go_up_in_parts(monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path) -> None:
    hub = LoopbackHub(accounts=ACCOUNTS, part_bytes=50_000)
    turn_to(hub, monkeypatch, tmp_path / "cache")
    with serving(hub):
        claimed()
        push_folder(stage(tmp_path / "staged", model_folder), "me/my-gpt2", message="Parts")
    weights = (model_folder / "model.safetensors").read_bytes()
    assert len(weights) > 100_000
    assert hub.model("me/my-gpt2").files()["model.safetensors"] == weights
    assert len([path for method, path in hub.writes() if "/lfs/upload/" in path]) == -(-len(weights) // 50_000)


@pytest.mark.parametrize("trouble", [401, 403, 404, 409, 429, 500, "cut", "down"])
@pytest.mark.parametrize("where", ["/lfs/upload", "/preupload/", "/commit/", "/tag/"])
def test_a_push_that_broke_shows_nothing_half_made_and_goes_through_later(
    hub: LoopbackHub,
    model_folder: Path,
    tmp_path: Path,
    trouble: int | str,
    where: str,
) -> None:
    claimed()
    folder = stage(tmp_path / "staged", model_folder)
    before = dict(hub.model("me/my-gpt2").files())
    hub.trouble = lambda method, path, number: trouble if where in path else None
    with pytest.raises(Exception) as failed:  # noqa: PT011 - whichever the client raises
        push_folder(folder, "me/my-gpt2", message="Step 4", tag="step-000004")
    assert TOKEN not in hub_repository.told(failed.value)
    if where != "/tag/":
        assert hub.model("me/my-gpt2").files() == before
    hub.trouble = lambda method, path, number: None
    pushed = push_folder(folder, "me/my-gpt2", message="Step 4", tag="step-000004")
    assert hub.model("me/my-gpt2").tags == {"step-000004": pushed.commit}
    assert hub.model("me/my-gpt2").messages == ["Step 4"]


def test_weights_that_were_in_other_pieces_go(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"{}", "notes.md": b"mine"}
    hub.repositories["model", "me/my-gpt2"] = Repository({**old, "last-checkpoint/config.json": b"{}"})
    push_folder(stage(tmp_path / "staged", model_folder), "me/my-gpt2", message="New")
    names = set(hub.model("me/my-gpt2").files())
    assert names & {*old, "last-checkpoint/config.json"} == {"notes.md"}


def test_an_error_is_told_without_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-another-kind")
    line = hub_repository.told(ValueError(f"bad header\nBearer {TOKEN} or secret-of-another-kind"))
    assert line == "ValueError: bad header Bearer hf_… or hf_…"


def test_set_tag_raises_what_is_no_conflict(hub: LoopbackHub) -> None:
    claimed()
    with pytest.raises(huggingface_hub.errors.RevisionNotFoundError):
        set_tag("me/my-gpt2", "step-000004", "0" * 40)


# The card on the Hub


def test_a_card_edited_on_the_hub_is_kept(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    claimed()
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


def test_a_card_edited_here_replaces_one_that_nobody_edited_there(
    hub: LoopbackHub,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    claimed()
    folder = stage(tmp_path / "staged", model_folder)
    push_folder(folder, "me/my-gpt2", message="First")
    (folder / "README.md").unlink()
    (folder / "README.md").write_text(CARD.replace("# A model", "# My model"))
    assert not push_folder(folder, "me/my-gpt2", message="Second").card_kept
    assert b"# My model" in hub.model("me/my-gpt2").files()["README.md"]


# A run


def published(make: Make, **changes: Any) -> tuple[Recipe, str]:
    recipe = make(**{"push_to_hub": True, "hub_model_id": "me/tiny", **changes})
    train(recipe)
    return recipe, (Path(recipe.output_dir) / "train.log").read_text()


@pytest.mark.usefixtures("fresh_accelerator")
def test_every_checkpoint_is_pushed_while_training_and_the_model_at_the_end(
    hub: LoopbackHub, tiny_recipe: Make
) -> None:
    recipe, log = published(tiny_recipe)
    there = hub.model("me/tiny")
    assert there.tags["step-000012"] == there.branches["main"]
    assert re.search(r"step 12 is on the Hub: me/tiny, tag step-000012", log)
    files = there.files()
    local = {p.name: p.read_bytes() for p in (Path(recipe.output_dir) / "model").iterdir() if p.is_file()}
    assert {name for name in files if name != ".gitattributes"} == set(local)
    assert files["model.safetensors"] == local["model.safetensors"]
    assert not (Path(recipe.output_dir) / ".pushing").exists()
    assert not [name for name in files if "training_state" in name or "optimizer" in name]


@pytest.mark.usefixtures("fresh_accelerator")
def test_strategy_end_pushes_once(hub: LoopbackHub, tiny_recipe: Make) -> None:
    published(tiny_recipe, hub_strategy="end", hub_private_repo=True)
    assert hub.model("me/tiny").messages == ["Step 12"]
    assert hub.model("me/tiny").private


@pytest.mark.usefixtures("fresh_accelerator")
def test_strategy_checkpoint_pushes_what_another_machine_goes_on_from(
    hub: LoopbackHub,
    tiny_recipe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, _ = published(tiny_recipe, hub_strategy="checkpoint", max_steps=8)
    files = hub.model("me/tiny").files()
    state = json.loads(files["last-checkpoint/training_state/trainer_state.json"])
    assert state["step"] == 8
    for name, content in files.items():
        for secret in (str(tmp_path).encode(), TOKEN.encode(), recipe.data_dir.encode(), b"/home/", b"/root/"):
            assert secret not in content, (name, secret)
    for name, content in files.items():
        if name.startswith("last-checkpoint/"):
            path = tmp_path / "elsewhere" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for forget in (lambda: AcceleratorState._reset_state(True), GradientState._reset_state, PartialState._reset_state):
        forget()
    resumed = tiny_recipe(
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "elsewhere" / "last-checkpoint"),
        max_steps=10,
    )
    train(resumed)
    assert "going on from" in (tmp_path / "resumed" / "train.log").read_text()


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("trouble", [401, "cut", "hang"])
def test_an_outage_changes_nothing_of_the_training(
    hub: LoopbackHub,
    tiny_recipe: Make,
    trouble: int | str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "LAST_PUSH_SECONDS", 1.0)
    started = threading.Event()

    def out(method: str, path: str, number: int) -> int | str | None:
        if started.is_set() or "/preupload/" in path or "/tree/" in path:
            started.set()
            return trouble
        return None

    hub.trouble = out
    recipe, log = published(tiny_recipe)
    command_line = f"python -m training.hub push {recipe.output_dir} --repo_id me/tiny"
    assert command_line in log
    if trouble != "hang":
        assert re.search(r"step \d+ is not on the Hub yet: \w+", log)
    assert TOKEN not in log
    hub.trouble = lambda method, path, number: None
    hub.released.set()
    for thread in threading.enumerate():  # in a run of its own it would have ended with the process
        if thread.name == "pusher":
            thread.join(30)
    command.main(["push", recipe.output_dir, "--repo_id", "me/tiny"])
    weights = (Path(recipe.output_dir) / "model" / "model.safetensors").read_bytes()
    assert hub.model("me/tiny").files("step-000012")["model.safetensors"] == weights


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_hub_that_comes_back_gets_the_newest(hub: LoopbackHub, tiny_recipe: Make) -> None:
    refused = []

    def at_first(method: str, path: str, number: int) -> int | None:
        if "/commit/" in path and len(refused) < 2:
            refused.append(path)
            return 500
        return None

    hub.trouble = at_first
    _, log = published(tiny_recipe)
    assert "is not on the Hub yet" in log
    assert "step 12 is on the Hub" in log
    assert len(refused) == 2


def test_a_run_that_may_not_push_does_not_start(hub: LoopbackHub, tiny_recipe: Make) -> None:
    recipe = tiny_recipe(push_to_hub=True, hub_model_id="them/gpt2")
    with pytest.raises(InputError, match="push_to_hub: false and push the run later"):
        train(recipe)
    assert not Path(recipe.output_dir).exists()


def test_the_judge_of_metadata_can_refuse() -> None:
    assert len(metadata_errors({"content": "---\nlicense: nonsense\ndatasets: [a b]\n---\n"})) == 2
    wrong = [{"name": "x", "results": [{"task": {}, "dataset": {"type": "a b", "name": "c"}, "metrics": [{}]}]}]
    assert len(metadata_errors({"content": f"---\n{yaml.safe_dump({'model-index': wrong})}---\n"})) == 3


def test_a_push_in_progress_outlives_the_pruning_of_its_checkpoint(
    hub: LoopbackHub,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    claimed()
    checkpoint = tmp_path / "step-000004"
    shutil.copytree(model_folder, checkpoint)
    weights = (checkpoint / "model.safetensors").read_bytes()
    staged = stage(tmp_path / "staged", checkpoint)

    def prune(method: str, path: str, number: int) -> None:
        if "/preupload/" in path:
            shutil.rmtree(checkpoint, ignore_errors=True)

    hub.trouble = prune
    push_folder(staged, "me/my-gpt2", message="Step 4")
    assert not checkpoint.exists()
    assert hub.model("me/my-gpt2").files()["model.safetensors"] == weights
