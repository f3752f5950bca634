"""Pushes of a model folder: the Hub's real client against a server on this machine."""

import concurrent.futures.thread
import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from support.hub_client import ACCOUNTS, TOKEN, point_client_at
from support.loopback_hub import LoopbackHub, serving
from support.loopback_repository import Repository
from support.repositories import CARD, ensured, model_folder  # noqa: F401 - a fixture
from support.tiny_models import tiny

from common.cli_errors import InputError
from training.hub import __main__ as command
from training.hub import hub_errors
from training.hub.repository import push_folder, set_tag
from training.hub.staging import stage
from training.recipe import Recipe

# The client itself uploads large files this way without Xet.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("impatient"),
]

Make = Callable[..., Recipe]


# The repository


def test_a_repository_is_created_and_named_after_the_folder(hub: LoopbackHub) -> None:
    assert ensured(None, default_name="my run (2)", private=True) == "me/my-run-2"
    assert hub.model("me/my-run-2").private
    assert ensured("our-lab/x") == "our-lab/x"
    assert ensured("our-lab/x") == "our-lab/x"  # it exists
    assert not hub.model("our-lab/x").private


@pytest.mark.parametrize("repo_id", ["a b", "me/my/gpt2", "me/", "-x", "me/a--b", "me/x.git", "", "C:\\gpt2"])
def test_an_invalid_repository_id_is_rejected_before_any_request(hub: LoopbackHub, repo_id: str) -> None:
    with pytest.raises(InputError, match=r"invalid repository id .*; use a name such as your-name/my-gpt2"):
        ensured(repo_id)
    assert not hub.requests


@pytest.mark.parametrize("exists", [True, False])
def test_a_repository_of_another_user_is_rejected(hub: LoopbackHub, exists: bool) -> None:
    if exists:
        hub.repositories["model", "them/gpt2"] = Repository({"x": b"theirs"})
    with pytest.raises(InputError, match=r"you cannot write to them/gpt2 \(403\); .*, or else"):
        ensured("them/gpt2")


def test_a_missing_and_a_rejected_token_are_named(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_revokedLongAgo")
    with pytest.raises(InputError, match=r"the Hub rejected your token \(401\); run `hf auth login`") as refused:
        ensured()
    assert "revoked" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"there is no token for the Hub; .*or else"):
        ensured()


@pytest.mark.parametrize("trouble", [429, 500, "down", "hang"])
def test_an_unreachable_hub_is_reported_within_seconds(
    hub: LoopbackHub,
    trouble: int | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.hub.repository._READ_SECONDS_AT_FIRST", 0.3)
    hub.trouble = lambda method, path, number: trouble
    with pytest.raises(InputError, match=r"cannot reach the Hub at http://127.*; try later, or else"):
        ensured()


def test_a_push_that_the_hub_rejects_for_good_is_not_retried(hub: LoopbackHub) -> None:
    hub.trouble = lambda method, path, number: 400 if "/create" in path else None
    with pytest.raises(InputError, match=r"does not accept this push \(BadRequestError.*\); fix that, or else"):
        ensured()


def test_a_refused_connection_is_reported(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"cannot reach the Hub at http://127.0.0.1:9 \(ConnectError"):
        ensured()


# A push


def test_a_push_is_one_commit_with_a_tag_that_moves(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    ensured()
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
    point_client_at(hub, monkeypatch, tmp_path / "cache")
    with serving(hub):
        ensured()
        push_folder(stage(tmp_path / "staged", model_folder), "me/my-gpt2", message="Parts")
    weights = (model_folder / "model.safetensors").read_bytes()
    assert len(weights) > 100_000
    assert hub.model("me/my-gpt2").files()["model.safetensors"] == weights
    assert len([path for method, path in hub.writes() if "/lfs/upload/" in path]) == -(-len(weights) // 50_000)


@pytest.mark.parametrize("trouble", [401, 403, 404, 409, 429, 500, "cut", "down"])
@pytest.mark.parametrize("where", ["/lfs/upload", "/preupload/", "/commit/", "/tag/"])
def test_a_failed_push_changes_nothing_and_succeeds_later(
    hub: LoopbackHub,
    model_folder: Path,
    tmp_path: Path,
    trouble: int | str,
    where: str,
) -> None:
    ensured()
    folder = stage(tmp_path / "staged", model_folder)
    before = dict(hub.model("me/my-gpt2").files())
    hub.trouble = lambda method, path, number: trouble if where in path else None
    with pytest.raises(Exception) as failed:  # noqa: PT011 - whichever the client raises
        push_folder(folder, "me/my-gpt2", message="Step 4", tag="step-000004")
    assert TOKEN not in hub_errors.one_line(failed.value)
    if where != "/tag/":
        assert hub.model("me/my-gpt2").files() == before
    hub.trouble = lambda method, path, number: None
    pushed = push_folder(folder, "me/my-gpt2", message="Step 4", tag="step-000004")
    assert hub.model("me/my-gpt2").tags == {"step-000004": pushed.commit}
    assert hub.model("me/my-gpt2").messages == ["Step 4"]


def test_a_hanging_upload_does_not_keep_the_process_alive(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    """At its exit, the interpreter joins the threads of executors, and others that are not daemons."""
    ensured()
    folder = stage(tmp_path / "staged", model_folder)
    (folder / "curves.png").write_bytes(b"\x89PNG" * 10)  # a second LFS file, by .gitattributes
    hangs = hub.hang_uploads()
    joined_at_exit = set(concurrent.futures.thread._threads_queues)

    def push() -> None:
        with contextlib.suppress(Exception):
            push_folder(folder, "me/my-gpt2", message="Step 4")

    thread = threading.Thread(target=push, daemon=True)
    thread.start()
    assert hangs.wait(20)
    time.sleep(0.05)
    assert set(concurrent.futures.thread._threads_queues) <= joined_at_exit
    assert not hub.large_files
    hub.trouble = lambda method, path, number: None
    hub.released.set()
    thread.join(20)
    assert not thread.is_alive()


def test_weights_in_other_shards_are_deleted(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
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
    # A push without last-checkpoint/ keeps that of an earlier push.
    assert names & {*old, "last-checkpoint/config.json"} == {
        *("notes.md", "adapter_model.safetensors", "last-checkpoint/config.json")
    }
    (folder / "last-checkpoint").mkdir()
    (folder / "last-checkpoint" / "model.safetensors").write_bytes(b"")
    push_folder(folder, "me/my-gpt2", message="With state")
    assert {name for name in hub.model("me/my-gpt2").files() if "/" in name} == {"last-checkpoint/model.safetensors"}


def test_an_error_message_hides_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-another-kind")
    line = hub_errors.one_line(ValueError(f"bad header\nBearer {TOKEN} or secret-of-another-kind"))
    assert line == "ValueError: bad header Bearer hf_… or hf_…"


def test_an_error_message_hides_signed_urls() -> None:
    error = ConnectionError(
        "403 for url 'https://storage/x?X-Amz-Signature=abc&y=1' of https://hf.co/me For more information check: https://x/403"
    )
    assert hub_errors.one_line(error) == "ConnectionError: 403 for url 'https://storage/x?…' of https://hf.co/me"


def test_set_tag_raises_errors_other_than_conflicts(hub: LoopbackHub) -> None:
    ensured()
    with pytest.raises(huggingface_hub.errors.RevisionNotFoundError):
        set_tag("me/my-gpt2", "step-000004", "0" * 40)


# The card on the Hub


def test_a_push_that_others_keep_overtaking_can_be_retried_later(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path
) -> None:
    ensured()
    hub.trouble = lambda method, path, number: 412 if "/commit/" in path else None
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as refused:
        push_folder(stage(tmp_path / "staged", model_folder), "me/my-gpt2", message="First")
    assert hub_errors.can_retry(refused.value)
    assert len([path for _, path in hub.writes() if "/commit/" in path]) == 3


def test_an_invalid_file_is_not_retried() -> None:
    assert not hub_errors.can_retry(ValueError("Invalid metadata in README.md"))
    assert hub_errors.can_retry(ConnectionError("reset"))


def test_the_wait_of_a_rate_limit_is_respected(hub: LoopbackHub) -> None:
    ensured()
    for header in ({"Retry_After": "77"}, {"RateLimit": '"api";r=0;t=77'}):
        hub.trouble = lambda method, path, number, header=header: (429, header)
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as refused:
            list(huggingface_hub.HfApi().list_repo_tree("me/my-gpt2"))  # by default the client sleeps that long
        assert hub_errors.retry_after(refused.value) == 77
    assert hub_errors.retry_after(ConnectionError("reset")) == 0


@pytest.mark.parametrize("trouble", [401, 404])
def test_a_failure_of_xet_is_one_line_and_changes_nothing(
    hub: LoopbackHub, model_folder: Path, trouble: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hf-xet installed, the client uses Xet, which asks for its own token (`_upload_xet_files`)."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    hub.trouble = lambda method, path, number: trouble if "/xet-write-token/" in path else None
    with pytest.raises(InputError, match=r"cannot reach the Hub at http://127.* \(ConnectionError.*try later"):
        command.main(["push", str(model_folder), "--repo_id", "me/my-gpt2"])
    assert [path for _, path, _ in hub.requests if "/xet-write-token/main" in path]
    assert not hub.model("me/my-gpt2").messages


def test_a_push_updates_an_existing_native_branch(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    command.main(["push", str(model_folder), "--repo_id", "me/my-gpt2", "--native"])
    there = hub.model("me/my-gpt2")
    first = there.files("native")["model.safetensors"]
    changed = tiny()
    changed.transformer.ln_f.weight.data.mul_(2.0)
    changed.save_pretrained(tmp_path / "changed")
    command.main(["push", str(tmp_path / "changed"), "--repo_id", "me/my-gpt2"])
    assert there.files("native")["model.safetensors"] == there.files()["model.safetensors"] != first


def test_a_model_folder_without_training_state_cannot_push_one(hub: LoopbackHub, model_folder: Path) -> None:
    with pytest.raises(InputError, match="--checkpoint needs a checkpoint"):
        command.main(["push", str(model_folder), "--repo_id", "me/my-gpt2", "--checkpoint"])
    assert not hub.requests


def test_a_push_survives_the_deletion_of_its_checkpoint(
    hub: LoopbackHub,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    ensured()
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
