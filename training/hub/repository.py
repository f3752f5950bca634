"""A repository on the Hub: created or checked before work begins, and written to in single commits.

`HfApi.upload_folder` is not used: with Xet it commits a folder in batches while it uploads (`_upload_pipeline.py` of
huggingface_hub), so that a download in between may get new weights with an old config. `create_commit` is atomic.
"""

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from common.cli_errors import InputError
from training.hub.card import card_for_repository
from training.hub.card_edits import with_edits_of
from training.hub.hub_errors import OVERTAKEN, input_errors, limit_client, status_of
from training.hub.staging import LAST_CHECKPOINT

Kind = Literal["model", "dataset", "space"]

NATIVE = "native"  # the branch with the same weights as a plain GPT-2

_READ_SECONDS_AT_FIRST = 15.0
_ATTEMPTS_WHEN_OVERTAKEN = 3


class Pushed(NamedTuple):
    """The result of a push."""

    commit: str
    card: str  # the README.md that was pushed; empty without one
    card_kept: bool  # its text is that of the Hub, where it was edited
    has_native: bool = False  # the repository has a native branch


def ensure_repository(
    repo_id: str | None, *, default_name: str, private: bool, kind: Kind = "model", advice: str
) -> str:
    """Create a repository unless it exists, check that we may write to it, and return its full id.

    `repo_id` is owner/name, or a name under the token's user; by default it is made from `default_name`.

    Raises:
        HubOutOfReachError: the Hub is unreachable or overloaded.
        InputError: invalid id, no token or a rejected one, no write access; the message ends with `advice`.
    """
    if repo_id is None:
        repo_id = re.sub(r"-{2,}|\.{2,}", "-", re.sub(r"[^\w.-]+", "-", default_name, flags=re.ASCII)).strip("-.")[:96]
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise InputError(
            f"invalid repository id {repo_id!r}; use a name such as your-name/my-gpt2 (letters, digits, - _ .)"
        ) from None
    limit_client(_READ_SECONDS_AT_FIRST)
    api = HfApi()
    try:
        with input_errors(repo_id, advice):
            user = api.whoami()["name"]
            repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
            sdk = "gradio" if kind == "space" else None
            api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True, space_sdk=sdk)
            # Repositories of others exist too.
            api.auth_check(repo_id, repo_type=kind, write=True)
    finally:
        limit_client()
    return repo_id


def push_folder(folder: Path, repo_id: str, *, message: str, tag: str | None = None, branch: str = "main") -> Pushed:
    """Push a model folder in one commit to a branch, which is created if needed, and set or move a tag.

    Files of an earlier push that this folder lacks are deleted: weights in other shards, files of last-checkpoint/ if
    this folder has one, and on the native branch everything. A card that was edited on the Hub keeps its text.
    """
    if branch != "main":
        HfApi().create_branch(repo_id, branch=branch, exist_ok=True)
    has_native = HfApi().revision_exists(repo_id, NATIVE)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    card = None
    if "README.md" in files:
        text = files.pop("README.md").read_text(encoding="utf-8")
        card = card_for_repository(text, repo_id, branch=branch, has_native=has_native)
    has_state = any(name.startswith(f"{LAST_CHECKPOINT}/") for name in files)
    pushed = push_files(
        *(repo_id, files, message), card=card, branch=branch, is_stale=lambda name: _is_ours(name, branch, has_state)
    )
    if tag is not None:
        set_tag(repo_id, tag, pushed.commit)
    return pushed._replace(has_native=has_native)


def push_files(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    message: str,
    *,
    kind: Kind = "model",
    branch: str = "main",
    card: str | None = None,
    is_stale: Callable[[str], bool] = lambda name: False,
    report: Callable[[str], object] = lambda line: None,
) -> Pushed:
    """Push files and a card, which keeps edits made on the Hub, in one commit on top of the branch's head.

    Files on the Hub that `is_stale` and are not pushed are deleted. `report` gets a line for each uploaded file.
    """
    api = HfApi()
    for attempts_left in reversed(range(_ATTEMPTS_WHEN_OVERTAKEN)):
        head = str(api.repo_info(repo_id, revision=branch, repo_type=kind).sha)
        on_hub = set(api.list_repo_files(repo_id, revision=head, repo_type=kind))
        files, merged, card_kept = dict(files), "", False
        if card is not None:
            existing = read_card(repo_id, head, kind) if "README.md" in on_hub and branch == "main" else None
            merged, card_kept = with_edits_of(existing, card)
            files["README.md"] = merged.encode()
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        for number, addition in enumerate(additions, start=1):
            # One file per call, which runs in this thread. For several files the client makes a thread pool
            # (`_upload_lfs_files`), and the interpreter waits for its threads: a hanging upload would block the exit.
            api.preupload_lfs_files(repo_id, [addition], repo_type=kind, revision=branch)
            report(f"{addition.path_in_repo}: {number} of {len(additions)} files uploaded")
        deletions = [CommitOperationDelete(name) for name in sorted(on_hub - set(files)) if is_stale(name)]
        try:
            commit = api.create_commit(
                repo_id,
                [*additions, *deletions],
                commit_message=message,
                repo_type=kind,
                revision=branch,
                parent_commit=head,
            )
        except HfHubHTTPError as error:  # 412: another commit was made on top of `head`
            if status_of(error) not in OVERTAKEN or not attempts_left:
                raise
        else:
            break
    return Pushed(str(commit.oid), merged, card_kept)


def _is_ours(name: str, branch: str, has_state: bool) -> bool:
    """Return whether a file on the Hub came from an earlier push, and is deleted if this push lacks it.

    A push without last-checkpoint/ keeps that of an earlier one, which is complete in itself.
    """
    if branch == NATIVE:
        return name != ".gitattributes"
    weights = re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)
    return weights is not None or (has_state and name.startswith(f"{LAST_CHECKPOINT}/"))


def read_card(repo_id: str, commit: str, kind: Kind = "model") -> str:
    """Return the README.md of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        path = hf_hub_download(repo_id, "README.md", revision=commit, repo_type=kind, local_dir=folder)
        return Path(path).read_text(encoding="utf-8", errors="replace")


def set_tag(repo_id: str, tag: str, commit: str) -> None:
    """Point a tag at a commit; a tag of that name is moved."""
    api = HfApi()
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if status_of(error) != 409:
            raise
        api.delete_tag(repo_id, tag=tag)
        api.create_tag(repo_id, tag=tag, revision=commit)
