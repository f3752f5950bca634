"""Points the Hub's real client in this process at the loopback Hub, with a token and a cache for the test."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from support.loopback_hub import LoopbackHub

TOKEN = "hf_nobodyMayReadThisToken"
ACCOUNTS = {TOKEN: ["me", "our-lab"], "hf_somebodyElsesToken": ["them"]}


def point_client_at(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
