"""A repository on the Hub that we may write to: claimed before work begins, and written to in single commits.

`HfApi.upload_folder` is not used: where Xet is installed it commits a folder in batches while it uploads
(`_upload_pipeline.py` of huggingface_hub), so that somebody who loads the model meanwhile may get new weights with an
old config. `create_commit` makes one commit of it all, which is there or not.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.cli_errors import InputError
from common.hub_retry import is_transient, network_errors
from training.hub.card import PLACE
from training.hub.card_merging import generated_text, merged, stamped, was_edited
from training.hub.staging import LAST_CHECKPOINT

Kind = Literal["model", "dataset"]

NATIVE = "native"  # the branch with the same weights as a plain GPT-2

_SECONDS_TO_CONNECT = 10.0
_SECONDS_OF_SILENCE = 120.0  # the Hub thinks about a large commit before it answers
_SECONDS_OF_SILENCE_AT_FIRST = 15.0
_SECONDS_THAT_THE_CLIENT_MAY_SLEEP = 10.0
_OVERTAKEN = (409, 412)  # somebody else's commit came between our reading and our writing
_TRIES_WHEN_OVERTAKEN = 3


class HubOutOfReachError(InputError):
    """The Hub does not answer, or not now: the same may succeed later with nobody doing anything."""


def give_up_on_silence(seconds: float = _SECONDS_OF_SILENCE) -> None:
    """Let the Hub's client raise when it hears nothing for so long, or is asked to come back much later.

    By itself it waits for ever, and sleeps for the hour that a rate limit asks for.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, logging
    from huggingface_hub.utils._http import default_client_factory

    def client() -> Any:
        made = default_client_factory()
        made.timeout = type(made.timeout)(seconds, connect=min(seconds, _SECONDS_TO_CONNECT))
        made.event_hooks = {**made.event_hooks, "response": [*made.event_hooks["response"], _raise_if_asked_to_wait]}
        return made

    huggingface_hub.set_client_factory(client)
    disable_progress_bars()
    logging.set_verbosity_error()  # its line for each try; ours tell what matters


def _raise_if_asked_to_wait(response: Any) -> None:
    from huggingface_hub.utils import hf_raise_for_status

    if response.is_error and _seconds_asked_for(response) > _SECONDS_THAT_THE_CLIENT_MAY_SLEEP:
        response.read()
        hf_raise_for_status(response)


def _seconds_asked_for(response: Any) -> float:
    """What a rate limit asks for by Retry-After, or by the Hub's own `RateLimit: "api";r=0;t=55`."""
    after = response.headers.get("Retry-After", "").strip()
    limit = re.search(r"\br=0;t=(\d+)", response.headers.get("RateLimit", ""))
    return max(float(after) if after.isdigit() else 0.0, float(limit[1]) if limit else 0.0)


def told(error: BaseException) -> str:
    """An error in one line, without any token, and without the signatures of addresses that may be written to."""
    from huggingface_hub import get_token

    cause = http_error(error) or error
    text = " ".join(str(cause).split())
    token = get_token()
    text = re.sub(r"hf_\w{8,}", "hf_…", text.replace(token, "hf_…") if token else text)
    text = re.sub(r"(https?://[^\s?]+)\?[^\s'\")]+", r"\1?…", text)
    text = re.sub(r" For more information check: \S+", "", text)
    return f"{type(cause).__name__}: {text[:300]}"


def http_error(error: BaseException) -> BaseException | None:
    """The Hub's refusal that led to an error, if one did: the client wraps those of large files."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    return cause


def status_of(error: BaseException) -> int:
    """The HTTP status that an error came with; 0 without one."""
    return getattr(getattr(http_error(error), "response", None), "status_code", 0)


def may_pass(error: BaseException) -> bool:
    """Whether the same push may succeed later with nobody doing anything."""
    cause = http_error(error) or error
    # What is wrong with a file or a card stays wrong.
    return status_of(error) in _OVERTAKEN or (is_transient(cause) and not isinstance(cause, ValueError))


def asked_to_wait(error: BaseException) -> float:
    """The seconds that the Hub asked us to wait for before the next try; 0 where it did not."""
    response = getattr(http_error(error), "response", None)
    return 0.0 if response is None else _seconds_asked_for(response)


@contextmanager
def refused_in_one_line(repo_id: str, way_out: str) -> Iterator[None]:
    """Turn what the Hub and the network raise into an `InputError` that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise InputError(
            "expected a token of the Hub with the right to write, found none; run `hf auth login` or set HF_TOKEN "
            f"(https://huggingface.co/settings/tokens), {way_out}"
        ) from None
    except OfflineModeIsEnabled:
        raise InputError(f"expected the Hub, found HF_HUB_OFFLINE set; unset it, {way_out}") from None
    except InputError:
        raise
    except _client_errors() as error:
        status = status_of(error)
        if status == 401:
            raise InputError(
                "expected a token that the Hub knows, found that it refuses this one (401); run `hf auth login` or set "
                f"HF_TOKEN anew, {way_out}"
            ) from None
        if status in (403, 404):
            raise InputError(
                f"expected a repository that you may write to, found that the Hub refuses {repo_id} ({status}); choose "
                f"one under your own name and a token with the right to write, {way_out}"
            ) from None
        if may_pass(error):
            raise HubOutOfReachError(
                f"expected the Hub at {constants.ENDPOINT}, found {told(error)}; wait for it, {way_out}"
            ) from None
        raise InputError(f"this cannot be pushed as it is: {told(error)}; mend that, {way_out}") from None


def _client_errors() -> tuple[type[BaseException], ...]:
    return (*network_errors(), RuntimeError, ValueError)


def claim(repo_id: str | None, *, default_name: str, private: bool, kind: Kind = "model", way_out: str) -> str:
    """The full id of a repository that exists from now on and that we may write to; takes seconds.

    Args:
        repo_id: as owner/name, or a name alone for one of the token's own; `default_name` when None.
        default_name: of a folder; what an id cannot hold is replaced.
        private: whether a repository that does not exist yet is made private.
        kind: of repository.
        way_out: what else can be done, as the end of the error's line.

    Raises:
        HubOutOfReachError: it does not answer.
        InputError: it is no id, there is no token or a bad one, the repository is another's.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo_id is None:
        repo_id = re.sub(r"-{2,}|\.{2,}", "-", re.sub(r"[^\w.-]+", "-", default_name, flags=re.ASCII)).strip("-.")[:96]
    try:
        validate_repo_id(repo_id)
        if not repo_id:
            raise HFValidationError("empty")
    except HFValidationError:
        raise InputError(
            f"expected a repository id such as your-name/my-gpt2 (letters, digits, - _ .), found {repo_id!r}; mend it"
        ) from None
    give_up_on_silence(_SECONDS_OF_SILENCE_AT_FIRST)
    api = HfApi()
    try:
        with refused_in_one_line(repo_id, way_out):
            if "/" not in repo_id:
                repo_id = f"{api.whoami()['name']}/{repo_id}"
            else:
                api.whoami()
            api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True)
            # Somebody else's repository exists too.
            api.auth_check(repo_id, repo_type=kind, write=True)
    finally:
        give_up_on_silence()
    return repo_id


@dataclass(frozen=True)
class Pushed:
    """A commit on the Hub.

    Attributes:
        commit: its id.
        card_kept: whether the card was edited on the Hub, so that its own text stayed.
    """

    commit: str
    card_kept: bool


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    tag: str | None = None,
    branch: str = "main",
    with_native: bool = False,
) -> Pushed:
    """Make a model folder the content of a branch, in one commit, and tag that.

    Files of an earlier push that this one does not have are deleted: weights in other pieces, those of another
    checkpoint to go on from where this one brings one, and on the native branch everything. The text of a card that
    was edited on the Hub is kept.

    Args:
        folder: whole, and nobody changes it meanwhile.
        repo_id: as owner/name.
        message: of the commit.
        tag: is moved here when it exists.
        branch: is made when it does not exist.
        with_native: whether the card is to tell of the branch with the plain GPT-2.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    if branch != "main":
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    for tries_left in reversed(range(_TRIES_WHEN_OVERTAKEN)):
        try:
            pushed = _commit(folder, repo_id, message=message, branch=branch, with_native=with_native)
            break
        except HfHubHTTPError as error:
            if status_of(error) not in _OVERTAKEN or not tries_left:
                raise
    if tag is not None:
        set_tag(repo_id, tag, pushed.commit)
    return pushed


def _commit(folder: Path, repo_id: str, *, message: str, branch: str, with_native: bool) -> Pushed:
    """Commit onto what the branch is now; the Hub refuses that with 412 if an edited card, or so, came in between."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile

    api = HfApi()
    head = api.model_info(repo_id, revision=branch).sha
    assert head is not None
    tree = api.list_repo_tree(repo_id, recursive=True, revision=head)
    there = {entry.path for entry in tree if isinstance(entry, RepoFile)}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    additions = [CommitOperationAdd(name, file) for name, file in files.items() if name != "README.md"]
    card_kept = False
    if "README.md" in files:
        local = files["README.md"].read_text(encoding="utf-8")
        change = _SAYING_NATIVE if with_native else {}
        place = f'"{repo_id}", revision="{NATIVE}"' if branch == NATIVE else f'"{repo_id}"'
        card = generated_text(local, {f'"{PLACE}"': place, **change})
        if "README.md" in there and branch != NATIVE:
            card, card_kept = with_text_of_the_hub(card, repo_id, head)
        else:
            card = stamped(card)
        additions.append(CommitOperationAdd("README.md", card.encode()))
    carries_state = any(name.startswith(f"{LAST_CHECKPOINT}/") for name in files)
    stale = [name for name in sorted(there - set(files)) if _is_ours(name, branch, carries_state)]
    deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
    for addition in additions:
        # One by one in this thread. For several the client makes a pool (`_upload_lfs_files`), whose threads the
        # interpreter waits for at its end: an upload that hangs would keep a run alive that was asked to leave.
        api.preupload_lfs_files(repo_id, [addition], revision=branch)
    commit = api.create_commit(
        repo_id, [*additions, *deletions], commit_message=message, revision=branch, parent_commit=head
    )
    return Pushed(str(commit.oid), card_kept)


def _is_ours(name: str, branch: str, carries_state: bool) -> bool:
    """Whether a file on the Hub came by a push, and is to go when the next one does not have it.

    A push without the state to go on from, such as one by hand, leaves an earlier one's: it is whole by itself.
    """
    if branch == NATIVE:
        return name != ".gitattributes"
    weights = re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)
    return weights is not None or (carries_state and name.startswith(f"{LAST_CHECKPOINT}/"))


_SAYING_NATIVE = {
    "<!-- end of generated: use -->": f"""
Programs that know GPT-2 but not this code load the same weights with `revision="{NATIVE}"`.
<!-- end of generated: use -->"""
}


def with_text_of_the_hub(card: str, repo_id: str, commit: str, kind: Kind = "model") -> tuple[str, bool]:
    """The card to push over the one that is there, and whether the text of that stays."""
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory() as place:
        downloaded = Path(hf_hub_download(repo_id, "README.md", revision=commit, repo_type=kind, local_dir=place))
        there = downloaded.read_text(encoding="utf-8", errors="replace")
    # Without a stamp it counts as edited for ever: what a person wrote there stays a person's.
    return (merged(card, there), True) if was_edited(there) else (stamped(card), False)


def has_branch(repo_id: str, branch: str) -> bool:
    """Whether the repository of a model has such a branch."""
    from huggingface_hub import HfApi

    return any(found.name == branch for found in HfApi().list_repo_refs(repo_id).branches)


def set_tag(repo_id: str, tag: str, commit: str) -> None:
    """Let a tag point at a commit, also when an earlier run has set it elsewhere."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if status_of(error) != 409:
            raise
        api.delete_tag(repo_id, tag=tag)
        api.create_tag(repo_id, tag=tag, revision=commit)
