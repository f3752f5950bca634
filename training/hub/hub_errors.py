"""Errors of pushes: their message without secrets, whether a retry can help; and time limits for the Hub's client."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, hf_raise_for_status, logging, parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory

from common.cli_errors import InputError
from common.hub_retry import is_transient, network_errors

OVERTAKEN = (409, 412)  # another commit was made between our read and our write

_CONNECT_SECONDS = 10.0
_READ_SECONDS = 120.0  # the Hub checks a large commit before it responds
_LONGEST_SLEEP_IN_CLIENT = 10.0


class HubOutOfReachError(InputError):
    """The Hub is unreachable or overloaded; a retry may succeed."""


def limit_client(read_seconds: float = _READ_SECONDS) -> None:
    """Make the Hub's client raise on a read timeout, and on a rate limit with a long wait.

    By default it waits forever, and sleeps for the hour that a rate limit may ask for.
    """

    def client() -> Any:
        made = default_client_factory()
        made.timeout = type(made.timeout)(read_seconds, connect=min(read_seconds, _CONNECT_SECONDS))
        made.event_hooks = {**made.event_hooks, "response": [*made.event_hooks["response"], _raise_on_long_wait]}
        return made

    huggingface_hub.set_client_factory(client)
    disable_progress_bars()
    logging.set_verbosity_error()  # it logs every retry


def _raise_on_long_wait(response: Any) -> None:
    if response.is_error and _seconds_to_wait(response) > _LONGEST_SLEEP_IN_CLIENT:
        response.read()
        hf_raise_for_status(response)


def _seconds_to_wait(response: Any) -> float:
    """Return the seconds that a rate limit asks for, by Retry-After or the Hub's own `RateLimit: "api";r=0;t=55`."""
    after, limit = response.headers.get("Retry-After", "").strip(), parse_ratelimit_headers(response.headers)
    reset = limit.reset_in_seconds if limit and not limit.remaining else 0
    return float(max(reset, int(after) if after.isdigit() else 0))


def one_line(error: BaseException) -> str:
    """Return an error in one line, without tokens and without signed URLs, which allow writing."""
    cause = _cause(error)
    text = " ".join(str(cause).split())
    token = huggingface_hub.get_token()
    text = re.sub(r"hf_\w{8,}", "hf_…", text.replace(token, "hf_…") if token else text)
    text = re.sub(r"(https?://[^\s?]+)\?[^\s'\")]+", r"\1?…", text)
    text = re.sub(r" For more information check: \S+", "", text)
    return f"{type(cause).__name__}: {text[:300]}"


def _cause(error: BaseException) -> BaseException:
    """Return the Hub's response that caused an error, or the error: the client wraps those for large files."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    return cause or error


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an error; 0 without one."""
    cause = _cause(error)
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0


def retry_after(error: BaseException) -> float:
    """Return the seconds to wait that the Hub requested; 0 if none."""
    cause = _cause(error)
    return _seconds_to_wait(cause.response) if isinstance(cause, HfHubHTTPError) else 0.0


def can_retry(error: BaseException) -> bool:
    """Return whether the same push may succeed later."""
    # A ValueError is about a file or the card, which stay as they are.
    cause = _cause(error)
    return status_of(error) in OVERTAKEN or (is_transient(cause) and not isinstance(cause, ValueError))


@contextmanager
def input_errors(repo_id: str, advice: str) -> Iterator[None]:
    """Turn errors of the Hub and the network into an `InputError` that ends with `advice`."""
    errors: tuple[type[BaseException], ...] = (*network_errors(), RuntimeError, ValueError)
    try:
        yield
    except InputError:
        raise
    except errors as error:
        status = status_of(error)
        if isinstance(error, LocalTokenNotFoundError):
            problem = (
                "there is no token for the Hub; create one with write access (https://huggingface.co/settings/tokens), "
                "run `hf auth login` or set HF_TOKEN"
            )
        elif isinstance(error, OfflineModeIsEnabled):
            problem = "HF_HUB_OFFLINE is set, and a push needs the Hub; unset it"
        elif status == 401:
            problem = "the Hub rejected your token (401); run `hf auth login` or set HF_TOKEN again"
        elif status in (403, 404):
            problem = (
                f"you cannot write to {repo_id} ({status}); choose a repository under your own name, and a token with "
                "write access"
            )
        elif can_retry(error):
            raise HubOutOfReachError(
                f"cannot reach the Hub at {constants.ENDPOINT} ({one_line(error)}); try later, {advice}"
            ) from None
        else:
            problem = f"the Hub does not accept this push ({one_line(error)}); fix that"
        raise InputError(f"{problem}, {advice}") from None
