"""The demo page as a Space: a page on the Hub, which loads the model from its repository.

The Space holds the demo's source files and no weights. It runs the code in the model's repository.
"""

import importlib.metadata
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, SpaceCard, SpaceCardData

import gpt2_scratch
from training.hub.repository import read_card

GRADIO_VERSION = "6.31.0"  # as in constraints.txt
SOURCES = ("demo_page.py", "demo_session.py", "demo_views.py", "inspection.py")
_PACKAGE = "gpt2_demo"
_PYTHON_VERSION = "3.11"

_APP = '''"""The demo page of a GPT-2 on the Hub: completions, and what the model thinks at each token."""

from gpt2_demo.demo_page import build_page, theme
from gpt2_demo.demo_views import CSS
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "{model}"

model = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=True)
build_page(model, tokenizer, MODEL).launch(theme=theme(), css=CSS, footer_links=["settings"])
'''


def space_id(space: str, repo_id: str) -> str:
    """Return the id of the Space `space`: owner/name, or a name under the model's owner."""
    return space if "/" in space else f"{repo_id.split('/')[0]}/{space}"


def space_files(repo_id: str) -> dict[str, str]:
    """Return the files of the Space of the model `repo_id`: path -> content."""
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in ("torch", "transformers")}
    package = Path(gpt2_scratch.__file__).parent
    return {
        "README.md": f"---\n{_metadata(repo_id).to_yaml()}\n---\n\n{_text(repo_id)}",
        "app.py": _APP.format(model=repo_id),
        "requirements.txt": "".join(f"{name}=={version}\n" for name, version in versions.items()),
        f"{_PACKAGE}/__init__.py": '"""The demo page."""\n',
        **{f"{_PACKAGE}/{name}": (package / name).read_text(encoding="utf-8") for name in SOURCES},
    }


def push_space(space: str, repo_id: str) -> None:
    """Push the demo page of the model `repo_id` to an existing Space, in one commit.

    A README.md that was edited on the Hub keeps its text and its other metadata.
    """
    api = HfApi()
    head = str(api.repo_info(space, repo_type="space").sha)
    files = space_files(repo_id)
    on_hub = api.list_repo_files(space, revision=head, repo_type="space")
    # A new Space has a README.md of the Hub, without a demo.
    if "README.md" in on_hub and "app.py" in on_hub:
        card = SpaceCard(read_card(space, head, "space"), ignore_metadata_errors=True)
        card.data["sdk_version"], card.data["models"] = GRADIO_VERSION, [repo_id]
        files["README.md"] = str(card)
    additions = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    api.create_commit(space, additions, commit_message=f"Demo of {repo_id}", repo_type="space", parent_commit=head)


def _metadata(repo_id: str) -> SpaceCardData:
    """Return the metadata of the Space's README.md, from which the Hub builds it."""
    return SpaceCardData(
        title=f"{repo_id.split('/')[-1]} demo",
        emoji="🔎",
        colorFrom="blue",
        colorTo="indigo",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version=_PYTHON_VERSION,
        app_file="app.py",
        short_description="Completions, and what the model thinks at each token",
        models=[repo_id],
        pinned=False,
    )


def _text(repo_id: str) -> str:
    return f"""# {repo_id.split("/")[-1]} demo

Completions of [{repo_id}](https://huggingface.co/{repo_id}), and what the model thinks at each token: its
probability and its likeliest alternatives, attention by layer and head, and the logit lens.
"""
