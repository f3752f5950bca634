"""The Hub's real client in this process, turned to the loopback Hub, with a token and a cache of the test's own."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from loopback_hub import LoopbackHub, serving

TOKEN = "hf_nobodyMayReadThisToken"
ACCOUNTS = {TOKEN: ["me", "our-lab"], "hf_somebodyElsesToken": ["them"]}


def turn_to(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub with two users, that the client of this process talks to."""
    hub = LoopbackHub(accounts=ACCOUNTS)
    turn_to(hub, monkeypatch, tmp_path / "hub-cache")
    with serving(hub):
        yield hub
    huggingface_hub.close_session()
