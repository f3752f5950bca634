"""Pushing a model folder and a run to the Hub: the real client against a server on this machine."""

import concurrent.futures.thread
import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from support.hub_client import ACCOUNTS, TOKEN, turn_to
from support.loopback_hub import LoopbackHub, serving
from support.loopback_repository import Repository
from support.loopback_writing import metadata_errors
from support.tiny_models import tiny

from common.cli_errors import InputError
from training.hub import command
from training.hub import repository as hub_repository
from training.hub.repository import claim, push_folder, set_tag
from training.hub.staging import stage
from training.recipe import Recipe

# How the client itself sends large files where there is no Xet.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("impatient"),
]

Make = Callable[..., Recipe]
CARD = "---\nlicense: mit\n---\n\n# A model\n\n<!-- generated: use -->\nold\n<!-- end of generated: use -->\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "my-gpt2"
    tiny().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


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
    with pytest.raises(InputError, match=r"expected the Hub at http://127.*, found .*; wait for it, or else"):
        claimed()


def test_what_the_hub_will_never_take_is_not_to_be_waited_for(hub: LoopbackHub) -> None:
    hub.trouble = lambda method, path, number: 400 if "/create" in path else None
    with pytest.raises(InputError, match=r"cannot be pushed as it is: BadRequestError.*; mend that, or else"):
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


def test_an_upload_that_hangs_keeps_no_process_alive(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    """The interpreter joins the threads of executors at its end, and only them and those that are no daemons."""
    claimed()
    folder = stage(tmp_path / "staged", model_folder)
    (folder / "curves.png").write_bytes(b"\x89PNG" * 10)  # a second large file, by .gitattributes
    hangs = hub.hang_uploads()
    joined_at_the_end = set(concurrent.futures.thread._threads_queues)

    def push() -> None:
        with contextlib.suppress(Exception):
            push_folder(folder, "me/my-gpt2", message="Step 4")

    thread = threading.Thread(target=push, daemon=True)
    thread.start()
    assert hangs.wait(20)
    time.sleep(0.05)
    assert set(concurrent.futures.thread._threads_queues) <= joined_at_the_end
    assert not hub.large_files
    hub.trouble = lambda method, path, number: None
    hub.released.set()
    thread.join(20)
    assert not thread.is_alive()


def test_weights_that_were_in_other_pieces_go(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    old = {
        "model-00001-of-00002.safetensors": b"",
        "model.safetensors.index.json": b"{}",
        "notes.md": b"mine",
        "adapter_model.safetensors": b"mine",
    }
    hub.repositories["model", "me/my-gpt2"] = Repository({**old, "last-checkpoint/config.json": b"{}"})
    folder = stage(tmp_path / "staged", model_folder)
    push_folder(folder, "me/my-gpt2", message="New")
    names = set(hub.model("me/my-gpt2").files())
    # A push by hand brings no state to go on from, and takes none away.
    assert names & {*old, "last-checkpoint/config.json"} == {
        *("notes.md", "adapter_model.safetensors", "last-checkpoint/config.json")
    }
    (folder / "last-checkpoint").mkdir()
    (folder / "last-checkpoint" / "model.safetensors").write_bytes(b"")
    push_folder(folder, "me/my-gpt2", message="With state")
    assert {name for name in hub.model("me/my-gpt2").files() if "/" in name} == {"last-checkpoint/model.safetensors"}


def test_an_error_is_told_without_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-another-kind")
    line = hub_repository.told(ValueError(f"bad header\nBearer {TOKEN} or secret-of-another-kind"))
    assert line == "ValueError: bad header Bearer hf_… or hf_…"


def test_an_error_is_told_without_what_lets_others_write() -> None:
    error = ConnectionError(
        "403 for url 'https://storage/x?X-Amz-Signature=abc&y=1' of https://hf.co/me For more information check: https://x/403"
    )
    assert hub_repository.told(error) == "ConnectionError: 403 for url 'https://storage/x?…' of https://hf.co/me"


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


def test_a_card_edited_while_a_push_is_on_its_way_is_kept_too(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path
) -> None:
    claimed()
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


def test_a_branch_that_others_overtake_again_and_again_is_tried_later(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path
) -> None:
    claimed()
    hub.trouble = lambda method, path, number: 412 if "/commit/" in path else None
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as refused:
        push_folder(stage(tmp_path / "staged", model_folder), "me/my-gpt2", message="First")
    assert hub_repository.may_pass(refused.value)
    assert len([path for _, path in hub.writes() if "/commit/" in path]) == 3


def test_what_is_wrong_with_a_file_is_not_waited_for() -> None:
    assert not hub_repository.may_pass(ValueError("Invalid metadata in README.md"))
    assert hub_repository.may_pass(ConnectionError("reset"))


def test_a_hub_that_names_the_time_to_wait_is_heard(hub: LoopbackHub) -> None:
    claimed()
    for header in ({"Retry_After": "77"}, {"RateLimit": '"api";r=0;t=77'}):
        hub.trouble = lambda method, path, number, header=header: (429, header)
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as refused:
            list(huggingface_hub.HfApi().list_repo_tree("me/my-gpt2"))  # the client itself would sleep so long
        assert hub_repository.asked_to_wait(refused.value) == 77
    assert hub_repository.asked_to_wait(ConnectionError("reset")) == 0


@pytest.mark.parametrize("trouble", [401, 404])
def test_xet_that_refuses_is_one_line_and_leaves_nothing_half_made(
    hub: LoopbackHub, model_folder: Path, trouble: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client takes Xet where hf-xet is installed, and has it ask for a token of its own (`_upload_xet_files`)."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    hub.trouble = lambda method, path, number: trouble if "/xet-write-token/" in path else None
    with pytest.raises(InputError, match=r"expected the Hub at http://127.*, found ConnectionError.*wait for it"):
        command.main(["push", str(model_folder), "--repo_id", "me/my-gpt2"])
    assert [path for _, path, _ in hub.requests if "/xet-write-token/main" in path]
    assert not hub.model("me/my-gpt2").messages


def test_a_push_renews_the_native_branch_that_an_earlier_one_made(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path
) -> None:
    command.main(["push", str(model_folder), "--repo_id", "me/my-gpt2", "--native"])
    there = hub.model("me/my-gpt2")
    first = there.files("native")["model.safetensors"]
    changed = tiny()
    changed.transformer.ln_f.weight.data.mul_(2.0)
    changed.save_pretrained(tmp_path / "changed")
    command.main(["push", str(tmp_path / "changed"), "--repo_id", "me/my-gpt2"])
    assert there.files("native")["model.safetensors"] == there.files()["model.safetensors"] != first


def test_a_folder_without_a_state_cannot_bring_one(hub: LoopbackHub, model_folder: Path) -> None:
    with pytest.raises(InputError, match="--checkpoint: expected a checkpoint, or a run"):
        command.main(["push", str(model_folder), "--repo_id", "me/my-gpt2", "--checkpoint"])
    assert not hub.requests


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
