"""A model folder with a card, and its repository on the loopback Hub."""

from pathlib import Path
from typing import Any

import pytest

from support.tiny_models import tiny
from training.hub.repository import ensure_repository

CARD = "---\nlicense: mit\n---\n\n# A model\n\n<!-- generated: results -->\nold\n<!-- end of generated: results -->\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "my-gpt2"
    tiny().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


def ensured(repo_id: str | None = "me/my-gpt2", **options: Any) -> str:
    return ensure_repository(repo_id, **{"default_name": "run", "private": False, "advice": "or else", **options})
